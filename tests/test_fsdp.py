"""A sharded model gives the same numbers as a whole one, and its checkpoints load anywhere."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import TORCHRUN, one_error_line
from training_cases import (
    environment,
    home,  # noqa: F401  a fixture
    metrics,
    ranks_of,
    running,
    start,
    state_of,
    stop,
    tensors,
    train,
)

import gpt_train
from pretraining_advanced import TrainConfig, gpt_job

SETTINGS = {"max_lr": 1e-4, "max_grad_norm": 0.5, "dropout": 0.0}


@pytest.fixture(scope="module")
def whole(home):  # noqa: F811
    """One big batch on one process."""
    return train(home, "whole", batch_size=8, **SETTINGS)


@pytest.mark.parametrize(("world", "accumulation", "rows"), [(2, 2, 2), (4, 1, 2)])
def test_slices_train_as_the_whole_model_does(home, whole, world, accumulation, rows):  # noqa: F811
    settings = {
        "batch_size": rows,
        "grad_accum_steps": accumulation,
        "parallel": "fsdp",
        **SETTINGS,
    }
    folder = train(home, f"slices{world}", world, activation_checkpointing=world == 4, **settings)
    for key, rel in (("train_loss", 1e-4), ("grad_norm", 1e-5), ("val_loss", 1e-4)):
        assert metrics(folder, key) == pytest.approx(metrics(whole, key), rel=rel), key
    assert (folder / "samples.txt").read_text(encoding="utf-8") == (
        whole / "samples.txt"
    ).read_text(encoding="utf-8")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = tensors(folder, file), tensors(whole, file)
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
            k: (t.shape, t.dtype) for k, t in theirs.items()
        }
    weights = tensors(whole)
    assert all(
        torch.allclose(t, weights[k], atol=1e-5)
        for k, t in tensors(folder).items()
        if "c_attn.bias" not in k
    )


BUILDING = """
import os
import torch
from parts.training.engine import ENGINES
from parts.training.ranks import Ranks
from gpt_train import GPT, Block, GPTConfig

def build(engine):
    with engine.building():
        model = GPT(GPTConfig(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=16))
    assert next(model.parameters()).is_meta == (engine.ranks.rank > 0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    engine.prepare(model, (Block,), lambda model: None)
    for name, t in engine.whole(model.state_dict()):
        assert torch.equal(t, before[name]), name

with Ranks(torch.device("cpu"), group=True) as ranks:
    build(ENGINES["fsdp"](ranks, torch.float32))
os._exit(0)  # as run_script does
"""


def test_only_rank_0_gives_the_whole_model_memory_and_the_others_get_their_slices(tmp_path):
    (tmp_path / "building.py").write_text(BUILDING, encoding="utf-8")
    subprocess.run([*TORCHRUN, "2", tmp_path / "building.py"], check=True, timeout=120)


def test_offload_trains_the_same_and_goes_with_slices_only(home, whole):  # noqa: F811
    folder = train(
        home,
        "offloaded",
        2,
        parallel="fsdp",
        batch_size=2,
        grad_accum_steps=2,
        cpu_offload=True,
        **SETTINGS,
    )
    for key, rel in (("train_loss", 1e-4), ("grad_norm", 1e-5), ("val_loss", 1e-4)):
        assert metrics(folder, key) == pytest.approx(metrics(whole, key), rel=rel), key
    assert "--cpu_offload: needs --parallel fsdp" in one_error_line(
        start(home, "bad", cpu_offload=True), 2
    )


def test_every_arrangement_goes_on_from_the_checkpoint_of_every_other(home):  # noqa: F811
    settings = {"grad_accum_steps": 2, "max_steps": 24, "save_ckpt_freq": 6, **SETTINGS}
    straight = train(home, "chain-straight", **settings)
    chain = [(6, 1, "none"), (12, 2, "fsdp"), (18, 2, "ddp"), (21, 2, "fsdp")]
    for step, world, parallel in chain:
        stop(home, "chain", step - 1, world, parallel=parallel, **settings)
    folder = train(home, "chain", **settings)
    assert metrics(folder, "tokens") == metrics(straight, "tokens")
    assert metrics(folder) == pytest.approx(metrics(straight), rel=1e-4)


def test_resumed_slices_equal_straight_ones_to_the_bit(home):  # noqa: F811
    settings = {
        "parallel": "fsdp",
        "dropout": 0.1,
        "max_steps": 16,
        "save_ckpt_freq": 5,
        "eval_freq": 6,
    }
    straight = train(home, "fsdp-straight", 2, **settings)
    stop(home, "fsdp-resumed", 8, 2, **settings)
    resumed = train(home, "fsdp-resumed", 2, **settings)
    assert metrics(resumed) == metrics(straight) and metrics(resumed, "val_loss") == metrics(
        straight, "val_loss"
    )
    assert state_of(resumed) == state_of(straight)


def test_one_process_under_torchrun_slices_too_and_resumes_to_the_bit(home, whole):  # noqa: F811
    group = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    settings = {
        "parallel": "fsdp",
        "batch_size": 8,
        "warmup_steps": 2,
        "env": environment(**group),
        **SETTINGS,
    }
    result = start(home, "slices1", **settings)
    assert result.returncode == 0, result.stderr
    folder = home / "runs/slices1"
    assert metrics(folder, "train_loss") == pytest.approx(metrics(whole, "train_loss"), rel=1e-6)
    assert (folder / "samples.txt").read_text(encoding="utf-8") == (
        whole / "samples.txt"
    ).read_text(encoding="utf-8")
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["resume"].startswith(
        "torchrun --nproc_per_node 1 "
    )
    for attempt in (10, 20):
        again = start(
            home,
            "again1",
            **{
                **settings,
                "max_steps": attempt,
                "schedule": "constant",
                "allow_change": "max_steps",
            },
        )
        assert again.returncode == 0, again.stderr
    start(home, "at_once1", **{**settings, "schedule": "constant"})
    assert all(
        torch.equal(t, tensors(home / "runs/at_once1")[k])
        for k, t in tensors(home / "runs/again1").items()
    )


def test_no_rank_stops_sampling_before_the_others(home, monkeypatch):  # noqa: F811
    """Else the others would wait forever: on different GPUs ranks may draw different tokens."""
    config = TrainConfig(
        dataset_name="data", tokenizer="bytes", val_share=0.05, model_size="nano", context_length=32
    )
    with contextlib.chdir(home):
        job = gpt_job(config, contextlib.nullcontext())
    calls, draws = [], []
    job.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def draw(logits, *_):
        draws.append(
            256 if len(draws) == 2 else 97
        )  # the third token ends the text: 256 is end-of-text
        return torch.tensor([[draws[-1]]])

    monkeypatch.setattr(gpt_train, "_sample_next", draw)
    assert job.sample(job.model, torch.device("cpu"), lambda: False) == "aa"
    assert len(calls) == 80


def test_a_rank_that_dies_ends_the_job(home):  # noqa: F811
    with running(
        home, "dying-slices", "step 3 loss", world=2, parallel="fsdp", max_steps=100_000
    ) as process:
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - started < 60


def test_what_slices_cannot_do_is_refused_with_the_reason(home):  # noqa: F811
    assert "torchrun --nproc_per_node 2" in one_error_line(start(home, "bad", parallel="fsdp"), 2)
    for optimizer in ("muon", "galore"):
        result = start(home, "bad", world=2, parallel="fsdp", optimizer=optimizer)
        assert (
            result.returncode == 1
            and f"--optimizer {optimizer}: needs whole matrices" in result.stderr
        )
    assert not (home / "runs/bad").exists()
