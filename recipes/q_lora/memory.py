"""
What LoRA, QLoRA and full training take, from the shape of a model: nothing is read or built.

    lines, fits = plan_lines(shape, setting, "qlora", rank=16, dropout=0.1)

Frozen weights are in 16 bits (of QLoRA, in NF4 inside the blocks), what is trained is in fp32 with
its gradient and AdamW's two moments. parts/training/plan.py counts full training. A test compares
the count of activations with what autograd keeps. A GB is 10^9 bytes.

Letters: B rows, T positions, C width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from parts.base.dtypes import DTYPES
from parts.base.machine import free_memory
from parts.base.units import format_bytes
from parts.model.cpu_products import attends_in_blocks
from parts.model.llama import LlamaConfig
from parts.model.losses import head_bytes
from parts.model.nf4 import BLOCK, GROUP
from parts.training.plan import (
    HOLES,
    Setting,
    count_parameters,
    matrices_of_block,
    memory_line,
    memory_of,
)

METHODS = ("full", "lora", "qlora")
GPUS_GB = (8, 24, 80)  # whose tips are computed
MOST_ROWS = 512  # of a micro-batch in these tips
# of a GPU that CUDA, its libraries and torch's allocator leave to the training: an assumption
USABLE = 0.92

# Qwen2.5 as published: n_layer, n_head, n_kv_head, n_embd, n_hidden, vocab_size, tied
QWEN25 = {
    "0.5B": (24, 14, 2, 896, 4864, 151936, True),
    "1.5B": (28, 12, 2, 1536, 8960, 151936, True),
    "3B": (36, 16, 2, 2048, 11008, 151936, True),
    "7B": (28, 28, 4, 3584, 18944, 152064, False),
    "14B": (48, 40, 8, 5120, 13824, 152064, False),
    "32B": (64, 40, 8, 5120, 27648, 152064, False),
    "72B": (80, 64, 8, 8192, 29568, 152064, False),
}


def published_shape(model_name: str) -> LlamaConfig | None:
    """The shape of Qwen2.5 that a name such as Qwen/Qwen2.5-7B-Instruct means, else None."""
    words = model_name.rsplit("/", 1)[-1].split("-")
    if not words[0].startswith("Qwen2.5") or not set(words[1:]) & QWEN25.keys():
        return None
    size = next(word for word in words if word in QWEN25)
    n_layer, n_head, n_kv_head, n_embd, n_hidden, vocab_size, tied = QWEN25[size]
    return LlamaConfig(
        vocab_size, 32768, n_layer, n_head, n_kv_head, n_embd, n_hidden,
        head_dim=n_embd // n_head, rope_theta=1e6, qkv_bias=True, tied=tied,
    )  # fmt: skip


def trained_numbers(shape: LlamaConfig, method: str, rank: int) -> int:
    """How many numbers are trained: all weights, or rank x (in + out) of each linear layer."""
    if method == "full":
        return count_parameters(shape)
    return shape.n_layer * sum(rank * (a + b) for a, b in matrices_of_block(shape))


def frozen_bytes(shape: LlamaConfig, method: str, e: int) -> int:
    """Bytes of the frozen base; e: bytes of a number in 16 bits, or 4."""
    sizes = [rows * columns for rows, columns in matrices_of_block(shape)]
    if method == "lora":
        return e * count_parameters(shape)
    in_blocks = 0
    for size in sizes:  # codes; scales, and their scales, in whole groups; an offset
        groups = -(-size // (BLOCK * GROUP))
        in_blocks += -(-size // BLOCK) * BLOCK // 2 + groups * (GROUP + 4) + 4
    rest = count_parameters(shape) - shape.n_layer * sum(sizes)
    return shape.n_layer * in_blocks + e * rest


def block_bytes(shape: LlamaConfig, s: Setting, rank: int, dropout: float) -> int:
    """Bytes that the forward pass of a micro-batch keeps of a block with adapters."""
    B, T, C, L = s.batch_size, shape.block_size, shape.n_embd, shape.n_layer
    H, K, D = shape.n_head, shape.n_kv_head, shape.head_dim
    e, n, on_cpu = DTYPES[s.dtype].itemsize, s.batch_size * T, s.device == "cpu"
    block = 2 * _norm_bytes(shape, s)
    # what the adapters of q, k, v, o, gate, up and down read
    inputs = [C, C, C, H * D, C, C, shape.n_hidden]
    shared = e * n * (C + H * D + C + shape.n_hidden)
    own = (e + (e if on_cpu else 1)) * n * sum(inputs)  # dropout: each its own, and a mask
    block += own if dropout else shared
    block += len(inputs) * e * n * rank + (e * trained_numbers(shape, "lora", rank) // L) * (e < 4)
    block += 3 * e * n * shape.n_hidden  # gate, its SiLU, the other half
    block += e * n * (H + 2 * K) * D  # query, key, value
    if s.attends_in_products:
        block += e * B * H * T * T + B * T * T  # probabilities, mask
    elif not attends_in_blocks(torch.device(s.device), DTYPES[s.dtype], T, 0.0):
        # the mask as numbers; the logarithm of each row's sum; the output
        block += e * B * T * T + 4 * n * H + e * n * H * D
    return block


def _norm_bytes(shape: LlamaConfig, s: Setting) -> int:
    """Bytes that a norm keeps: its input, which a CPU has in fp32, and its root mean square."""
    e, n = DTYPES[s.dtype].itemsize, s.batch_size * shape.block_size
    return (4 if s.device == "cpu" else e) * n * shape.n_embd + 4 * n


def activation_bytes(shape: LlamaConfig, s: Setting, rank: int, dropout: float) -> int:
    """
    Bytes that the forward pass of a micro-batch keeps with adapters, without the head's.

    With activation checkpointing the inputs of the blocks; each block is recomputed later.
    """
    B, T, C, L = s.batch_size, shape.block_size, shape.n_embd, shape.n_layer
    stream = DTYPES[s.dtype].itemsize * B * T * C  # in the dtype of the base
    # the last norm, the input of the head; the mask of all blocks, cosines and sines
    ends = _norm_bytes(shape, s) + stream + B * T * T + 4 * T * shape.head_dim
    if s.activation_checkpointing:
        return ends + L * stream
    return ends + L * block_bytes(shape, s, rank, dropout)


def memory(shape: LlamaConfig, s: Setting, method: str, rank: int, dropout: float) -> dict:
    """
    Bytes of one process by part; "peak" is the most of them at one time.

    shape: with the rows' length as block_size.
    """
    if method == "full":
        return memory_of(shape, s)
    e, n_trained = DTYPES[s.dtype].itemsize, trained_numbers(shape, method, rank)
    shards = s.world if s.parallel == "fsdp" else 1
    if s.parallel == "fsdp":  # which has whole weights in fp32
        e = 4
    positions, kind = s.batch_size * shape.block_size, DTYPES[s.dtype]
    head = (positions, shape.n_embd, shape.vocab_size, kind, s.device)
    parts = {
        "frozen weights": frozen_bytes(shape, method, e) // shards,
        "adapters": 4 * n_trained // shards,
        "gradients": 4 * n_trained * (2 if s.parallel == "ddp" else 1),
        "optimizer": 8 * n_trained // shards,
        "activations": activation_bytes(shape, s, rank, dropout),
        "logits": head_bytes(*head, stored=torch.float32 if e == 4 else kind),
    }
    if s.activation_checkpointing:  # the logits are gone when a block is recomputed
        block = block_bytes(shape, s, rank, dropout)
        parts["a block, or logits"] = max(block, parts.pop("logits"))
    if method == "qlora":  # one layer's weight in fp32, its scaled copy, and in 16 bits
        largest = max(rows * columns for rows, columns in matrices_of_block(shape))
        parts["one layer in 16 bits"] = (8 + DTYPES[s.dtype].itemsize) * largest
    if s.device == "cpu" and not s.activation_checkpointing:  # see engine.keep_freed_memory
        parts["holes in the heap"] = int(HOLES * sum(parts.values()))
    return parts | {"peak": sum(parts.values())}


def rows_that_fit(shape, s: Setting, method: str, rank: int, dropout: float, limit: float) -> int:
    """The largest micro-batch, a power of two of at most 512 rows, within `limit` bytes; or 0."""
    rows = 0
    while rows < MOST_ROWS:
        more = replace(s, batch_size=max(1, 2 * rows))
        if memory(shape, more, method, rank, dropout)["peak"] > limit:
            break
        rows = more.batch_size
    return rows


def plan_lines(
    shape: LlamaConfig,
    s: Setting,
    method: str,
    rank: int,
    dropout: float,
    memory_gb: float | None = None,
) -> tuple[list[str], bool]:
    """
    (lines about memory, and what would fit, whether this training fits).

    shape: with the rows' length as block_size. memory_gb: of the device to fit, in 10^9 bytes;
    None: the setting's device, as it is now.
    """
    if memory_gb:
        limit, where = memory_gb * 1e9, "--plan_memory_gb"
    else:
        limit, where = free_memory(s.device)
    line, fits = memory_line(memory(shape, s, method, rank, dropout), limit, where)
    n_trained, n = trained_numbers(shape, method, rank), count_parameters(shape)
    return [f"{method}: trains {n_trained:,} numbers of a model of {n:,} parameters", line], fits


def tips(shape: LlamaConfig, s: Setting, rank: int, dropout: float) -> list[str]:
    """Four ways to less memory, with figures computed for this model on GPUs of 8, 24, 80 GB."""
    gpu = replace(s, device="cuda", dtype="bf16", attends_in_products=False, parallel="none")
    on, off = (replace(gpu, activation_checkpointing=x) for x in (True, False))

    def peak(setting: Setting, method: str) -> str:
        return format_bytes(memory(shape, setting, method, rank, dropout)["peak"])

    def rows(setting: Setting, method: str, GB: int) -> str:
        most = rows_that_fit(shape, setting, method, rank, dropout, USABLE * GB * 1e9)
        return f"{most:>4}" if most else "   -"

    B, accum = 4, 8
    four, one = replace(on, batch_size=B), replace(on, batch_size=1)
    wide, narrow = f"--batch_size {B}", "--batch_size 1"
    lines = [
        f"to need less memory (computed for rows of {shape.block_size:,} tokens, bf16, one GPU):",
        f"  1. smaller batches: lora with {wide} {peak(four, 'lora')}, {narrow} "
        f"{peak(one, 'lora')}",
        f"  2. more accumulation: {narrow} --gradient_accumulation_steps {B * accum} is the same "
        f"step as {wide} --gradient_accumulation_steps {accum}, in the memory of {narrow}",
        f"  3. another method, {narrow}: full {peak(one, 'full')}, lora {peak(one, 'lora')}, "
        f"qlora {peak(one, 'qlora')}",
        f"  4. activation checkpointing (the default), {wide}: lora {peak(four, 'lora')}, "
        f"without {peak(replace(off, batch_size=B), 'lora')}; a step takes up to half as long "
        "again",
        "  largest micro-batch, in rows, with activation checkpointing / without:",
        "    GPU      " + "".join(f"{method:>14}" for method in METHODS),
    ]
    for GB in GPUS_GB:
        cells = (f"{rows(on, m, GB)} /{rows(off, m, GB)}" for m in METHODS)
        lines.append(f"    {GB:>2} GB    " + "".join(f"{cell:>14}" for cell in cells))
    return lines
