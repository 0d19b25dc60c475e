"""
One process or many: the few verbs the training loop knows, the same for none | ddp | fsdp.

    none   one process
    ddp    each process has the whole model, and gradients are averaged while they are computed (Li et al. 2020)
    fsdp   weights, gradients and optimizer state lie in slices on all processes, and a block is put together while it is
           computed (torch's fully_shard; Rajbhandari et al. 2020): for models that fit on no single device

    with Parallel("auto", "auto", "auto") as parallel:
        model, optimizer = parallel.prepare(model, blocks, make_optimizer)
        with parallel.sync(model, last=True): parallel.backward(loss)
        loss, grad_norm = parallel.read(loss, optimizer)
        parallel.step(optimizer, grad_norm, max_norm)

Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK; NCCL between GPUs, gloo between CPUs, and gloo for the few
numbers that the ranks agree on, so that no GPU has to wait for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import sys

import torch
from torch.utils.checkpoint import checkpoint

from parts.base.dtypes import SAFETENSORS_NAMES

DTYPES = list(SAFETENSORS_NAMES)  # what can be in a checkpoint, by number


class Parallel:
    """Where this process stands among the others, its device and its arithmetic. A context manager: leaving it closes the group."""

    def __init__(self, kind: str, device, dtype: torch.dtype):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.dtype, self.wrapped = device, dtype, None
        if kind == "none" and self.world > 1:
            raise ValueError(
                f"--parallel none: torchrun started {self.world} processes; leave the flag out, or start with python"
            )
        if kind == "ddp" and "RANK" not in os.environ:
            raise ValueError(
                "--parallel ddp: start with torchrun --nproc_per_node N pretraining_advanced.py ..."
            )
        if kind == "fsdp" and "RANK" not in os.environ:
            raise ValueError(
                "--parallel fsdp: slices a model over several processes; start two with torchrun --nproc_per_node 2, or leave it out"
            )
        self.kind = "fsdp" if kind == "fsdp" else "none" if self.world == 1 else "ddp"
        self.lockstep = (
            self.kind == "fsdp"
        )  # a forward pass needs all ranks, also in evaluation and sampling
        self.exchanging = (
            self.lockstep
        )  # the others wait for this rank's part: too late to do the step again
        self.loss_scale = {"scale": 2.0**15, "good": 0} if dtype == torch.float16 else None
        if self.kind != "none":
            import torch.distributed as dist  # here: one process does without

            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(
                    backend, device_id=device if device.type == "cuda" else None
                )
            except RuntimeError as e:
                raise ValueError(_why_no_group(e, device)) from e

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.kind != "none":
            import torch.distributed as dist

            self.wrapped = None  # before the group: DDP's reducer otherwise outlives it, and the process aborts at times
            if kind is None:
                dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------------- agreeing

    def all_sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in fp64; all ranks get the same bits."""
        if self.world == 1:
            return [float(v) for v in values]
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    @contextlib.contextmanager
    def agree(self):
        """What fails here on one rank ends all of them, with one message: that of the lowest rank that failed."""
        error = None
        try:
            yield
        except (ValueError, OSError, RuntimeError) as e:
            error = e
        failed = self.all_sum(
            [float(error is not None and r == self.rank) for r in range(self.world)]
        )
        if error and not any(failed[: self.rank]):
            raise error
        if any(failed):
            raise SystemExit(2)

    def same(self, facts: dict, way_out: str) -> None:
        """Raises ValueError, on all ranks, where these JSON values are not those of rank 0 on every rank."""
        digest = int.from_bytes(
            hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()[:6], "big"
        )  # fp64 holds it exactly
        digests = self.all_sum([digest * (r == self.rank) for r in range(self.world)])
        if wrong := [r for r in range(self.world) if digests[r] != digests[0]]:
            raise ValueError(
                f"rank {wrong[0]} has other data or another tokenizer than rank 0; {way_out}"
            )

    def share(self, state: dict | None) -> dict:
        """Rank 0's JSON values, on all ranks: only one of them needs to see the disk."""
        if self.world == 1:
            return state
        text = (
            torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
            if self.rank == 0
            else None
        )
        return json.loads(self._broadcast(text).numpy().tobytes())

    def shared(self, tensors: dict | None):
        """Rank 0's (name, tensor) pairs, on all ranks, one at a time: no other rank ever holds all of them."""
        if self.world == 1:
            yield from tensors.items()
            return
        for name in self.share(list(tensors) if self.rank == 0 else None):
            yield name, self._broadcast(tensors[name] if self.rank == 0 else None)

    def _broadcast(self, tensor):
        """Rank 0's tensor (on the CPU), on all ranks."""
        import torch.distributed as dist

        code = torch.zeros(
            12, dtype=torch.int64
        )  # which dtype, how many dimensions, the dimensions
        if self.rank == 0:
            code[: 2 + tensor.ndim] = torch.tensor(
                [DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
            )
        dist.broadcast(code, 0)
        kind, n_dims, *shape = code.tolist()
        tensor = (
            tensor.contiguous()
            if self.rank == 0
            else torch.empty(shape[:n_dims], dtype=DTYPES[kind])
        )
        dist.broadcast(tensor, 0)
        return tensor

    def gathered(self, named: dict):
        """
        (name, tensor) pairs as a checkpoint holds them, on rank 0: whole, one at a time. Under fsdp the others have to
        go through them too, and get none.
        """
        for name, tensor in named.items():
            tensor = _whole(tensor) if self.lockstep or self.rank == 0 else None
            if self.rank == 0:
                yield name, tensor

    # ------------------------------------------------------------------------------------------------- training

    def building(self):
        """Around the making of the model. Under fsdp only rank 0 gives it memory; the others get their slices of it in `prepare`."""
        return (
            torch.device("meta") if self.kind == "fsdp" and self.rank else contextlib.nullcontext()
        )

    def prepare(
        self,
        model,
        blocks,
        make_optimizer,
        activation_checkpointing=False,
        compile_blocks=False,
        cpu_offload=False,
    ):
        """
        (model to call, optimizer) of a plain model: activation checkpointing, compile per block, device, optimizer, wrap.

        cpu_offload: under fsdp the slices and the optimizer stay in the memory of the CPU, and a block's weights travel when needed.

        The plain model stays what it was, with its own names: it is the one to save, to evaluate and to sample from.
        """
        for block in (m for m in model.modules() if isinstance(m, tuple(blocks))):
            if activation_checkpointing:
                _recompute_in_backward(block)
            if compile_blocks:
                block.compile(
                    dynamic=False
                )  # a new shape would otherwise change the kernels of the old one
        if compile_blocks and self.kind == "ddp":
            # Dynamo would split each block where a gradient bucket is full
            torch._dynamo.config.optimize_ddp = False
        if cpu_offload and self.device.type == "cuda":
            # the optimizer computes on the CPU, and torchrun gives each rank one thread
            torch.set_num_threads(max(torch.get_num_threads(), cores_per_rank()))
        if self.kind == "fsdp":
            self._slice(model, blocks, cpu_offload)
        else:
            model.to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory(
                not activation_checkpointing
            )  # which asks for less memory, not for speed
        optimizer = make_optimizer(model)
        if self.kind != "ddp":
            return model, optimizer
        from torch.nn.parallel import DistributedDataParallel

        model.register_forward_hook(
            lambda *_: setattr(self, "exchanging", self.wrapped.require_backward_grad_sync)
        )
        ids = [self.device.index] if self.device.type == "cuda" else None
        # find_unused_parameters keeps the gradient buckets as they are; DDP otherwise orders them anew after the first
        # backward, and from 3 ranks up a resumed run would add in another order than the straight one
        options = {"find_unused_parameters": True, "broadcast_buffers": False}
        options |= {"gradient_as_bucket_view": True}  # no second copy of the gradients
        self.wrapped = DistributedDataParallel(model, device_ids=ids, **options)
        return self.wrapped, optimizer

    def _slice(self, model, blocks, cpu_offload: bool) -> None:
        """Lay the weights in slices on all ranks, block by block, so that no device ever holds the whole model."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
        from torch.distributed.tensor import distribute_tensor

        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if cpu_offload
            else OffloadPolicy()
        )
        whole = (
            {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
            if self.rank == 0
            else {}
        )
        for module in (*(m for m in model.modules() if isinstance(m, tuple(blocks))), model):
            fully_shard(module, mesh=mesh, offload_policy=policy)
        home = torch.device("cpu") if cpu_offload else self.device
        model.to(home) if self.rank == 0 else model.to_empty(device=home)
        for name, tensor in (
            *model.named_parameters(),
            *model.named_buffers(),
        ):  # what the others have is empty still
            value = self._broadcast(whole.pop(name, None)).to(self.device)
            if hasattr(tensor, "placements"):
                tensor.data.to_local().copy_(
                    distribute_tensor(value, mesh, tensor.placements, src_data_rank=None).to_local()
                )
            else:
                tensor.copy_(value)

    @contextlib.contextmanager
    def sync(self, model, last: bool):
        """Around forward and backward of a micro-batch: autocast, and gradients are exchanged with the last one only."""
        self.exchanging = self.lockstep
        if self.kind == "fsdp":
            model.set_requires_gradient_sync(last)
        with model.no_sync() if self.kind == "ddp" and not last else contextlib.nullcontext():
            yield

    def autocast(self):
        """
        Products in bf16 or fp16 where that was chosen; weights, sums and losses stay fp32.

        Autocast's cache is off: it would keep a 16-bit copy of every weight until the end of the
        forward pass, also in evaluation and under activation checkpointing (2.9 GB for 1558M). Each
        weight is used once, so nothing is cast twice.
        """
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def backward(self, loss) -> None:
        """Add the gradients of a loss; DDP divides by the number of ranks, so the loss comes multiplied by it."""
        (loss * self.scale).backward()

    def read(self, loss, optimizer) -> tuple[float, float]:
        """
        (summed loss of this rank, norm of the whole gradient before clipping), after the last
        backward pass of a step.

        The only read of a GPU in a step. Under fsdp the ranks add up their parts of the norm here.
        """
        grads = [p.grad for p in optimizer.names if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(grads))
        loss, norm = torch.stack((loss, norm.to(loss.device))).tolist()
        return loss, norm / self.scale

    def step(self, optimizer, norm: float, max_norm: float | None, apply: bool = True) -> None:
        """
        Unscale, clip the gradient, whose norm `read` gave, to max_norm, update, clear.

        Without `apply`, or where the norm is not finite, nothing is updated.
        """
        finite = math.isfinite(norm)
        if apply and finite:
            optimizer.step(
                grad_scale=self.scale * max(1.0, (norm + 1e-6) / max_norm if max_norm else 1.0)
            )
        optimizer.zero_grad()
        if self.loss_scale and not finite:
            self.loss_scale |= {"scale": self.loss_scale["scale"] / 2, "good": 0}
        elif self.loss_scale:
            self.loss_scale["good"] += 1
            if self.loss_scale["good"] % 2000 == 0:
                self.loss_scale["scale"] *= 2

    @property
    def scale(self) -> float:
        """What losses, and so gradients, are multiplied by: the loss scale of fp16, else 1."""
        return self.loss_scale["scale"] if self.loss_scale else 1.0

    @property
    def finding_scale(self) -> bool:
        """Whether an overflow is only fp16 looking for its loss scale, not a fault."""
        return self.loss_scale is not None and self.loss_scale["scale"] >= 1


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _why_no_group(e: RuntimeError, device) -> str:
    """Why the processes could not form a group, and what to do, in one line."""
    from torch.distributed import DistBackendError

    error = " ".join(str(e).split())[:150]
    if isinstance(e, DistBackendError) or "NCCL" in error:
        return f"NCCL cannot start on {device} ({error}); NCCL_DEBUG=INFO shows why"
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"the processes do not find each other at {address} ({error}); try another port"


def _recompute_in_backward(block) -> None:
    """
    Keep only the block's input, and recompute the rest in the backward pass (Chen et al. 2016).

    The random state is saved for that, which reads it from the GPU, unless the block says
    `draws_random = False`.
    """
    forward = block.forward
    options = {"use_reentrant": False, "preserve_rng_state": getattr(block, "draws_random", True)}

    def recomputed(*args, **kwargs):
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, **options, **kwargs)
        return forward(*args, **kwargs)

    block.forward = recomputed


def cores_per_rank() -> int:
    """CPU cores that this machine has for each of its ranks, at least one."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_freed_memory(keep: bool = True) -> None:
    """
    Let glibc keep what a step frees for the next one. It gives large blocks back to Linux, which has to fill every page of
    them with zeros when the next step asks for them: a fifth of a step. The price: no other program gets that memory until the
    run ends, and holes between what is kept. keep=False is the opposite: every block from 1 MB up is given back at once.
    Source: mallopt(3).
    """
    M_ARENA_MAX, M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -4, -3, -1
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        one_heap = (
            (M_ARENA_MAX, 1),
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, 2**31 - 1),
        )  # all blocks in it, kept
        for option, value in one_heap if keep else ((M_MMAP_THRESHOLD, 2**20),):
            libc.mallopt(option, value)
