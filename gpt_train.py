"""
The GPT that every script here trains, and the helpers around it: loss, evaluation, sampling, plots.

    python gpt_train.py --checkpoint runs/simple --prompt "It was a dark"    # sample a trained run
    python gpt_train.py --checkpoint runs/simple --num_samples 3 --temperature 0.7 --top_k 50
    python gpt_train.py --checkpoint runs/simple --eval book.txt             # or score it
    python gpt_train.py --compare runs/simple runs/simple-1     # compare runs; writes compare.png

Reads a run folder (its newest good checkpoint) or one checkpoint folder; prints, and otherwise
writes nothing. Sampling 200 tokens from the default laptop model takes about a second on two CPU
cores.

The model is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"),
weight for weight, so that published checkpoints fit: its logits (a score for every next token)
equal those of transformers' GPT2LMHeadModel. To take it into another project, copy the section "the
model" and the two modules of parts/model that it imports.

Shapes, here and in every file: B rows, T positions, C width (n_embd), H heads, D head_dim, V
vocabulary, L layers.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import codecs
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.base.files import write_file
from parts.base.machine import choose_dtype, pick_device
from parts.cli.config import parse
from parts.cli.launch import error_line, run_script
from parts.data.tokenizers import Tokenizer
from parts.model.cpu_products import Linear, attend, product
from parts.model.families import FAMILIES, Family, check_tensors, config_of, shell
from parts.model.kv_cache import LayerCache
from parts.model.losses import cross_entropy_of_head
from parts.report import scoring
from parts.report.compare import compare
from parts.report.plots import draw_losses, draw_runs
from parts.storage.checkpoint import load_checkpoint, newest_checkpoint
from parts.training.metrics import read_metrics
from parts.training.plan import count_parameters

# ---------------------------------------------------------------------------------------- the model


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2's smallest size, 124M."""

    family: ClassVar[str] = "gpt"
    vocab_size: int = 50257  # V, tokens
    block_size: int = 1024  # longest T the model can read, tokens
    n_layer: int = 12  # L, blocks
    n_head: int = 12  # H, attention heads per block: attentions side by side
    n_embd: int = 768  # C, width of the residual stream that blocks read and add to
    dropout: float = 0.0  # share of activations zeroed while training
    tied: bool = True  # the output head is the token embedding; False: a matrix of its own

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                shown = str(value)[:50]
                raise ValueError(f"GPTConfig: {name} is {shown}; give a whole number, at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                "change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}; it must be in [0, 1)")

    @classmethod
    def of_size(cls, name: str, **changes) -> GPTConfig:
        """The config of a named size (see SIZES), with `changes` applied. Raises ValueError."""
        if name not in SIZES:
            sizes = ", ".join(SIZES)
            raise ValueError(f"--model_size: unknown size {name!r}; choose one of {sizes}")
        n_layer, n_head, n_embd = SIZES[name]
        return cls(**{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **changes})


# name -> (n_layer, n_head, n_embd). The last four are GPT-2's, named by their parameters with
# 50,257 tokens; most parameters of the small ones depend on the vocabulary.
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


class CausalSelfAttention(nn.Module):
    """Each position reads itself and earlier ones. Source: Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(C, 3 * C)  # query, key and value in one product
        self.c_proj = Linear(C, C)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C). With a cache, x has only positions after the cached ones."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = [t.view(B, T, H, D).transpose(1, 2) for t in (q, k, v)]  # each (B, H, T, D)
        seen = 0
        if cache is not None:
            seen = len(cache)
            k, v = cache.extend(k, v)  # (B, H, seen + T, D)
        # after earlier keys, one query may read every key; several need a mask shifted by `seen`
        mask = None
        if seen and T > 1:
            mask = torch.ones(T, seen + T, dtype=torch.bool, device=x.device).tril(seen)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Four times wider and back, with the tanh form of GELU that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), each position by itself."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.draws_random = config.dropout > 0  # recomputing then needs the earlier random state

    def forward(self, x, cache: LayerCache | None = None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """
    GPT-2. The output head is the token embedding itself (tied weights), stored and counted once,
    unless the config says otherwise.
    """

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
        # 2 L products add to the residual stream; with this scale its variance does not grow
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
        Logits for the token after each position, or after the last one only; or the loss.

        ids (B, T) int64 with T <= block_size. Returns logits (B, T, V), with `last` (B, 1, V). With
        targets (B, T) int64 it returns the fp32 **sum** of the cross-entropy over targets that are
        not -100, a scalar: sums of ragged batches can be added and divided once, means cannot.
        `cache` is a list of one LayerCache per block, extended in place; ids then continue the
        cached positions. Raises ValueError if the text is longer than block_size.
        """
        B, T = ids.shape
        seen = len(cache[0]) if cache else 0
        longest = self.config.block_size
        if seen + T > longest:
            raise ValueError(
                f"GPT: {seen + T} tokens are more than the context of {longest}; crop the input"
            )
        positions = torch.arange(seen, seen + T, device=ids.device)
        # sparse: the embedding's gradient is a few rows, added to the head's; a dense one would be
        # a second (V, C), mostly zeros
        sparse = self.config.tied and ids.device.type == "cpu"
        x = F.embedding(ids, self.wte.weight, sparse=sparse)  # (B, T, C)
        x = self.dropout(x + self.wpe(positions))
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        x = self.ln_f(x)
        head = self.wte.weight if self.config.tied else self.lm_head.weight
        if targets is None:
            return product(x[:, -1:] if last else x, head)  # (B, T, V) or (B, 1, V)
        return cross_entropy_of_head(x.flatten(0, 1), head, targets.flatten())


# --------------------------------------------------------------------------------- loss, evaluation


def calc_loss_batch(input_batch, target_batch, model, device):
    """
    Mean cross-entropy per target: nats, fp32 scalar, differentiable.

    Batches are (B, T) int64; targets that are -100 are ignored.
    """
    input_batch, target_batch = input_batch.to(device), target_batch.to(device)
    return model(input_batch, target_batch) / (target_batch != -100).sum().clamp(min=1)


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None):
    """
    Mean cross-entropy per target (nats, float) over (inputs, targets) pairs.

    num_batches: only the first so many; None: all. Sums are added and divided once, so a short last
    batch counts by its tokens. nan if there are no targets.
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
    Figures of the whole validation set, without dropout; the model is left in the mode it was in.

    val_batches: a list of (inputs, targets) pairs, each (B, T) int64. token_bytes (V,): bytes of
    text behind each token id (0 for end-of-text). Returns {"loss": nats per token, "perplexity",
    "tokens"} and, with token_bytes, "bits_per_byte": all nats, in bits, over all bytes predicted.
    Unlike the loss, that figure can be compared between tokenizers.
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


# ----------------------------------------------------------------------------------------- sampling


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
            "the model's output is not finite: its training has diverged; "
            "train again with a lower learning rate"
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
        before = probs.cumsum(dim=-1) - probs  # of likelier tokens: the first is always kept
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def _check_options(ids, temperature, top_k, top_p, seed, V: int) -> None:
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"generate: ids have shape {tuple(ids.shape)}; "
            "give (B, T) with at least one token, such as end-of-text"
        )
    if not temperature >= 0:
        raise ValueError(
            f"--temperature: {temperature} is below 0; use 0 for the likeliest token, "
            "1 for the model's own distribution"
        )
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"--top_k: {top_k} is not between 1 and the {V} tokens of the vocabulary")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top_p: {top_p} is not in (0, 1]")
    if seed is not None and abs(seed) >= 2**63:
        raise ValueError(f"--seed: {seed} does not fit into 64 bits")


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
    The tokens that follow ids (B, T) int64, as they are sampled: up to max_new_tokens times (B, 1).

    temperature 0 always takes the likeliest token; top_k keeps the k likeliest tokens, top_p the
    smallest set whose probability reaches p (Holtzman et al. 2020). A row that has produced
    `stop_token` is filled up with it; sampling ends when all rows have. `n_ids`: sample only ids
    below it, if the model has more of them than the tokenizer. `seed` fixes the result; the global
    random state is neither read nor changed, so sampling cannot disturb training.

    The model reads at most its last block_size tokens. While all fit, keys and values are cached;
    from then on every learned position shifts with each token, so the window is read anew: slower,
    with the same ids as without a cache. Raises ValueError for an empty prompt or options out of
    range.
    """
    V = n_ids or model.config.vocab_size
    _check_options(ids, temperature, top_k, top_p, seed, V)
    generator = torch.Generator(ids.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    was_training, block_size = model.training, model.config.block_size
    model.eval()
    cache, fresh = None, ids[:, -block_size:]  # fresh: what the model reads in the next call
    if use_cache and ids.shape[1] < block_size:
        capacity = min(block_size, ids.shape[1] + max_new_tokens)
        cache = [LayerCache(capacity) for _ in range(model.config.n_layer)]
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


def generate(model, ids, max_new_tokens, **options):
    """ids (B, T) int64 with the sampled ones appended, (B, T + n); options as for `stream`."""
    return torch.cat((ids, *stream(model, ids, max_new_tokens, **options)), dim=1)


def sample_text(
    model,
    tokenizer,
    device,
    prompt: str = "",
    num_samples: int = 1,
    max_new_tokens: int = 80,
    *,
    on_piece=None,
    should_stop=None,
    **options,
) -> list[str]:
    """
    What the model writes after `prompt` ("" begins a document): one text per sample.

    Options as for `stream`. Each text ends before its end-of-text; with stop_token=None the model
    is called max_new_tokens times all the same. should_stop() true ends it at the next token.
    on_piece(text) gets the first sample piece by piece; a character of several tokens comes when it
    is complete.
    """
    eot, ids = tokenizer.eot, [tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    start = torch.tensor([ids] * num_samples, device=device)
    options = {"stop_token": eot, "n_ids": tokenizer.vocab_size} | options
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    columns = []  # (B, 1) each
    for next_ids in stream(model, start, max_new_tokens, **options):
        columns.append(next_ids)
        if on_piece and next_ids[0].item() != eot:
            on_piece(decoder.decode(tokenizer.decode_bytes([next_ids[0].item()])))
        if should_stop and should_stop():
            break
    if on_piece:
        on_piece(decoder.decode(b"", final=True))
    rows = torch.cat(columns, dim=1).tolist() if columns else [[]] * num_samples
    return [tokenizer.decode(row[: row.index(eot) if eot in row else None]) for row in rows]


def sampler(tokenizer):
    """(model, device, should_stop) -> a text: the samples of a training, always the same seed."""

    def sample(model, device, should_stop) -> str:
        options = {"temperature": 0.8, "top_k": 50, "seed": 0, "should_stop": should_stop}
        options["stop_token"] = None  # under fsdp every rank calls the model equally often
        return sample_text(model, tokenizer, device, **options)[0]

    return sample


def generate_and_print_sample(model, tokenizer, device, start_context="", **options) -> str:
    """Print one sample that continues `start_context`, and return its text."""
    options = {"max_new_tokens": 80, "temperature": 0.8, "top_k": 50, "seed": 0} | options
    text = start_context + sample_text(model, tokenizer, device, start_context, **options)[0]
    print(text.strip() + "\n", flush=True)
    return text


# -------------------------------------------------------------------------------------------- plots


def plot_losses(
    steps,
    tokens_seen,
    train_losses,
    val_losses,
    path,
    *,
    xlabel="optimizer steps",
    uniform_loss=None,
) -> Path | None:
    """
    Draw training and validation loss over steps (or epochs), with tokens on an axis above; save it.

    Four lists of one length; None in a loss list leaves that point out (validation is measured
    rarely). uniform_loss: ln(V), the loss of guessing evenly, as a dotted line. The format is that
    of the path, PNG or PDF. Needs no display. Returns the path, or None, with a warning, if
    matplotlib is missing or broken. Raises OSError if the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix[1:] or "png"
    lists = (steps, tokens_seen, train_losses, val_losses)
    return _write_image(path, draw_losses, *lists, xlabel, uniform_loss, kind)


def _write_image(path: Path, draw, *arguments) -> Path | None:
    """Write the image that draw(*arguments) returns. What was computed is not lost without it."""
    try:
        image = draw(*arguments)
    except Exception as e:  # noqa: BLE001  a missing or broken matplotlib may raise anything
        print(f"warning: no {path.name}: {error_line(e)}; pip install matplotlib", flush=True)
        return None
    write_file(path, image)
    return path


def plot_run(run_dir, vocab_size: int | None = None, folder=None) -> None:
    """
    Draw loss.png from a run's metrics.jsonl, at most two thousand points, or warn.

    folder: where it goes; None: the run folder.
    """
    n = sum(1 for _ in read_metrics(run_dir))
    every = n // 2000 + 1
    records = enumerate(read_metrics(run_dir))
    rows = [r for i, r in records if i % every == 0 or "val_loss" in r]
    steps, tokens, train_losses, val_losses = [
        [r.get(name) for r in rows] for name in ("step", "tokens", "train_loss", "val_loss")
    ]
    tokens = [t or 0 for t in tokens]
    uniform = math.log(vocab_size) if vocab_size else None
    path = Path(folder or run_dir) / "loss.png"
    try:
        plot_losses(steps, tokens, train_losses, val_losses, path, uniform_loss=uniform)
    except OSError as e:
        print(f"warning: no loss.png: {error_line(e)}", flush=True)


# ----------------------------------------------------------------------- sampling from a checkpoint

FAMILIES["gpt"] = Family("GPT-2", GPTConfig, GPT, Block, "h", SIZES)


def load_model(path, device) -> tuple[nn.Module, Tokenizer, dict]:
    """
    (model in eval mode, tokenizer, trainer state) of a run's newest good checkpoint, or of one.

    Every file is checked against the checkpoint's hashes before it is read; nothing in it is
    executed. Raises FileNotFoundError if there is no checkpoint, ValueError if it is damaged, of
    another family or of another shape.
    """
    folder = newest_checkpoint(path)
    tensors, state = load_checkpoint(folder)
    try:
        config = config_of(state)
        check_tensors(tensors, config)  # before a model of whatever size is built
        model = shell(config)
        model.load_state_dict(tensors, assign=True)
    except (ValueError, RuntimeError) as e:
        raise ValueError(f"{folder}: holds no model of this project: {error_line(e)[:300]}") from e
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} ids, "
            f"the model a vocabulary of {config.vocab_size:,}"
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
    top_p: float | None = None  # keep the likeliest tokens up to this probability, in (0, 1]
    seed: int = 0  # same seed, same samples on one device
    eval: str | None = None  # score this: token shards, a text or folder, hellaswag, hellaswag:FILE
    compare: tuple[str, ...] | None = None  # two to eight run folders; writes compare.png here
    stride: int | None = None  # tokens between two windows of --eval; None: the whole context
    batch_size: int = 8  # windows scored at once; changes no figure
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights while sampling or scoring
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    debug: bool = False  # show the traceback of an error


def show_samples(model, tokenizer, device, prompt: str, config: SampleConfig) -> None:
    """Print `num_samples` continuations of a prompt, after the prompt."""
    n_tokens = 1 + len(tokenizer.encode(prompt))  # every document begins after an end-of-text
    T = model.config.block_size
    if n_tokens > T:
        print(f"the prompt has {n_tokens:,} tokens, the context {T}: the model reads the last {T}")
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    options["max_new_tokens"] = config.max_new_tokens
    ruler = "-" * 80
    if config.stream or config.interactive:
        for i in range(config.num_samples):
            print(f"{ruler}\n{prompt}", end="", flush=True)

            def show(piece: str) -> None:
                print(piece, end="", flush=True)

            options |= {"seed": config.seed + i, "on_piece": show}
            sample_text(model, tokenizer, device, prompt, **options)
            print()
        return
    options |= {"num_samples": config.num_samples, "seed": config.seed}
    for text in sample_text(model, tokenizer, device, prompt, **options):
        print(f"{ruler}\n{prompt}{text}")


def main(config: SampleConfig) -> None:
    """Print continuations of the prompt, the figures of --eval, or the table of --compare."""
    if config.compare is not None:
        text, *picture = compare(config.compare)
        print(f"{text}\n")
        if _write_image(Path("compare.png"), draw_runs, *picture):
            print(f"compare.png: their losses against {picture[1]}")
        return None
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
        f"step {state['step']}: {count_parameters(c):,} parameters, tokenizer {tokenizer.name}, "
        f"context {c.block_size}, {device}"
    )
    if config.eval:
        T, B = c.block_size, config.batch_size
        stride = T if config.stride is None else config.stride
        return print(scoring.score(model, tokenizer, config.eval, T, stride, B, device))
    prompt = config.prompt
    if config.prompt_file:
        prompt = scoring.read_utf8(config.prompt_file, "--prompt_file")
    if not config.interactive:
        return show_samples(model, tokenizer, device, prompt, config)
    with contextlib.suppress(EOFError):  # Ctrl-D
        while True:
            show_samples(model, tokenizer, device, input("> "), config)


if __name__ == "__main__":
    run_script(lambda: main(parse(SampleConfig)))
