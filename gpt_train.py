"""
The GPT that every script here trains, and the helpers around it: loss, evaluation, generation, plots.

    python gpt_train.py --checkpoint runs/simple --prompt "It was a dark"      # sample from a trained run
    python gpt_train.py --checkpoint runs/simple --num_samples 3 --temperature 0.7 --top_k 50 --seed 1
    python gpt_train.py --checkpoint runs/simple --eval book.txt               # or score it; --help lists the rest
    python gpt_train.py --compare runs/simple runs/simple-1                    # runs beside each other; writes compare.png

Reads a run folder (its newest good checkpoint) or one checkpoint folder; prints, and otherwise writes nothing.
Sampling 200 tokens from the default laptop model takes about a second on two CPU cores.

The model is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), weight for
weight, so that published checkpoints fit: its logits (a score for every next token) equal those of transformers' GPT2LMHeadModel.
Shapes, here and in every file: B rows, T positions, C width (n_embd), H heads, D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

if (
    __name__ == "__main__"
):  # before torch is imported, so that Ctrl-C in those seconds leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import codecs
import contextlib
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.base.dtypes import DTYPES
from parts.base.files import write_file
from parts.base.machine import choose_dtype, free_memory, pick_device
from parts.base.units import format_bytes, format_duration
from parts.cli.config import parse
from parts.cli.launch import error_line, run_script
from parts.data.shards import Shards, read_index
from parts.data.tokenizers import Tokenizer
from parts.model.few_row_matmul import Linear, product
from parts.model.losses import cross_entropy_of_head, head_bytes
from parts.report import scoring
from parts.report.compare import compare
from parts.report.plots import draw_losses, draw_runs
from parts.storage.checkpoint import load_checkpoint, newest_checkpoint
from parts.storage.formats import shape_of
from parts.storage.writer import SMALL
from parts.training import plan
from parts.training.metrics import read_metrics
from parts.training.optim import state_bytes_of
from parts.training.plan import Setting, count_parameters, flops_per_token  # noqa: F401  others look for them here

# ---------------------------------------------------------------------------------------------------- the model


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2's smallest size, 124M."""

    vocab_size: int = 50257  # V, tokens
    block_size: int = 1024  # longest T the model can read, tokens
    n_layer: int = 12  # L, blocks
    n_head: int = 12  # H, attention heads per block: attentions side by side
    # C, width of the residual stream: the numbers per position that blocks read and add to
    n_embd: int = 768
    dropout: float = 0.0  # share of activations zeroed while training
    tied: bool = True  # the output head (it makes the scores) is the token embedding; False: a matrix of its own, as some imports have

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(
                    f"GPTConfig: {name} is {str(getattr(self, name))[:50]}; it must be a whole number, at least 1"
                )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}; it must be in [0, 1)")

    @classmethod
    def of_size(cls, name: str, **changes) -> GPTConfig:
        """The config of a named size (see SIZES), with `changes` applied. Raises ValueError listing the names."""
        if name not in SIZES:
            raise ValueError(
                f"--model_size: unknown size {name!r}; choose one of {', '.join(SIZES)}"
            )
        n_layer, n_head, n_embd = SIZES[name]
        return cls(**{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **changes})


# name -> (n_layer, n_head, n_embd). The last four are GPT-2's, named by their parameters with 50,257 tokens;
# the small ones have no number in their name because most of their parameters hang on the vocabulary.
SIZES = {
    "nano": (2, 2, 64),
    "micro": (4, 4, 128),
    "mini": (6, 6, 384),
    "small": (8, 8, 512),
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


class LayerCache:
    """For sampling (read CausalSelfAttention first): keys and values, (B, H, T, D), of the positions seen; room for `capacity`."""

    def __init__(self, capacity: int):
        self.capacity, self.n, self.k, self.v = capacity, 0, None, None

    def __len__(self) -> int:
        return self.n

    def extend(self, k, v):
        """All keys and values up to now, the new ones last."""
        if (
            self.k is None
        ):  # taken once: to join old and new for every token would copy them all each time
            B, H, _, D = k.shape
            self.k, self.v = (
                k.new_empty(B, H, self.capacity, D),
                v.new_empty(B, H, self.capacity, D),
            )
        start, self.n = self.n, self.n + k.shape[2]
        self.k[:, :, start : self.n], self.v[:, :, start : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]


def attends_in_products(device, dtype, T: int, dropout: float) -> bool:
    """Whether two plain products and a softmax are faster than torch's kernel: its bf16 backward on CPUs takes three times as long."""
    return device.type == "cpu" and dtype == torch.bfloat16 and T <= 512 and not dropout


def _attention_in_products(q, k, v):
    """Causal attention of q, k, v (B, H, T, D) -> (B, H, T, D); holds (B, H, T, T) probabilities."""
    T, D = q.shape[2:]
    with torch.autocast(
        q.device.type, enabled=False
    ):  # a softmax of bf16 is computed in fp32, and given back in bf16
        scores = (q / math.sqrt(D)) @ k.transpose(2, 3)  # (B, H, T, T)
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(dim=3) @ v


class CausalSelfAttention(nn.Module):
    """Each position reads from itself and the positions before it. Source: Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(
            config.n_embd, 3 * config.n_embd
        )  # query, key and value in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C). With a cache, x holds only the positions that follow the cached ones."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = [t.view(B, T, H, D).transpose(1, 2) for t in (q, k, v)]  # each (B, H, T, D)
        seen = 0
        if cache is not None:
            seen = len(cache)
            k, v = cache.extend(k, v)  # (B, H, seen + T, D)
        # is_causal aligns query 0 with key 0, which is wrong as soon as keys lie before the first query:
        # one query may then see every key, several need a mask that starts `seen` columns further right.
        mask = (
            torch.ones(T, seen + T, dtype=torch.bool, device=x.device).tril(seen)
            if seen and T > 1
            else None
        )
        dropout = self.dropout if self.training else 0.0
        if attends_in_products(q.device, q.dtype, T, dropout) and not seen:
            y = _attention_in_products(q, k, v)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not seen and T > 1
            )
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Four times wider and back, position by position, with the tanh form of GELU (a bend without a corner) that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it (pre-LayerNorm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.draws_random = config.dropout > 0  # then recomputing needs the random state of before

    def forward(self, x, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output head is the token embedding itself (tied weights), stored and counted once, unless the config says otherwise."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embedding, and the head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # learned positions
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        # 2 L products add to the residual stream; scaled like this its variance does not grow with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, targets=None, cache: list[LayerCache] | None = None, last: bool = False):
        """
        Logits for the token after each position, or after the `last` one only; with `targets` the loss instead.

        ids (B, T) int64 with T <= block_size. Returns logits (B, T, V). With targets (B, T) int64 it returns the
        fp32 **sum** of the cross-entropy over targets that are not -100, a scalar: sums of ragged batches can be
        added and divided once, means cannot. `cache` is a list of one LayerCache per block, extended in place;
        ids then continue the cached positions. Raises ValueError where the text is longer than block_size.
        """
        B, T = ids.shape
        seen = len(cache[0]) if cache else 0
        if seen + T > self.config.block_size:
            raise ValueError(
                f"GPT: {seen + T} tokens are more than the context of {self.config.block_size}; crop the input"
            )
        positions = torch.arange(seen, seen + T, device=ids.device)
        # sparse: the embedding's gradient is a few rows, added to the head's; otherwise a second (V, C) of zeros comes about
        x = F.embedding(
            ids, self.wte.weight, sparse=self.config.tied and ids.device.type == "cpu"
        )  # (B, T, C)
        x = self.dropout(x + self.wpe(positions))
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        x, head = self.ln_f(x), self.wte.weight if self.config.tied else self.lm_head.weight
        if targets is None:
            return product(x[:, -1:] if last else x, head)  # (B, T, V) or (B, 1, V)
        return cross_entropy_of_head(x.flatten(0, 1), head, targets.flatten())


def memory_of(config: GPTConfig, s: Setting, galore_rank: int = 128) -> dict[str, int]:
    """Bytes that training a GPT of this shape takes, by part, with the "peak" among them; nothing is built. See parts/training/plan.py."""
    C, L, n = config.n_embd, config.n_layer, count_parameters(config)
    dtype = DTYPES[s.dtype]
    state = state_bytes_of(
        [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * L,
        n - 12 * L * C * C,
        s.optimizer,
        galore_rank,
    )
    logits = head_bytes(s.batch_size * config.block_size, C, config.vocab_size, dtype, s.device)
    in_products = attends_in_products(
        torch.device(s.device), dtype, config.block_size, config.dropout
    )
    s = replace(
        s, attends_in_products=in_products, keeps_copy=s.keeps_copy and 4 * n + state > SMALL
    )
    return plan.memory(config, s, state, logits)


def plan_lines(
    config: GPTConfig, setting: Setting, memory_gb: float | None = None, galore_rank: int = 128
) -> tuple[list[str], bool]:
    """Lines about parameters and memory, and whether it fits: into this device, or one of `memory_gb` (10^9 bytes)."""
    limit, where = (
        (memory_gb * 1e9, "--plan_memory_gb") if memory_gb else free_memory(setting.device)
    )
    parts = memory_of(config, setting, galore_rank)
    fits = parts["peak"] <= limit
    ways = (
        []
        if fits
        else plan.ways_to_fit(
            setting, limit, lambda other: memory_of(config, other, galore_rank)["peak"]
        )
    )
    return plan.memory_lines(config, parts, limit, where, ways), fits


def show_plan(
    config: GPTConfig, batch_size: int, device, max_steps: int, memory_gb: float | None
) -> int:
    """Print what training in fp32 with AdamW would take, its time from a few steps on random tokens; returns the exit code, 0."""
    setting = Setting(batch_size, device="cuda" if memory_gb else str(device))
    lines, fits = plan_lines(config, setting, memory_gb)
    print(
        *lines,
        f"disk: {format_bytes(4 * count_parameters(config))} a checkpoint",
        sep="\n",
        flush=True,
    )
    if memory_gb or not fits:
        return 0
    model, ids = (
        GPT(config).to(device),
        torch.randint(config.vocab_size, (batch_size, config.block_size)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type != "mps")

    def step() -> None:
        loss = calc_loss_batch(ids, ids, model, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU

    seconds = plan.seconds_of(step)
    known = (
        f"; {max_steps:,} steps in {format_duration(max_steps * seconds)}"
        if max_steps < sys.maxsize
        else ""
    )
    print(
        f"time: {format_duration(seconds)} a step (measured), {ids.numel() / seconds:,.0f} tokens/s{known}, besides evaluations and samples"
    )
    return 0


# --------------------------------------------------------------------------------------------- loss, evaluation


def calc_loss_batch(input_batch, target_batch, model, device):
    """Mean cross-entropy per target (nats, fp32 scalar, differentiable). Batches are (B, T) int64, -100 is ignored."""
    input_batch, target_batch = input_batch.to(device), target_batch.to(device)
    return model(input_batch, target_batch) / (target_batch != -100).sum().clamp(min=1)


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None):
    """
    Mean cross-entropy per target (nats, float) over the first `num_batches` (None: all) (inputs, targets) pairs.

    Sums are added and divided once, so a short last batch counts by its tokens. nan where there are no targets.
    """
    total, n_targets = 0.0, 0
    for i, (input_batch, target_batch) in enumerate(data_loader):
        if num_batches is not None and i >= num_batches:
            break
        total += model(input_batch.to(device), target_batch.to(device)).item()
        n_targets += int((target_batch != -100).sum())
    return total / n_targets if n_targets else float("nan")


def evaluate_model(model, val_batches, device, token_bytes=None) -> dict:
    """
    Honest numbers on the whole validation set, dropout off, the model left in the mode it was in.

    val_batches: a list of (inputs, targets) pairs, each (B, T) int64. token_bytes (V,): bytes of text behind each
    token id (0 for end-of-text). Returns {"loss": nats per token, "perplexity", "tokens"} and, with token_bytes,
    "bits_per_byte": all nats spent, in bits, over all bytes predicted. Unlike the loss, that figure can be compared
    between tokenizers.
    """
    was_training = model.training
    model.eval()
    loss = calc_loss_loader(val_batches, model, device)
    model.train(was_training)
    targets = torch.cat([t[t != -100] for _, t in val_batches]).cpu()
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": len(targets)}
    if token_bytes is not None:
        n_bytes = int(torch.as_tensor(token_bytes)[targets].sum())
        result["bits_per_byte"] = loss * len(targets) / math.log(2) / max(n_bytes, 1)
    return result


# --------------------------------------------------------------------------------------------------- generation


def text_to_token_ids(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    """ids (1, T) int64 of a text."""
    return torch.from_numpy(tokenizer.encode(text).astype("int64"))[None]


def token_ids_to_text(ids: torch.Tensor, tokenizer: Tokenizer) -> str:
    """Text of ids (T,) or (1, T). Bytes that are no whole UTF-8 character become U+FFFD."""
    return tokenizer.decode(ids.flatten().tolist())


def _sample_next(logits, temperature, top_k, top_p, generator):
    """Next ids (B, 1) from logits (B, V)."""
    if not torch.isfinite(logits).all():
        raise RuntimeError(
            "the model's output is not finite: its training has diverged; train again with a lower learning rate"
        )
    if temperature < 1e-5:  # dividing by less overflows
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(
            probs.cumsum(dim=-1) - probs >= top_p, -math.inf
        )  # the first is always kept
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@torch.no_grad()
def stream(
    model,
    ids,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    seed=None,
    stop_token=None,
    use_cache=True,
    n_ids=None,
):
    """
    The tokens that follow ids (B, T) int64, as they are sampled: up to `max_new_tokens` times (B, 1).

    temperature 0 is greedy (always the likeliest); top_k keeps the k likeliest tokens, top_p the smallest set whose probability reaches p
    (Holtzman et al. 2020). A row that has produced `stop_token` is filled up with it; it ends when all have. `n_ids`: only
    ids below it are sampled, where the model has more of them than the tokenizer. `seed` fixes the result; the global random
    state is neither read nor changed, so sampling cannot disturb training.
    The model reads at most its last block_size tokens. While all fit, keys and values are cached; past that point
    every learned position shifts with each token, so the window is read anew: slower, and the same ids as without
    a cache. Raises ValueError for an empty prompt or options out of range.
    """
    V = n_ids or model.config.vocab_size
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"generate: ids have shape {tuple(ids.shape)}; give (B, T) with at least one token, such as end-of-text"
        )
    if not temperature >= 0:
        raise ValueError(
            f"--temperature: {temperature} is not 0 or more; use 0 for greedy, 1 for the model's own distribution"
        )
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"--top_k: {top_k} is not between 1 and the {V} tokens of the vocabulary")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top_p: {top_p} is not in (0, 1]")
    if seed is not None and abs(seed) >= 2**63:
        raise ValueError(f"--seed: {seed} does not fit into 64 bits")
    generator = torch.Generator(ids.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    was_training, block_size = model.training, model.config.block_size
    model.eval()
    cache, fresh = None, ids[:, -block_size:]  # fresh: what the model reads in the coming call
    if use_cache and ids.shape[1] < block_size:
        cache = [LayerCache(min(block_size, ids.shape[1] + max_new_tokens)) for _ in model.h]
    stopped = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    try:
        for _ in range(max_new_tokens):
            logits = model(fresh, cache=cache, last=True)[:, 0, :V]  # (B, V)
            next_ids = _sample_next(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if stop_token is not None:
                next_ids = next_ids.masked_fill(stopped, stop_token)
                stopped |= next_ids == stop_token
            yield next_ids
            if stopped.all():
                return
            ids = torch.cat((ids[:, -block_size:], next_ids), dim=1)
            if cache and cache[0].n == block_size:
                cache = None
            fresh = next_ids if cache else ids[:, -block_size:]
    finally:
        model.train(was_training)


def generate(model, ids, max_new_tokens, *, should_stop=None, **options):
    """
    The ids with up to `max_new_tokens` sampled ones behind them: (B, T) int64 -> (B, T + n); options as for `stream`.

    should_stop() true ends it at the next token.
    """
    parts = [ids]
    for next_ids in stream(model, ids, max_new_tokens, **options):
        parts.append(next_ids)
        if should_stop and should_stop():
            break
    return torch.cat(parts, dim=1)


def continuations(
    model, tokenizer, device, prompt: str, num_samples: int, max_new_tokens: int, **options
) -> list[str]:
    """
    What the model writes after `prompt` ("" begins a document): one text per sample.

    Options as for `generate`. Each text ends before its end-of-text; with stop_token=None the model
    is called max_new_tokens times all the same.
    """
    start = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    options = {"stop_token": tokenizer.eot, "n_ids": tokenizer.vocab_size} | options
    ids = generate(
        model, torch.tensor([start] * num_samples, device=device), max_new_tokens, **options
    )
    rows = [row[len(start) :] for row in ids]  # (n,) each
    return [
        token_ids_to_text(
            row[: row.tolist().index(tokenizer.eot) if tokenizer.eot in row else None], tokenizer
        )
        for row in rows
    ]


def streamed(model, tokenizer, device, prompt: str, max_new_tokens: int, **options):
    """One continuation piece by piece, as it comes; a character of several tokens comes when it is whole."""
    start = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt).tolist()]], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for next_ids in stream(
        model,
        start,
        max_new_tokens,
        stop_token=tokenizer.eot,
        n_ids=tokenizer.vocab_size,
        **options,
    ):
        if next_ids.item() != tokenizer.eot:
            yield decoder.decode(tokenizer.decode_bytes([next_ids.item()]))
    yield decoder.decode(b"", final=True)


def generate_and_print_sample(
    model,
    tokenizer,
    device,
    start_context="",
    *,
    max_new_tokens=80,
    temperature=0.8,
    top_k=50,
    seed=0,
) -> str:
    """Print one sample that continues `start_context` ("": begins a document), and return its text."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    text = (
        start_context
        + continuations(model, tokenizer, device, start_context, 1, max_new_tokens, **options)[0]
    )
    print(text.strip() + "\n", flush=True)
    return text


# -------------------------------------------------------------------------------------------------------- plots


def plot_losses(
    steps,
    tokens_seen,
    train_losses,
    val_losses,
    path,
    *,
    xlabel="optimizer steps",
    uniform_loss=None,
) -> Path:
    """
    Draw training and validation loss over steps (or epochs), tokens on a second axis above; save PNG or PDF.

    Four lists of one length; None in a loss list leaves that point out (validation is measured rarely).
    uniform_loss: ln(V), drawn as a dotted line, is what guessing evenly costs. Needs no display. Returns the path.
    """
    path = Path(path)
    write_file(
        path,
        draw_losses(
            steps,
            tokens_seen,
            train_losses,
            val_losses,
            xlabel,
            uniform_loss,
            path.suffix[1:] or "png",
        ),
    )
    return path


def plot_run(run_dir, vocab_size: int | None = None) -> None:
    """Draw RUN_DIR/loss.png from its metrics.jsonl, of two thousand points at most; what prevents it is told, and nothing more."""
    n = sum(1 for _ in read_metrics(run_dir))
    rows = [
        r
        for i, r in enumerate(read_metrics(run_dir))
        if i % (n // 2000 + 1) == 0 or "val_loss" in r
    ]
    steps, tokens, *losses = [
        [r.get(name) for r in rows] for name in ("step", "tokens", "train_loss", "val_loss")
    ]
    try:
        uniform = math.log(vocab_size) if vocab_size else None
        plot_losses(
            steps,
            [t or 0 for t in tokens],
            *losses,
            Path(run_dir) / "loss.png",
            uniform_loss=uniform,
        )
    except (ImportError, OSError) as e:
        print(f"warning: no loss.png: {error_line(e)}", flush=True)


# ---------------------------------------------------------------------------------- sampling from a checkpoint


def shell(config: GPTConfig) -> GPT:
    """A GPT without memory, to be filled with load_state_dict(..., assign=True)."""
    normal_, nn.init.normal_ = nn.init.normal_, lambda tensor, *_, **__: tensor
    try:  # random numbers for what has no memory: torch imports its compiler for it, a second of every start
        with torch.device("meta"):
            return GPT(config)
    finally:
        nn.init.normal_ = normal_


def load_model(path, device) -> tuple[GPT, Tokenizer, dict]:
    """
    Model in eval mode, tokenizer and trainer state of a run folder's newest good checkpoint, or of one checkpoint.

    Every file is checked against the checkpoint's hashes before it is read; nothing in it is executed.
    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or of another shape.
    """
    folder = newest_checkpoint(path)
    tensors, state = load_checkpoint(folder)
    try:
        config = GPTConfig(**state["model_config"])
        shape_of(
            tensors, asdict(config)
        )  # before a model is built, of whatever size the configuration claims
        if len(tensors) != 12 * config.n_layer + (4 if config.tied else 5):
            raise ValueError(f"{len(tensors)} tensors are too many or too few")
        model = shell(config)
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"{folder}: the weights are not those of a GPT of this project ({error_line(e)[:200]})"
        ) from e
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} ids, the model a vocabulary of {config.vocab_size:,}"
        )
    return model.to(device).eval(), tokenizer, state


@dataclass
class SampleConfig:
    """Sample text from a trained checkpoint, or score it with --eval."""

    checkpoint: str = "runs/simple"  # run folder or checkpoint folder
    prompt: str = ""  # text to continue; empty begins a new document
    prompt_file: str | None = None  # file with the text to continue, UTF-8
    interactive: bool = False  # ask for one prompt after another, until Ctrl-D
    stream: bool = False  # show the text as it comes, one sample after another
    num_samples: int = 1  # samples, drawn together as one batch unless streamed
    max_new_tokens: int = 200  # tokens per sample, at most
    temperature: float = 0.8  # 0 is greedy, 1 the model's own distribution
    top_k: int | None = 50  # keep the k likeliest tokens; None keeps all
    # keep the likeliest tokens up to this probability, in (0, 1]; None keeps all
    top_p: float | None = None
    seed: int = 0  # same seed, same samples on one device
    # score this instead: a folder of token shards, a text file or folder, hellaswag, or hellaswag:FILE
    eval: str | None = None
    # two to eight run folders, such as runs/a runs/b: a table of them, and compare.png here
    compare: tuple[str, ...] | None = None
    # tokens between two windows of --eval; None: the whole context, so that each is read once
    stride: int | None = None
    batch_size: int = 8  # windows scored at once; changes no figure
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights while sampling or scoring
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    debug: bool = False  # show the traceback of an error


def show_samples(model, tokenizer, device, prompt: str, config: SampleConfig) -> None:
    """Print `num_samples` continuations of a prompt, behind it."""
    n_tokens, T = (
        1 + len(tokenizer.encode(prompt)),
        model.config.block_size,
    )  # end-of-text stands before every document
    if n_tokens > T:
        print(f"the prompt has {n_tokens:,} tokens, the context {T}: the model reads the last {T}")
    options = {k: getattr(config, k) for k in ("temperature", "top_k", "top_p")}
    if config.stream or config.interactive:
        for i in range(config.num_samples):
            print("-" * 80 + "\n" + prompt, end="", flush=True)
            for piece in streamed(
                model,
                tokenizer,
                device,
                prompt,
                config.max_new_tokens,
                seed=config.seed + i,
                **options,
            ):
                print(piece, end="", flush=True)
            print()
        return
    for text in continuations(
        model,
        tokenizer,
        device,
        prompt,
        config.num_samples,
        config.max_new_tokens,
        seed=config.seed,
        **options,
    ):
        print("-" * 80 + "\n" + prompt + text)


def _utf8(path, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{flag}: {path}: not UTF-8 text ({e.reason}); convert it") from e


def ids_to_score(data: str, tokenizer: Tokenizer) -> list:
    """Streams of token ids (T,) of a folder of token shards (its validation part), a text file, or a folder of .txt files."""
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"--eval: {path} does not exist; give token shards, a text file or folder, hellaswag, or hellaswag:FILE"
        )
    if path.is_dir() and any(path.glob("*.bin")):
        index = read_index(path)
        if index["tokenizer"] and index["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"--eval: {path} was made with another tokenizer ({index['tokenizer']['name']}) than the checkpoint's"
            )
        shards = Shards(path, "val", index)
        for i, tokens in enumerate(shards.tokens):
            shards.check(i, [0], len(tokens))
        if (
            not len(shards)
            or max(int(tokens.max(initial=0)) for tokens in shards.tokens) >= tokenizer.vocab_size
        ):
            raise ValueError(
                f"--eval: {path} has no tokens for validation, or ids that the checkpoint's tokenizer does not have"
            )
        return shards.tokens
    documents = [
        _utf8(file, "--eval")
        for file in ([path] if path.is_file() else sorted(path.rglob("*.txt")))
    ]
    if not any(documents):
        raise ValueError(
            f"--eval: {path} holds no text; give token shards, a text file, or a folder of .txt files"
        )
    return [np.concatenate(([tokenizer.eot], tokenizer.encode_documents(documents)))]


def score(model, tokenizer, device, config: SampleConfig) -> None:
    """Print the figures that --eval asks for."""
    T, what = model.config.block_size, config.eval.partition(":")
    options = {"block_size": T, "batch_size": config.batch_size, "device": device}
    if what[0] == "hellaswag":
        path = scoring.fetch_hellaswag(what[2] or "hellaswag_val.jsonl")
        r = scoring.score_hellaswag(
            model, scoring.read_hellaswag(path), tokenizer.encode, tokenizer.eot, **options
        )
        print(
            f"{path}: accuracy {r['accuracy']:.4f}, length-normalised {r['accuracy_norm']:.4f} ({r['items']:,} items)"
        )
        return
    streams, token_bytes = ids_to_score(config.eval, tokenizer), tokenizer.token_bytes()
    parts = [
        scoring.score_tokens(model, ids, stride=config.stride or T, **options) for ids in streams
    ]
    n_tokens, nats = (
        sum(part["tokens"] for part in parts),
        sum(part["loss"] * part["tokens"] for part in parts),
    )
    n_bytes = sum(int(token_bytes[ids[1:]].sum()) for ids in streams)
    loss, bits = (
        nats / n_tokens,
        f", {nats / math.log(2) / n_bytes:.4f} bits per byte" if n_bytes else "",
    )
    print(
        f"{config.eval}: loss {loss:.6f} nats per token, perplexity {math.exp(min(loss, 700)):.3f}{bits} ({n_tokens:,} tokens scored)"
    )


def main(config: SampleConfig) -> None:
    """Print continuations of the prompt, the figures of --eval, or the table of --compare."""
    if config.compare is not None:
        text, *picture = compare(
            config.compare, read_metrics, lambda shape: count_parameters(GPTConfig(**shape))
        )
        write_file("compare.png", draw_runs(*picture))
        return print(f"{text}\n\ncompare.png: their losses against {picture[1]}")
    for name in ("num_samples", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}: {getattr(config, name)} is out of range; give 1 or more")
    if sum(map(bool, (config.prompt, config.prompt_file, config.interactive))) > 1:
        raise ValueError("--prompt, --prompt_file, --interactive: give one of them")
    device = pick_device(config.device)
    dtype, _ = choose_dtype(config.dtype, device)
    model, tokenizer, state = load_model(config.checkpoint, device)
    model, c = model.to(dtype), model.config
    print(
        f"step {state['step']}: {count_parameters(c):,} parameters, tokenizer {tokenizer.name}, context {c.block_size}, {device}"
    )
    if config.eval:
        return score(model, tokenizer, device, config)
    prompt = _utf8(config.prompt_file, "--prompt_file") if config.prompt_file else config.prompt
    if not config.interactive:
        return show_samples(model, tokenizer, device, prompt, config)
    with contextlib.suppress(EOFError):  # Ctrl-D
        while True:
            show_samples(model, tokenizer, device, input("> "), config)


if __name__ == "__main__":
    run_script(lambda: main(parse(SampleConfig)))
