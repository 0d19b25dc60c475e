"""
The loss of a language model, without its largest tensor.

50,257 logits in fp32 for each of 16,000 positions are 3.3 GB, and plain cross-entropy allocates them
three times. Here the logits are computed for some positions at a time and turned into their
gradient in place, so the gradients by the hidden states and by the head are ready when the loss
is. Wijmans et al. 2024 and Liger Kernel do this in GPU kernels.

Letters: N positions, C width, V vocabulary, n positions of one piece.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

HELD = 2**25  # logits that a CPU holds at once
IN_CACHE = 2**22  # of these, how many it takes through the softmax at once
TILE = 4096  # rows of the head whose gradient it adds at once
HELD_ON_GPU = 2**27  # logits that a GPU holds at once: large products, few kernels to launch

_one_kernel = None  # the softmax as compiled by compile_softmax


def compile_softmax(on: bool) -> None:
    """Compute the softmax, the loss and its gradient in one compiled function, or one by one."""
    global _one_kernel
    _one_kernel = torch.compile(_softmax_for_compiler, dynamic=False) if on else None


def cross_entropy_of_head(hidden, weight, targets, bias=None):
    """
    fp32 sum of the cross-entropy of logits = hidden @ weight.T + bias over targets not -100.

    hidden (N, C), weight (V, C), targets (N,) int64, bias (V,) or None; returns a scalar. Under autocast the products
    are in its dtype; the softmax is always in fp32. Equals F.cross_entropy of the whole logits, to
    rounding. It can be differentiated once.
    """
    dtype = _product_dtype(hidden)
    if not torch.is_grad_enabled():  # which an autograd.Function does not see in its inputs
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    if dtype == torch.float16:  # its gradient would have to be scaled before it is known by what
        logits = F.linear(hidden, _padded(weight, dtype))[:, : len(weight)].float()
        logits = logits if bias is None else logits + bias
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return _Blocked.apply(hidden, weight, targets, dtype, bias)


def head_bytes(N: int, C: int, V: int, dtype: torch.dtype, device: str) -> int:
    """
    Bytes that cross_entropy_of_head allocates for a moment, besides the gradient of the head.

    N positions, width C, vocabulary V; a device such as "cuda:1".
    """
    e = dtype.itemsize
    if dtype == torch.float16:
        return N * V * 3 * 4  # log-softmax, its gradient and that of the logits, in fp32
    width = V if e == 4 else -(-V // 64) * 64
    rows, few = _at_once(N, width, device == "cpu")
    return rows * width * e + few * width * 4 + (width * C * e if e < 4 else 0) + N * C * (e + 4)


def _at_once(N: int, V: int, on_cpu: bool) -> tuple[int, int]:
    """(positions whose logits are allocated at once, how many of these one softmax takes)."""
    if on_cpu:
        rows = -(-N // -(-N * V // HELD))
        return rows, max(1, min(rows, IN_CACHE // V))
    at_most = max(1, HELD_ON_GPU // V)
    rows = min(N, 1 << (at_most.bit_length() - 1))  # a power of two: pieces of one shape
    return rows, rows


def _product_dtype(hidden) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _padded(weight, dtype):
    """The head in the dtype of its products; in 16 bits padded with zeros to a multiple of 64 rows."""
    if dtype == torch.float32:
        return weight
    V, C = weight.shape
    w = torch.empty(-(-V // 64) * 64, C, dtype=dtype, device=weight.device)  # faster products
    w[:V] = weight
    w[V:] = 0
    return w


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, bias):
        with torch.autocast(hidden.device.type, enabled=False):
            needed = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[4])
            on_cpu = hidden.device.type == "cpu"
            tensors = (hidden, weight, targets, bias)
            loss, gradients = _loss_and_gradients(*tensors, dtype, on_cpu, *needed)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * of_loss
        if d_weight is not None:
            d_weight = d_weight.mul_(of_loss)
        if d_bias is not None:
            d_bias = d_bias * of_loss
        return d_hidden, d_weight, None, None, d_bias


def _loss_and_gradients(
    hidden, weight, targets, bias, dtype, on_cpu: bool, for_hidden, for_weight, for_bias
):
    """
    (loss, gradients by hidden, weight and bias): None for those that are not needed.

    Pieces are small on a CPU.
    """
    (N, C), V, device = hidden.shape, len(weight), hidden.device
    kept = targets != -100  # (N,)
    targets = targets.clamp(min=0)[:, None]  # (N, 1)
    h = hidden.detach().to(dtype) * kept[:, None]  # (N, C); rows of zeros add nothing to d_weight
    w = _padded(weight.detach(), dtype)  # (V or more, C)
    rows, few = _at_once(N, len(w), on_cpu)
    logits = torch.empty(rows, len(w), dtype=dtype, device=device)
    room = None if _one_kernel else torch.empty(few, len(w), device=device)
    softmax = _one_kernel or functools.partial(_softmax_in_place, room=room)
    loss = torch.zeros((), device=device)
    d_hidden = torch.empty(N, C, dtype=dtype, device=device) if for_hidden else None
    d_weight = torch.empty_like(weight) if for_weight else None
    d_bias = torch.zeros(V, device=device) if for_bias else None
    with_gradient = for_hidden or for_weight or for_bias
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        for first in range(start, stop, few):
            last = min(first + few, stop)
            z = logits[first - start : last - start]  # (n, V or more)
            torch.mm(h[first:last], w.T, out=z)
            if bias is not None:
                z[:, :V] += bias.detach()
            z[:, V:] = -torch.inf
            loss += softmax(z, targets[first:last], kept[first:last], with_gradient)
        z = logits[: stop - start]
        if for_hidden:
            torch.mm(z, w, out=d_hidden[start:stop])
        if for_weight:
            _add_product(d_weight, z[:, :V], h[start:stop], start == 0, on_cpu)
        if for_bias:
            z *= kept[start:stop, None]
            d_bias += z[:, :V].sum(dim=0, dtype=torch.float32)
    if for_hidden:
        d_hidden = d_hidden.mul_(kept[:, None]).to(hidden.dtype)
    if for_bias:
        d_bias = d_bias.to(bias.dtype)
    return loss, (d_hidden, d_weight, d_bias)


def _softmax_in_place(z, target, kept, gradient: bool, room):
    """
    fp32 sum of the cross-entropy of logits z (n, V) over the targets (n, 1) that are kept (n,).

    With `gradient`, z is replaced by the gradient of each row's own loss, also where it is not
    kept. `room` (n or more, V) in fp32 is overwritten.
    """
    p = room[: len(z)]
    torch.softmax(p.copy_(z), dim=1, out=p)
    # log of the sum of exponentials, from the most likely token, whose probability cannot vanish
    of_all = z.amax(dim=1).float() - p.amax(dim=1).log()
    loss = ((of_all - z.gather(1, target)[:, 0].float()) * kept).sum()
    if gradient:
        p.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
        z.copy_(p)
    return loss


def _softmax_for_compiler(z, target, kept, gradient: bool):
    """The same, written so that a compiler can fuse it: z is read twice and written once."""
    x = z.float()
    highest = x.amax(dim=1, keepdim=True)
    exponentials = (x - highest).exp()
    total = exponentials.sum(dim=1, keepdim=True)
    loss = ((highest + total.log() - x.gather(1, target))[:, 0] * kept).sum()
    if gradient:
        is_target = torch.arange(z.shape[1], device=z.device) == target
        z.copy_(exponentials / total - is_target.float())
    return loss


def _add_product(total, z, h, is_first: bool, on_cpu: bool) -> None:
    """Add z.T @ h to `total` (V, C) in fp32, or store it there. z (n, V), h (n, C)."""
    if not on_cpu and (z.dtype == total.dtype or _adds_in_fp32(z.device.type, z.dtype)):
        options = {} if z.dtype == total.dtype else {"out_dtype": total.dtype}
        torch.addmm(total, z.T, h, beta=0 if is_first else 1, out=total, **options)
        return
    tile = TILE if on_cpu else len(total)
    for row in range(0, len(total), tile):
        piece = torch.mm(z[:, row : row + tile].T, h)
        if is_first:
            total[row : row + tile].copy_(piece)
        else:
            total[row : row + tile].add_(piece)


@functools.cache
def _adds_in_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether one kernel adds a 16-bit product to an fp32 matrix here (on CUDA since torch 2.8)."""
    factor = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
