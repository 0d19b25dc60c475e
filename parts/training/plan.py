"""
Before the first step: parameters, memory, disk and time of a GPT or Llama, from its shape.

Nothing is built. Which tensors the forward pass keeps for the backward pass is counted from the
code of the model; a test compares the count with what autograd keeps, and the sum with the
memory of real runs (docs/benchmarks.md).

Letters: B rows, T positions, C width, H heads, V vocabulary, L layers. A GB is 10^9 bytes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import torch

from parts.base.dtypes import DTYPES
from parts.base.machine import free_memory
from parts.base.units import format_bytes, format_duration
from parts.model.losses import head_bytes
from parts.storage.writer import SMALL
from parts.training.optim import state_bytes_of

# of what a step allocates on a CPU: holes in a heap that keeps what is freed (0.1 to 0.3 measured)
HOLES = 0.17


def parameters_by_part(config) -> dict[str, int]:
    """
    Parameters of a model of this shape (a GPTConfig or LlamaConfig), by part; tied ones once.

    The sum is `count_parameters`.
    """
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    in_products = [rows * columns for rows, columns in matrices_of_block(config)]
    n_attention = -3 if config.family == "llama" else -2  # the last matrices are the MLP's
    attention, mlp = sum(in_products[:n_attention]), sum(in_products[n_attention:])
    parts = {"token embedding": V * C}
    if config.family == "llama":
        biases = (config.n_head + 2 * config.n_kv_head) * config.head_dim if config.qkv_bias else 0
        parts |= {"attention": L * (attention + biases), "MLP": L * mlp, "norms": (2 * L + 1) * C}
    else:
        parts |= {"positions": config.block_size * C, "attention": L * (attention + 4 * C)}
        parts |= {"MLP": L * (mlp + 5 * C), "norms": (2 * L + 1) * 2 * C}
    return parts if config.tied else parts | {"head": V * C}


def matrices_of_block(config) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of one block, those of attention first."""
    C = config.n_embd
    if config.family != "llama":
        return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    attention = [(queries, C), (keys, C), (keys, C), (C, queries)]
    return [*attention, (config.n_hidden, C), (config.n_hidden, C), (C, config.n_hidden)]


def count_parameters(config) -> int:
    """Trainable numbers in a model of this shape, tied ones once, without building it."""
    return sum(parameters_by_part(config).values())


def flops_per_token(config) -> int:
    """
    Floating-point operations to train on one token at full context, forward and backward.

    6 per weight of a matrix product (the head is one, looking up embeddings is none), and
    12 L (H D) T for attention scores and values. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    parts = parameters_by_part(config)
    n_weights = count_parameters(config) - parts.get("positions", 0)
    if not config.tied:
        n_weights -= parts["token embedding"]
    T, width = config.block_size, config.n_embd
    if config.family == "llama":
        T, width = min(T, config.window or T), config.n_head * config.head_dim
    return 6 * n_weights + 12 * config.n_layer * width * T


@dataclass(frozen=True)
class Setting:
    """What determines the memory of a step, besides the shape of the model."""

    batch_size: int  # rows per micro-batch
    grad_accum_steps: int = 1  # micro-batches per step
    dtype: str = "fp32"  # of matrix products
    optimizer: str = "adamw"
    activation_checkpointing: bool = False
    device: str = "cpu"  # such as cpu, mps or cuda:1
    parallel: str = "none"  # none, ddp or fsdp
    world: int = 1  # processes that share a model
    reshard: bool = True  # under fsdp: a block's whole weights are freed after its forward pass
    cpu_offload: bool = False  # weights, gradients and optimizer state are in CPU memory
    keeps_copy: bool = False  # CPU memory has a copy of what goes into a checkpoint
    # attention is two products and a softmax, which keeps the (B, H, T, T) probabilities
    attends_in_products: bool = False


def activation_bytes(config, s: Setting) -> int:
    """Bytes that the forward pass of a micro-batch keeps, without the head's gradient."""
    T, C = config.block_size, config.n_embd
    n = s.batch_size * T  # positions
    stream = 4 * n * C  # the residual stream is fp32
    block, ends = (_kept_by_llama if config.family == "llama" else _kept_by_gpt)(config, s, stream)
    e = DTYPES[s.dtype].itemsize
    if e < 4:  # autocast's copies of the weights
        block += e * sum(rows * columns for rows, columns in matrices_of_block(config))
    L = config.n_layer
    return ends + (L * stream + block if s.activation_checkpointing else L * block)


def _kept_by_gpt(config, s: Setting, stream: int) -> tuple[int, int]:
    """Bytes of activations (in a block, before and after the blocks) of a GPT."""
    T, C, H = config.block_size, config.n_embd, config.n_head
    e = DTYPES[s.dtype].itemsize
    n = s.batch_size * T
    squares = s.batch_size * H * T * T  # one number per pair of positions
    # the stream before each norm, its mean and deviation; the inputs of four products; the MLP's
    # 4 C before GELU; query, key, value
    block = 2 * stream + 4 * 4 * n + (1 + 1 + 1 + 4 + 4 + 3) * e * n * C
    if config.dropout:
        block += 2 * e * n * C  # masks
    if s.attends_in_products:
        block += e * squares + T * T
    elif config.dropout and s.device == "cpu":
        # none of torch's kernels has dropout there: scores, mask and product in fp32
        block += 3 * 4 * squares + (3 * e * n * C if e < 4 else 0)
    else:
        block += 4 * n * H  # the logarithm of each row's sum
    # before and after the last norm; token ids; the first mask
    return block, 2 * stream + 16 * n + (stream if config.dropout else 0)


def _kept_by_llama(config, s: Setting, stream: int) -> tuple[int, int]:
    """The same of a Llama."""
    T, C, H, K, D = (
        *(config.block_size, config.n_embd),
        *(config.n_head, config.n_kv_head, config.head_dim),
    )
    e = DTYPES[s.dtype].itemsize
    n = s.batch_size * T
    # the stream before a norm, its root mean square; on a CPU also the stream divided by that
    norm = stream + 4 * n + (stream if s.device == "cpu" else 0)
    # the inputs of the products after the norms; gate, its SiLU, the other half, their product
    block = 2 * norm + 2 * e * n * C + 4 * e * n * config.n_hidden
    block += 2 * e * n * (H + K) * D  # query, key, value; the input of the last product
    if s.attends_in_products:
        block += e * s.batch_size * H * T * T + T * T
    else:
        block += e * n * H * D + 4 * n * H  # the output; the logarithm of each row's sum
    # the last norm and the input of the head; token ids; cosines and sines
    return block, norm + stream + 8 * n + 4 * T * D


def memory_of(config, s: Setting, galore_rank: int = 128) -> dict[str, int]:
    """
    Bytes of one process while it trains a model of this shape, by part.

    "peak" is the most of them at one time, on the device of the training: at the end of the forward
    pass (all activations and logits, the gradient of the head, gradients of earlier micro-batches)
    or of the backward pass (all gradients).
    """
    C, L, n_weights = config.n_embd, config.n_layer, count_parameters(config)
    weights = 4 * n_weights
    matrices = matrices_of_block(config)
    in_block = sum(rows * columns for rows, columns in matrices)
    optimizer = state_bytes_of(matrices * L, n_weights - L * in_block, s.optimizer, galore_rank)
    positions = s.batch_size * config.block_size
    logits = head_bytes(positions, C, config.vocab_size, DTYPES[s.dtype], s.device)
    shards = s.world if s.parallel == "fsdp" else 1
    head = 4 * config.vocab_size * C  # its gradient is computed in the forward pass
    # gradients of earlier micro-batches: fsdp too keeps them whole until it exchanges the last one
    earlier = weights if s.grad_accum_steps > 1 else 0
    gradients = max(earlier, weights // shards)
    exchange = 0
    if s.parallel == "ddp":  # buckets, allocated at the start; gradients become views of them
        exchange, earlier = earlier, earlier + weights
    elif s.parallel == "fsdp":
        # whole weights, and gradients, of the embedding and two blocks; or all weights stay whole
        units = head + 2 * 4 * in_block
        exchange = units + (units if s.reshard else max(units, weights))
    copy = weights + optimizer
    if not s.keeps_copy or copy <= SMALL:
        copy = 0
    parts = {
        "weights": weights // shards,
        "gradients": gradients,
        "optimizer": optimizer // shards,
        "activations": activation_bytes(config, s),
        "logits": logits,
    }
    parts |= {"exchange": exchange} if exchange else {}
    if s.cpu_offload and s.device != "cpu":
        parts |= {"weights": 0, "gradients": earlier, "optimizer": 0}
    state = parts["weights"] + parts["optimizer"] + (exchange if s.parallel == "fsdp" else 0)
    if copy and s.device == "cpu":
        parts["copy for checkpoints"] = copy
        state += copy
    forward = earlier + head + parts["activations"] + logits
    parts["peak"] = state + max(forward, parts["gradients"])
    if s.device == "cpu" and not s.activation_checkpointing:  # see engine.keep_freed_memory
        allocated = parts["peak"] - parts.get("copy for checkpoints", 0)
        parts["holes in the heap"] = int(HOLES * allocated)
        parts["peak"] += parts["holes in the heap"]
    return parts


def ways_to_fit(s: Setting, limit: float, peak_of) -> list[str]:
    """
    Flags with which a step of as many rows takes at most `limit` bytes.

    Smaller micro-batches, which is the same step; the same with recomputed blocks; the same with an
    optimizer that has less state, which is another step. peak_of(setting) -> bytes. Empty if none
    of that suffices.
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
    Seconds that call() takes: the shortest of a few calls after a first one.

    The first one's if it takes too long to repeat.

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


def parameter_line(config) -> str:
    """How many parameters a model of this shape has, and in which parts."""
    by_part = ", ".join(f"{name} {n:,}" for name, n in parameters_by_part(config).items())
    return f"parameters: {count_parameters(config):,} ({by_part})"


def memory_line(
    parts: dict[str, int], limit: float, where: str, title: str = "memory"
) -> tuple[str, bool]:
    """(a line about the bytes by part, with "peak" among them; whether that fits the limit)."""
    sizes = ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items() if name != "peak")
    fits = parts["peak"] <= limit
    verdict = "fits the" if fits else "does NOT fit the"
    peak = f"at most {format_bytes(parts['peak'])} at one time"
    return f"{title}: {peak}, {verdict} {format_bytes(limit)} of {where} ({sizes})", fits


def plan_lines(
    config, setting: Setting, memory_gb: float | None = None, galore_rank: int = 128
) -> tuple[list[str], bool]:
    """
    (lines about parameters and memory, whether it fits) of training a model of this shape.

    memory_gb: of the device to fit, in 10^9 bytes; None: the setting's device, as it is now.
    """
    if memory_gb:
        limit, where = memory_gb * 1e9, "--plan_memory_gb"
    else:
        limit, where = free_memory(setting.device)
    line, fits = memory_line(memory_of(config, setting, galore_rank), limit, where)
    lines = [parameter_line(config), line]
    if not fits:
        ways = ways_to_fit(setting, limit, lambda s: memory_of(config, s, galore_rank)["peak"])
        line = "no flag makes it fit: take a smaller model, or --parallel fsdp on several devices"
        if ways:
            line = f"what would fit, with pretraining_advanced.py: {'; or '.join(ways)}"
        lines.append(line)
    return lines, fits


def show_plan(
    config, make_model, batch_size: int, device, max_steps: int, memory_gb: float | None
) -> int:
    """
    Print what training in fp32 with AdamW would take; returns the exit code, 0.

    Its time is that of a few steps on random tokens; make_model() builds the GPT for them.
    """
    setting = Setting(batch_size, device="cuda" if memory_gb else str(device))
    lines, fits = plan_lines(config, setting, memory_gb)
    disk = format_bytes(4 * count_parameters(config))
    print(*lines, f"disk: {disk} a checkpoint", sep="\n", flush=True)
    if memory_gb or not fits:
        return 0
    model = make_model().to(device)
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type != "mps")

    def step() -> None:
        loss = model(ids, ids) / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU

    seconds = seconds_of(step)
    line = (
        f"time: {format_duration(seconds)} a step (measured), {ids.numel() / seconds:,.0f} tokens/s"
    )
    if max_steps < sys.maxsize:
        line += f"; {max_steps:,} steps in {format_duration(max_steps * seconds)}"
    print(f"{line}, without evaluations and samples")
    return 0


def wasted(config, n_steps: int | None) -> list[str]:
    """
    A line for settings that have no effect in a run of so few steps, if there are any.

    config: of either trainer; the short one has neither warmup_steps nor schedule. n_steps: None if
    the length is not known.
    """
    n, found = n_steps, []
    warmup = getattr(config, "warmup_steps", None)
    if n and warmup and warmup >= n and config.schedule != "constant":
        found.append(f"--warmup_steps {warmup:,}: --max_lr is never reached")
    if n and config.eval_freq > n:
        found.append(f"--eval_freq {config.eval_freq:,}: evaluated at the first and last step only")
    if n and config.save_ckpt_freq > n:
        found.append(f"--save_ckpt_freq {config.save_ckpt_freq:,}: saved at the end only")
    return [f"note: the run has {n:,} steps; {'; '.join(found)}"] if found else []
