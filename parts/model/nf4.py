"""
Weights in 4 bits, to train adapters on a model that would not fit otherwise (QLoRA).

    quantise_linears(model, (LlamaBlock,))    every linear layer of the blocks becomes an NF4Linear
    numbers = quantise(weight)                a weight as codes and scales: 0.516 bytes a parameter
    dequantise(*numbers, shape, dtype)        and back, 9 % off for normally distributed weights

NF4 (Dettmers et al. 2023, QLoRA): 64 neighbouring numbers share a scale, their largest magnitude,
and each is the nearest of 16 levels, which are quantiles of a normal distribution. The scales are
quantised as well: to int8, 256 of them sharing a scale in fp32, after the mean of all is subtracted
(double quantisation). Codes equal those of bitsandbytes. Everything is a pure function of the
weight: nothing is packed anew when the model evaluates.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.model.losses import product_dtype

BLOCK = 64  # numbers that share a scale
GROUP = 256  # scales that share a scale
# The levels, as published with QLoRA: quantiles of a normal distribution, 0 among them.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38  # a scale of zero is replaced by this one as a divisor


class Quantised(NamedTuple):
    """A weight of n numbers in NF4. All tensors but the codes are small."""

    codes: torch.Tensor  # (blocks * BLOCK / 2,) uint8: two levels per byte, the first one higher
    scales: torch.Tensor  # (groups, GROUP) int8: of the blocks
    scale_of_scales: torch.Tensor  # (groups,) fp32
    offset: torch.Tensor  # () fp32: mean of the scales


def quantise(weight, name: str = "weight") -> Quantised:
    """
    A weight of any shape and float dtype in NF4; numbers past its end are zeros.

    Raises ValueError with the name of the weight if a number is not finite.
    """
    flat = weight.detach().reshape(-1).float()
    if not flat.is_meta and not flat.isfinite().all():
        raise ValueError(f"{name}: has numbers that are not finite; quantise intact weights")
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)  # (blocks,)
    levels = torch.tensor(LEVELS, device=flat.device)
    # times the reciprocal, as bitsandbytes has it: a quotient rounds to other codes at times
    relative = blocks * (1 / largest.clamp(min=SMALLEST))[:, None]
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    pairs = codes.to(torch.uint8).view(-1, 2)
    offset = largest.double().mean().float()  # the sum may overflow fp32
    groups = F.pad(largest - offset, (0, -len(largest) % GROUP)).view(-1, GROUP)
    scale_of_scales = groups.abs().amax(dim=1) / 127
    scales = (groups / scale_of_scales.clamp(min=SMALLEST)[:, None]).round().to(torch.int8)
    return Quantised(pairs[:, 0] * 16 + pairs[:, 1], scales, scale_of_scales, offset)


def level_pairs(device) -> torch.Tensor:
    """The two levels (256, 2) of each byte of codes: one look-up gives two numbers."""
    return torch.tensor(list(itertools.product(LEVELS, LEVELS)), device=device)


def dequantise(codes, scales, scale_of_scales, offset, shape, dtype, pairs=None):
    """
    The weight of this shape and dtype that the tensors of a Quantised stand for.

    pairs: what level_pairs gives, to spare it.
    """
    pairs = level_pairs(codes.device) if pairs is None else pairs
    blocks = F.embedding(codes.int(), pairs).view(-1, BLOCK)  # fp32
    largest = (scales * scale_of_scales[:, None]).flatten()[: len(blocks)] + offset
    # beside blocks a thousand times larger, a scale may round to less than zero
    blocks *= largest.clamp(min=0)[:, None]
    return blocks.view(-1)[: math.prod(shape)].view(shape).to(dtype)


class NF4Linear(nn.Module):
    """
    An nn.Linear whose weight is frozen and held in NF4; its bias is frozen, and as it was.

    The weight is dequantised in each forward pass and again in the backward pass, so no more than
    one layer's is in memory. state_dict() has the tensors of Quantised under their names.
    """

    def __init__(self, linear: nn.Linear, name: str = "weight"):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for kind, tensor in quantise(linear.weight, name)._asdict().items():
            self.register_buffer(kind, tensor)
        self.register_buffer("pairs", level_pairs(self.codes.device), persistent=False)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def numbers(self) -> Quantised:
        """The weight as quantised tensors."""
        return Quantised(self.codes, self.scales, self.scale_of_scales, self.offset)

    def weight(self, dtype: torch.dtype = torch.float32):
        """The weight (out, in) that products are computed with."""
        shape = (self.out_features, self.in_features)
        return dequantise(*self.numbers, shape, dtype, self.pairs)

    def forward(self, x):
        """x (..., in) -> (..., out), in autocast's dtype, or in that of x."""
        x = x.to(product_dtype(x))
        y = _Product.apply(x, *self.numbers, self.pairs, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        """As nn.Module, but model.to(torch.bfloat16) rounds no scale."""
        exact = {name: t for name, t in self.named_buffers() if t.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self


class _Product(torch.autograd.Function):
    """x (..., in) times a quantised weight; only the quantised one is kept for the backward."""

    @staticmethod
    def forward(ctx, x, codes, scales, scale_of_scales, offset, pairs, out_features):
        numbers = (codes, scales, scale_of_scales, offset)
        ctx.save_for_backward(*numbers, pairs)
        ctx.shape = (out_features, x.shape[-1])
        return F.linear(x, dequantise(*numbers, ctx.shape, x.dtype, pairs))

    @staticmethod
    def backward(ctx, of_y):
        *numbers, pairs = ctx.saved_tensors
        of_x = of_y @ dequantise(*numbers, ctx.shape, of_y.dtype, pairs)
        return of_x, None, None, None, None, None, None


def quantise_linears(model, within) -> list[str]:
    """
    Replace every nn.Linear inside the blocks of a model by its NF4Linear; returns their names.

    within: class of the blocks, or a tuple of them. A single block may be the model, so that a
    large one is quantised while it is read. Raises ValueError as `quantise`.
    """
    found = linears(model, within, nn.Linear)
    for name, linear in found.items():
        replace_module(model, name, NF4Linear(linear, f"{name}.weight"))
    return list(found)


def linears(model, within, kinds) -> dict[str, nn.Module]:
    """
    {name: layer} of the layers of these classes inside the blocks of class `within`.

    The thin layers of adapters (parts/model/lora.py) are not among them.
    """
    blocks = [module for module in model.modules() if isinstance(module, within)]
    inside = {id(module) for block in blocks for module in block.modules()}
    found = {n: m for n, m in model.named_modules() if id(m) in inside and isinstance(m, kinds)}
    return {name: m for name, m in found.items() if not name.endswith((".lora_A", ".lora_B"))}


def replace_module(model, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
