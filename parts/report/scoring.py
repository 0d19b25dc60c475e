"""
How well a model predicts: the loss of a text in sliding windows, and HellaSwag.

    score(model, tokenizer, data, ...)       one line of figures, for --eval
    score_tokens(logits_fn, ids, ...)        loss of a stream of token ids
    score_hellaswag(logits_fn, items, ...)   accuracy

A logits_fn maps ids (B, T) int64 to logits (B, T, V) and is causal; a GPT is one. Rows shorter than
their batch are padded on the right, which no scored position can see. Logarithms are computed in
fp32, sums in fp64, so batch_size changes a result only as far as it changes the matrix products of
the model: on the CPU mostly not at all, at most by 2e-10 of the loss (measured).
"""

from __future__ import annotations

import io
import json
import math
import re
import threading
import urllib.error
import urllib.request
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from parts.base.files import write_file
from parts.base.text import one_line
from parts.cli.launch import print_notes
from parts.data.corpus import documents_of
from parts.data.shards import Shards, holds_shards, read_index

HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
MAX_BYTES = 64 << 20  # of a download; the file has 12 MB
NOT_FINITE = (
    "the model's output is not finite: its training has diverged; "
    "train again with a lower learning rate"
)


def _nats(logits_fn, rows, scored, width: int, device) -> list[float]:
    """
    -log p (nats) of the last scored[i] tokens of each row of ids (n,).

    All rows are read as one batch (B, width). Raises RuntimeError if the output is not finite.
    """
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)  # (B, T)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.from_numpy(row[:-1])
    all_logits = logits_fn(inputs.to(device))  # (B, T, V)
    sums = []
    for row, n, logits in zip(rows, scored, all_logits, strict=True):  # (T, V) in fp32 is large
        last = logits[len(row) - 1 - n : len(row) - 1]  # (n, V)
        targets = torch.from_numpy(row[-n:]).to(logits.device)  # (n,)
        nats = F.cross_entropy(last.float(), targets, reduction="none")
        sums.append(nats.cpu().double().sum().item())  # not every device has fp64
    if not all(map(math.isfinite, sums)):
        raise RuntimeError(NOT_FINITE)
    return sums


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch_size: {batch_size} is not a number of rows; use 1 or more")


# ----------------------------------------------------------------------------------- loss of a text


def windows(n_tokens: int, block_size: int, stride: int):
    """
    Iterator of (start, end, first_scored): read ids[start:end], score ids[first_scored : end + 1].

    Every token but the first is scored once: in the first window all of them, in each later one the
    last `stride`, with at least block_size - stride + 1 tokens before them. stride == block_size is
    fastest, 1 gives each token as much context as there is. windows(8, 4, 2) is (0, 4, 1),
    (2, 6, 5), (4, 7, 7).
    Raises ValueError for fewer than 2 tokens, or a stride that skips tokens. Source: "Perplexity of
    fixed-length models" of Hugging Face's transformers, whose windows end one token earlier, so
    that without overlap each loses its first.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"--stride: {stride} is not between 1 and the context length, {block_size}"
        )
    if n_tokens < 2:
        raise ValueError(
            f"the text to score has {n_tokens} tokens; scoring needs at least 2, "
            "as the first is not predicted"
        )
    n_later = -(-max(0, n_tokens - 1 - block_size) // stride)  # windows after the first
    starts = range(0, (n_later + 1) * stride, stride)
    return (
        (s, min(s + block_size, n_tokens - 1), s + block_size - stride + 1 if s else 1)
        for s in starts
    )


@torch.no_grad()
def score_tokens(
    logits_fn,
    ids,
    block_size: int,
    stride: int,
    batch_size: int,
    device,
    token_bytes=None,
    progress=None,
) -> dict:
    """
    {"loss": nats per token, "perplexity", "tokens" scored} of ids (n,); see `windows`.

    ids: a numpy array; of a memory-mapped one only the current windows are copied. Several
    documents are one stream, and end-of-text is predicted like any other token. batch_size windows
    are read at once. With token_bytes (V,), bytes of text per id (0 for end-of-text), also
    "bits_per_byte". progress(n) is called when n more of the len(ids) - 1 tokens are scored.
    Raises ValueError as `windows` does, RuntimeError if the model's output is not finite.
    """
    _check_batch_size(batch_size)
    remaining = windows(len(ids), block_size, stride)
    # The last window, which may be shorter, is padded: compiled kernels see one width.
    width = min(block_size, len(ids) - 1)
    total, n_tokens, n_bytes = 0.0, 0, 0
    while batch := list(islice(remaining, batch_size)):
        rows = [np.asarray(ids[start : end + 1]).astype(np.int64) for start, end, _ in batch]
        scored = [end + 1 - first for _, end, first in batch]
        for nats in _nats(logits_fn, rows, scored, width, device):
            total += nats
        n_tokens += sum(scored)
        if token_bytes is not None:
            for row, n in zip(rows, scored, strict=True):
                n_bytes += int(np.asarray(token_bytes)[row[-n:]].sum())
        if progress:
            progress(sum(scored))
    loss = total / n_tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": n_tokens}
    if token_bytes is not None:
        result["bits_per_byte"] = total / math.log(2) / max(n_bytes, 1)
    return result


# ---------------------------------------------------------------------------------------- HellaSwag


def _clean(text: str) -> str:
    """
    A text without WikiHow's marks, as lm-evaluation-harness cleans it.

    The blanks that this leaves are scored, there as here.
    """
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_hellaswag(path) -> list[dict]:
    """
    Items {"ctx", "endings": 4 texts, "label": index of the right one} of HellaSwag's own jsonl.

    Cleaned as lm-evaluation-harness does. Raises FileNotFoundError, or ValueError naming the first
    line that is not an item. Source: Zellers et al. 2019.
    """
    with open(path, "rb") as f:
        return _items(f, path)


def _items(lines, path) -> list[dict]:
    items = [_item(line, f"{path}: line {n}") for n, line in enumerate(lines, 1)]
    if not items:
        raise ValueError(f"{path}: holds no items; fetch the file again")
    return items


def _item(line: bytes, where: str) -> dict:
    where = f"{where} is not a HellaSwag item"
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} (not JSON); fetch the file again") from e
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    if not isinstance(item, dict) or any(name not in item for name in fields):
        raise ValueError(f"{where} (it has to have {', '.join(fields)}); give hellaswag_val.jsonl")
    activity, ctx_a, ctx_b, endings, label = (item[name] for name in fields)
    four = endings if isinstance(endings, list) and len(endings) == 4 else [None]
    if not all(isinstance(text, str) for text in (activity, ctx_a, ctx_b, *four)):
        raise ValueError(f"{where} (it needs texts and 4 endings); give hellaswag_val.jsonl")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(
            f"{where} (label {str(label)[:20]!r} is not 0, 1, 2 or 3); "
            "give the validation part, which has labels"
        )
    ctx = _clean(f"{activity}: {ctx_a} {ctx_b.capitalize()}")
    return {"ctx": ctx, "endings": [_clean(text) for text in endings], "label": int(label)}


def fetch_hellaswag(
    path, url: str = HELLASWAG_URL, timeout_s: float = 10.0, whole_s: float = 120.0
) -> Path:
    """
    `path`, after downloading and checking it if it is missing.

    Raises OSError after timeout_s without an answer or whole_s in all, and for a file that is too
    large, cut off, or not HellaSwag.
    """
    path, received, failed = Path(path), bytearray(), []
    if path.exists():
        return path

    def download():
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as response:
                while len(received) <= MAX_BYTES and (block := response.read1(1 << 16)):
                    received.extend(block)
                length = response.headers.get("Content-Length") or ""
                if length.isdecimal() and len(received) < min(int(length), MAX_BYTES + 1):
                    raise OSError(f"cut off after {len(received):,} of {int(length):,} bytes")
        except Exception as e:  # noqa: BLE001  whatever it is, it is reported below
            failed.append(e)
            if isinstance(e, urllib.error.HTTPError):  # is an open response, too
                e.close()

    # A daemon thread: the timeout of the socket limits neither a slow name server nor a server that
    # sends one byte per second.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if received:
        thread.join(max(0.0, whole_s - timeout_s))
    try:
        if thread.is_alive():
            late = f"not complete after {whole_s:g} s"
            raise OSError(late if received else f"no answer within {timeout_s:g} s")
        if failed:
            raise failed[0]
        if len(received) > MAX_BYTES:
            raise OSError(f"longer than {MAX_BYTES >> 20} MB")
        _items(io.BytesIO(received), path)
        write_file(path, received)
    except Exception as e:
        why = one_line(e, 200)
        raise OSError(
            f"{path}: missing, and the download from {url} failed ({why}); "
            "put HellaSwag's hellaswag_val.jsonl there"
        ) from e
    return path


def _ids_of(encode, bos: int, ctx: str, ending: str) -> tuple[np.ndarray, int]:
    """
    Ids (n,) of a question with one ending, and how many of them belong to the ending.

    The ending is what follows as many ids as the question has by itself.
    """
    question = ctx.rstrip()  # a blank belongs to the word after it
    n = len(encode(question))
    ids = np.asarray(encode(ctx + " " + ending)).astype(np.int64)
    return (ids, max(1, len(ids) - n)) if n else (np.insert(ids, 0, bos), len(ids))


@torch.no_grad()
def score_hellaswag(
    logits_fn, items, encode, bos: int, block_size: int, batch_size: int, device, progress=None
) -> dict:
    """
    {"accuracy", "accuracy_norm", "items"}: how often the right ending is the likeliest.

    accuracy compares whole endings, accuracy_norm their log-probability per character. They equal
    acc and acc_norm of lm-evaluation-harness in its task hellaswag, zero-shot. items: see
    read_hellaswag; encode(text) -> ids; bos precedes an ending that has no question. What exceeds
    block_size is cut off on the left. batch_size endings are read at once; progress(n) is called
    when n more of them are read.
    Raises ValueError if an ending alone exceeds block_size, RuntimeError if the model's output is
    not finite.
    """
    _check_batch_size(batch_size)
    pairs = [(item["ctx"], ending) for item in items for ending in item["endings"]]
    encoded = [_ids_of(encode, bos, ctx, ending) for ctx, ending in pairs]
    longest = max(n for _, n in encoded)
    if longest > block_size:
        raise ValueError(
            f"HellaSwag: its longest ending has {longest} tokens, this model reads {block_size}; "
            "use a model with a longer context"
        )
    rows = [row[-(block_size + 1) :] for row, _ in encoded]
    scored = [n for _, n in encoded]
    log_p = [0.0] * len(rows)
    # longest first: little padding, and a batch that is too large for the memory fails at once
    order = iter(sorted(range(len(rows)), key=lambda i: -len(rows[i])))
    while batch := list(islice(order, batch_size)):
        width = len(rows[batch[0]]) - 1
        batch_rows, batch_scored = [rows[i] for i in batch], [scored[i] for i in batch]
        sums = _nats(logits_fn, batch_rows, batch_scored, width, device)
        for i, nats in zip(batch, sums, strict=True):
            log_p[i] = -nats
        if progress:
            progress(len(batch))
    remaining, n_right, n_right_norm = iter(log_p), 0, 0
    for item in items:
        sums = list(islice(remaining, len(item["endings"])))
        lengths = [max(len(ending), 1e-9) for ending in item["endings"]]  # an empty one never wins
        norms = [s / length for s, length in zip(sums, lengths, strict=True)]
        n_right += sums.index(max(sums)) == item["label"]
        n_right_norm += norms.index(max(norms)) == item["label"]
    n = len(items)
    return {"accuracy": n_right / n, "accuracy_norm": n_right_norm / n, "items": n}


# --------------------------------------------------------------------------------------- for --eval


def read_utf8(path, flag: str) -> str:
    """The text of a file that `flag` names, without a byte order mark. Raises ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{flag}: {path}: not UTF-8 text ({e.reason}); convert it") from e


def ids_to_score(data: str, tokenizer) -> list:
    """
    Streams of token ids (T,) to score.

    data: a folder of token shards (its validation part), or a file or folder of text, which is read
    as for training.
    Raises FileNotFoundError or ValueError; OSError if a shard is damaged.
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"--eval: {path} does not exist; "
            "give token shards, a text file or folder, hellaswag, or hellaswag:FILE"
        )
    if path.is_dir() and holds_shards(path):
        return _validation_shards(path, tokenizer)
    documents, notes = documents_of(path, "--eval")
    print_notes(notes)
    return [np.concatenate(([tokenizer.bos], tokenizer.encode_documents(documents)))]


def _validation_shards(folder: Path, tokenizer) -> list:
    index = read_index(folder)
    made_with = index["tokenizer"]  # None for published shards
    if made_with and made_with["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"--eval: {folder} was made with another tokenizer ({made_with['name']}) than the "
            "checkpoint's; build the shards with the tokenizer of the checkpoint"
        )
    shards = Shards(folder, "val", index)
    for i, tokens in enumerate(shards.tokens):
        shards.check(i, [0], len(tokens))
    highest = max((int(tokens.max(initial=0)) for tokens in shards.tokens), default=0)
    if not len(shards) or highest >= tokenizer.vocab_size:
        raise ValueError(
            f"--eval: {folder} has no tokens for validation, or ids that the checkpoint's "
            "tokenizer does not have"
        )
    return shards.tokens


def score(model, tokenizer, data: str, block_size: int, stride: int, batch_size: int, device):
    """
    The figures that --eval prints, as one line.

    data: what `ids_to_score` reads, "hellaswag", or "hellaswag:FILE". stride: tokens from one
    window to the next.
    """
    kind, _, file = data.partition(":")
    options = {"block_size": block_size, "batch_size": batch_size, "device": device}
    if kind == "hellaswag":
        path = fetch_hellaswag(file or "hellaswag_val.jsonl")
        items = read_hellaswag(path)
        r = score_hellaswag(model, items, tokenizer.encode, tokenizer.bos, **options)
        accuracies = f"accuracy {r['accuracy']:.4f}, length-normalised {r['accuracy_norm']:.4f}"
        return f"{path}: {accuracies} ({r['items']:,} items)"
    streams, token_bytes = ids_to_score(data, tokenizer), tokenizer.token_bytes()
    results = [score_tokens(model, ids, stride=stride, **options) for ids in streams]
    n_tokens = sum(r["tokens"] for r in results)
    nats = sum(r["loss"] * r["tokens"] for r in results)
    n_bytes = sum(int(token_bytes[ids[1:]].sum()) for ids in streams)
    loss = nats / n_tokens
    figures = f"loss {loss:.6f} nats per token, perplexity {math.exp(min(loss, 700)):.3f}"
    if n_bytes:
        figures += f", {nats / math.log(2) / n_bytes:.4f} bits per byte"
    return f"{data}: {figures} ({n_tokens:,} tokens scored)"
