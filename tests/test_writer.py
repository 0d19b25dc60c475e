"""A checkpoint of the thread has the tensors of the moment of the call; no error is lost."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from parts.storage import writer
from parts.storage.checkpoint import list_checkpoints, save_checkpoint, verify_checkpoint
from parts.storage.writer import Writer


@pytest.fixture
def large(monkeypatch):
    """Every checkpoint counts as large."""
    monkeypatch.setattr(writer, "SMALL", -1)


def ready(write, reported=None) -> Writer:
    """A writer that has its memory; what it tells is appended to `reported`."""
    w = Writer(write, lambda step, e: reported.append((step, str(e))))
    w.reserve(2**20, device=torch.device("cpu"))
    w.wait()
    return w


def test_the_thread_writes_what_the_tensors_were(tmp_path, large):
    go = threading.Event()

    def slowly(*args):
        assert go.wait(60)
        save_checkpoint(*args)

    w = ready(slowly)
    tensors = {
        "a": torch.arange(12.0).reshape(3, 4),
        "n": torch.tensor(7),
        "b": torch.ones(5, dtype=torch.bfloat16),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert w.save(tmp_path, 5, {"model.safetensors": tensors.items()}, {}, {}, 3)
    assert not list_checkpoints(tmp_path)  # returned before it was written
    for tensor in tensors.values():
        tensor.zero_()
    go.set()
    w.wait()
    verify_checkpoint(tmp_path / "checkpoints/step_000005")
    found = load_file(tmp_path / "checkpoints/step_000005/model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize("at_once", [False, True])
def test_a_disk_that_refuses_is_reported(tmp_path, large, at_once):
    def refuse(*_):
        raise OSError(28, "No space left on device", "file")

    reported = []
    w = ready(refuse, reported)
    tensors = {"model.safetensors": [("a", torch.ones(3))]}
    assert w.save(tmp_path, 5, tensors, {}, {}, 3, at_once=at_once) is not at_once
    w.wait()
    assert [step for step, _ in reported] == [5] and "No space left" in reported[0][1]


def test_any_other_error_in_the_thread_is_raised(tmp_path, large):
    w = ready(lambda *_: 1 / 0)
    w.save(tmp_path, 5, {}, {}, {}, 3)
    with pytest.raises(ZeroDivisionError):
        w.wait()


def test_more_than_the_reserved_memory_is_written_at_once(tmp_path, large):
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


def test_too_little_memory_is_refused():
    writer.enough_memory(2**20, "weights", "--cpu_offload")
    with pytest.raises(ValueError, match="--cpu_offload: weights need 1000000.00 GB"):
        writer.enough_memory(1e15, "weights", "--cpu_offload")


def test_only_copies_from_cuda_are_not_waited_for(tmp_path, large, monkeypatch):
    """On mps such a copy may be read before it has arrived, and its hash would be right."""

    def no_context(*_):
        pytest.fail("a CUDA context was made")

    copy_ = torch.Tensor.copy_
    asked = []

    def record(self, source, non_blocking=False):
        asked.append(non_blocking)
        return copy_(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", record)
    # a GPU that this run does not use
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", no_context)
    w = ready(save_checkpoint)
    assert w.save(tmp_path, 5, {"model.safetensors": [("a", torch.ones(3))]}, {}, {}, 3)
    w.wait()
    assert asked == [False]


@pytest.mark.parametrize("refused", [False, True])
def test_pinned_memory_is_as_large_as_what_goes_into_it(monkeypatch, large, refused):
    calls, current = [], []

    def register(address, n_bytes, flags):
        calls.append(("pin", address, n_bytes))
        return int(refused)

    def unregister(address):
        calls.append(("unpin", address))

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    w, n_bytes = Writer(None, None), 3 * 2**20 + 5
    w.reserve(n_bytes, torch.device("cuda:1"))
    w.wait()
    assert current == [torch.device("cuda:1")] and len(w.room) == n_bytes
    address = w.room.data_ptr()
    assert calls == [("pin", address, n_bytes)]
    w.room = None
    gc.collect()
    assert calls[1:] == ([] if refused else [("unpin", address)])


def test_what_is_offloaded_counts_the_rounding_of_pinned_memory():
    n_weights = [1024, 1025]  # 4,096 and 4,100 bytes
    assert writer.offloaded_bytes(n_weights, 1, pinned=False) == 16 * 2049
    assert writer.offloaded_bytes(n_weights, 1, pinned=True) == 8 * 2049 + 2 * (4096 + 8192)
    assert writer.offloaded_bytes([2048], 2, pinned=True) == 16 * 1024
