"""A checkpoint written by the thread is that of the moment it was asked for; what goes wrong in the thread is not lost."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from parts import writer
from parts.checkpoint import list_checkpoints, save_checkpoint, verify_checkpoint
from parts.writer import Writer


@pytest.fixture
def large(monkeypatch):
    """Every checkpoint counts as large."""
    monkeypatch.setattr(writer, "SMALL", -1)


def ready(save, told=None) -> Writer:
    w = Writer(save, lambda step, e: told.append((step, str(e))))
    w.reserve(2**20, pinned=False)
    w.wait()
    return w


def test_the_thread_writes_what_the_tensors_were(tmp_path, large):
    go = threading.Event()

    def slowly(*args):
        assert go.wait(60)
        save_checkpoint(*args)

    w, t = ready(slowly), {"a": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(7), "b": torch.ones(5, dtype=torch.bfloat16)}
    then = {name: value.clone() for name, value in t.items()}
    assert w.save(tmp_path, 5, {"model.safetensors": t.items()}, {}, {}, 3)
    assert not list_checkpoints(tmp_path)  # back before it is written
    for value in t.values():
        value.zero_()
    go.set()
    w.wait()
    verify_checkpoint(tmp_path / "checkpoints/step_000005")
    found = load_file(tmp_path / "checkpoints/step_000005/model.safetensors")
    assert found.keys() == then.keys() and all(torch.equal(found[k], then[k]) and found[k].dtype == then[k].dtype for k in then)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_disk_that_refuses_is_told(tmp_path, large, at_once):
    def refuse(*_):
        raise OSError(28, "No space left on device", "there")

    told = []
    w = ready(refuse, told)
    assert w.save(tmp_path, 5, {"model.safetensors": [("a", torch.ones(3))]}, {}, {}, 3, at_once=at_once) is not at_once
    w.wait()
    assert [step for step, _ in told] == [5] and "No space left" in told[0][1]


def test_any_other_error_in_the_thread_is_raised(tmp_path, large):
    w = ready(lambda *_: 1 / 0)
    w.save(tmp_path, 5, {}, {}, {}, 3)
    with pytest.raises(ZeroDivisionError):
        w.wait()


def test_more_than_the_memory_taken_is_written_at_once(tmp_path, large):
    w = ready(save_checkpoint)
    tensors = {"model.safetensors": [("a", torch.ones(2**17)), ("b", torch.ones(2**18))]}
    assert w.save(tmp_path, 5, tensors, {}, {}, 3)
    assert len(list_checkpoints(tmp_path)) == 1
    verify_checkpoint(tmp_path / "checkpoints/step_000005")


def test_without_memory_for_a_copy_the_training_waits(tmp_path, large, monkeypatch):
    monkeypatch.setattr(writer, "available_memory", lambda: 2**20)
    w = ready(save_checkpoint)
    assert w.save(tmp_path, 5, {"model.safetensors": [("a", torch.ones(3))]}, {}, {}, 3)
    assert len(list_checkpoints(tmp_path)) == 1


def test_memory_that_is_not_there_is_told_before_it_is_taken():
    writer.enough_memory(2**20, "weights", "--cpu_offload")
    with pytest.raises(ValueError, match="--cpu_offload: weights need 1000000.00 GB"):
        writer.enough_memory(1e15, "weights", "--cpu_offload")
