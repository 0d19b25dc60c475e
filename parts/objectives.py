"""
The loss of a language model, without its largest tensor.

50,257 logits in fp32 for each of 16,000 positions are 3.3 GB, and plain cross-entropy holds them three times. Here the logits are
computed for a few positions at a time, and turned into their gradient where they lie: what goes back to the hidden
states and to the head is finished when the loss is (Wijmans et al. 2024, and Liger Kernel, do this in GPU kernels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

HELD = 2**25  # logits whose gradient is held at once
IN_CACHE = 2**22  # of these, how many a CPU takes through the softmax at once
TILE = 4096  # rows of the head whose gradient is added at once


def cross_entropy_of_head(hidden, weight, targets):
    """
    fp32 sum of the cross-entropy of logits = hidden @ weight.T over the targets that are not -100, a scalar.

    hidden (N, C), weight (V, C), targets (N,) int64. Under autocast the products are in its dtype, the softmax is in fp32
    always. The same numbers as F.cross_entropy of the whole logits, to rounding; it can be differentiated once.
    """
    dtype = _product_dtype(hidden)
    if dtype == torch.float16:  # its gradient would have to be scaled before it is known by what
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum")
    return _Blocked.apply(hidden, weight, targets, dtype)


def head_bytes(N: int, C: int, V: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that cross_entropy_of_head holds for a moment, besides the gradient of the head: N positions, device by its type."""
    e = dtype.itemsize
    if dtype == torch.float16:
        return N * V * 3 * 4  # in the backward pass: the logarithms of the softmax, their gradient, and that of the logits
    width = V if e == 4 else -(-V // 64) * 64
    rows, few = _at_once(N, width, device)
    return rows * width * e + few * width * 4 + (width * C * e if e < 4 else 0) + N * C * (e + 4)


def _at_once(N: int, V: int, device: str) -> tuple[int, int]:
    """Positions whose logits' gradient is held at once, and of these, those that are in the softmax."""
    rows = -(-N // -(-N * V // HELD))
    return rows, max(1, min(rows, IN_CACHE // V)) if device == "cpu" else rows


def _product_dtype(hidden) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        with torch.autocast(hidden.device.type, enabled=False):
            loss, d_hidden, d_weight = _loss_and_gradients(hidden, weight, targets, dtype, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden if d_hidden is None else d_hidden * of_loss, d_weight if d_weight is None else d_weight.mul_(of_loss), None, None


def _loss_and_gradients(hidden, weight, targets, dtype, for_hidden: bool, for_weight: bool):
    (N, C), V, device = hidden.shape, len(weight), hidden.device
    kept, targets = targets != -100, targets.clamp(min=0)[:, None]
    h, w = hidden.detach().to(dtype), weight.detach()
    if dtype != weight.dtype:  # cast once, with rows of zeros: the products are faster at multiples of 64, and nobody else sees them
        w = torch.empty(-(-V // 64) * 64, C, dtype=dtype, device=device)
        w[:V], w[V:] = weight.detach(), 0
    rows, few = _at_once(N, len(w), device.type)
    logits = torch.empty(rows, len(w), dtype=dtype, device=device)
    probabilities = torch.empty(few, len(w), device=device)
    loss = torch.zeros((), device=device)
    d_hidden = torch.empty(N, C, dtype=dtype, device=device) if for_hidden else None
    d_weight = torch.empty_like(weight) if for_weight else None
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        for first in range(start, stop, few):
            last = min(first + few, stop)
            z, p, target = logits[first - start : last - start], probabilities[: last - first], targets[first:last]
            torch.mm(h[first:last], w.T, out=z)  # (n, V)
            z[:, V:] = -torch.inf
            torch.softmax(p.copy_(z), dim=1, out=p)
            # log of the sum of exponentials, from the most likely token, whose probability cannot vanish
            of_all = z.amax(dim=1).float() - p.amax(dim=1).log()
            loss += ((of_all - z.gather(1, target)[:, 0].float()) * kept[first:last]).sum()
            if for_hidden or for_weight:
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                z.copy_(p)  # now the gradient of the logits
        z, n_kept = logits[: stop - start], kept[start:stop, None]
        if for_hidden:
            d_hidden[start:stop] = torch.mm(z, w) * n_kept
        for row in range(0, V if for_weight else 0, TILE):
            tile, piece = d_weight[row : row + TILE], torch.mm(z[:, row : min(row + TILE, V)].T, h[start:stop] * n_kept)
            tile.copy_(piece) if start == 0 else tile.add_(piece)
    return loss, None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight
