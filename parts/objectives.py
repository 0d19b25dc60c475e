"""
The loss of a language model, without its largest tensor.

50,257 logits in fp32 for each of 16,000 positions are 3.3 GB, and plain cross-entropy holds them three times. Here
the logits are computed for a few positions at a time, and turned into their gradient in place: what is passed on to the
hidden states and to the head is finished when the loss is (Wijmans et al. 2024, and Liger Kernel, do this in GPU kernels).

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
    """From now on the softmax, the loss and its gradient are one compiled kernel, or (on=False) torch's own one by one."""
    global _one_kernel
    _one_kernel = torch.compile(_softmax_for_compiler, dynamic=False) if on else None


def cross_entropy_of_head(hidden, weight, targets):
    """
    fp32 sum of the cross-entropy of logits = hidden @ weight.T over the targets that are not -100, a scalar.

    hidden (N, C), weight (V, C), targets (N,) int64. Under autocast the products are in its dtype, the softmax is in fp32
    always. The same numbers as F.cross_entropy of the whole logits, to rounding; it can be differentiated once.
    """
    dtype = _product_dtype(hidden)
    if not torch.is_grad_enabled():  # a Function is told what requires a gradient, not whether one is wanted
        hidden, weight = hidden.detach(), weight.detach()
    if dtype == torch.float16:  # its gradient would have to be scaled before it is known by what
        logits = F.linear(hidden, _padded(weight, dtype))[:, : len(weight)]
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return _Blocked.apply(hidden, weight, targets, dtype)


def head_bytes(N: int, C: int, V: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that cross_entropy_of_head holds for a moment, besides the gradient of the head; a device such as "cuda"."""
    e = dtype.itemsize
    if dtype == torch.float16:
        return N * V * 3 * 4  # in the backward pass: the logarithms of the softmax, their gradient, and that of the logits
    width = V if e == 4 else -(-V // 64) * 64
    rows, few = _at_once(N, width, device == "cpu")
    return rows * width * e + few * width * 4 + (width * C * e if e < 4 else 0) + N * C * (e + 4)


def _at_once(N: int, V: int, on_cpu: bool) -> tuple[int, int]:
    """Positions whose logits' gradient is held at once, and of these, those that are in the softmax."""
    if on_cpu:
        rows = -(-N // -(-N * V // HELD))
        return rows, max(1, min(rows, IN_CACHE // V))
    rows = min(N, 1 << max(0, (HELD_ON_GPU // V).bit_length() - 1))  # a power of two: pieces of one shape, whole tiles
    return rows, rows


def _product_dtype(hidden) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _padded(weight, dtype):
    """The head in the dtype of its products; in 16 bits with rows of zeros up to a multiple of 64, where they are faster."""
    if dtype == torch.float32:
        return weight
    V, C = weight.shape
    w = torch.empty(-(-V // 64) * 64, C, dtype=dtype, device=weight.device)
    w[:V] = weight
    w[V:] = 0
    return w


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        with torch.autocast(hidden.device.type, enabled=False):
            on_cpu, wanted = hidden.device.type == "cpu", ctx.needs_input_grad[:2]
            loss, d_hidden, d_weight = _loss_and_gradients(hidden, weight, targets, dtype, on_cpu, *wanted)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden if d_hidden is None else d_hidden * of_loss, d_weight if d_weight is None else d_weight.mul_(of_loss), None, None


def _loss_and_gradients(hidden, weight, targets, dtype, on_cpu: bool, for_hidden: bool, for_weight: bool):
    """(loss, its gradient by hidden or None, its gradient by weight or None); small pieces on_cpu, large ones elsewhere."""
    (N, C), V, device = hidden.shape, len(weight), hidden.device
    kept, targets = targets != -100, targets.clamp(min=0)[:, None]  # (N,), (N, 1)
    h = hidden.detach().to(dtype) * kept[:, None]  # (N, C); a row of zeros adds nothing to the gradient of the head
    w = _padded(weight.detach(), dtype)  # (V or a few more, C)
    rows, few = _at_once(N, len(w), on_cpu)
    logits = torch.empty(rows, len(w), dtype=dtype, device=device)
    softmax = _one_kernel or functools.partial(_softmax_in_place, room=torch.empty(few, len(w), device=device))
    loss = torch.zeros((), device=device)
    d_hidden = torch.empty(N, C, dtype=dtype, device=device) if for_hidden else None
    d_weight = torch.empty_like(weight) if for_weight else None
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        for first in range(start, stop, few):
            last = min(first + few, stop)
            z = logits[first - start : last - start]  # (n, V or a few more)
            torch.mm(h[first:last], w.T, out=z)
            z[:, V:] = -torch.inf
            loss += softmax(z, targets[first:last], kept[first:last], for_hidden or for_weight)
        z = logits[: stop - start]
        if for_hidden:
            torch.mm(z, w, out=d_hidden[start:stop])
        if for_weight:
            _add_product(d_weight, z[:, :V], h[start:stop], start == 0, on_cpu)
    if for_hidden:
        d_hidden = d_hidden.mul_(kept[:, None]).to(hidden.dtype)
    return loss, d_hidden, d_weight


def _softmax_in_place(z, target, kept, gradient: bool, room):
    """
    fp32 sum of the cross-entropy of logits z (n, V) over the targets (n, 1) that are kept (n,).

    With `gradient`, z becomes the gradient of that sum by it, kept or not. `room` (n or more, V) fp32 is overwritten.
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
    """The same without room, as a compiler likes it: it reads z twice and writes it once."""
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
    """Add z.T @ h to `total` (V, C) in fp32, or begin with it. z (n, V) and h (n, C) may be in 16 bits."""
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
    """Whether one kernel adds a product of 16-bit matrices to an fp32 matrix here; torch has it on CUDA since 2.8."""
    factor, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
