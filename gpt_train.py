"""
The GPT that every script here trains, and the helpers around it: loss, evaluation, generation, plots.

    python gpt_train.py --checkpoint runs/simple --prompt "It was a dark"      # sample from a trained run
    python gpt_train.py --checkpoint runs/simple --num_samples 3 --temperature 0.7 --top_k 50 --seed 1
    python gpt_train.py --help

Reads a run folder (its newest good checkpoint) or one checkpoint folder; prints samples and writes nothing.
Sampling 200 tokens from the default laptop model takes about a second on two CPU cores.

The model is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), weight for
weight, so that published checkpoints fit: its logits equal those of transformers' GPT2LMHeadModel.
Shapes, here and in every file: B rows, T positions, C width (n_embd), H heads, D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C in those seconds leaves no traceback
    from parts.launch import quiet_ctrl_c

    quiet_ctrl_c()

import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.checkpoint import load_checkpoint, newest_checkpoint, write_file
from parts.config import parse
from parts.launch import error_line, run_script
from parts.meter import read_metrics
from parts.objectives import cross_entropy_of_head
from parts.tokenizers import Tokenizer

# ---------------------------------------------------------------------------------------------------- the model


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2's smallest size, 124M."""

    vocab_size: int = 50257  # V, tokens
    block_size: int = 1024  # longest T the model can read, tokens
    n_layer: int = 12  # L, blocks
    n_head: int = 12  # H, attention heads per block
    n_embd: int = 768  # C, width of the residual stream
    dropout: float = 0.0  # share of activations zeroed while training

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change one of them")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}; it must be in [0, 1)")

    @classmethod
    def of_size(cls, name: str, **changes) -> GPTConfig:
        """The config of a named size (see SIZES), with `changes` applied. Raises ValueError listing the names."""
        if name not in SIZES:
            raise ValueError(f"--model_size: unknown size {name!r}; choose one of {', '.join(SIZES)}")
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
    """Keys and values, each (B, H, T, D), of the positions one attention layer has already seen."""

    def __init__(self):
        self.k = self.v = None

    def __len__(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def extend(self, k, v):
        """All keys and values up to now, the new ones last."""
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v


def attends_in_products(device, dtype, T: int, dropout: float) -> bool:
    """Whether two plain products and a softmax are faster than torch's kernel: its bf16 backward on CPUs takes three times as long."""
    return device.type == "cpu" and dtype == torch.bfloat16 and T <= 512 and not dropout


def _attention_in_products(q, k, v):
    """Causal attention of q, k, v (B, H, T, D) -> (B, H, T, D); holds (B, H, T, T) probabilities."""
    T, D = q.shape[2:]
    with torch.autocast(q.device.type, enabled=False):  # a softmax of bf16 is computed in fp32, and given back in bf16
        scores = (q / math.sqrt(D)) @ k.transpose(2, 3)  # (B, H, T, T)
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(dim=3) @ v


class CausalSelfAttention(nn.Module):
    """Each position reads from itself and the positions before it. Source: Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C). With a cache, x holds only the positions that follow the cached ones."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        seen = 0
        if cache is not None:
            seen = len(cache)
            k, v = cache.extend(k, v)  # (B, H, seen + T, D)
        # is_causal aligns query 0 with key 0, which is wrong as soon as keys lie before the first query:
        # one query may then see every key, several need a mask that starts `seen` columns further right.
        mask = torch.ones(T, seen + T, dtype=torch.bool, device=x.device).tril(seen) if seen and T > 1 else None
        dropout = self.dropout if self.training else 0.0
        if attends_in_products(q.device, q.dtype, T, dropout) and not seen:
            y = _attention_in_products(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not seen and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Four times wider and back, position by position, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
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

    def forward(self, x, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output head is the token embedding itself (tied weights), so it is stored and counted once."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embedding, and the head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # learned positions
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(self._init_weights)
        # 2 L products add to the residual stream; scaled like this its variance does not grow with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, ids, targets=None, cache: list[LayerCache] | None = None):
        """
        Logits for the token after each position; with `targets` the loss instead.

        ids (B, T) int64 with T <= block_size. Returns logits (B, T, V). With targets (B, T) int64 it returns the
        fp32 **sum** of the cross-entropy over targets that are not -100, a scalar: sums of ragged batches can be
        added and divided once, means cannot. `cache` is a list of one LayerCache per block, extended in place;
        ids then continue the cached positions. Raises ValueError where the text is longer than block_size.
        """
        B, T = ids.shape
        seen = len(cache[0]) if cache else 0
        if seen + T > self.config.block_size:
            raise ValueError(f"GPT: {seen + T} tokens are more than the context of {self.config.block_size}; crop the input")
        positions = torch.arange(seen, seen + T, device=ids.device)
        # sparse: the embedding's gradient is a few rows, added to the head's; otherwise a second (V, C) of zeros comes about
        x = F.embedding(ids, self.wte.weight, sparse=ids.device.type == "cpu")  # (B, T, C)
        x = self.dropout(x + self.wpe(positions))
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        x = self.ln_f(x)
        if targets is None:
            return F.linear(x, self.wte.weight)  # (B, T, V)
        return cross_entropy_of_head(x.flatten(0, 1), self.wte.weight, targets.flatten())


def count_parameters(config: GPTConfig) -> int:
    """Trainable numbers in a GPT of this shape, tied ones once, without building it."""
    C = config.n_embd
    block = 12 * C * C + 13 * C  # attention 4 C^2 + 4 C, MLP 8 C^2 + 5 C, two norms 4 C
    return (config.vocab_size + config.block_size) * C + config.n_layer * block + 2 * C


def flops_per_token(config: GPTConfig) -> int:
    """
    Floating-point operations to train on one token at full context, forward and backward.

    6 per weight of a matrix product (the tied head is one, position embeddings are not) and 12 L C T for
    attention scores and values. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    c = config
    n_weights = count_parameters(c) - c.block_size * c.n_embd
    return 6 * n_weights + 12 * c.n_layer * c.n_embd * c.block_size


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
        raise RuntimeError("the model's output is not finite: its training has diverged; train again with a lower learning rate")
    if temperature < 1e-5:  # dividing by less overflows
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, -math.inf)  # the first is always kept
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model, ids, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, seed=None, stop_token=None, use_cache=True, should_stop=None
):
    """
    The ids with up to `max_new_tokens` sampled ones behind them: (B, T) int64 -> (B, T + n).

    temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the smallest set whose probability reaches p
    (Holtzman et al. 2020). A row that has produced `stop_token` is filled up with it; generation ends when all have.
    `seed` fixes the result; the global random state is neither read nor changed, so sampling cannot disturb training.
    The model reads at most its last block_size tokens. While all fit, keys and values are cached; past that point
    every learned position shifts with each token, so the window is read anew: slower, and the same ids as without
    a cache. should_stop() true ends it at the next token. Raises ValueError for an empty prompt or options out of range.
    """
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"generate: ids have shape {tuple(ids.shape)}; give (B, T) with at least one token, such as end-of-text")
    if not temperature >= 0:
        raise ValueError(f"--temperature: {temperature} is not 0 or more; use 0 for greedy, 1 for the model's own distribution")
    if top_k is not None and top_k < 1:
        raise ValueError(f"--top_k: {top_k} keeps no token; use 1 or more")
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
        cache = [LayerCache() for _ in model.h]
    stopped = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = model(fresh, cache=cache)[:, -1]  # (B, V)
        next_ids = _sample_next(logits, temperature, top_k, top_p, generator)  # (B, 1)
        if stop_token is not None:
            next_ids = next_ids.masked_fill(stopped, stop_token)
            stopped |= next_ids == stop_token
        ids = torch.cat((ids, next_ids), dim=1)
        if stopped.all() or (should_stop and should_stop()):
            break
        if ids.shape[1] > block_size:
            cache = None
        fresh = next_ids if cache else ids[:, -block_size:]
    model.train(was_training)
    return ids


def continuations(model, tokenizer, device, prompt: str, num_samples: int, max_new_tokens: int, **options) -> list[str]:
    """What the model writes behind `prompt` ("": begins a document), one text per sample; options as for `generate`."""
    start = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    ids = generate(model, torch.tensor([start] * num_samples, device=device), max_new_tokens, stop_token=tokenizer.eot, **options)
    rows = [row[len(start) :] for row in ids]  # (n,) each
    return [token_ids_to_text(row[: row.tolist().index(tokenizer.eot) if tokenizer.eot in row else None], tokenizer) for row in rows]


def generate_and_print_sample(model, tokenizer, device, start_context="", *, max_new_tokens=80, temperature=0.8, top_k=50, seed=0) -> str:
    """Print one sample that continues `start_context` ("": begins a document), and return its text."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    text = start_context + continuations(model, tokenizer, device, start_context, 1, max_new_tokens, **options)[0]
    print(text.strip() + "\n", flush=True)
    return text


# -------------------------------------------------------------------------------------------------------- plots


def plot_losses(steps, tokens_seen, train_losses, val_losses, path, *, xlabel="optimizer steps", uniform_loss=None) -> Path:
    """
    Draw training and validation loss over steps (or epochs), tokens on a second axis above; save PNG or PDF.

    Four lists of one length; None in a loss list leaves that point out (validation is measured rarely).
    uniform_loss: ln(V), drawn as a dotted line, is what guessing evenly costs. Needs no display. Returns the path.
    """
    from matplotlib.figure import Figure  # here, because matplotlib costs every start a second
    from matplotlib.ticker import EngFormatter

    def points(losses):
        return zip(*[(s, loss) for s, loss in zip(steps, losses, strict=True) if loss is not None], strict=True)

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if any(loss is not None for loss in train_losses):
        x, y = points(train_losses)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="training, each batch")
        weight, total, smooth = 0.0, 0.0, []  # exponential mean over about 10 points, unbiased at the start
        for loss in y:
            weight, total = 0.9 * weight + 1, 0.9 * total + loss
            smooth.append(total / weight)
        axes.plot(x, smooth, color="tab:blue", linewidth=2, label="training, smoothed")
    if any(loss is not None for loss in val_losses):
        x, y = points(val_losses)
        axes.plot(x, y, color="tab:orange", marker="o", markersize=4, label=f"validation, last {y[-1]:.3f}")
    if uniform_loss is not None:
        axes.axhline(uniform_loss, color="gray", linestyle=":", linewidth=1, label=f"guessing evenly, {uniform_loss:.2f}")
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    if len(steps) > 1 and steps[-1] > steps[0]:
        per_step = (tokens_seen[-1] - tokens_seen[0]) / (steps[-1] - steps[0])
        if per_step > 0:
            top = axes.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
            top.set_xlabel("tokens seen")
            top.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 under a distant 1e6
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=150)
    write_file(path, buffer.getvalue())
    return path


def plot_run(run_dir, vocab_size: int | None = None) -> None:
    """Draw RUN_DIR/loss.png from its metrics.jsonl, of two thousand points at most; what prevents it is told, and nothing more."""
    n = sum(1 for _ in read_metrics(run_dir))
    rows = [r for i, r in enumerate(read_metrics(run_dir)) if i % (n // 2000 + 1) == 0 or "val_loss" in r]
    steps, tokens, *losses = [[r.get(name) for r in rows] for name in ("step", "tokens", "train_loss", "val_loss")]
    try:
        uniform = math.log(vocab_size) if vocab_size else None
        plot_losses(steps, [t or 0 for t in tokens], *losses, Path(run_dir) / "loss.png", uniform_loss=uniform)
    except (ImportError, OSError) as e:
        print(f"warning: no loss.png: {error_line(e)}", flush=True)


# ---------------------------------------------------------------------------------- sampling from a checkpoint


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" takes cuda, else mps, else cpu. Raises ValueError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # also refuses "meta", which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device: {name!r} cannot be used here ({str(e).splitlines()[0][:120]}); try cpu") from e
    return device


def load_model(path, device) -> tuple[GPT, Tokenizer, dict]:
    """
    Model in eval mode, tokenizer and trainer state of a run folder's newest good checkpoint, or of one checkpoint.

    Every file is checked against the checkpoint's hashes before it is read; nothing in it is executed.
    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or of another shape.
    """
    folder = newest_checkpoint(path)
    tensors, state = load_checkpoint(folder)
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"{folder}: the weights are not those of a GPT of this project ({error_line(e)[:200]})") from e
    return model.to(device).eval(), Tokenizer.load(folder / "tokenizer.json"), state


@dataclass
class SampleConfig:
    """Sample text from a trained checkpoint."""

    checkpoint: str = "runs/simple"  # run folder or checkpoint folder
    prompt: str = ""  # text to continue; empty begins a new document
    num_samples: int = 1  # samples, drawn together as one batch
    max_new_tokens: int = 200  # tokens per sample, at most
    temperature: float = 0.8  # 0 is greedy, 1 the model's own distribution
    top_k: int | None = 50  # keep the k likeliest tokens; None keeps all
    top_p: float | None = None  # keep the likeliest tokens up to this probability, in (0, 1]; None keeps all
    seed: int = 0  # same seed, same samples on one device
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    debug: bool = False  # show the traceback of an error


def main(config: SampleConfig) -> None:
    """Print `num_samples` continuations of the prompt."""
    if config.num_samples < 1 or config.max_new_tokens < 1:
        raise ValueError(f"--num_samples {config.num_samples}, --max_new_tokens {config.max_new_tokens}: both must be at least 1")
    device = pick_device(config.device)
    model, tokenizer, state = load_model(config.checkpoint, device)
    c = model.config
    print(f"step {state['step']}: {count_parameters(c):,} parameters, tokenizer {tokenizer.name}, context {c.block_size}, {device}")
    n_tokens = 1 + len(tokenizer.encode(config.prompt))  # end-of-text stands before every document
    if n_tokens > c.block_size:
        print(f"the prompt has {n_tokens:,} tokens, the context {c.block_size}: the model reads the last {c.block_size}")
    options = {k: getattr(config, k) for k in ("temperature", "top_k", "top_p", "seed")}
    for text in continuations(model, tokenizer, device, config.prompt, config.num_samples, config.max_new_tokens, **options):
        print("-" * 80 + "\n" + config.prompt + text)


if __name__ == "__main__":
    run_script(lambda: main(parse(SampleConfig)))
