"""
Checkpoints written while the training goes on: it stands still for a copy of the tensors, and a thread does the rest.
"""

from __future__ import annotations

import threading
import weakref

import torch

from parts.base.machine import available_memory

SMALL = 64e6  # bytes: what is written while the training waits, which takes less than a second


class Writer:
    """
    Calls save(run_dir, step, {file: {name: tensor}}, *rest) in a thread, with copies of the tensors.

    Small checkpoints and those that somebody waits for are written at once. `tell(step, error)` hears of an OSError.
    """

    def __init__(self, save, tell):
        self.write, self.tell, self.thread, self.error, self.room = save, tell, None, None, None

    def reserve(self, n_bytes: int, device) -> None:
        """Allocate memory for copies of that many bytes, in a thread: a second per GB."""
        if n_bytes > SMALL:
            self._start(self._take, n_bytes, device)

    def save(self, run_dir, step: int, tensors: dict, *rest, at_once: bool = False) -> bool:
        """Write one, with tensors as {file: (name, tensor) pairs}, copied before this returns; False where it failed at once."""
        self.wait()
        copied, start, on_gpus = {}, 0, set()
        for file, pairs in tensors.items():
            copied[file] = {}
            for name, tensor in pairs:
                if (
                    not at_once
                    and self.room is not None
                    and start + tensor.nbytes <= len(self.room)
                ):
                    place = (
                        self.room[start : start + tensor.nbytes]
                        .view(tensor.dtype)
                        .view(tensor.shape)
                    )
                    on_gpus |= {tensor.device} if tensor.is_cuda else set()
                    # on mps a copy that nobody waits for may be read before it has arrived
                    tensor = place.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                    start += -(-tensor.nbytes // 64) * 64
                else:  # small, or written before anything can change
                    at_once, tensor = True, tensor.detach().cpu()
                copied[file][name] = tensor
        if at_once:
            return self._save(run_dir, step, copied, *rest)
        for device in on_gpus:
            torch.cuda.synchronize(device)
        self._start(self._save, run_dir, step, copied, *rest)
        return True

    def wait(self) -> None:
        """Until all is written. Raises what went wrong in the thread, but for an OSError, which was told."""
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

    def _take(self, n_bytes: int, device) -> None:
        if 2 * n_bytes > available_memory():
            return  # checkpoints are written while the training waits
        try:
            room = torch.empty(n_bytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            return
        room[::4096] = 0
        if device.type == "cuda":
            pin(room, device)
        self.room = room

    def _save(self, run_dir, step: int, *rest) -> bool:
        try:
            self.write(run_dir, step, *rest)
        except OSError as e:
            self.tell(step, e)
            return False
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
    Bytes of one rank's slices of weights, their gradients and two moments, in fp32.

    n_weights: numbers in each tensor. Pinned weights and gradients, for a GPU, take the next power
    of two each.
    """
    slices = [4 * -(-n // world) for n in n_weights]
    return sum(2 * n + 2 * (1 << (n - 1).bit_length() if pinned else n) for n in slices)


def enough_memory(need: float, what: str, flag: str) -> None:
    """Raises ValueError where that many bytes are not to be had."""
    if need > (free := available_memory()):
        raise ValueError(
            f"{flag}: {what} need {need / 1e9:.2f} GB, {free / 1e9:.2f} are free; start on more machines, or take a smaller model"
        )
