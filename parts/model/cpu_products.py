"""
Matrix products and attention, the fastest way on CPUs; elsewhere they are torch's own.

    Linear, product    products of a few rows, which is what sampling computes
    attend             attention in bf16, which is what training on a CPU computes
"""

from __future__ import annotations

import math

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


def attends_in_products(device, dtype, T: int, dropout: float) -> bool:
    """
    Whether two matrix products and a softmax are faster than torch's attention kernel.

    So in bf16 on CPUs, where the kernel's backward pass takes three times as long.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and T <= 512 and not dropout


def attend(q, k, v, mask=None, dropout: float = 0.0):
    """
    Scaled dot-product attention of q (B, H, T, D), k and v (B, K, keys, D) -> (B, H, T, D).

    mask, bool (T, keys) or (B, 1, T, keys): the keys that each query reads. None: each query reads
    the keys up to its own if there are as many, and a single query all keys. H is a multiple of K;
    so many query heads share a key head. dropout: share of the attention zeroed.
    """
    T, n_keys = q.shape[2], k.shape[2]
    if n_keys == T and attends_in_products(q.device, q.dtype, T, dropout):
        return _attend_in_products(q, k, v, mask)
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": mask is None and T > 1}
    if k.shape[1] != q.shape[1]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, v, **options)


def _attend_in_products(q, k, v, mask):
    """As `attend`, for as many keys as queries; keeps (B, H, T, T) numbers."""
    B, H, T, D = q.shape
    K = k.shape[1]
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    elif mask.ndim == 4:
        mask = mask[:, :, None]  # (B, 1, 1, T, T)
    # a softmax of bf16 is computed in fp32, and returned in bf16
    with torch.autocast(q.device.type, enabled=False):
        # the query heads of one key head are further rows of its product
        scores = (q / math.sqrt(D)).reshape(B, K, -1, D) @ k.transpose(2, 3)
        scores = scores.view(B, K, H // K, T, T).masked_fill(~mask, -math.inf)
        y = scores.softmax(dim=4).view(B, K, -1, T) @ v
    return y.view(B, H, T, D)
