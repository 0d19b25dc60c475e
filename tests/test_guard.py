"""
A bad step is skipped on all ranks; several in a row roll the run back and skip their rows.

Too little memory halves the micro-batches.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, ranks
from small_job import SpoiledGradient

import pretraining_advanced
from parts.data.batches import TrainBatches
from parts.storage.checkpoint import load_checkpoint, load_tensors, newest_checkpoint
from parts.training.guard import Guard
from pretraining_advanced import TrainConfig
from wt_load import weights_hash

SETTINGS = {"dataset_name": "data", "tokenizer": "bytes", "val_share": 0.05, "device": "cpu"}
SETTINGS |= {"model_size": "nano", "context_length": 32, "batch_size": 4, "max_steps": 20}
SETTINGS |= {"max_lr": 3e-3, "warmup_steps": 2, "dtype": "fp32", "max_bad_steps": 3}
SETTINGS |= {"eval_freq": 10, "print_sample_iter": 100, "save_ckpt_freq": 5, "keep_last": 9}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus in `data`."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "data").mkdir()
    texts = [f"{n}. " + " ".join(str((n * 7 + i * i) % 97) for i in range(60)) for n in range(400)]
    (folder / "data/train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    return folder


def train(home, monkeypatch, name, change_loss=None, skip=(), **settings) -> int:
    """
    The trainer, in this process.

    change_loss(windows, loss) gets the indices of the windows of a micro-batch and may spoil its
    loss; skip: ranges of windows that are skipped from the beginning.
    """
    config = TrainConfig(**{**SETTINGS, "run_name": name, **settings})
    make_job = pretraining_advanced.gpt_job

    def gpt_job(config, building):
        job = make_job(config, building)
        for stretch in skip:
            job.train_batches.skip(*stretch)
        number = {job.train_batches.rows(k, 1)[0, :-1].tobytes(): k for k in range(400)}

        def loss_fn(model, batch):
            windows = [number.get(row.numpy().tobytes()) for row in batch["inputs"]]
            loss = model(batch["inputs"], batch["targets"])
            return change_loss(windows, loss) if model.training else loss

        return dataclasses.replace(job, loss_fn=loss_fn if change_loss else job.loss_fn)

    with contextlib.chdir(home):
        return pretraining_advanced.run(config, gpt_job)


def spoil(bad, value=math.nan):
    """Multiply the loss of micro-batches that hold one of these windows."""
    return lambda windows, loss: loss * value if set(windows) & set(bad) else loss


def records(home, name) -> list[dict]:
    found = [
        json.loads(line)
        for line in (home / "runs" / name / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert [r["step"] for r in found] == list(range(len(found)))
    return found


def bits(home, name) -> tuple:
    folder = newest_checkpoint(home / "runs" / name)
    weights, state = load_checkpoint(folder)
    losses = [
        [r.get(k) for k in ("train_loss", "lr", "grad_norm", "val_loss")]
        for r in records(home, name)
    ]
    return (
        weights_hash(weights),
        weights_hash(load_tensors(folder / "optimizer.safetensors")),
        state["data_cursor"],
        losses,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_step_is_applied_nowhere_and_the_run_goes_on(home, monkeypatch, value, capsys):
    name = f"one_{value}"
    assert train(home, monkeypatch, name, spoil([41], value)) == 0  # of the eleventh step
    found = records(home, name)
    assert [r["step"] for r in found if "skipped" in r] == [11] and found[11]["train_loss"] is None
    assert all(math.isfinite(r["train_loss"]) for r in found[1:] if r["step"] != 11)
    assert "step 11: the loss is" in capsys.readouterr().out
    assert train(home, monkeypatch, f"{name}_until", max_steps=10) == 0
    before, _ = load_checkpoint(newest_checkpoint(home / f"runs/{name}_until"))
    resumed = {"resume": f"runs/{name}_until", "allow_change": "max_steps", "max_steps": 11}
    assert train(home, monkeypatch, f"{name}_at", spoil([41], value), **resumed) == 0
    after, _ = load_checkpoint(newest_checkpoint(home / f"runs/{name}_at"))
    assert weights_hash(before) == weights_hash(after)


def test_a_gradient_that_is_not_finite_is_applied_nowhere(home, monkeypatch):
    assert (
        train(
            home,
            monkeypatch,
            "gradient",
            lambda w, loss: SpoiledGradient.apply(loss) if 41 in w else loss,
        )
        == 0
    )
    found = records(home, "gradient")
    assert (
        found[11]["skipped"] == "the gradient is nan"
        and found[11]["grad_norm"] is None
        and found[11]["train_loss"] > 0
    )


def test_a_bad_stretch_sends_the_run_back_and_past_it(home, monkeypatch, capsys):
    """Steps 12 to 14 (windows 48 to 59) are bad; the reference is a run that never saw them."""
    assert train(home, monkeypatch, "reference", skip=[(48, 60)], save_ckpt_freq=7) == 0
    assert train(home, monkeypatch, "stretch", spoil(range(48, 60))) == 0
    assert "rolled back to step 10, skipping rows 48 to 59" in capsys.readouterr().out
    assert bits(home, "stretch") == bits(home, "reference")
    assert records(home, "stretch")[10]["skipped_rows"] == [48, 60]


def test_a_run_that_was_stopped_in_a_bad_stretch_ends_with_the_same_bits(home, monkeypatch):
    bad = range(48, 60)
    if not (home / "runs/reference").exists():
        assert train(home, monkeypatch, "reference", skip=[(48, 60)], save_ckpt_freq=7) == 0
    for step in (11, 13, 15):
        name = f"stopped{step}"

        def stop_at(windows, loss, step=step):
            if (step - 1) * 4 in windows:
                os.kill(os.getpid(), signal.SIGTERM)
            return spoil(bad)(windows, loss)

        assert train(home, monkeypatch, name, stop_at) == 75
        assert train(home, monkeypatch, name, spoil(bad)) == 0
        assert bits(home, name) == bits(home, "reference")


def test_a_second_bad_stretch_at_the_same_place_ends_the_run(home, monkeypatch):
    with pytest.raises(
        RuntimeError,
        match="3 bad steps in a row.*again since step 10; resume from there with a lower --max_lr",
    ):
        train(home, monkeypatch, "again", spoil(range(48, 400)))
    assert newest_checkpoint(home / "runs/again").name == "step_000010"


ON_ONE_RANK = """
import dataclasses, math, os, sys
sys.path.insert(0, {root!r})
import pretraining_advanced as advanced
from parts.cli.config import parse
from parts.cli.launch import run_script

def gpt_job(config, building, make_job=advanced.gpt_job):
    job = make_job(config, building)
    bad = {{job.train_batches.rows(k, 1)[0, :-1].tobytes() for k in range(48, 60)}}

    def loss_fn(model, batch):
        loss = model(batch["inputs"], batch["targets"])
        if not model.training or os.environ["RANK"] != "1":
            return loss
        spoiled = any(row.numpy().tobytes() in bad for row in batch["inputs"])
        return loss * math.nan if spoiled else loss

    return dataclasses.replace(job, loss_fn=loss_fn)

run_script(lambda: advanced.run(parse(advanced.TrainConfig), gpt_job))
"""


def test_what_is_bad_on_one_rank_is_skipped_on_all(home):
    script = home / "on_one_rank.py"
    script.write_text(ON_ONE_RANK.format(root=str(ROOT)), encoding="utf-8")
    settings = {**SETTINGS, "batch_size": 2, "run_name": "one_rank"}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    results = ranks(script, *flags, world=2, cwd=home).wait(120)
    assert [r.returncode for r in results] == [0, 0], (
        results[0].stderr[-2000:] + results[1].stderr[-2000:]
    )
    assert "rolled back to step 10, skipping rows 48 to 59" in results[0].stdout
    assert records(home, "one_rank")[20]["val_loss"] < 5


def test_without_a_checkpoint_there_is_no_way_back(home, monkeypatch):
    with pytest.raises(RuntimeError, match="no checkpoint to roll back to"):
        train(home, monkeypatch, "early", spoil(range(400)))


def test_a_spike_is_skipped_where_that_was_asked_for(home, monkeypatch):
    settings = {"spike_zscore": 8.0, "spike_window": 10, "max_steps": 30}
    for name, more in (("spike", settings), ("no_spike", {"max_steps": 30})):
        assert train(home, monkeypatch, name, spoil([100], 50.0), **more) == 0
    spiked = [r["skipped"] for r in records(home, "spike") if "skipped" in r]
    assert len(spiked) == 1 and "standard deviations above the last 10" in spiked[0]
    assert not [r for r in records(home, "no_spike") if "skipped" in r]


def test_the_spike_window_is_in_the_checkpoint():
    first, second = Guard(3, 4.0, 5), Guard(3, 4.0, 5)
    for loss in (2.0, 2.1, 1.9, 2.0, 2.05):
        assert first.objection(loss) is None
        assert not first.note(None, loss, 0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.objection(9.0) == second.objection(9.0) is not None
    assert first.objection(1.0) is None, "a loss that falls is no spike"


def test_too_little_memory_halves_the_micro_batches_and_stays_exact(home, monkeypatch, capsys):
    def small_memory(windows, loss):
        if len(windows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    assert (
        train(home, monkeypatch, "by_one", batch_size=1, grad_accum_steps=4, schedule="constant")
        == 0
    )
    assert train(home, monkeypatch, "memory", small_memory, max_steps=10, schedule="constant") == 0
    out = capsys.readouterr().out
    assert (
        "out of memory with micro-batches of 4 rows; each in 2 parts" in out
        and "of 2 rows; each in 4 parts" in out
    )
    assert (
        train(
            home, monkeypatch, "memory", small_memory, schedule="constant", allow_change="max_steps"
        )
        == 0
    )
    assert "out of memory" not in capsys.readouterr().out, "the checkpoint keeps it"
    mine, theirs = bits(home, "memory"), bits(home, "by_one")
    assert mine[:3] == theirs[:3]
    assert [r[0] for r in mine[3]] == [r[0] for r in theirs[3]]


SMALL_RANK_1 = """
import sys, torch, pretraining_advanced as advanced
from gpt_train import MLP
plain = MLP.forward

def forward(self, x):
    if torch.distributed.get_rank() == 1 and self.training and len(x) > int(sys.argv[1]):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(self, x)

MLP.forward = forward
config = advanced.TrainConfig(
    dataset_name="data", tokenizer="bytes", val_share=0.05, model_size="nano", context_length=32,
    batch_size=4, max_steps=6, max_lr=1e-4, warmup_steps=2, device="cpu", dtype="fp32",
    print_sample_iter=100, run_name=sys.argv[2], parallel=sys.argv[3],
)
sys.exit(advanced.run(config))
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_too_little_memory_on_one_of_two_ranks(home, parallel):
    (home / "small.py").write_text(SMALL_RANK_1, encoding="utf-8")
    if parallel == "fsdp":  # torchrun ends the rank that waits for the other
        line = [*TORCHRUN, "2", home / "small.py", "2", "fsdp-2", "fsdp"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, cwd=home, env=env, capture_output=True, text=True, timeout=120)
        assert (
            done.returncode == 1
            and "out of memory with micro-batches of 4 rows; resume this run with" in done.stderr
        )
        return
    first, then = (
        ranks(home / "small.py", rows, f"ddp-{rows}", "ddp", world=2, cwd=home).wait(120)
        for rows in (2, 4)
    )
    assert [r.returncode for r in (*first, *then)] == [0] * 4, first[0].stderr + first[1].stderr
    assert (
        "rank 1, step 1: out of memory with micro-batches of 4 rows; each in 2 parts"
        in first[1].stdout
    )
    assert "out of memory" not in first[0].stdout and first[1].stdout.count("out of memory") == 1, (
        "rank 0 splits too, from the next step on"
    )
    losses = [
        [r.get("train_loss") for r in records(home, f"{parallel}-{rows}")[1:]] for rows in (2, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6
    assert load_checkpoint(newest_checkpoint(home / "runs" / f"{parallel}-2"))[1]["split"] == 2


def test_one_row_that_does_not_fit_ends_the_run(home, monkeypatch):
    def no_memory(windows, loss):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        )

    with pytest.raises(
        RuntimeError, match="step 1: out of memory with micro-batches of 1 rows.*smaller model"
    ):
        train(home, monkeypatch, "nothing", no_memory)


def test_windows_that_are_skipped_come_in_no_batch(home):
    class Text:
        folder, tokens, masks = "text", [np.arange(3301)], ()

        def check(self, *_):
            """As it was written."""

    def order(skipped, n):
        batches = TrainBatches(Text(), 33, 1, 5000)
        batches.share(0, 1, 4, 4)
        for stretch in skipped:
            batches.skip(*stretch)
        stream = iter(batches)
        return [tuple(next(stream)[0]["inputs"][:, 0].tolist()) for _ in range(n)]

    straight = order([], 12)
    assert order([(8, 16)], 10) == straight[:2] + straight[4:]
    assert order([(8, 16), (16, 24)], 6) == straight[:2] + straight[6:10]
