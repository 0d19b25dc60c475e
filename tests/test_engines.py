"""Engines: one that owns its step, and the sharding strategies, against one process."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ranks
from small_job import SpoiledGradient, bits, config_of, loss_fn, records, small_job

from parts.training.engine import ENGINES, Engine, choose_engine
from parts.training.ranks import Ranks
from pretraining_advanced import run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class OwnsItsStep(Engine):
    """
    Like DeepSpeed's engine: it clips, steps and clears by itself, and cannot be told not to.

    The norm is known only after the step, which is applied whatever the norm is.
    """

    name = "owns"
    steps = discards = 0

    def read(self, total) -> float:
        return total.item()

    def discard(self) -> None:
        self.discards += 1
        super().discard()

    def step(self, lr, max_norm, veto=False):
        if veto:
            self.discard()
            return math.nan, False
        type(self).steps += 1
        grads = [p.grad for p in self.optimizer.names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        self.optimizer.set_lr(lr)
        self.optimizer.step(grad_scale=max(1.0, (norm + 1e-6) / max_norm))
        self.optimizer.zero_grad()
        return norm, True


def train(name, spoil=lambda step, loss: loss, engine=OwnsItsStep, **settings) -> int:
    """spoil(step, loss): what becomes of the loss of the n-th training step, counted from 1."""
    seen = {"steps": 0}

    def loss(model, batch):
        total = loss_fn(model, batch)
        if not model.training:
            return total
        seen["steps"] += 1
        return spoil(seen["steps"], total)

    table = {**ENGINES, engine.name: engine}
    config = config_of(name, parallel=engine.name, **settings)
    return run(config, lambda *where: small_job(*where, loss_fn=loss), table)


def test_an_engine_that_owns_its_step_trains_and_resumes_as_ours():
    constant = {"schedule": "constant"}
    assert train("ours", engine=Engine, **constant) == 0
    assert train("owns", **constant) == 0
    assert bits("owns") == bits("ours")
    assert train("begun", max_steps=7, **constant) == 0
    resumed = {"resume": "runs/begun", "allow_change": "max_steps"}
    assert train("resumed", **constant, **resumed) == 0
    assert bits("resumed")[0] == bits("ours")[0]


def test_a_veto_before_the_step_means_no_step():
    OwnsItsStep.steps = 0
    assert train("veto", lambda step, loss: loss * math.nan if step == 5 else loss) == 0
    skipped = [r["step"] for r in records("veto") if "skipped" in r]
    assert skipped == [5] and OwnsItsStep.steps == 11
    assert all(math.isfinite(r["train_loss"]) for r in records("veto")[1:] if r["step"] != 5)


def test_a_norm_found_bad_after_the_step_rolls_back_at_once(capsys):
    spoil = {8: SpoiledGradient.apply}
    assert train("late", lambda step, loss: spoil.get(step, lambda x: x)(loss)) == 0
    out = capsys.readouterr().out
    assert "step 8: the gradient is nan; its update made the weights useless" in out
    assert "rolled back to step 6, skipping rows 28 to 31" in out
    found = records("late")
    assert [r["step"] for r in found] == list(range(13))
    assert all(math.isfinite(r["train_loss"]) for r in found[1:])
    assert found[6]["skipped_rows"] == [28, 32]


def test_the_engine_is_chosen_by_name_and_by_how_the_script_was_started(monkeypatch):
    assert choose_engine("auto", ENGINES) is ENGINES["none"]
    for name in ("ddp", "fsdp"):
        with pytest.raises(ValueError, match=f"--parallel {name}: is for several processes"):
            choose_engine(name, ENGINES)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_engine("auto", ENGINES) is ENGINES["ddp"]
    with pytest.raises(ValueError, match="--parallel none: torchrun started 2 processes"):
        choose_engine("none", ENGINES)
    with pytest.raises(ValueError, match="no such engine; choose one of auto, none, ddp, fsdp"):
        choose_engine("zero3", ENGINES)


@pytest.mark.parametrize("flag", [{"reshard": False}, {"replicate": 2}, {"cpu_offload": True}])
def test_options_of_fsdp_are_refused_elsewhere(flag):
    with pytest.raises(ValueError, match=f"--{next(iter(flag))}: needs --parallel fsdp"):
        train("bad", engine=Engine, **flag)
    assert not Path("runs/bad/run.json").exists()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from parts.cli.config import parse
from parts.cli.launch import run_script
from pretraining_advanced import run
from small_job import SmallConfig, small_job
run_script(lambda: run(parse(SmallConfig), small_job))
"""
STRATEGIES = {  # as torch's first FSDP called them
    "FULL_SHARD": [],
    "SHARD_GRAD_OP": ["--no-reshard"],
    "HYBRID_SHARD": ["--replicate", "2"],
    "_HYBRID_SHARD_ZERO2": ["--replicate", "2", "--no-reshard"],
    "NO_SHARD": ["--replicate", "4"],
}


def on_ranks(here, name, world, *flags) -> list[str]:
    script = here / "small.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    settings = {"batch_size": 4 // world, "max_steps": 8, "max_lr": 1e-2, "warmup_steps": 2}
    settings |= {"eval_freq": 4, "save_ckpt_freq": 4, "device": "cpu", "dtype": "fp32"}
    words = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    results = ranks(script, "--run_name", name, *words, *flags, world=world, cwd=here).wait(150)
    return [f"{r.returncode} {r.stderr[-1500:]}" for r in results]


def test_five_sharding_strategies_train_as_one_process_does(here):
    """On four ranks: losses to 1e-5, and each resumes from the checkpoint of the one before it."""
    assert on_ranks(here, "one", 1)[0].startswith("0 ")
    expected = [r.get("train_loss") for r in records("one")][1:]
    before = None
    for name, flags in STRATEGIES.items():
        codes = on_ranks(here, name, 4, "--parallel", "fsdp", *flags)
        assert all(code.startswith("0 ") for code in codes), codes[0]
        losses = [r.get("train_loss") for r in records(name)][1:]
        assert losses == pytest.approx(expected, rel=1e-5), name
        if before:
            folder = f"runs/{before}/checkpoints/step_000004"
            more = ("--parallel", "fsdp", "--resume", folder, *flags)
            codes = on_ranks(here, f"on_{name}", 4, *more)
            assert all(code.startswith("0 ") for code in codes), codes[0]
            resumed = [r.get("train_loss") for r in records(f"on_{name}")]
            assert resumed[-4:] == pytest.approx(expected[-4:], rel=1e-5), name
        before = name


def test_groups_that_do_not_divide_the_ranks_are_refused(here):
    codes = on_ranks(here, "bad", 2, "--parallel", "fsdp", "--replicate", "3")
    assert codes[0].startswith("2 ") and "--replicate 3: does not divide the 2" in codes[0]


def test_a_run_says_which_engine_it_used(here):
    assert train("named") == 0
    config = json.loads(Path("runs/named/run.json").read_text(encoding="utf-8"))["config"]
    assert config["parallel"] == "owns"


def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_many_good_steps():
    engine = Engine(Ranks(torch.device("cpu"), group=False), torch.float16)
    first = engine.scale
    for norm, n_steps, factor in ((math.inf, 2, 1 / 4), (1.0, 1999, 1 / 4), (1.0, 1, 1 / 2)):
        for _ in range(n_steps):
            engine.norm = norm
            engine.adapt_scale()
        assert engine.scale == first * factor
