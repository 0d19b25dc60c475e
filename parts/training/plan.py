"""
Before the first step: parameters, operations, memory, disk and time of a GPT, by arithmetic on its shape. Nothing is built here.

Which tensors the forward pass leaves for the backward one is counted from the code of gpt_train.py; a test compares the count
with what autograd keeps, and the sum with the memory of real runs (docs/benchmarks.md).
Letters as everywhere: B rows, T positions, C width, H heads, V vocabulary, L layers; bytes are bytes, GB are 10^9 of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from parts.base.units import format_bytes

BYTES = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
}  # of a number in a product; weights, their gradients and moments are fp32 always
HOLES = 0.17  # of what a step holds on a CPU: room between the blocks of a heap that keeps what is freed (0.1 to 0.3 measured)


def parameters_by_part(config) -> dict[str, int]:
    """Trainable numbers of a GPT of this shape (a GPTConfig), by part; tied weights once. The sum is `count_parameters`."""
    C, L = config.n_embd, config.n_layer
    parts = {"token embedding": config.vocab_size * C, "positions": config.block_size * C}
    parts |= {
        "attention": L * (4 * C * C + 4 * C),
        "MLP": L * (8 * C * C + 5 * C),
        "norms": (2 * L + 1) * 2 * C,
    }
    return parts if config.tied else parts | {"head": config.vocab_size * C}


def count_parameters(config) -> int:
    """Trainable numbers in a GPT of this shape, tied ones once, without building it."""
    return sum(parameters_by_part(config).values())


def flops_per_token(config) -> int:
    """
    Floating-point operations to train on one token at full context, forward and backward.

    6 per weight of a matrix product (the head is one, looking up embeddings is none) and 12 L C T for
    attention scores and values. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    c = config
    n_weights = count_parameters(c) - (c.block_size + (0 if c.tied else c.vocab_size)) * c.n_embd
    return 6 * n_weights + 12 * c.n_layer * c.n_embd * c.block_size


@dataclass(frozen=True)
class Setting:
    """What decides about the memory of a step, besides the shape of the model."""

    batch_size: int  # rows per micro-batch
    grad_accum_steps: int = 1  # micro-batches per step
    dtype: str = "fp32"  # of the products
    optimizer: str = "adamw"
    activation_checkpointing: bool = False
    device: str = "cpu"  # such as cpu, mps or cuda:1
    parallel: str = "none"  # none, ddp or fsdp
    world: int = 1  # processes
    cpu_offload: bool = False  # weights, gradients and optimizer state lie in the CPU's memory
    keeps_copy: bool = False  # a copy of what goes into a checkpoint lies in the CPU's memory
    # attention as two products and a softmax, whose (B, H, T, T) probabilities are kept
    attends_in_products: bool = False


def activation_bytes(config, s: Setting) -> int:
    """Bytes that the forward pass of one micro-batch leaves for the backward pass, without the head's gradient."""
    T, C, H, L, e = config.block_size, config.n_embd, config.n_head, config.n_layer, BYTES[s.dtype]
    n = s.batch_size * T  # positions
    stream, squares = (
        4 * n * C,
        s.batch_size * H * T * T,
    )  # the residual stream is fp32; one number per pair of positions
    # the stream before each norm, its mean and deviation; what goes into four products; the MLP's 4 C before GELU; query, key, value
    block = 2 * stream + 4 * 4 * n + (1 + 1 + 1 + 4 + 4 + 3) * e * n * C
    if config.dropout:
        block += 2 * e * n * C  # masks
    if s.attends_in_products:
        block += e * squares + T * T
    elif (
        config.dropout and s.device == "cpu"
    ):  # no kernel of torch's has dropout there: scores, mask and product in fp32
        block += 3 * 4 * squares + (3 * e * n * C if e < 4 else 0)
    else:
        block += 4 * n * H  # the logarithm of each row's sum
    block += 12 * C * C * e if e < 4 else 0  # autocast's copies of the weights
    ends = (
        2 * stream + 16 * n + (stream if config.dropout else 0)
    )  # before and behind the last norm; token ids; the first mask
    return ends + (L * stream + block if s.activation_checkpointing else L * block)


def memory(config, s: Setting, optimizer_bytes: int, logits_bytes: int) -> dict[str, int]:
    """
    Bytes of one process while it trains, by part, and "peak": the most of them at one time, on the device of the training.

    optimizer_bytes: its state for the whole model; logits_bytes: what the head and its loss
    allocate for a moment. The peak is at the end of the forward pass (all activations and logits,
    the gradient of the head, gradients of earlier micro-batches) or of the backward pass (all
    gradients).
    """
    C, weights = config.n_embd, 4 * count_parameters(config)
    slices, exchange = s.world if s.parallel == "fsdp" else 1, 0
    head = 4 * config.vocab_size * C  # its gradient is computed in the forward pass
    # gradients of earlier micro-batches: fsdp too keeps them whole until it exchanges the last one
    earlier = weights if s.grad_accum_steps > 1 else 0
    gradients = max(earlier, weights // slices)
    if s.parallel == "ddp":  # buckets, allocated at the start; gradients are views of them at last
        exchange, earlier = earlier, earlier + weights
    elif s.parallel == "fsdp":
        exchange = 2 * (
            head + 2 * 4 * 12 * C * C
        )  # whole weights, and gradients, of the embedding and two blocks
    copy = weights + optimizer_bytes if s.keeps_copy else 0
    parts = {
        "weights": weights // slices,
        "gradients": gradients,
        "optimizer": optimizer_bytes // slices,
    }
    parts |= {"activations": activation_bytes(config, s), "logits": logits_bytes}
    parts |= {"exchange": exchange} if exchange else {}
    if s.cpu_offload and s.device != "cpu":
        parts |= {"weights": 0, "gradients": earlier, "optimizer": 0}
    state = parts["weights"] + parts["optimizer"] + (exchange if s.parallel == "fsdp" else 0)
    if copy and s.device == "cpu":
        parts["copy for checkpoints"] = copy
        state += copy
    parts["peak"] = state + max(
        earlier + head + parts["activations"] + logits_bytes, parts["gradients"]
    )
    if (
        s.device == "cpu" and not s.activation_checkpointing
    ):  # the heap is kept, see keep_freed_memory
        parts["holes in the heap"] = int(
            HOLES * (parts["peak"] - parts.get("copy for checkpoints", 0))
        )
        parts["peak"] += parts["holes in the heap"]
    return parts


def ways_to_fit(s: Setting, limit: float, peak_of) -> list[str]:
    """
    Flags with which a step of as many rows takes at most `limit` bytes: smaller micro-batches, which is the same step; the same with
    blocks that are computed twice; the same with an optimizer that remembers less, which is another step.

    peak_of(setting) -> bytes. Empty where nothing of that suffices.
    """
    ways = []
    for name, value in (
        (None, None),
        ("activation_checkpointing", True),
        ("optimizer", "galore"),
        ("optimizer", "muon"),
    ):
        if name and getattr(s, name) == value or (name == "optimizer" and s.parallel == "fsdp"):
            continue
        changed = replace(s, **{name: value}) if name else s
        B, accum = changed.batch_size, changed.grad_accum_steps
        while (
            peak_of(replace(changed, batch_size=B, grad_accum_steps=accum)) > limit and B % 2 == 0
        ):
            B, accum = B // 2, accum * 2
        if peak_of(replace(changed, batch_size=B, grad_accum_steps=accum)) <= limit:
            flags = [f"--batch_size {B} --grad_accum_steps {accum}"] if s.batch_size != B else []
            flags += [f"--{name}" if value is True else f"--{name} {value}"] if name else []
            ways.append(" ".join(flags))
    return ways


def seconds_of(
    call, of_all=lambda seconds: seconds, at_most_s: float = 20.0, times: int = 3
) -> float:
    """
    Seconds that call() takes: the shortest of a few after a first one; the first one's where that takes too long to repeat.

    of_all: seconds here -> one figure for all processes, which then call equally often.
    """
    best, total = float("inf"), 0.0
    for i in range(1 + times):
        started = time.perf_counter()
        call()
        took = of_all(time.perf_counter() - started)
        best, total = min(best, took) if i > 1 else took, total + took
        if total + took > at_most_s:
            break
    return best


def memory_lines(
    config, parts: dict[str, int], limit: float, where: str, ways: list[str]
) -> list[str]:
    """Two lines for people: parameters by part; memory by part against the `limit` bytes of the device `where`, and what would fit."""
    by_part = ", ".join(f"{name} {n:,}" for name, n in parameters_by_part(config).items())
    bytes_by_part = ", ".join(
        f"{name} {format_bytes(n)}" for name, n in parts.items() if name != "peak"
    )
    lines = [f"parameters: {count_parameters(config):,} ({by_part})"]
    verdict = (
        f"fits the {format_bytes(limit)} of {where}"
        if parts["peak"] <= limit
        else f"does NOT fit the {format_bytes(limit)} of {where}"
    )
    lines.append(
        f"memory: at most {format_bytes(parts['peak'])} at one time, {verdict} ({bytes_by_part})"
    )
    if parts["peak"] > limit:
        none = "no flag makes it fit: take a smaller model, or --parallel fsdp on several devices"
        lines.append(
            f"what would fit, with pretraining_advanced.py: {'; or '.join(ways)}" if ways else none
        )
    return lines
