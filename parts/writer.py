"""
Checkpoints written while the training goes on: it stands still for a copy of the tensors, and a thread does the rest.
"""

from __future__ import annotations

import os
import threading

import torch

SMALL = 64e6  # bytes: what is written while the training waits, which takes less than a second


class Writer:
    """
    Calls save(run_dir, step, {file: {name: tensor}}, *rest) in a thread, with copies of the tensors.

    Small checkpoints and those that somebody waits for are written at once. `tell(step, error)` hears of an OSError.
    """

    def __init__(self, save, tell):
        self.write, self.tell, self.thread, self.error, self.room = save, tell, None, None, None

    def reserve(self, n_bytes: int, pinned: bool) -> None:
        """Take the memory for copies of that many bytes beside the training: its first use costs a second per GB."""
        if n_bytes > SMALL:
            self._start(self._take, n_bytes, pinned)

    def save(self, run_dir, step: int, tensors: dict, *rest, at_once: bool = False) -> bool:
        """Write one, with tensors as {file: (name, tensor) pairs}, copied before this returns; False where it failed at once."""
        self.wait()
        copied, start = {}, 0
        for file, pairs in tensors.items():
            copied[file] = {}
            for name, tensor in pairs:
                if not at_once and self.room is not None and start + tensor.nbytes <= len(self.room):
                    place = self.room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                    tensor = place.copy_(tensor.detach(), non_blocking=True)
                    start += -(-tensor.nbytes // 64) * 64
                else:  # small, or written before anything can change
                    at_once, tensor = True, tensor.detach().cpu()
                copied[file][name] = tensor
        if at_once:
            return self._save(run_dir, step, copied, *rest)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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

    def _take(self, n_bytes: int, pinned: bool) -> None:
        if 2 * n_bytes > available_memory():
            return  # checkpoints are written while the training waits
        try:
            room = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        except (RuntimeError, MemoryError):
            return
        room[::4096] = 0
        self.room = room

    def _save(self, run_dir, step: int, *rest) -> bool:
        try:
            self.write(run_dir, step, *rest)
        except OSError as e:
            self.tell(step, e)
            return False
        return True


def available_memory() -> float:
    """Bytes of memory that are free or can be freed; more than there can be where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def free_memory(device: str) -> tuple[float, str]:
    """(bytes that a process can have on a device such as "cuda:1", its name); processes of one machine share the CPU's memory."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    if device == "mps":
        return torch.mps.recommended_max_memory(), "the GPU"
    return available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "free memory"


def enough_memory(need: float, what: str, flag: str) -> None:
    """Raises ValueError where that many bytes are not to be had."""
    if need > (free := available_memory()):
        raise ValueError(
            f"{flag}: {what} need {need / 1e9:.2f} GB, {free / 1e9:.2f} are free; start on more machines, or take a smaller model"
        )
