"""What a run reports is true or not reported; no kill between two writes loses a line."""

import errno
import itertools
import json
import os
import sys
import threading
import time
import types

import pytest
import torch

from parts.training import metrics
from parts.training.metrics import Journal, Speed, memory_gib, peak_flops, read_metrics


def lines(folder) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def written(folder, n_steps: int) -> list[dict]:
    """The records of a finished attempt."""
    records = [{"step": step, "train_loss": step / 10} for step in range(n_steps)]
    journal = Journal(folder, 0)
    for record in records:
        journal.write(record)
    journal.close()
    return records


def test_metrics_after_the_checkpoint_are_dropped_and_none_is_doubled(tmp_path):
    written(tmp_path, 8)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 8, "tra')  # a line that a kill tore
    journal = Journal(tmp_path, 5)
    assert journal.last == {"step": 5, "train_loss": 0.5}
    steps = [r["step"] for r in lines(tmp_path)]
    assert steps == [0, 1, 2, 3, 4, 5], "a kill right here must find all of them"
    # the loop writes the record of the step that it resumed from again
    journal.write({"step": 5, "train_loss": 0.5})
    journal.write({"step": 6, "train_loss": 0.6})
    journal.close()
    assert [r["step"] for r in lines(tmp_path)] == list(range(7))


def test_an_evaluation_made_after_the_resume_completes_the_record(tmp_path):
    *earlier, last = written(tmp_path, 4)
    journal = Journal(tmp_path, 3)
    journal.write({**journal.last, "val_loss": 1.0})
    journal.close()
    assert lines(tmp_path) == [*earlier, {**last, "val_loss": 1.0}]


def test_a_rewritten_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    written(tmp_path, 4)
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    journal = Journal(tmp_path, 3)
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    journal.write({"step": 4})
    journal.close()
    assert len(calls) == 3, "a step waits for no disk"


def test_a_full_disk_while_a_record_is_completed_costs_a_warning(tmp_path, monkeypatch, capsys):
    records = written(tmp_path, 4)
    journal = Journal(tmp_path, 3)
    with monkeypatch.context() as full:
        full.setattr(metrics, "rename_durably", refuse)
        journal.write({**journal.last, "val_loss": 1.0})
    warning = f"warning: {tmp_path / 'metrics.jsonl'}: No space left on device; the run continues"
    assert capsys.readouterr().out.strip() == warning
    assert lines(tmp_path) == records and not (tmp_path / "metrics.jsonl.part").exists()
    journal.write({**journal.last, "val_loss": 1.0})
    assert lines(tmp_path)[-1] == {**records[-1], "val_loss": 1.0}


def test_a_full_disk_when_a_run_resumes_names_the_file(tmp_path, monkeypatch):
    records = written(tmp_path, 4)
    monkeypatch.setattr(metrics, "rename_durably", refuse)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        Journal(tmp_path, 2)
    assert lines(tmp_path) == records


def test_a_full_disk_is_told_once_a_minute_and_no_record_is_lost(tmp_path, monkeypatch, capsys):
    """A step a second for three minutes, the first two of them on a full disk."""
    clock = itertools.count(1000.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock) / 3)
    written_at = []
    append_lines, full = metrics.append_lines, True

    def append(path, lines):
        written_at.append(lines[-1]["step"] if lines else None)
        if full and lines:
            print("warning: full")
        else:
            append_lines(path, lines)

    monkeypatch.setattr(metrics, "append_lines", append)
    journal = Journal(tmp_path, 0)
    for step in range(540):
        full = step < 360
        journal.write({"step": step})
    journal.close()
    assert [r["step"] for r in lines(tmp_path)] == list(range(540))
    assert 2 <= capsys.readouterr().out.count("warning: full") <= 7
    assert len(written_at) > 40, "once the disk has space, every second or so again"


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_speed_counts_training_alone(monkeypatch):
    clock = iter([0.0, 2.0, 100.0, 102.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    speed = Speed(flops_per_token=10, peak=10_000.0, n_devices=2)
    speed.start()
    assert speed.stop(1000) == {"tokens_per_s": 500.0, "mfu": 500 * 10 / 20_000}
    speed.start()  # after 98 s of evaluation
    assert speed.stop(3000)["tokens_per_s"] == 1000.0


PEAKS = {  # name as the driver gives it -> TFLOP/s, or unknown
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA H20": 148,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA L20": 119,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 5090": 209,
    "NVIDIA GeForce RTX 4090": 165,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla T4": 65,
    "GeForce 256": None,
    "NVIDIA T400 4GB": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA A10-24Q": None,
    "NVIDIA A40": None,
}


@pytest.mark.parametrize(("name", "peak"), PEAKS.items())
def test_the_peak_is_that_of_the_device_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == (peak and peak * 1e12)
    assert peak_flops(torch.device("cuda"), torch.float32) is None  # another peak
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert Speed(10, None).peak is None


def test_memory_is_that_of_the_process():
    with open("/proc/self/status", encoding="utf-8") as f:
        high = next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**20
    assert memory_gib(torch.device("cpu")) == pytest.approx(high, rel=0.05)


def test_wandb_waits_for_no_login(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert metrics.Wandb.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert metrics.Wandb.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert metrics.Wandb.mode() == "disabled"


class FakeWandb(types.ModuleType):
    """Stands in for wandb: keeps what is logged, and fails in `fails` (init, log or finish)."""

    Settings = Histogram = staticmethod(lambda **_: None)

    def __init__(self, fails="", error=None, go=None):
        super().__init__("wandb")
        self.logged, self.fails, self.error, self.go = [], fails, error, go

    def maybe_fail(self, where: str) -> None:
        if self.go and where == "log":
            self.go.wait(60)
        if where == self.fails:
            raise self.error

    def init(self, **_):
        self.maybe_fail("init")
        return self

    def log(self, values, step):
        if step > 1:
            self.maybe_fail("log")
        if "train_loss" in values:
            self.logged.append(step)

    def finish(self):
        self.maybe_fail("finish")


def with_wandb(folder, monkeypatch, fake: FakeWandb) -> Journal:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "WANDB_END_S", 5)
    facts = {"project": "p", "name": "n", "run_id": "0", "config": {}, "folder": folder}
    return Journal(folder, 0, wandb=facts)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "AssertionError"),
        (TimeoutError(), "TimeoutError"),
        (SystemExit(), "SystemExit"),
        (RuntimeError(" \n "), "RuntimeError"),
        (ValueError("no\nkey"), "no key"),
        (OSError(13, "Permission denied", "a"), "a: Permission denied"),
    ],
)
@pytest.mark.parametrize(("fails", "missing"), [("init", 5), ("log", 3), ("finish", 0)])
def test_wandb_that_fails_says_why_and_what_it_lacks(
    tmp_path, monkeypatch, capsys, error, reason, fails, missing
):
    journal = with_wandb(tmp_path, monkeypatch, FakeWandb(fails, error))
    for step in range(5):
        journal.write({"step": step, "train_loss": 1.0})
    started = time.monotonic()
    journal.close()
    assert time.monotonic() - started < 4, "closing waits for nothing"
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"warning: wandb is off: {reason}; metrics.jsonl has everything"
    left = f"warning: wandb is off ({reason}); {missing} steps are only in metrics.jsonl"
    assert out[1:] == [left] * bool(missing)
    assert len(lines(tmp_path)) == 5


@pytest.mark.parametrize("slow_from", [2, 7])
def test_wandb_that_is_too_slow_lacks_the_steps_that_are_named(
    tmp_path, monkeypatch, capsys, slow_from
):
    """It stops taking records at step 2, with room for three more."""
    monkeypatch.setattr(metrics, "WANDB_QUEUE", 3)
    go = threading.Event()
    fake = FakeWandb(go=go)
    journal = with_wandb(tmp_path, monkeypatch, fake)
    for step in range(2):
        journal.write({"step": step, "train_loss": 1.0})
    while len(fake.logged) < 2:
        time.sleep(0.01)
    for step in range(2, 2 + slow_from):
        journal.write({"step": step, "train_loss": 1.0})
        time.sleep(0.02)
    n_lost = max(0, slow_from - 4)  # one in its hands, three in the queue
    go.set()
    journal.close()
    out = capsys.readouterr().out
    assert len(fake.logged) == 2 + slow_from - n_lost
    assert (f"wandb was too slow; {n_lost} steps are only in" in out) == bool(n_lost), out


def test_wandb_that_hangs_is_left_and_every_step_it_lacks_is_counted(tmp_path, monkeypatch, capsys):
    go = threading.Event()
    journal = with_wandb(tmp_path, monkeypatch, FakeWandb(go=go))
    for step in range(9):
        journal.write({"step": step, "train_loss": 1.0})
    monkeypatch.setattr(metrics, "WANDB_END_S", 0.2)
    journal.close()
    go.set()
    assert "wandb was too slow; 7 steps are only in metrics.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("back_to", [[4], [0], [6, 2], [5, 7, 1]])
def test_no_mirror_has_a_step_twice_after_the_run_rolled_back(tmp_path, monkeypatch, back_to):
    """back_to: the steps that the run rolls back to; each time it goes to two steps further."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    # files of one second are read in the order of their names, which end with this number
    numbers = itertools.count(1000)
    uid = "tensorboard.summary.writer.event_file_writer._global_uid.get"
    monkeypatch.setattr(uid, lambda: next(numbers))
    fake = FakeWandb()
    with_wandb(tmp_path, monkeypatch, fake).close()
    facts = {"project": "p", "name": "n", "run_id": "0", "config": {}, "folder": tmp_path}
    journal = Journal(tmp_path, 0, tensorboard=True, wandb=facts)
    first, ends, expected = 0, 8, {}
    for attempt, back in enumerate([*back_to, None]):
        for step in range(first, ends):
            expected[step] = float(attempt)
            journal.write({"step": step, "train_loss": float(attempt)})
            journal.histograms(step, torch.nn.Linear(1, 1))
        if back is not None:
            journal.rewind(back)
            first, ends = back + 1, ends + 2
    journal.close()
    assert {r["step"]: r["train_loss"] for r in lines(tmp_path)} == expected
    board = accumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    scalars = [(s.step, s.value) for s in board.Scalars("train_loss")]
    assert scalars == sorted(expected.items())
    assert fake.logged == sorted(expected)


def test_reading_skips_what_is_no_record(tmp_path):
    text = '{"step": 1}\n[1]\nnull\n{"step": "x"}\n{"step": 2}\n{"st'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    assert list(read_metrics(os.fspath(tmp_path / "absent"))) == []
