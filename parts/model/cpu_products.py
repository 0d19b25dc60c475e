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


BLOCK = 128  # queries of one product, where a row is too long for all of them


def attends_in_products(device, dtype, T: int, dropout: float) -> bool:
    """
    Whether two matrix products and a softmax are faster than torch's attention kernel.

    So in bf16 on CPUs, where the kernel's backward pass takes three times as long. They keep
    (B, H, T, T) numbers, so not for long rows: see attends_in_blocks.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and T <= 512 and not dropout


def attends_in_blocks(device, dtype, T: int, dropout: float) -> bool:
    """
    Whether that is done for BLOCK queries at a time, with only the keys that the mask lets them
    read. torch's kernel computes all T x T scores if it is given a mask.

    Forward and backward of 2,048 positions in documents of 400, 8 heads, took 109 ms of one core
    instead of 420. Without a mask the kernel is as fast. A compiler would have to split the block
    of the model where numbers are read from the mask, so not if it compiles.
    """
    in_bf16 = device.type == "cpu" and dtype == torch.bfloat16
    return in_bf16 and T > 512 and not dropout and not torch.compiler.is_compiling()


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
    if n_keys == T and mask is not None and attends_in_blocks(q.device, q.dtype, T, dropout):
        return _InBlocks.apply(q, k, v, mask)
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


class _InBlocks(torch.autograd.Function):
    """As `attend` with a mask; the backward pass computes the shares again, so none are kept."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        ctx.save_for_backward(q, k, v, mask)
        ctx.blocks = _blocks_of_queries(q.shape[2], mask)
        y = torch.empty_like(q)
        for rows, keys in ctx.blocks:
            shares, _ = _shares(q, k, mask, rows, keys)
            y[:, :, rows] = (shares @ v[:, :, keys]).view_as(y[:, :, rows])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_y):
        q, k, v, mask = ctx.saved_tensors
        B, K, T, D = k.shape
        of_q = torch.empty_like(q)
        # sums over blocks, in fp32
        of_k, of_v = (torch.zeros(B, K, T, D, device=k.device) for _ in "kv")
        for rows, keys in ctx.blocks:
            shares, queries = _shares(q, k, mask, rows, keys)
            of_block = of_y[:, :, rows].reshape(B, K, -1, D)
            of_v[:, :, keys] += shares.transpose(2, 3) @ of_block
            of_shares = of_block @ v[:, :, keys].transpose(2, 3)
            of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, 3, shares.dtype)
            of_queries = (of_scores @ k[:, :, keys]) / math.sqrt(D)
            of_q[:, :, rows] = of_queries.view_as(of_q[:, :, rows])
            of_k[:, :, keys] += of_scores.transpose(2, 3) @ queries
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None


def _blocks_of_queries(T: int, mask) -> list[tuple[slice, slice]]:
    """(queries, the keys from the first to the last that one of them reads in any row)."""
    blocks = []
    for start in range(0, T, BLOCK):
        rows = slice(start, min(start + BLOCK, T))
        are_read = mask[..., rows, :].flatten(end_dim=-2).any(dim=0).nonzero()
        blocks.append((rows, slice(int(are_read[0]), int(are_read[-1]) + 1)))
    return blocks


def _shares(q, k, mask, rows: slice, keys: slice):
    """
    How much each of these queries reads of each of these keys; and the queries, scaled.

    (B, K, H / K n, keys) and (B, K, H / K n, D): the query heads of one key head are further rows.
    """
    B, H, _, D = q.shape
    K, n, n_keys = k.shape[1], rows.stop - rows.start, keys.stop - keys.start
    is_read = mask[..., rows, keys]
    if mask.ndim == 4:
        is_read = is_read[:, :, None]  # (B, 1, 1, n, keys)
    queries = (q[:, :, rows] / math.sqrt(D)).reshape(B, K, -1, D)
    # a softmax of bf16 is computed in fp32, and returned in bf16
    with torch.autocast(q.device.type, enabled=False):
        scores = (queries @ k[:, :, keys].transpose(2, 3)).view(B, K, H // K, n, n_keys)
        shares = scores.masked_fill_(~is_read, -math.inf).softmax(dim=4)
    return shares.view(B, K, -1, n_keys), queries
