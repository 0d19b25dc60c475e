"""
DeepSpeed as one more engine of the core: its ZeRO, our loop, our checkpoints.

    engine_class = engine_of(plan)          # a subclass for this plan; see deepspeed_settings.py
    run(config, make_job, {**ENGINES, "deepspeed": engine_class})

DeepSpeed is imported when a model is prepared, not before. Tested on CPUs with DeepSpeed 0.19.8 and
torch 2.13; not yet on GPUs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from functools import partial

import torch

from parts.training.engine import Engine
from parts.training.optim import BETAS, EPS, AdamW
from recipes.orchestrator.deepspeed_settings import DeepSpeedPlan, have_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")


class ClientAdamW(torch.optim.AdamW):
    """
    AdamW as DeepSpeed's ZeRO calls it: on this rank's part of all parameters, in one or more calls.

    DeepSpeed cannot be told to leave an update out once gradients are reduced, but this optimizer
    can: divisor() is what the gradients are divided by, and None leaves the update out.
    `applied`: whether weights were updated since it was last set to False.
    """

    def __init__(self, groups: list[dict], divisor):
        super().__init__(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)
        self.divisor = divisor
        self.applied = False

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the parameters that are in the groups now."""
        divisor = self.divisor()
        if divisor is None:
            return
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        torch._foreach_div_([grad for grad in grads if grad is not None], divisor)
        super().step()
        self.applied = True


class DeepSpeedEngine(Engine):
    """
    deepspeed: ZeRO stages 0 to 3 of DeepSpeed (Rajbhandari et al. 2020), where it is installed.

    `plan` says which. Weights stay fp32, and bf16 or fp16 is the format of the products, as under
    the core's engines, so that checkpoints resume under each of them and on any number of ranks.
    Each rank makes the whole model in CPU memory before DeepSpeed takes its part.
    """

    name = "deepspeed"
    needs_torchrun = True
    shards = True
    plan = DeepSpeedPlan()

    def __init__(self, ranks, dtype: torch.dtype):
        self.lockstep = self.plan.stage == 3  # a forward pass gathers weights
        super().__init__(ranks, dtype)
        self.exchanging = True  # stages 2 and 3 reduce each micro-batch
        self.deepspeed = self.client = None
        self.offload, self.max_norm, self.veto = False, 0.0, False

    def memory_like(self, reshard: bool) -> tuple[str, bool]:
        """As Engine.memory_like. Stage 1 has whole gradients too, as fsdp while it accumulates."""
        return ("fsdp" if self.plan.stage else "ddp"), self.plan.stage == 3

    def check_options(self, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """Raises ValueError if DeepSpeed is not installed, or for options that it does not have."""
        if not have_deepspeed():
            raise ValueError("--parallel deepspeed: is not installed; pip install deepspeed")
        if cpu_offload and not self.plan.stage:
            raise ValueError("--cpu_offload: ZeRO stage 0 offloads nothing; give stage 1, 2 or 3")
        super().check_options(False, reshard, replicate)

    # ------------------------------------------------------------------------------ prepare

    def wrap_blocks(self, model, blocks, activation_checkpointing, compile_blocks) -> None:
        """As Engine.wrap_blocks. Raises ValueError if a compiled block would gather weights."""
        if compile_blocks and self.plan.stage == 3:
            raise ValueError(
                "--compile: in ZeRO stage 3 a block gathers weights, which the compiler cannot do; "
                "leave it out, or give stage 0, 1 or 2"
            )
        super().wrap_blocks(model, blocks, activation_checkpointing, compile_blocks)

    def place(self, model, blocks, cpu_offload: bool, reshard: bool, replicate: int) -> None:
        """DeepSpeed moves the model to its device, see `wrap`."""
        self.offload = cpu_offload

    def wrap(self, model):
        """What is called in training: the model inside DeepSpeed's engine."""
        if self.ranks.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
        import deepspeed

        # the names of torch that DeepSpeed calls in every step are deprecated from torch 2.13 on
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated")
        # the shared-memory operation serves inference; without it no compiler is needed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        parts = self.optimizer.parts
        if len(parts) != 1 or not isinstance(parts[0], AdamW):
            raise ValueError("--parallel deepspeed: needs AdamW; use another engine for this job")
        parts[0].state.clear()  # moments of whole parameters
        groups = [
            {name: group[name] for name in ("params", "weight_decay")}
            for group in parts[0].param_groups
            if group["params"]
        ]
        self.client = ClientAdamW(groups, self._divisor)
        self._autocast_inside(model)
        with _only_errors(deepspeed.utils.logger):  # else: "an untested optimizer", which is ours
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self.client, config=self.plan.engine_config(self.offload)
            )
        self.ranks.before_closing.append(self._release)
        self._make_state()
        if self.plan.stage == 3:
            model.register_state_dict_post_hook(_show_whole_tensors)
        return self._call

    def _release(self) -> None:
        """End DeepSpeed before the group, or the process aborts."""
        self.deepspeed.destroy()
        self.model = self.deepspeed = self.client = None

    def _autocast_inside(self, model) -> None:
        """DeepSpeed's engine switches off an autocast that began outside; begin it inside."""
        forward = model.forward

        def forward_in_autocast(*args, **kwargs):
            with self.autocast():
                return forward(*args, **kwargs)

        model.forward = forward_in_autocast

    def _call(self, *args, **kwargs):
        with torch.autocast(self.ranks.device.type, enabled=False):
            return self.deepspeed(*args, **kwargs)

    @property
    def zero(self):
        """DeepSpeed's optimizer around ours; None in stage 0."""
        return self.deepspeed.optimizer if self.plan.stage else None

    def _parts(self) -> list:
        """The tensors that the client optimizer updates on this rank."""
        if self.plan.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return [p for group in self.client.param_groups for p in group["params"]]

    def _make_state(self) -> None:
        """Zero state, as torch would make it in the first step: a checkpoint may come before."""
        for p in self._parts():
            self.client.state[p] = {"step": torch.zeros((), device=p.device)}
            self.client.state[p] |= {name: torch.zeros_like(p) for name in MOMENTS}
        if self.plan.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()  # shows them to safe_get_*

    # ----------------------------------------------------------------------------- one step

    def accumulate(self, loss_fn, batch: dict, n_targets: float, last: bool) -> torch.Tensor:
        """As Engine.accumulate; `last` is DeepSpeed's accumulation boundary."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        with self.autocast():
            loss = loss_fn(self.model, batch)
        scaled = loss * (self.ranks.world / n_targets) * self.scale
        self.deepspeed.backward(scaled, scale_wrt_gas=False)
        return loss.detach()

    def discard(self) -> None:
        """Nothing: gradients are reduced by then, and the run ends (see `exchanging`)."""

    def read(self, total) -> float:
        """As Engine.read, but for the norm: from stage 1 on DeepSpeed computes it in its step."""
        return total.item() if self.plan.stage else super().read(total)

    def step(self, lr: float, max_norm: float, veto: bool = False) -> tuple[float, bool]:
        """As Engine.step."""
        self.max_norm, self.veto = max_norm, veto
        for group in self.client.param_groups:
            group["lr"] = lr
        self.client.applied = False
        self.deepspeed.step()
        if self.plan.stage:
            self.norm = float(self.deepspeed.get_global_grad_norm()) / self.scale
        self.adapt_scale()
        return self.norm, self.client.applied

    def _divisor(self) -> float | None:
        """What clips and unscales the gradients of this step; None leaves it out."""
        norm = float(self.zero._global_grad_norm) / self.scale if self.zero else self.norm
        if self.veto or not math.isfinite(norm):
            return None
        clip = max(1.0, (norm + 1e-6) / self.max_norm) if self.max_norm else 1.0
        return self.scale * clip

    # -------------------------------------------------------------------------- checkpoints

    def whole(self, named: dict):
        """As Engine.whole; of a stand-in (see below), what it stands for."""
        for name, tensor in named.items():
            if hasattr(tensor, "gathered"):
                tensor = tensor.gathered()
            elif tensor.numel() == 0 and self.plan.stage == 3:
                raise RuntimeError(f"{name}: is sharded; Job.weights must ask model.state_dict()")
            if self.ranks.rank == 0:
                yield name, tensor

    def state(self) -> tuple[dict, dict]:
        """As Engine.state: the same names and shapes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors = {}
        n_steps = self.client.state[self._parts()[0]]["step"].cpu()
        for p, name in self.optimizer.names.items():
            tensors[f"{name}|step"] = n_steps.clone()
            for moment in MOMENTS:
                if self.plan.stage:
                    get = partial(safe_get_full_optimizer_state, p, moment)
                    tensors[f"{name}|{moment}"] = stand_in(p, get)
                else:
                    tensors[f"{name}|{moment}"] = self.client.state[p][moment]
        return tensors, {"optimizer_numbers": {}, "loss_scale": self.loss_scale}

    def load(self, weights: dict, tensors: dict, numbers: dict, with_optimizer: bool) -> None:
        """As Engine.load: the model's own values, and the fp32 copies that ZeRO updates."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        gathered = deepspeed.zero.GatheredParameters
        for name, tensor in self.ranks.share_tensors(tensors):
            tensor = tensor.to(self.ranks.device)
            if name not in weights:
                if with_optimizer:
                    self._load_moment(name, tensor)
                continue
            own = getattr(weights[name], "parameter", weights[name])
            with torch.no_grad(), gathered([own], 0, enabled=hasattr(own, "ds_id")):
                own.copy_(tensor)
            if hasattr(own, "ds_id"):
                safe_set_full_fp32_param(own, tensor)
        if self.plan.stage in (1, 2):
            for p in self.optimizer.names:
                safe_set_full_fp32_param(p, p.data)
        if with_optimizer:
            self.optimizer.load_state_dict(numbers["optimizer_numbers"])
        self.loss_scale = self.loss_scale and (numbers["loss_scale"] or self.loss_scale)

    def _load_moment(self, key: str, tensor) -> None:
        """Put one tensor of the optimizer's state back. Raises ValueError if it does not fit."""
        from deepspeed.utils import safe_set_full_optimizer_state

        name, _, entry = key.rpartition("|")
        p = next((p for p, own in self.optimizer.names.items() if own == name), None)
        shape = () if entry == "step" else getattr(p, "ds_shape", getattr(p, "shape", None))
        if p is None or entry not in ("step", *MOMENTS) or tensor.shape != shape:
            raise ValueError(
                f"optimizer state {key}: has shape {list(tensor.shape)}, which does not fit this "
                "model; use a checkpoint of this model"
            )
        if entry == "step":  # one count for all of them
            for part in self._parts():
                self.client.state[part]["step"].copy_(tensor)
        elif self.plan.stage:
            safe_set_full_optimizer_state(p, tensor, entry)
        else:
            self.client.state[p][entry].copy_(tensor)


@contextlib.contextmanager
def _only_errors(logger):
    """Leave the warnings of a logger out."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def stand_in(p, gathered):
    """
    A tensor of the whole shape of a sharded parameter, without memory.

    Its gathered() is the value, for which all ranks must call it; its `parameter` is p.
    """
    tensor = torch.zeros((), dtype=p.dtype).expand(getattr(p, "ds_shape", p.shape))
    tensor.gathered, tensor.parameter = gathered, p
    return tensor


def _show_whole_tensors(model, state_dict: dict, prefix: str, _) -> None:
    """Stage 3 keeps empty tensors in the model; show whole ones in its state_dict."""
    for name, p in model.named_parameters(remove_duplicate=False):
        state_dict[prefix + name] = stand_in(p, partial(_gather, p))


def _gather(p):
    """The whole value of a parameter of stage 3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def engine_of(plan: DeepSpeedPlan) -> type[DeepSpeedEngine]:
    """The engine of this plan."""
    return type("DeepSpeedEngine", (DeepSpeedEngine,), {"plan": plan})
