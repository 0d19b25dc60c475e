"""
DeepSpeed's JSON, checked: what it means for a run, and what it asks for that is not done.

    plan = read_deepspeed("ds_config.json", micro_batch=4, accumulation=2, world=8)
    plan.run_settings(native=not have_deepspeed())

Keys are those of https://www.deepspeed.ai/docs/config-json/. A key is taken over, or says the same
as the trainer does anyway, or only changes what DeepSpeed prints or how it divides its messages,
and a note says so; every other one is a problem.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parts.training.optim import BETAS, EPS

MAX_BYTES = 1_000_000  # of a JSON file; the largest published ones have 3 kB
AUTO = "auto"  # Hugging Face's word for: as the rest of the configuration says
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# keys of zero_optimization that change how DeepSpeed divides memory and messages, not the result
TUNING = {
    "allgather_bucket_size": int,
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "overlap_comm": bool,
    "reduce_bucket_size": int,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_gather_16bit_weights_on_model_save": bool,
    "stage3_gather_fp16_weights_on_model_save": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_param_persistence_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "sub_group_size": int,
}
OF_SCALE = (
    *("auto_cast", "consecutive_hysteresis", "hysteresis", "initial_scale_power"),
    *("loss_scale_window", "min_loss_scale"),
)
PRINTED = ("dump_state", "memory_breakdown", "steps_per_print", "wall_clock_breakdown")
# keys that mean nothing else than what is done anyway if they have this value
USUAL = {
    "communication_data_type": ("fp32",),
    "dataloader_drop_last": (True, False),
    "disable_allgather": (False,),
    "gradient_predivide_factor": (1, 1.0),
    "prescale_gradients": (False,),
    "sparse_gradients": (False,),
    "zero_allow_untested_optimizer": (True, False),
    "zero_force_ds_cpu_optimizer": (True, False),
}
# blocks that are off unless they have "enabled": true -> what does the same here
OFF = {
    "amp": "take bf16 or fp16",
    "autotuning": "try settings with --validate",
    "comms_logger": "leave it out",
    "compression_training": "leave it out",
    "csv_monitor": "metrics.jsonl has every step",
    "curriculum_learning": "leave it out",
    "data_efficiency": "leave it out",
    "elasticity": "a run resumes on another number of ranks anyway",
    "flops_profiler": "the trainer reports MFU itself",
    "tensorboard": "set tensorboard in the run's own settings",
    "torch_autocast": "take bf16 or fp16, which mean the same here",
    "wandb": "set use_wandb in the run's own settings",
}
# what is known and not done -> what to do
NOT_DONE = {
    "aio": "nothing is offloaded to NVMe; leave it out",
    "checkpoint": "checkpoints are the trainer's own; leave it out",
    "scheduler": "the schedule is the trainer's; give training.lr_scheduler and warmup_steps",
    "sparse_attention": "attention is dense; leave it out",
    "hybrid_engine": "is for reinforcement learning; leave it out",
    "pipeline": "there is no pipeline parallelism; leave it out",
    "tensor_parallel": "there is no tensor parallelism; leave it out",
}
NOT_DONE_IN_ZERO = {
    "mics_shard_size": "use strategy fsdp with HYBRID_SHARD",
    "zero_hpz_partition_size": "use strategy fsdp with HYBRID_SHARD",
    "zero_quantized_gradients": "gradients are exchanged as they are; leave it out",
    "zero_quantized_weights": "weights are gathered as they are; leave it out",
    "zenflow": "leave it out",
}
KNOWN = {
    *BATCH,
    *PRINTED,
    *USUAL,
    *OFF,
    *NOT_DONE,
    *("activation_checkpointing", "bf16", "data_types", "fp16"),
    *("gradient_clipping", "optimizer", "zero_optimization"),
}
IN_ZERO = {*TUNING, *NOT_DONE_IN_ZERO, "offload_optimizer", "offload_param", "stage"}


class SettingsError(ValueError):
    """
    Everything that is wrong with a block of settings, in one line.

    problems: (path, what) of each, such as ("zero_optimization.stage", "4 is not 0, 1, 2 or 3"); an
    empty path is the whole block.
    """

    def __init__(self, source: str, problems: list[tuple[str, str]]):
        self.problems = problems
        lines = [f"{path}: {what}" if path else what for path, what in problems]
        super().__init__(f"{source}: {'; '.join(lines)}")


@dataclass(frozen=True)
class DeepSpeedPlan:
    """
    What a DeepSpeed configuration means for a run.

    stage: of ZeRO; offload: optimizer state and its step in CPU memory; dtype: of the products, or
    None if the file leaves it to the run; clip: largest norm of the gradient, 0 for no limit, None
    if the file leaves it to the run; tuning: keys of zero_optimization that are handed to
    DeepSpeed as they are; notes: what of the file is not used, and why that is no loss.
    """

    stage: int = 0
    offload: bool = False
    dtype: str | None = None
    clip: float | None = None
    tuning: Mapping = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def run_settings(self, native: bool) -> dict:
        """
        Settings of RunConfig: under DeepSpeed's own engine, or `native`, the core's engines.

        ZeRO 0 is ddp; 1 and 2 are fsdp that keeps gathered weights (1 would keep whole gradients
        too, for nothing); 3 is fsdp.
        """
        settings = {"cpu_offload": self.offload}
        if native:
            settings["parallel"] = "fsdp" if self.stage else "ddp"
            settings["reshard"] = self.stage not in (1, 2)
        else:
            settings["parallel"] = "deepspeed"
        if self.dtype:
            settings["dtype"] = self.dtype
        if self.clip is not None:
            settings["max_grad_norm"] = self.clip
        return settings

    def notes_of(self, native: bool) -> list[str]:
        """What a user should be told about how this configuration runs."""
        notes = list(self.notes)
        if native:
            means = {0: "ddp", 3: "fsdp (FULL_SHARD)"}.get(self.stage, "fsdp (SHARD_GRAD_OP)")
            offload = " with cpu_offload" if self.offload else ""
            notes.insert(
                0,
                f"DeepSpeed is not installed: ZeRO stage {self.stage} runs as {means}{offload}; "
                "pip install deepspeed to run DeepSpeed itself",
            )
            if self.tuning:
                names = ", ".join(sorted(self.tuning))
                notes.append(f"zero_optimization.{{{names}}}: of DeepSpeed's own engine, not used")
        elif self.dtype in ("bf16", "fp16"):
            notes.append(
                f"{self.dtype}: products are {self.dtype}; weights and their gradients stay fp32, "
                "as under ddp and fsdp"
            )
        return notes

    def engine_config(self, offload: bool) -> dict:
        """
        The configuration for deepspeed.initialize.

        Batch sizes, clipping, formats and the learning rate are the trainer's. Two accumulation
        steps stand for any number, since the trainer sets the boundary itself; with one, some
        versions of DeepSpeed keep no buffer to accumulate in.
        """
        zero = {**self.tuning, "stage": self.stage}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # absent, some versions clip to 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
            "steps_per_print": None,
        }


def have_deepspeed() -> bool:
    """Whether `deepspeed` can be imported; it is not imported for that."""
    return importlib.util.find_spec("deepspeed") is not None


def read_deepspeed(source, micro_batch: int, accumulation: int, world: int) -> DeepSpeedPlan:
    """
    The plan of a DeepSpeed configuration, a dict or the path of a JSON file.

    micro_batch: rows per rank; accumulation: micro-batches per step; world: ranks. Raises
    SettingsError with every problem at once; FileNotFoundError if there is no such file.
    """
    where = "deepspeed_config" if isinstance(source, Mapping) else str(source)
    found = _Reader(where)
    config = source if isinstance(source, Mapping) else found.load(Path(source))
    plan = found.plan(config, micro_batch, accumulation, world)
    if found.problems:
        raise SettingsError(where, found.problems)
    return plan


class _Reader:
    """Collects problems and notes while it reads."""

    def __init__(self, where: str):
        self.where = where
        self.problems: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def load(self, path: Path):
        """The JSON of a file. Raises SettingsError if it is not JSON, FileNotFoundError."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such DeepSpeed configuration")
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(str(path), [("", f"is larger than {MAX_BYTES:,} bytes")])
        try:
            return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)
        except (ValueError, RecursionError) as e:
            raise SettingsError(str(path), [("", f"is not JSON: {e}")]) from e

    def bad(self, path: str, what: str) -> None:
        self.problems.append((path, what))

    def plan(self, config, micro_batch: int, accumulation: int, world: int) -> DeepSpeedPlan:
        """The plan; what is wrong goes to `problems`."""
        if not isinstance(config, Mapping):
            self.bad("", f"is {type(config).__name__}, not a block of keys")
            return DeepSpeedPlan()
        self.unknown("", config, KNOWN)
        self.batch(config, micro_batch, accumulation, world)
        for name in (name for name in NOT_DONE if name in config):
            self.bad(name, NOT_DONE[name])
        for name in (name for name in OFF if name in config):
            if self.enabled(config, name):
                self.bad(f"{name}.enabled", f"is not done; {OFF[name]}")
        for name, usual in USUAL.items():
            value = config.get(name, AUTO)
            same = [word for word in usual if word == value and type(word) is type(value)]
            if value not in (AUTO, None) and not same:
                shown = " or ".join(json.dumps(word) for word in usual)
                self.bad(name, f"{_shown(value)} is not done; give {shown}, or leave it out")
        if printed := [name for name in PRINTED if name in config]:
            self.notes.append(f"{', '.join(printed)}: the trainer prints its own figures")
        self.optimizer(config)
        self.recomputation(config)
        stage, offload, tuning = self.zero(config)
        dtype, clip = self.dtype(config), self.clip(config)
        return DeepSpeedPlan(stage, offload, dtype, clip, tuning, tuple(self.notes))

    # ------------------------------------------------------------------------- its parts

    def unknown(self, path: str, block: Mapping, known) -> None:
        """A problem for each key that DeepSpeed does not have, with the nearest name."""
        prefix = f"{path}." if path else ""
        for name in (name for name in block if name not in known):
            near = difflib.get_close_matches(str(name), [*known], 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            self.bad(f"{prefix}{str(name)[:60]}", f"unknown, or not done here; {hint}")

    def block(self, config: Mapping, name: str) -> Mapping:
        """A block of keys; {} if it is absent or something else, which is a problem."""
        value = config.get(name)
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.bad(name, f"{_shown(value)} is not a block of keys")
        return {}

    def enabled(self, config: Mapping, name: str) -> bool | str:
        """The word `enabled` of a block: a boolean or "auto"."""
        value = self.block(config, name).get("enabled", False)
        if isinstance(value, bool) or value == AUTO:
            return value
        self.bad(f"{name}.enabled", f'{_shown(value)} is not true, false or "auto"')
        return False

    def batch(self, config: Mapping, micro_batch: int, accumulation: int, world: int) -> None:
        """train_batch_size = micro-batch x accumulation x ranks, as the run has them."""
        product = micro_batch * accumulation * world
        sum_of = f"{micro_batch} rows x {accumulation} micro-batches x {world} ranks"
        wanted = dict(zip(BATCH, (product, micro_batch, accumulation), strict=True))
        for name, right in wanted.items():
            value = config.get(name, AUTO)
            if value == AUTO:
                continue
            if not _is_count(value):
                self.bad(name, f'{_shown(value)} is not a positive whole number or "auto"')
            elif value != right and name == "train_batch_size":
                self.bad(name, f"{value}, but the run has {sum_of} = {product}")
            elif value != right:
                self.bad(name, f"{value}, but the run has {right}")

    def dtype(self, config: Mapping) -> str | None:
        """bf16, fp16 or fp32; None if one is "auto"."""
        on = {name: self.enabled(config, name) for name in ("bf16", "fp16")}
        self.unknown("bf16", self.block(config, "bf16"), {"enabled"})
        fp16 = self.block(config, "fp16")
        self.unknown("fp16", fp16, {"enabled", "loss_scale", *OF_SCALE})
        if fp16.get("loss_scale", 0) not in (0, AUTO):
            shown = _shown(fp16["loss_scale"])
            self.bad("fp16.loss_scale", f"{shown} is a fixed scale; give 0, which adapts it")
        if scale := [name for name in OF_SCALE if name in fp16]:
            self.notes.append(f"fp16.{{{', '.join(scale)}}}: the trainer's own loss scale is used")
        if on["bf16"] is True and on["fp16"] is True:
            self.bad("bf16, fp16", "both are enabled; choose one")
        types = self.block(config, "data_types")
        self.unknown("data_types", types, {"grad_accum_dtype"})
        if types.get("grad_accum_dtype") not in (None, AUTO, "fp32"):
            self.bad("data_types.grad_accum_dtype", 'gradients are added up in fp32; give "fp32"')
        for name in on:
            if on[name] is True:
                return name
        return None if AUTO in on.values() else "fp32"

    def clip(self, config: Mapping) -> float | None:
        """gradient_clipping; None if it is absent or "auto"."""
        value = config.get("gradient_clipping", AUTO)
        if value == AUTO:
            return None
        if not _is_number(value) or value < 0:
            self.bad("gradient_clipping", f'{_shown(value)} is not a number from 0 up, or "auto"')
            return None
        return float(value)

    def zero(self, config: Mapping) -> tuple[int, bool, dict]:
        """(stage, offload, tuning) of zero_optimization."""
        path = "zero_optimization"
        block = self.block(config, path)
        self.unknown(path, block, IN_ZERO)
        for name in (name for name in NOT_DONE_IN_ZERO if block.get(name)):
            self.bad(f"{path}.{name}", f"is not done; {NOT_DONE_IN_ZERO[name]}")
        stage = block.get("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            self.bad(f"{path}.stage", f"{_shown(stage)} is not 0, 1, 2 or 3")
            stage = 0
        offload = self.device(block, f"{path}.offload_optimizer") == "cpu"
        if offload and not stage:
            self.bad(f"{path}.offload_optimizer", "stage 0 offloads nothing; give stage 1, 2 or 3")
        if self.device(block, f"{path}.offload_param") == "cpu":
            self.bad(
                f"{path}.offload_param.device",
                "weights are not offloaded under DeepSpeed; leave it out, or use strategy fsdp "
                "with cpu_offload",
            )
        tuning = {}
        for name, kind in TUNING.items():
            value = block.get(name, AUTO)
            if value in (AUTO, None):
                continue
            right = isinstance(value, bool) if kind is bool else _is_number(value) and value >= 0
            if right:
                tuning[name] = value if kind is bool else int(value)
            else:
                what = "true or false" if kind is bool else "a number from 0 up"
                self.bad(f"{path}.{name}", f'{_shown(value)} is not {what}, or "auto"')
        return int(stage), offload, tuning

    def device(self, zero: Mapping, path: str) -> str:
        """The device of an offload block, "none" if it is absent or wrong."""
        name = path.rpartition(".")[2]
        value = zero.get(name)
        if value is None:
            return "none"
        if not isinstance(value, Mapping):
            self.bad(path, f"{_shown(value)} is not a block of keys")
            return "none"
        self.unknown(path, value, {"device", "pin_memory", "fast_init", "nvme_path"})
        device = value.get("device", "cpu")
        if device == "nvme":
            self.bad(f"{path}.device", 'nothing is offloaded to NVMe; give "cpu" or "none"')
        elif device not in ("cpu", "none"):
            self.bad(f"{path}.device", f'{_shown(device)} is not "cpu" or "none"')
        else:
            return device
        return "none"

    def optimizer(self, config: Mapping) -> None:
        """Its block must describe the trainer's AdamW, or leave values to the run."""
        block = self.block(config, "optimizer")
        if not block:
            return
        self.unknown("optimizer", block, {"type", "params"})
        kind = block.get("type", "AdamW")
        if str(kind).lower() not in ("adam", "adamw"):
            self.bad("optimizer.type", f"{_shown(kind)} is not done under DeepSpeed; give AdamW")
        params = self.block(block, "params")
        known = {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam"}
        self.unknown("optimizer.params", params, known)
        for name, setting in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if params.get(name, AUTO) != AUTO:
                path, shown = f"optimizer.params.{name}", _shown(params[name])
                self.bad(path, f'{shown} belongs to training.{setting}; give "auto" here')
        fixed = {"betas": list(BETAS), "eps": EPS, "adam_w_mode": True}
        for name, right in fixed.items():
            value = params.get(name, AUTO)
            value = list(value) if isinstance(value, tuple) else value
            if value not in (AUTO, right):
                path = f"optimizer.params.{name}"
                self.bad(path, f'{_shown(value)}; the trainer has {json.dumps(right)}; give "auto"')

    def recomputation(self, config: Mapping) -> None:
        """DeepSpeed's activation checkpointing acts on models that call it, which ours do not."""
        name = "activation_checkpointing"
        for key, value in self.block(config, name).items():
            if value not in (False, None):
                where = "use the run's own activation_checkpointing"
                self.bad(f"{name}.{str(key)[:60]}", f"{_shown(value)} has no effect here; {where}")


def _no_twins(pairs: list) -> dict:
    """A JSON object. Raises ValueError if a key is there twice: which one holds is a guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twins = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twins)[:100]} is given twice")
    return found


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shown(value) -> str:
    """A value as JSON has it, cut to one short line."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
