"""
Matrix products of a few rows, which is what sampling computes, the fastest way on CPUs.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    """nn.Linear that computes with `product`."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        return product(x, self.weight, self.bias)


def product(x, weight, bias=None):
    """
    F.linear: x (..., in) times weight (out, in), plus bias (out,).

    Up to eight rows on a CPU take another route. Each weight is read for so little arithmetic that
    memory bandwidth decides: MKL reads 16 GB/s for x W^T of one row, and 35 to 39 of 41 GB/s for
    W x^T of two to four, a single row doubled (two cores of an EPYC, 2304 x 768). Not so if `in` is
    the longer side.
    """
    n = x.numel() // x.shape[-1]  # rows
    small = 0 < n <= 8 and weight.shape[0] >= weight.shape[1]
    if torch.is_grad_enabled() or not (small and _multiplies_in_mkl(x, weight)):
        return F.linear(x, weight, bias)
    parts = []
    for rows in x.reshape(n, -1).split(4):
        doubled = rows if len(rows) > 1 else rows.repeat(2, 1)
        parts.append(torch.mm(weight, doubled.t())[:, : len(rows)])  # (out, up to 4)
    y = torch.cat(parts, dim=1).t()  # (n, out)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


def _multiplies_in_mkl(x, weight) -> bool:
    """Whether the product is one of MKL: in fp32, on a CPU."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32 and torch.backends.mkl.is_available()
