"""
How a model runs on one process or many: the verbs that the training loop knows, the same for all.

    none   one process
    ddp    each process has the whole model; gradients are averaged while they are computed
           (Li et al. 2020, "PyTorch Distributed")
    fsdp   weights, gradients and optimizer state are sharded over the processes, and a block is
           gathered while it is computed (torch's fully_shard; Rajbhandari et al. 2020, ZeRO)

    engine = ENGINES["none"](ranks, torch.float32)
    engine.prepare(model, blocks, make_optimizer)
    total = engine.accumulate(loss_fn, batch, n_targets, last=True)
    loss = engine.read(total)
    norm, applied = engine.step(lr, max_norm, veto=False)

An engine owns its optimizer, the loss scale of fp16, clipping and gathering. A subclass of Engine
in the table of `run` is a choice of --parallel.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys

import torch
from torch.utils.checkpoint import checkpoint

from parts.training.optim import slice_like
from parts.training.ranks import Ranks

FIRST_LOSS_SCALE = 2.0**15
STEPS_BETWEEN_SCALES = 2000  # without an overflow, after which the loss scale is doubled


class Engine:
    """
    One process, and what all engines share.

    lockstep: a forward pass needs all ranks, also in evaluation and sampling. shards: no rank has
    whole matrices.
    exchanging: the exchange of this step has begun on the other ranks, so that this rank cannot
    start the step again, for example with smaller micro-batches.
    """

    name = "none"
    needs_torchrun = False
    lockstep = False
    shards = False

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        self.ranks, self.dtype = ranks, dtype
        self.model = None  # the model to call, perhaps wrapped
        self.optimizer = None
        self.norm = math.nan  # of the gradient of this step, before clipping
        self.exchanging = self.lockstep
        self.loss_scale = None
        if dtype == torch.float16:
            self.loss_scale = {"scale": FIRST_LOSS_SCALE, "good": 0}

    def memory_like(self, reshard: bool) -> tuple[str, bool]:
        """(engine, reshard) of parts/training/plan.py whose memory this one takes."""
        return self.name, reshard

    def building(self):
        """The context in which a job makes its model."""
        return contextlib.nullcontext()

    def prepare(
        self,
        model,
        blocks: tuple,
        make_optimizer,
        *,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        cpu_offload: bool = False,
        reshard: bool = True,
        replicate: int = 1,
    ) -> None:
        """
        Make a plain model ready to train, in this order: activation checkpointing and compile per
        block, device, optimizer, wrapper.

        make_optimizer(model) -> parts.training.optim.Optimizer. `blocks` are classes. The plain
        model keeps its names: it is the one to save, to evaluate and to sample from.
        cpu_offload, reshard and replicate: see Sharded. Raises ValueError for options that this
        engine does not have.
        """
        self.check_options(cpu_offload, reshard, replicate)
        self.wrap_blocks(model, blocks, activation_checkpointing, compile_blocks)
        self.place(model, blocks, cpu_offload, reshard, replicate)
        if self.ranks.device.type == "cpu":
            # activation checkpointing asks for less memory, not for speed
            keep_freed_memory(not activation_checkpointing)
        self.optimizer = make_optimizer(model)
        self.model = self.wrap(model)

    def check_options(self, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """Raises ValueError for options that this engine does not have: here, those of fsdp."""
        options = {"cpu_offload": cpu_offload, "reshard": not reshard, "replicate": replicate != 1}
        for option in (name for name, on in options.items() if on):
            raise ValueError(
                f"--{option}: needs --parallel fsdp, this is {self.name}; "
                "start with torchrun, or leave it out"
            )

    def place(self, model, blocks, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """Put the model on its device."""
        model.to(self.ranks.device)

    def wrap_blocks(self, model, blocks, activation_checkpointing, compile_blocks) -> None:
        """Activation checkpointing, then compile, on each block of the model."""
        for block in (m for m in model.modules() if isinstance(m, tuple(blocks))):
            if activation_checkpointing:
                recompute_in_backward(block)
            if compile_blocks:
                # dynamic: a new shape would otherwise change the kernels of the earlier one
                block.compile(dynamic=False)

    def wrap(self, model):
        """The model to call in training."""
        return model

    # ------------------------------------------------------------------------------ one step

    def autocast(self):
        """
        Context for matrix products in bf16 or fp16; weights, sums and losses stay fp32.

        Autocast's cache is off. It would keep a 16-bit copy of every weight until the end of the
        forward pass, also in evaluation and under activation checkpointing (2.9 GB for 1558M). Each
        weight is used once, so nothing is cast twice.
        """
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, self.dtype, cache_enabled=False)

    def accumulate(self, loss_fn, batch: dict, n_targets: float, last: bool) -> torch.Tensor:
        """
        Add the gradient of one micro-batch; returns its summed loss, detached, on the device.

        The gradient is that of the loss divided by n_targets, the targets of the whole step on all
        ranks. Ranks exchange gradients with the `last` micro-batch. Forward and backward both run
        in here: DDP decides in the forward pass whether the backward pass exchanges.
        """
        self.exchanging = self.lockstep
        with self.synchronisation(last):
            with self.autocast():
                loss = loss_fn(self.model, batch)
            # DDP and fully_shard divide by the number of ranks, which must not change the sum
            (loss * (self.ranks.world / n_targets) * self.scale).backward()
        return loss.detach()

    def synchronisation(self, last: bool):
        """Context of forward and backward in which gradients are exchanged only if `last`."""
        return contextlib.nullcontext()

    def discard(self) -> None:
        """Drop the gradients accumulated so far."""
        self.optimizer.zero_grad()

    def read(self, total) -> float:
        """
        The summed loss of this rank as a number, after the last micro-batch of a step.

        The only read of a GPU in a step, so the norm of the gradient comes with it. Under fsdp the
        ranks add up their parts of the norm here.
        """
        grads = [p.grad for p in self.optimizer.names if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        loss, norm = torch.stack((total, norm.to(total.device))).tolist()
        self.norm = norm / self.scale
        return loss

    def step(self, lr: float, max_norm: float, veto: bool = False) -> tuple[float, bool]:
        """
        Clip the gradient to max_norm (0: do not), update the weights, drop the gradient.

        Returns (norm of the gradient before clipping, whether the weights were updated). Nothing is
        updated with `veto`, or if the norm is not finite.
        """
        applied = math.isfinite(self.norm) and not veto
        if applied:
            clip = max(1.0, (self.norm + 1e-6) / max_norm) if max_norm else 1.0
            self.optimizer.set_lr(lr)
            self.optimizer.step(grad_scale=self.scale * clip)
        self.discard()
        self.adapt_scale()
        return self.norm, applied

    def adapt_scale(self) -> None:
        """Halve the loss scale of fp16 after an overflow, double it after many good steps."""
        if self.loss_scale and not math.isfinite(self.norm):
            self.loss_scale |= {"scale": self.loss_scale["scale"] / 2, "good": 0}
        elif self.loss_scale:
            self.loss_scale["good"] += 1
            if self.loss_scale["good"] % STEPS_BETWEEN_SCALES == 0:
                self.loss_scale["scale"] *= 2

    @property
    def scale(self) -> float:
        """What losses, and so gradients, are multiplied by: the loss scale of fp16, else 1."""
        return self.loss_scale["scale"] if self.loss_scale else 1.0

    @property
    def finding_scale(self) -> bool:
        """Whether an overflow is only fp16 looking for its loss scale, not a fault."""
        return self.loss_scale is not None and self.loss_scale["scale"] >= 1

    # ---------------------------------------------------------------------------- checkpoints

    def whole(self, named: dict):
        """(name, whole tensor) pairs on rank 0, one at a time; other ranks must exhaust it too."""
        if self.ranks.rank == 0:
            yield from named.items()

    def state(self) -> tuple[dict, dict]:
        """(named tensors, JSON values) of optimizer and loss scale; the tensors go to `whole`."""
        tensors, numbers = self.optimizer.state_dict()
        return tensors, {"optimizer_numbers": numbers, "loss_scale": self.loss_scale}

    def unknown(self, names) -> set[str]:
        """Those of these names of optimizer tensors that `load` has no place for."""
        return self.optimizer.unknown(names)

    def load(self, weights: dict, tensors: dict, numbers: dict, with_optimizer: bool) -> None:
        """
        Put weights, optimizer and loss scale where a checkpoint has them.

        weights: the model's own tensors by name. tensors: a checkpoint's, of weights and optimizer,
        on rank 0. numbers: JSON values of `state`, on all ranks. Without `with_optimizer` the
        optimizer starts anew.
        """
        for name, tensor in self.ranks.share_tensors(tensors):
            if name in weights:
                own = weights[name]
                with torch.no_grad():
                    own.copy_(slice_like(own, tensor.to(self.ranks.device)))
            elif with_optimizer:
                self.optimizer.load_state_dict({name: tensor})
        if with_optimizer:
            self.optimizer.load_state_dict(numbers["optimizer_numbers"])
        self.loss_scale = self.loss_scale and (numbers["loss_scale"] or self.loss_scale)


class Replicated(Engine):
    """ddp: the whole model on each process."""

    name = "ddp"
    needs_torchrun = True

    def wrap_blocks(self, model, blocks, activation_checkpointing, compile_blocks) -> None:
        """As Engine.wrap_blocks."""
        super().wrap_blocks(model, blocks, activation_checkpointing, compile_blocks)
        if compile_blocks:
            # Dynamo would split each block where a gradient bucket is full
            torch._dynamo.config.optimize_ddp = False

    def wrap(self, model):
        """The model inside DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel

        model.register_forward_hook(self._on_forward)
        device = self.ranks.device
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            # keeps the gradient buckets fixed. DDP otherwise reorders them after the first
            # backward, and from 3 ranks on a resumed run would add in another order
            find_unused_parameters=True,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )
        # DDP's reducer must not outlive the group, or the process sometimes aborts
        self.ranks.before_closing.append(self._release)
        return wrapped

    def _on_forward(self, *_) -> None:
        self.exchanging = self.model.require_backward_grad_sync

    def _release(self) -> None:
        self.model = None

    def synchronisation(self, last: bool):
        """As Engine.synchronisation."""
        return contextlib.nullcontext() if last else self.model.no_sync()


class Sharded(Engine):
    """
    fsdp: weights, gradients and optimizer state sharded over the ranks, block by block.

    With cpu_offload the shards and the optimizer stay in the memory of the CPU, and a block's
    weights travel when they are needed. `reshard` frees a block's whole weights after its forward
    pass, to gather them again in the backward pass; without it they stay. `replicate` groups of
    ranks each have the whole model, sharded within the group (hybrid sharding). In the words of
    torch's first FSDP: FULL_SHARD is the default, SHARD_GRAD_OP reshard=False, HYBRID_SHARD
    replicate=n, _HYBRID_SHARD_ZERO2 both, NO_SHARD replicate=world.
    """

    name = "fsdp"
    needs_torchrun = True
    lockstep = True
    shards = True

    def building(self):
        """Only rank 0 gives the model memory; the others get their shards in `prepare`."""
        return torch.device("meta") if self.ranks.rank else contextlib.nullcontext()

    def check_options(self, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """Raises ValueError if the ranks do not divide into the groups."""
        if self.ranks.world % replicate:
            raise ValueError(
                f"--replicate {replicate}: does not divide the {self.ranks.world} processes; "
                "give a divisor of their number"
            )

    def place(self, model, blocks, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """Shard the model."""
        if cpu_offload and self.ranks.device.type == "cuda":
            # the optimizer computes on the CPU, and torchrun gives each rank one thread
            torch.set_num_threads(max(torch.get_num_threads(), cores_per_rank()))
        self._shard(model, blocks, cpu_offload, reshard, replicate)

    def _shard(self, model, blocks, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """Shard the weights block by block, so that no device ever has the whole model."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
        from torch.distributed.tensor import distribute_tensor

        device = self.ranks.device
        shape, names = (self.ranks.world,), ("shard",)
        if replicate > 1:
            shape = (replicate, self.ranks.world // replicate)
            names = ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        policy = OffloadPolicy()
        if cpu_offload:
            policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        values = {}
        if self.ranks.rank == 0:
            values = {name: tensor.detach() for name, tensor in named_tensors(model)}
        units = [m for m in model.modules() if isinstance(m, tuple(blocks))]
        for module in (*units, model):
            fully_shard(module, mesh=mesh, offload_policy=policy, reshard_after_forward=reshard)
        home = torch.device("cpu") if cpu_offload else device
        if self.ranks.rank == 0:
            model.to(home)
        else:
            model.to_empty(device=home)
        for name, tensor in named_tensors(model):
            value = self.ranks.broadcast(values.pop(name, None)).to(device)
            if hasattr(tensor, "placements"):
                shard = distribute_tensor(value, mesh, tensor.placements, src_data_rank=None)
                tensor.data.to_local().copy_(shard.to_local())
            else:
                tensor.copy_(value)

    @contextlib.contextmanager
    def synchronisation(self, last: bool):
        """As Engine.synchronisation."""
        self.model.set_requires_gradient_sync(last)
        yield

    def whole(self, named: dict):
        """As Engine.whole; all ranks gather each tensor together."""
        for name, tensor in named.items():
            tensor = whole(tensor)
            if self.ranks.rank == 0:
                yield name, tensor


ENGINES = {engine.name: engine for engine in (Engine, Replicated, Sharded)}


def choose_engine(name: str, engines: dict) -> type[Engine]:
    """
    The class of --parallel NAME; "auto" is ddp if torchrun started several processes, else none.

    Raises ValueError for a name that is not in the table, or does not fit how the script was
    started.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = "none" if world == 1 else "ddp"
    if name not in engines:
        known = ", ".join(("auto", *engines))
        raise ValueError(f"--parallel {name}: there is no such engine; choose one of {known}")
    chosen = engines[name]
    if chosen.needs_torchrun and "RANK" not in os.environ:
        raise ValueError(
            f"--parallel {name}: is for several processes; start two with "
            "torchrun --nproc_per_node 2, or leave it out"
        )
    if not chosen.needs_torchrun and world > 1:
        raise ValueError(
            f"--parallel {name}: torchrun started {world} processes; "
            "leave the flag out, or start with python"
        )
    if name == "ddp" and world == 1:
        return engines["none"]  # nothing to exchange
    return chosen


def named_tensors(model):
    """(name, tensor) of every parameter and buffer."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def whole(tensor):
    """The whole tensor of a shard (fsdp), gathered from all ranks; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def recompute_in_backward(block) -> None:
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
    Let glibc keep the memory that a step frees for the next step.

    By default it returns large blocks to Linux, which fills every page with zeros when the next
    step asks for them: a fifth of a step. The price: no other program gets that memory until the
    run ends, and there are holes between the blocks. keep=False does the opposite: every block from
    1 MB up is returned at once. Source: mallopt(3).
    """
    M_ARENA_MAX, M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -4, -3, -1
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    options = ((M_MMAP_THRESHOLD, 2**20),)
    if keep:  # all blocks in one heap, which is never trimmed
        options = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    for option, value in options:
        libc.mallopt(option, value)
