"""
The loss of a language model, without its largest tensor.

50,257 logits in fp32 for each of 16,000 positions take 3.3 GB, and plain cross-entropy allocates
them three times. Here the logits of some positions at a time are computed and turned into their
gradient in place, so the gradients of hidden states and head are ready as soon as the loss is.
Wijmans et al. 2024 and Liger Kernel do this in GPU kernels.

Letters: N positions, C width, V vocabulary, n positions of one piece.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

HELD = 2**25  # logits that a CPU holds at once
IN_CACHE = 2**22  # of these, how many go through the softmax at once
TILE = 4096  # rows of the head whose gradient is added at once
HELD_ON_GPU = 2**27  # logits that a GPU holds at once: large products, few kernels to launch

_one_kernel = None  # the softmax as compiled by compile_softmax


def compile_softmax(on: bool) -> None:
    """Compute softmax, loss and gradient in one compiled function, or one by one."""
    global _one_kernel
    _one_kernel = torch.compile(_softmax_for_compiler, dynamic=False) if on else None


def cross_entropy_of_head(hidden, weight, targets, bias=None):
    """
    fp32 sum of the cross-entropy of hidden @ weight.T + bias over targets that are not -100.

    hidden (N, C), weight (V, C), targets (N,) int64, bias (V,) or None; returns a scalar. Under
    autocast the products are in its dtype; the softmax is always in fp32. Equals F.cross_entropy of
    the whole logits, to rounding. It can be differentiated once.
    """
    dtype = product_dtype(hidden)
    if not torch.is_grad_enabled():  # which an autograd.Function does not see in its inputs
        hidden, weight = hidden.detach(), weight.detach()
        bias = bias if bias is None else bias.detach()
    if dtype == torch.float16:  # the factor of the loss, which scales its gradient, comes too late
        added = bias if bias is None else _padded(bias, dtype)
        logits = F.linear(hidden, _padded(weight, dtype), added)[:, : len(weight)]
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return _Blocked.apply(hidden, weight, targets, bias, dtype)


def head_bytes(
    N: int, C: int, V: int, dtype: torch.dtype, device: str, stored: torch.dtype = torch.float32
) -> int:
    """
    Bytes that cross_entropy_of_head allocates temporarily, besides the gradient of the head.

    N positions, width C, vocabulary V, no bias; dtype of the products, and the one that the head is
    stored in; a device such as "cuda:1".
    """
    e = dtype.itemsize
    if dtype == torch.float16:
        return N * V * 3 * 4  # log-softmax, its gradient and that of the logits, in fp32
    width = V if e == 4 else -(-V // 64) * 64
    rows, softmax_rows = _at_once(N, width, device == "cpu")
    copied = e < 4 and (stored != dtype or V % 64)
    copy = width * C * e if copied else 0  # of the head
    return rows * width * e + softmax_rows * width * 4 + copy + N * C * (e + 4)


def _at_once(N: int, V: int, on_cpu: bool) -> tuple[int, int]:
    """(positions whose logits are held at once, how many of them go through one softmax)."""
    if on_cpu:
        rows = -(-N // -(-N * V // HELD))
        return rows, max(1, min(rows, IN_CACHE // V))
    at_most = max(1, HELD_ON_GPU // V)
    rows = min(N, 1 << (at_most.bit_length() - 1))  # a power of two: all pieces have one shape
    return rows, rows


def product_dtype(x) -> torch.dtype:
    """The dtype of matrix products with x: autocast's, or that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _padded(head, dtype):
    """
    Weight (V, C) or bias (V,) of the head in the dtype of its products.

    In 16 bits V is padded to a multiple of 64 with zeros, which makes the products faster. A frozen
    head that is so already is not copied: of a 7B model that is 1 GB.
    """
    if dtype == torch.float32 or (head.dtype == dtype and len(head) % 64 == 0):
        return head
    V, *C = head.shape
    padded = torch.empty(-(-V // 64) * 64, *C, dtype=dtype, device=head.device)
    padded[:V] = head
    padded[V:] = 0
    return padded


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, dtype):
        wanted = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
        with torch.autocast(hidden.device.type, enabled=False):
            options = (dtype, hidden.device.type == "cpu", wanted, bias)
            loss, *gradients = _loss_and_gradients(hidden, weight, targets, *options)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * of_loss,
            None if d_weight is None else d_weight.mul_(of_loss),
            None,
            None if d_bias is None else d_bias * of_loss,
            None,
        )


def _loss_and_gradients(hidden, weight, targets, dtype, on_cpu, wanted, bias=None):
    """
    The loss and its gradients by hidden, weight and bias: each that is `wanted`, else None.

    on_cpu: compute in small pieces, as a CPU does.
    """
    for_hidden, for_weight, for_bias = wanted
    (N, C), V, device = hidden.shape, len(weight), hidden.device
    kept = targets != -100  # (N,)
    targets = targets.clamp(min=0)[:, None]  # (N, 1)
    h = hidden.detach().to(dtype) * kept[:, None]  # (N, C); rows of zeros add nothing to d_weight
    w = _padded(weight.detach(), dtype)  # (V or more, C)
    if bias is None:
        product = torch.mm
    else:
        product = functools.partial(torch.addmm, _padded(bias.detach().to(dtype), dtype))
    rows, softmax_rows = _at_once(N, len(w), on_cpu)
    logits = torch.empty(rows, len(w), dtype=dtype, device=device)
    room = None if _one_kernel else torch.empty(softmax_rows, len(w), device=device)
    softmax = _one_kernel or functools.partial(_softmax_in_place, room=room)
    loss = torch.zeros((), device=device)
    d_hidden = torch.empty(N, C, dtype=dtype, device=device) if for_hidden else None
    d_weight = torch.empty_like(weight) if for_weight else None
    d_bias = torch.zeros(V, device=device) if for_bias else None
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        for first in range(start, stop, softmax_rows):
            last = min(first + softmax_rows, stop)
            z = logits[first - start : last - start]  # (n, V or more)
            product(h[first:last], w.T, out=z)
            z[:, V:] = -torch.inf
            loss += softmax(z, targets[first:last], kept[first:last], any(wanted))
            if for_bias:  # in fp32, piece by piece while they are in the cache
                d_bias += z.mul_(kept[first:last, None])[:, :V].sum(dim=0, dtype=torch.float32)
        z = logits[: stop - start]
        if for_hidden:
            torch.mm(z, w, out=d_hidden[start:stop])
        if for_weight:
            _add_product(d_weight, z[:, :V], h[start:stop], start == 0, on_cpu)
    if for_hidden:
        d_hidden = d_hidden.mul_(kept[:, None]).to(hidden.dtype)
    if for_bias:
        d_bias = d_bias.to(bias.dtype)
    return loss, d_hidden, d_weight, d_bias


def _softmax_in_place(z, target, kept, gradient: bool, room):
    """
    fp32 sum of the cross-entropy of logits z (n, V) over the targets (n, 1) that are kept (n,).

    With `gradient`, z becomes the gradient of each row's own loss, also in rows that are not kept.
    `room` (n or more, V) in fp32 is overwritten.
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
    """_softmax_in_place as a compiler can fuse it: z is read twice and written once."""
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
