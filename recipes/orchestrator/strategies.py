"""
How a training is distributed: the sharding strategies of FSDP, DDP, and DeepSpeed.

    get_fsdp_config(sharding_strategy="HYBRID_SHARD").run_settings()   # settings of RunConfig
    plan = read_deepspeed("ds_config.json", micro_batch=4, accumulation=2, world=8)
    run(config, make_job, engines_of(plan))

    setup_ddp(backend="gloo")                                          # for a loop of your own
    model = setup_model_with_ddp(model)

All strategies are engines of the core, and DeepSpeed is one more (deepspeed_engine.py). They train
to the same losses, and each resumes from the checkpoints of the others.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch

from parts.base.dtypes import DTYPES
from parts.training import engine as core
from recipes.orchestrator.deepspeed_engine import DeepSpeedEngine, engine_of
from recipes.orchestrator.deepspeed_settings import (
    DeepSpeedPlan,
    SettingsError,
    have_deepspeed,
    read_deepspeed,
)

__all__ = [
    "DeepSpeedEngine",
    "DeepSpeedPlan",
    "ENGINES",
    "FSDPConfig",
    "SettingsError",
    "engines_of",
    "get_fsdp_config",
    "have_deepspeed",
    "read_deepspeed",
    "setup_ddp",
    "setup_model_with_ddp",
]

ENGINES = {**core.ENGINES, "deepspeed": DeepSpeedEngine}


def engines_of(plan: DeepSpeedPlan) -> dict:
    """What --parallel chooses from, with DeepSpeed as this plan has it."""
    return {**core.ENGINES, "deepspeed": engine_of(plan)}


# ---------------------------------------------------------------------------------------- FSDP

# name in torch's first FSDP -> (whether gathered weights are freed after a block's forward pass,
# which groups of ranks have a whole model each)
SHARDING = {
    "FULL_SHARD": (True, "one"),
    "SHARD_GRAD_OP": (False, "one"),
    "HYBRID_SHARD": (True, "several"),
    "_HYBRID_SHARD_ZERO2": (False, "several"),
    "NO_SHARD": (True, "each rank"),
}
POLICIES = {  # of activation checkpointing -> what is said about it
    "full": "",
    "contiguous": (
        'activation checkpointing "contiguous" is no policy of torch: taken as "full", which '
        "recomputes every block"
    ),
    "none": "",
}


@dataclass(frozen=True)
class FSDPConfig:
    """
    A sharding strategy and its options, checked; make one with get_fsdp_config.

    replicate: groups of ranks that each have the whole model, None for the default of the strategy.
    """

    sharding_strategy: str
    dtype: str
    activation_checkpointing: bool
    cpu_offload: bool
    replicate: int | None
    notes: tuple[str, ...] = ()

    def groups(self, world: int) -> int:
        """Groups of ranks that have a whole model each: by default one per node, or two."""
        kind = SHARDING[self.sharding_strategy][1]
        if kind == "each rank":
            return world
        if kind == "one":
            return 1
        nodes = world // int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return self.replicate or (nodes if nodes > 1 else 2)

    def run_settings(self, world: int | None = None) -> dict:
        """Settings of RunConfig on `world` ranks; None: as many as torchrun started."""
        world = world or int(os.environ.get("WORLD_SIZE", 1))
        return {
            "parallel": "fsdp",
            "reshard": SHARDING[self.sharding_strategy][0],
            "replicate": self.groups(world),
            "cpu_offload": self.cpu_offload,
            "activation_checkpointing": self.activation_checkpointing,
            "dtype": self.dtype,
        }


def get_fsdp_config(
    mixed_precision: bool | str = True,
    sharding_strategy: str = "FULL_SHARD",
    checkpoint_activation: bool = True,
    activation_checkpointing_policy: str = "contiguous",
    cpu_offload: bool = False,
    replicate: int | None = None,
) -> FSDPConfig:
    """
    How FSDP shards: weights, gradients and optimizer state, block by block.

    mixed_precision: products in 16 bits, bf16 where the device has it; False for fp32; or bf16,
    fp16, fp32, auto. Weights, gradients and optimizer state are fp32 either way. replicate is for
    HYBRID_SHARD and _HYBRID_SHARD_ZERO2. Raises SettingsError, a ValueError, with every problem.
    """
    problems = []
    for name, value, known in (
        ("sharding_strategy", sharding_strategy, SHARDING),
        ("activation_checkpointing_policy", activation_checkpointing_policy, POLICIES),
    ):
        if not isinstance(value, str) or value not in known:
            problems.append((name, unknown(value, known)))
    flags = {"checkpoint_activation": checkpoint_activation, "cpu_offload": cpu_offload}
    for name, value in flags.items():
        if not isinstance(value, bool):
            problems.append((name, f"{value!r:.60} is not true or false"))
    words = {True: "auto", False: "fp32"}
    dtype = words[mixed_precision] if isinstance(mixed_precision, bool) else mixed_precision
    if dtype not in ("auto", *DTYPES):
        known = ("true", "false", "auto", *DTYPES)
        problems.append(("mixed_precision", unknown(dtype, known)))
    if replicate is not None:
        if isinstance(replicate, bool) or not isinstance(replicate, int) or replicate < 1:
            problems.append(("replicate", f"{replicate!r:.60} is not a positive whole number"))
        elif str(sharding_strategy) in SHARDING and SHARDING[sharding_strategy][1] != "several":
            what = "is for HYBRID_SHARD and _HYBRID_SHARD_ZERO2; leave it out"
            problems.append(("replicate", f"{replicate} {what}"))
    if problems:
        raise SettingsError("fsdp_config", problems)
    recomputed = checkpoint_activation and activation_checkpointing_policy != "none"
    note = POLICIES[activation_checkpointing_policy] if recomputed else ""
    return FSDPConfig(
        sharding_strategy,
        dtype,
        recomputed,
        cpu_offload,
        replicate,
        (note,) if note else (),
    )


def unknown(value, known) -> str:
    """That a value is not one of the known ones, which they are, and the nearest."""
    near = difflib.get_close_matches(str(value).upper(), {str(k).upper() for k in known}, 1, 0.6)
    hint = next((f"; did you mean {k}?" for k in known if near and str(k).upper() == near[0]), "")
    return f"{value!r:.60} is not one of {', '.join(map(str, known))}{hint}"


# ----------------------------------------------------------------------------------------- DDP

BACKENDS = ("nccl", "gloo")
_ddp = {}  # what setup_ddp was asked for, and the models that were wrapped


def setup_ddp(backend: str = "nccl", find_unused_parameters: bool = False) -> torch.device:
    """
    Join the processes that torchrun started, or be the only one; returns the device of this rank.

    For a loop of your own: PretrainingOrchestrator does this itself. nccl is for GPUs, gloo for
    CPUs. find_unused_parameters is kept for setup_model_with_ddp: with it, parameters that take no
    part in a forward pass are found in each step; without it, such a parameter is an error.
    The trainer's own ddp engine keeps it on, though its models use every parameter: DDP otherwise
    reorders its gradient buckets after the first backward pass. A resumed run, whose first pass
    comes later, would from three ranks on add gradients in another order than the uninterrupted
    one, and not be bit-identical to it. Raises ValueError if the backend cannot be had.
    """
    import torch.distributed as dist

    if backend not in BACKENDS:
        raise ValueError(f"backend: {unknown(backend, BACKENDS)}")
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError('backend nccl: needs GPUs, and there is none here; give backend="gloo"')
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        if dist.get_backend() != backend:
            raise ValueError(
                f"backend {backend}: the processes are already joined by {dist.get_backend()}; "
                "call setup_ddp once"
            )
    elif "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not _ddp:
        atexit.register(_close_ddp)
    _ddp.update(device=device, find_unused_parameters=find_unused_parameters)
    return device


def setup_model_with_ddp(model: torch.nn.Module) -> torch.nn.Module:
    """
    The model on the device of this rank, inside DistributedDataParallel, as setup_ddp was told.

    Raises ValueError if setup_ddp was not called.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not _ddp:
        raise ValueError("setup_model_with_ddp: call setup_ddp first")
    device = _ddp["device"]
    wrapped = DistributedDataParallel(
        model.to(device),
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=_ddp["find_unused_parameters"],
    )
    _ddp.setdefault("models", []).append(wrapped)
    return wrapped


CLOSING_S = 30  # the longest wait for the other ranks at the end


def _close_ddp() -> None:
    """
    Drop what holds the group, then the group, or the process sometimes aborts at its end.

    All ranks come here first, unless this one ends with an error: DDP with find_unused_parameters
    does not wait for its last exchange.
    """
    import torch.distributed as dist

    if dist.is_initialized() and not hasattr(sys, "last_value"):
        with contextlib.suppress(RuntimeError):  # another rank ended with an error
            dist.barrier(async_op=True).wait(timedelta(seconds=CLOSING_S))
    for model in _ddp.pop("models", []):  # else the group's threads would outlive the interpreter
        model.reducer = model.logger = model.process_group = None
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
