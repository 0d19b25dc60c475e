"""
The processes of a run: who this one is, and everything the ranks agree on.

torchrun starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK. GPUs exchange tensors
through NCCL, CPUs through gloo. The few numbers that ranks agree on always go through gloo, so that
no GPU has to wait for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

import torch

from parts.base.dtypes import SAFETENSORS_NAMES
from parts.base.files import append_lines
from parts.base.text import one_line
from parts.cli.progress_bar import tqdm

DTYPES = list(SAFETENSORS_NAMES)  # a tensor's dtype travels as its position in this list


class Ranks:
    """
    Rank, world (the world size) and device of this process, and what it exchanges with others.

    A context manager. With `group` the processes form a group on entering the constructor; leaving
    it dissolves the group. Raises ValueError if the processes cannot find each other.
    """

    def __init__(self, device: torch.device, group: bool):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        self.text_log = None  # path of a text file that gets everything `say` prints
        self.before_closing = []  # called, newest first, before the group is dissolved
        self.group = group
        if group:
            import torch.distributed as dist  # here: one process does without

            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                device_id = device if device.type == "cuda" else None
                dist.init_process_group(backend, device_id=device_id)
            except RuntimeError as e:
                raise ValueError(_why_no_group(e, device)) from e

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind, *_) -> None:
        while self.before_closing:
            self.before_closing.pop()()
        if self.group and kind is None:
            import torch.distributed as dist

            dist.destroy_process_group()

    def say(self, text: str, every_rank: bool = False) -> None:
        """Print a message from rank 0, or from this rank; also append it to the text log."""
        if not text or not (self.rank == 0 or every_rank):
            return
        with tqdm.external_write_mode():
            print(text, flush=True)
        if self.text_log and self.rank == 0:
            append_lines(self.text_log, [text])

    # ------------------------------------------------------------------------------ agreeing

    def all_sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in fp64; every rank gets the same bits."""
        if self.world == 1:
            return [float(v) for v in values]
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, value) -> bool:
        """Whether the value is true on any rank."""
        return self.all_sum([float(bool(value))])[0] > 0

    def gather(self, values: dict[str, float]) -> list[dict[str, float]]:
        """The values of every rank, in the order of ranks; all ranks pass the same names."""
        if self.world == 1:
            return [{name: float(value) for name, value in values.items()}]
        import torch.distributed as dist

        names = sorted(values)
        mine = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        return [dict(zip(names, row.tolist(), strict=True)) for row in everyone]

    @contextlib.contextmanager
    def agree(self):
        """
        If the code inside fails on one rank, all ranks end, with one message.

        The lowest rank that failed reports its error; the others exit with code 2.
        """
        error = None
        try:
            yield
        except (ValueError, OSError, RuntimeError) as e:
            error = e
        failed = [rank["failed"] for rank in self.gather({"failed": error is not None})]
        if error and not any(failed[: self.rank]):
            raise error
        if any(failed):
            raise SystemExit(2)

    def same(self, facts: dict, what: str, fix: str) -> None:
        """
        Raises ValueError on all ranks if these JSON values differ from rank 0's on any rank.

        The message is `what` such a rank does, and what would `fix` it.
        """
        text = json.dumps(facts, sort_keys=True).encode()
        digest = int.from_bytes(hashlib.sha256(text).digest()[:6], "big")  # fp64 holds it exactly
        digests = [rank["digest"] for rank in self.gather({"digest": digest})]
        if wrong := [r for r in range(self.world) if digests[r] != digests[0]]:
            raise ValueError(f"rank {wrong[0]} {what}; {fix}")

    # ------------------------------------------------------------------------------- sharing

    def share(self, value):
        """Rank 0's JSON value, on all ranks: only rank 0 needs to see the disk."""
        if self.world == 1:
            return value
        text = None
        if self.rank == 0:
            text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return json.loads(self.broadcast(text).numpy().tobytes())

    def share_tensors(self, tensors: dict | None):
        """Rank 0's (name, tensor) pairs, on all ranks, one at a time to save memory."""
        if self.world == 1:
            yield from tensors.items()
            return
        for name in self.share(list(tensors) if self.rank == 0 else None):
            yield name, self.broadcast(tensors[name] if self.rank == 0 else None)

    def broadcast(self, tensor):
        """Rank 0's tensor, which is on the CPU, on all ranks."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        code = torch.zeros(12, dtype=torch.int64)  # dtype, number of dimensions, dimensions
        if self.rank == 0:
            head = [DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
            code[: len(head)] = torch.tensor(head)
        dist.broadcast(code, 0)
        kind, n_dims, *shape = code.tolist()
        if self.rank == 0:
            tensor = tensor.contiguous()
        else:
            tensor = torch.empty(shape[:n_dims], dtype=DTYPES[kind])
        dist.broadcast(tensor, 0)
        return tensor


def _why_no_group(e: RuntimeError, device) -> str:
    """Why the processes could not form a group, and what to do, in one line."""
    from torch.distributed import DistBackendError

    error = one_line(e, 150)
    if isinstance(e, DistBackendError) or "NCCL" in error:
        return f"NCCL cannot start on {device} ({error}); NCCL_DEBUG=INFO shows why"
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"the processes do not find each other at {address} ({error}); try another port"
