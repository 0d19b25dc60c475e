"""
Write checkpoints in a thread: the training waits for a copy of the tensors, not for the disk.
"""

from __future__ import annotations

import threading
import time
import weakref

import torch

from parts.base.machine import available_memory

SMALL = 64e6  # bytes that are written while the training waits; it takes less than a second
ALIGNMENT = 64  # bytes; each tensor of a copy begins at a multiple
PAGE = 4096  # bytes


class Writer:
    """
    Calls write(run_dir, step, {file: {name: tensor}}, *rest) in a thread, with copied tensors.

    Small checkpoints and those that the caller waits for are written in this thread. An OSError of
    `write` is reported to tell(step, error). failing_since: when (time.monotonic) the first write
    failed since the last one that did not; None: the last one did not.
    """

    def __init__(self, write, tell):
        self.write = write
        self.tell = tell
        self.thread = None
        self.error = None  # raised in the thread
        self.failing_since = None
        self.room = None  # memory for copies

    def reserve(self, n_bytes: int, device) -> None:
        """Allocate memory for copies of that many bytes, in a thread: a second per GB."""
        if n_bytes > SMALL:
            self._start(self._allocate, n_bytes, device)

    def save(self, run_dir, step: int, tensors: dict, *rest, at_once: bool = False) -> bool:
        """
        Write a checkpoint; returns False if it failed before this returned.

        tensors: {file: (name, tensor) pairs}; they may change as soon as this returns. at_once:
        return when the checkpoint is on the disk.
        """
        self.wait()
        copied = {}
        start = 0  # of the next copy
        gpus = set()
        for file, pairs in tensors.items():
            copied[file] = {}
            for name, tensor in pairs:
                tensor = tensor.detach()
                end = start + tensor.nbytes
                if at_once or self.room is None or end > len(self.room):
                    at_once = True  # from here on, so that nothing can change before it is written
                    copied[file][name] = tensor.cpu()
                    continue
                copy = self.room[start:end].view(tensor.dtype).view(tensor.shape)
                # only from CUDA: on mps a copy that nobody waits for may be read before it arrives
                copied[file][name] = copy.copy_(tensor, non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    gpus.add(tensor.device)
                start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if at_once:
            return self._save(run_dir, step, copied, *rest)
        for device in gpus:
            torch.cuda.synchronize(device)
        self._start(self._save, run_dir, step, copied, *rest)
        return True

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """
        Wait until everything is written.

        Raises what the thread raised, except for an OSError, which was reported to `tell`.
        """
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            raise self.error

    def _start(self, function, *inputs) -> None:
        def run():
            try:
                function(*inputs)
            except Exception as e:  # noqa: BLE001  raised again by wait
                self.error = e

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def _allocate(self, n_bytes: int, device) -> None:
        """Set self.room; without enough memory checkpoints are written while the training waits."""
        if 2 * n_bytes > available_memory():
            return
        try:
            room = torch.empty(n_bytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            return
        room[::PAGE] = 0  # the system provides a page when it is first written
        if device.type == "cuda":
            pin(room, device)
        self.room = room

    def _save(self, run_dir, step: int, *rest) -> bool:
        try:
            self.write(run_dir, step, *rest)
        except OSError as e:
            self.failing_since = self.failing_since or time.monotonic()
            self.tell(step, e)
            return False
        self.failing_since = None
        return True


def pin(room, device) -> bool:
    """
    Pin the memory of a CPU tensor, for fast copies from a GPU; False if CUDA refuses.

    torch's own pinned memory is rounded up to a power of two: 18.7 GB would take 34.4.
    """
    torch.cuda.set_device(device)  # in this thread; otherwise GPU 0 would get a context
    cudart, address = torch.cuda.cudart(), room.data_ptr()
    if int(cudart.cudaHostRegister(address, room.nbytes, 1)):  # 1: for all GPUs
        return False
    weakref.finalize(room, cudart.cudaHostUnregister, address)
    return True


def offloaded_bytes(n_weights: list[int], world: int, pinned: bool) -> int:
    """
    Bytes of one rank's shards of weights, their gradients and two moments, in fp32.

    n_weights: the number of weights in each tensor. Pinned weights and gradients, for a GPU, take
    the next power of two each.
    """
    total = 0
    for n in n_weights:
        shard = 4 * -(-n // world)
        total += 2 * shard  # moments
        total += 2 * (1 << (shard - 1).bit_length() if pinned else shard)
    return total


def enough_memory(need: float, what: str, flag: str) -> None:
    """Raises ValueError if this machine has not that many bytes of memory free."""
    free = available_memory()
    if need > free:
        raise ValueError(
            f"{flag}: {what} need {need / 1e9:.2f} GB, {free / 1e9:.2f} are free; "
            "start on more machines, or take a smaller model"
        )
