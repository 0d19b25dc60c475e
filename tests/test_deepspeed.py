"""DeepSpeed as an engine: equal to one process, resumed to the bit, with checkpoints for all."""

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TORCHRUN, one_error_line, ranks
from small_job import records
from strategy_cases import LLAMA, SCRIPT, end_after, killed_ten_times, same_training, train_under
from training_cases import (
    environment,
    flags,
    home,  # noqa: F401  a fixture
    ranks_of,
)

from parts.storage.checkpoint import newest_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"
)
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def whole(home):  # noqa: F811
    """One batch of sixteen rows on one process."""
    return train_under(home, "whole", batch_size=16)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one_process(home, whole, stage):  # noqa: F811
    settings = {"batch_size": 4, "grad_accum_steps": 2, "parallel": "deepspeed"}
    folder = train_under(home, f"stage{stage}", 2, stage, **settings)
    same_training(folder, whole)
    files = {"model.safetensors", "optimizer.safetensors"}
    ours, theirs = (
        json.loads((newest_checkpoint(run) / "MANIFEST.json").read_text())["files"]
        for run in (folder, whole)
    )
    assert {name: ours[name]["bytes"] for name in files} == {
        name: theirs[name]["bytes"] for name in files
    }


@pytest.mark.parametrize(("rows", "accumulation"), [(1, 8), (8, 1)])
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_changes_nothing(home, whole, stage, rows, accumulation):  # noqa: F811
    settings = {"batch_size": rows, "grad_accum_steps": accumulation, "parallel": "deepspeed"}
    same_training(train_under(home, f"stage{stage}-{rows}", 2, stage, **settings), whole)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_and_recomputation_change_nothing(home, whole, stage):  # noqa: F811
    settings = {"batch_size": 4, "grad_accum_steps": 2, "parallel": "deepspeed"}
    settings |= {"cpu_offload": True, "activation_checkpointing": True}
    same_training(train_under(home, f"offload{stage}", 2, stage, **settings), whole)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_is_that_of_ddp(home, stage):  # noqa: F811
    settings = {"batch_size": 4, "grad_accum_steps": 2, "dtype": "bf16"}
    ddp = train_under(home, "ddp-bf16", 2, parallel="ddp", **settings)
    folder = train_under(home, f"bf16-{stage}", 2, stage, parallel="deepspeed", **settings)
    same_training(folder, ddp, rel=2e-4)  # ddp in bf16 differs from ddp in fp32 by 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_killed_ten_times_equals_straight_to_the_bit(home, stage):  # noqa: F811
    killed_ten_times(home, "deepspeed", stage)


# the engine, ranks and ZeRO stage of each leg, and the step at which the next one takes over
THERE = [("fsdp", 4, 0), ("ddp", 2, 0), ("deepspeed", 2, 3), ("none", 1, 0)]
BACK = [("deepspeed", 2, 2), ("ddp", 2, 0), ("fsdp", 4, 0)]


def test_checkpoints_are_those_of_every_engine(home):  # noqa: F811
    """fsdp x4 -> ddp x2 -> deepspeed x2 -> none, and back; each leg is killed once on its way."""
    common = {"max_steps": 70, "save_ckpt_freq": 5, "eval_freq": 10}
    straight = train_under(home, "chain-straight", batch_size=8, **common)
    legs = [*THERE, *BACK]
    for n, (parallel, world, stage) in enumerate(legs):
        settings = {**common, "parallel": parallel, "batch_size": 8 // world}
        options = {"world": world, "stage": stage, **settings}
        end_after(home, "chain", 10 * n + 7, **options)
        if n < len(legs) - 1:
            end_after(home, "chain", 10 * n + 9, signal.SIGTERM, **options)
        else:
            same_training(train_under(home, "chain", **options), straight)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_dies_ends_the_job_within_a_minute(home, stage):  # noqa: F811
    settings = {**LLAMA, "parallel": "deepspeed", "max_steps": 100_000}
    line = [*TORCHRUN, "2", str(ROOT / SCRIPT), *flags(f"dying{stage}", **settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = environment(ZERO_STAGE=str(stage), PYTHONPATH=str(ROOT))
    with subprocess.Popen(line, cwd=home, env=env, **pipes) as process:
        assert any("step 3 loss" in line for line in process.stdout), process.stderr.read()
        children = ranks_of(process)
        os.kill(children[1], signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - started < 60
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children.values())


# ------------------------------------------------------------------------- steps left out

SCRIPT_OF_SMALL_JOB = """
import sys
sys.path.insert(0, {tests!r})
import torch
from small_job import SmallConfig, SpoiledGradient, loss_fn, small_job
from parts.cli.config import parse
from parts.cli.launch import run_script
from pretraining_advanced import run
from recipes.orchestrator.strategies import DeepSpeedEngine, engines_of, read_deepspeed

stage, spoiled = int(sys.argv.pop(1)), sys.argv.pop(1)
steps = []

def loss(model, batch):
    total = loss_fn(model, batch)
    if torch.is_grad_enabled():
        steps.append(1)
        if len(steps) == 5 and spoiled == "loss":
            return total * float("nan")
        if len(steps) == 5 and spoiled == "gradient":
            return SpoiledGradient.apply(total)
    return total

class Watched(DeepSpeedEngine):
    plan = read_deepspeed({{"zero_optimization": {{"stage": stage}}}}, 1, 1, 1)

    def prepare(self, model, *args, **options):
        super().prepare(model, *args, **options)
        n = sum(part.numel() for part in self._parts())
        print("share", n, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))

engines = {{**engines_of(Watched.plan), "deepspeed": Watched}}
run_script(lambda: run(parse(SmallConfig), lambda *w: small_job(*w, loss_fn=loss), engines))
"""


def small(folder, name, stage, spoiled, *more, world=2) -> list:
    script = folder / "small.py"
    text = SCRIPT_OF_SMALL_JOB.format(tests=str(Path(__file__).parent))
    script.write_text(text, encoding="utf-8")
    settings = {"batch_size": 4, "max_steps": 12, "max_lr": 1e-2, "warmup_steps": 2}
    settings |= {"eval_freq": 4, "save_ckpt_freq": 3, "device": "cpu", "dtype": "fp32"}
    words = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    words = [str(stage), spoiled, "--run_name", name, "--parallel", "deepspeed", *words, *more]
    return ranks(script, *words, world=world, cwd=folder).wait(150)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, stage, spoiled):
    results = small(tmp_path, "left_out", stage, spoiled)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    with contextlib.chdir(tmp_path):
        found = records("left_out")
    assert [r["step"] for r in found if "skipped" in r] == [5]
    assert "rolled back" not in results[0].stdout
    later = [r for r in found[1:] if r["step"] != 5]
    assert all(math.isfinite(r["train_loss"]) and math.isfinite(r["grad_norm"]) for r in later)
    assert later[-1]["train_loss"] < later[0]["train_loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_has_its_share_of_what_is_updated(tmp_path, stage):
    out = small(tmp_path, "share", stage, "nothing")[0].stdout
    mine, all_of_them = next(
        map(int, line.split()[1:]) for line in out.splitlines() if line.startswith("share")
    )
    padding = 2 * 2 * 5  # of two groups, or of each parameter
    assert mine == all_of_them if stage == 0 else mine <= all_of_them / 2 + padding


def test_what_deepspeed_cannot_do_is_refused_in_one_line(tmp_path):
    for flag, words in (
        (("--optimizer", "muon"), "--optimizer muon: needs whole matrices"),
        (("--no-reshard",), "--reshard: needs --parallel fsdp"),
        (("--compile",), "--compile: in ZeRO stage 3 a block gathers weights"),
    ):
        first, *_ = small(tmp_path, "refused", 3, "nothing", *flag)
        assert words in one_error_line(first, 2)
    first, *_ = small(tmp_path, "refused", 0, "nothing", "--cpu_offload")
    assert "--cpu_offload: ZeRO stage 0 offloads nothing" in one_error_line(first, 2)
