"""
LoRA (Hu et al. 2021): train two thin matrices beside each frozen weight, W + alpha / rank B A.

    add_lora(model, 16, 32.0, 0.05, (LlamaBlock,), seed=1)
    Job(model, weights=adapter_tensors, weights_file="adapter_model.safetensors", ...)

Every linear layer inside the blocks gets an adapter; embedding, norms and output head stay as they
are. B begins as zero, so the model begins as its base. On an NF4Linear (parts/model/nf4.py) this is
QLoRA. Files are those of the library peft: PeftModel.from_pretrained(base, folder) reads a folder
with adapter_tensors() in adapter_model.safetensors and adapter_config() in adapter_config.json.

The base's tensors have their own names but for a part "base_layer", which base_name() takes out.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.model.losses import product_dtype
from parts.model.nf4 import NF4Linear, linears, replace_module

KINDS = (nn.Linear, NF4Linear)  # layers that get an adapter
PREFIX = "base_model.model."  # before the name of a layer in peft's files


class LoRALinear(nn.Module):
    """
    A frozen linear layer with an adapter.

    It has no `weight` on purpose: code that would multiply by it, as nn.MultiheadAttention does,
    would leave the adapter out without a word.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        options = {"bias": False, "device": device, "dtype": torch.float32}
        # skip_init: its random numbers would be those of the global generator
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, rank, **options)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base.out_features, **options)

    @property
    def scaling(self) -> float:
        """What the product of the adapter is multiplied by."""
        return self.alpha / self.rank

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """A uniform as nn.Linear's weights, from a generator on the CPU; B zero."""
        A = torch.empty(self.lora_A.weight.shape)
        bound = 1 / math.sqrt(A.shape[1])
        self.lora_A.weight.copy_(A.uniform_(-bound, bound, generator=generator))
        self.lora_B.weight.zero_()

    def forward(self, x):
        """x (..., in) -> (..., out) in the dtype of the base's output."""
        y = self.base_layer(x)
        h = x.to(product_dtype(self.lora_A.weight))  # fp32, or autocast's
        h = self.lora_A(F.dropout(h, self.dropout, self.training))  # (..., rank)
        return y + self.lora_B(h * self.scaling).to(y.dtype)


def check_lora(rank: int, alpha: float, dropout: float) -> None:
    """Raises ValueError that names the setting (--lora_rank, ...) with a wrong value."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"--lora_rank: {rank!r} is not a whole number, at least 1; give 8 or 16")
    if not 0 < alpha < math.inf:
        raise ValueError(f"--lora_alpha: {alpha!r} is not a positive number; give 1 to 2 x rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"--lora_dropout: {dropout!r} is not in [0, 1); give 0 to 0.1")


def add_lora(model, rank: int, alpha: float, dropout: float, within, seed: int = 0) -> list[str]:
    """
    Freeze the model, and put an adapter on each linear layer in its blocks; returns their names.

    within: class of the blocks, or a tuple of them. seed: of the adapters' first weights. Random
    numbers of dropout come from torch's global generator. Raises ValueError for a wrong setting, a
    model that has adapters, or one without linear layers in such blocks.
    """
    check_lora(rank, alpha, dropout)
    if _adapted(model):
        raise ValueError("the model has LoRA adapters; merge them first, or load_adapters")
    found = linears(model, within, KINDS)
    if not found:
        raise ValueError("no block of the model has a linear layer to adapt; check `within`")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in found.items():
        adapted = LoRALinear(layer, rank, alpha, dropout).train(layer.training)
        if not adapted.lora_A.weight.is_meta:
            adapted.initialise(generator)
        replace_module(model, name, adapted)
    if dropout:
        for block in (m for m in model.modules() if isinstance(m, within)):
            block.draws_random = True  # for activation checkpointing: see engine.py
    return list(found)


def trainable_count(model, rank: int, within) -> int:
    """Numbers that adapters of this rank would train: rank x (in + out) of each layer."""
    layers = linears(model, within, KINDS).values()
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def base_name(name: str) -> str:
    """What a parameter or buffer of the base is called in the model without adapters."""
    return name.replace(".base_layer.", ".")


def _adapted(model) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


# ------------------------------------------------------------------------------ peft's files


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    """{name in peft's file: tensor} of all adapters. The tensors are the model's own."""
    return {
        f"{PREFIX}{name}.{kind}.weight": getattr(layer, kind).weight.detach()
        for name, layer in _adapted(model).items()
        for kind in ("lora_A", "lora_B")
    }


def load_adapters(model, tensors: dict[str, torch.Tensor]) -> None:
    """
    Put tensors named as in peft's file into the adapters of a model.

    Raises ValueError, and changes nothing, if one is missing, unexpected or of another shape.
    """
    own = adapter_tensors(model)
    _refuse(_differences({name: t.shape for name, t in own.items()}, tensors))
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def adapter_config(model, base: str) -> dict:
    """
    What peft's adapter_config.json holds for the adapters of a model.

    base: path or hub name of the base. Layers are named as briefly as they are unambiguous.
    """
    layers = _adapted(model)
    first = next(iter(layers.values()))
    targets = sorted({name.rpartition(".")[2] for name in layers})
    # peft takes every module whose name ends so, also outside the blocks
    if {n for n, _ in model.named_modules() if n.rpartition(".")[2] in targets} != set(layers):
        targets = list(layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }


# ----------------------------------------------------------------------------------- merging


def check_merge(shapes: dict[str, tuple], adapters: dict[str, torch.Tensor]) -> None:
    """
    Raises ValueError for adapters that do not fit a base with tensors of these names and shapes.

    adapters: as in peft's file.
    """
    expected = {}
    for name in adapters:
        layer = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        shape = shapes.get(f"{layer}.weight", ())
        if len(shape) == 2:
            rows, columns = shape
            A, B = (f"{PREFIX}{layer}.lora_{kind}.weight" for kind in "AB")
            rank = len(adapters[A]) if A in adapters else 0
            expected |= {A: (rank, columns), B: (rows, rank)}
    _refuse(_differences(expected, adapters))


def merged(name: str, weight, adapters: dict[str, torch.Tensor], scaling: float):
    """
    A tensor of the base with its adapter added, in its own dtype; any other tensor as it is.

    name: in the base's files. The sum is computed in fp32, from the base in 16 or 32 bits: a weight
    in 4 bits is another weight. scaling: alpha / rank. `check_merge` says whether all is used.
    """
    layer = PREFIX + name.removesuffix(".weight")
    A, B = (adapters.get(f"{layer}.lora_{kind}.weight") for kind in "AB")
    if A is None or B is None or not name.endswith(".weight"):
        return weight
    return (weight.float() + scaling * (B.float() @ A.float())).to(weight.dtype)


def _differences(expected: dict[str, tuple], tensors: dict) -> list[str]:
    """One phrase for each tensor that is missing, unexpected or of another shape."""
    found = [f"{name} is missing" for name in expected if name not in tensors]
    found += [f"{name} has no layer here" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != tuple(shape):
            found.append(f"{name} is {list(tensors[name].shape)} instead of {list(shape)}")
    return found


def _refuse(differences: list[str]) -> None:
    if differences:
        shown = "; ".join(differences[:3])
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"the adapters do not fit this model: {shown}{more}; use its own ones")
