"""
How well a model predicts: the loss of a text in sliding windows, and HellaSwag's questions.

A model is here a function: ids (B, T) int64 -> logits (B, T, V), causal. Rows shorter than their batch are padded on
the right, where no position that counts can see it. Logarithms are taken in fp32, sums in fp64, so a result hangs on
batch_size only by what the model's own matrix products do: on the CPU measured mostly by nothing, at most by 2e-10 of the loss.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import urllib.error
import urllib.request
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from parts.data.shards import Shards, read_index

HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
MAX_BYTES = 64 << 20  # of a download; the file has 12 MB


def _nats(logits_fn, rows, scored, width: int, device) -> list[float]:
    """-log p (nats) of the last scored[i] tokens of each row of ids (n,), all read as one batch (B, width). Raises RuntimeError."""
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)  # (B, T)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.from_numpy(row[:-1])
    sums = []
    for row, n, logits in zip(
        rows, scored, logits_fn(inputs.to(device)), strict=True
    ):  # row by row: (T, V) in fp32 is large enough
        last, targets = (
            logits[len(row) - 1 - n : len(row) - 1],
            torch.from_numpy(row[-n:]).to(logits.device),
        )  # (n, V), (n,)
        nats = F.cross_entropy(
            last.float(), targets, reduction="none"
        ).cpu()  # before fp64, which not every device has
        sums.append(nats.double().sum().item())
    if not all(map(math.isfinite, sums)):
        raise RuntimeError(
            "the model's output is not finite: its training has diverged; train again with a lower learning rate"
        )
    return sums


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch_size: {batch_size} is no number of rows; use 1 or more")


# ---------------------------------------------------------------------------------------------- the loss of a text


def windows(n_tokens: int, block_size: int, stride: int):
    """
    Iterator of (start, end, first_scored): the model reads ids[start:end], ids[first_scored : end + 1] are scored.

    Every token but the first is scored once: in the first window all of them, in each later one the last `stride`, with
    at least block_size - stride + 1 before them. stride == block_size is fastest, 1 gives each token all the context there
    is. windows(8, 4, 2) is (0, 4, 1), (2, 6, 5), (4, 7, 7). Raises ValueError for fewer than 2 tokens, or a stride that leaves
    tokens out. Source: "Perplexity of fixed-length models" of Hugging Face's transformers, whose windows end one token
    earlier, so that without overlap each loses its first.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"--stride: {stride} is not between 1 and the context length, {block_size}"
        )
    if n_tokens < 2:
        raise ValueError(
            f"the text to score has {n_tokens} tokens; there is something to predict from 2 on"
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
    {"loss": nats per token, "perplexity", "tokens" scored} of ids (n,), and with token_bytes (V,) "bits_per_byte".

    ids: a numpy array, also a memory-mapped one of which only the window at hand is copied; several documents are one stream,
    and end-of-text is predicted like any token. batch_size windows are read at once. token_bytes: bytes of text
    behind each id, 0 for end-of-text. progress(n): n more tokens are scored, of len(ids) - 1.
    Raises ValueError as `windows` does, RuntimeError where the model's output is not finite.
    """
    _check_batch_size(batch_size)
    todo, width = windows(len(ids), block_size, stride), min(block_size, len(ids) - 1)
    total, n_tokens, n_bytes = 0.0, 0, 0
    while batch := list(islice(todo, batch_size)):
        rows = [np.asarray(ids[start : end + 1]).astype(np.int64) for start, end, _ in batch]
        scored = [end + 1 - first for _, end, first in batch]
        # the short last window is padded and not read alone: every call has one width, and compiled kernels stay as they are
        for nats in _nats(logits_fn, rows, scored, width, device):
            total += nats
        n_tokens += sum(scored)
        if token_bytes is not None:
            n_bytes += sum(
                int(np.asarray(token_bytes)[row[-n:]].sum())
                for row, n in zip(rows, scored, strict=True)
            )
        if progress:
            progress(sum(scored))
    loss = total / n_tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": n_tokens}
    return (
        result
        if token_bytes is None
        else result | {"bits_per_byte": total / math.log(2) / max(n_bytes, 1)}
    )


# --------------------------------------------------------------------------------------------------------- HellaSwag


def _clean(text: str) -> str:
    """Without WikiHow's marks, as lm-evaluation-harness does it, blanks that it leaves included: they are scored."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_hellaswag(path) -> list[dict]:
    """
    Items {"ctx", "endings": 4 texts, "label": which is right} of HellaSwag's own jsonl, cleaned as lm-evaluation-harness does.

    Raises FileNotFoundError, or ValueError naming the first line that is no item. Source: Zellers et al. 2019.
    """
    items = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            where = f"{path}: line {n} is no item of HellaSwag"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{where} (not JSON); fetch the file again") from e
            fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
            if not isinstance(item, dict) or any(name not in item for name in fields):
                raise ValueError(
                    f"{where} (it has to have {', '.join(fields)}); give hellaswag_val.jsonl"
                )
            label, ctx_a, ctx_b, endings, right = (item[name] for name in fields)
            if (
                not isinstance(endings, list)
                or len(endings) != 4
                or not all(isinstance(t, str) for t in (label, ctx_a, ctx_b, *endings))
            ):
                raise ValueError(
                    f"{where} (4 endings and texts are wanted); give hellaswag_val.jsonl"
                )
            if str(right) not in ("0", "1", "2", "3"):
                raise ValueError(
                    f"{where} (label {str(right)[:20]!r} is not 0, 1, 2 or 3); give the validation part, which has labels"
                )
            ctx = _clean(f"{label}: {ctx_a} {ctx_b.capitalize()}")
            items.append({"ctx": ctx, "endings": [_clean(t) for t in endings], "label": int(right)})
    if not items:
        raise ValueError(f"{path}: holds no items; fetch the file again")
    return items


def fetch_hellaswag(
    path, url: str = HELLASWAG_URL, timeout_s: float = 10.0, whole_s: float = 120.0
) -> Path:
    """
    `path`, downloaded if it is not there, and then read once. Raises OSError after timeout_s without an answer, or
    whole_s in all, and for a file too large, cut off, or of something else.
    """
    path, got, failed = Path(path), bytearray(), []
    if path.exists():
        return path

    def work():
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as response:
                while len(got) <= MAX_BYTES and (block := response.read1(1 << 16)):
                    got.extend(block)
                announced = response.headers.get("Content-Length") or ""
                if announced.isdecimal() and len(got) < int(announced) and len(got) <= MAX_BYTES:
                    raise OSError(f"cut off after {len(got):,} of {int(announced):,} bytes")
        except Exception as e:  # noqa: BLE001  whatever it is, it is told below
            failed.append(e)
            if isinstance(e, urllib.error.HTTPError):  # is an open answer, too
                e.close()

    # a daemon thread: the socket's timeout bounds neither a slow name server nor a server that sends a byte a second
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if got:
        thread.join(max(0.0, whole_s - timeout_s))
    part = path.with_name(path.name + ".part")
    try:
        if thread.is_alive():
            raise OSError(
                f"not complete after {whole_s:g} s" if got else f"no answer within {timeout_s:g} s"
            )
        if failed:
            raise failed[0]
        if len(got) > MAX_BYTES:
            raise OSError(f"longer than {MAX_BYTES >> 20} MB")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(got)
        read_hellaswag(part)
        os.replace(part, path)
    except Exception as e:
        why = " ".join(str(e).split())[:200]
        raise OSError(
            f"{path}: is not there, and cannot be had from {url} ({why}); put HellaSwag's hellaswag_val.jsonl there"
        ) from e
    finally:
        part.unlink(missing_ok=True)
    return path


def _ids_of(encode, eot: int, ctx: str, ending: str) -> tuple[np.ndarray, int]:
    """Ids (n,) of a question with one ending, and how many of them are the ending's: what follows as many as the question has alone."""
    start = ctx.rstrip()  # blanks belong to the word behind them
    n = len(encode(start))
    ids = np.asarray(encode(ctx + " " + ending)).astype(np.int64)
    return (ids, max(1, len(ids) - n)) if n else (np.insert(ids, 0, eot), len(ids))


@torch.no_grad()
def score_hellaswag(
    logits_fn, items, encode, eot: int, block_size: int, batch_size: int, device, progress=None
) -> dict:
    """
    {"accuracy", "accuracy_norm", "items"}: how often the right ending is the likeliest, as a whole and per character.

    items as read_hellaswag gives them; encode(text) -> ids; eot stands before an ending that has no question. What does not
    fit into block_size is cut off on the left. The numbers are lm-evaluation-harness's acc and acc_norm of its task hellaswag
    without examples. batch_size endings are read at once. progress(n): n more endings are read, of all. Raises ValueError
    where an ending alone is longer than block_size, RuntimeError where the model's output is not finite.
    """
    _check_batch_size(batch_size)
    rows, scored = zip(
        *[
            _ids_of(encode, eot, item["ctx"], ending)
            for item in items
            for ending in item["endings"]
        ],
        strict=True,
    )
    if max(scored) > block_size:
        raise ValueError(
            f"HellaSwag: its longest ending has {max(scored)} tokens, this model reads {block_size}; it cannot be asked"
        )
    rows = [row[-(block_size + 1) :] for row in rows]
    log_p = [0.0] * len(rows)
    order = iter(
        sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    )  # little padding, and what needs most memory first
    while batch := list(islice(order, batch_size)):
        some = [rows[i] for i in batch]
        for i, nats in zip(
            batch,
            _nats(logits_fn, some, [scored[i] for i in batch], len(some[0]) - 1, device),
            strict=True,
        ):
            log_p[i] = -nats
        if progress:
            progress(len(batch))
    left, n_right, n_right_norm = iter(log_p), 0, 0
    for item in items:
        sums = list(islice(left, len(item["endings"])))
        norms = [
            s / max(len(ending), 1e-9) for s, ending in zip(sums, item["endings"], strict=True)
        ]  # one without text never wins
        n_right += sums.index(max(sums)) == item["label"]
        n_right_norm += norms.index(max(norms)) == item["label"]
    return {
        "accuracy": n_right / len(items),
        "accuracy_norm": n_right_norm / len(items),
        "items": len(items),
    }


def read_utf8(path, flag: str) -> str:
    """A UTF-8 text file. Raises ValueError naming the flag that asked for it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{flag}: {path}: not UTF-8 text ({e.reason}); convert it") from e


def ids_to_score(data: str, tokenizer) -> list:
    """
    Streams of token ids (n,) of what --eval names.

    A folder of token shards (its validation part), a text file, or a folder of .txt files. Raises
    ValueError or FileNotFoundError.
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"--eval: {path} does not exist; give token shards, a text file or folder, "
            "hellaswag, or hellaswag:FILE"
        )
    if path.is_dir() and any(path.glob("*.bin")):
        return _validation_tokens(path, tokenizer)
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    documents = [read_utf8(file, "--eval") for file in files]
    if not any(documents):
        raise ValueError(
            f"--eval: {path} holds no text; give token shards, a text file, "
            "or a folder of .txt files"
        )
    return [np.concatenate(([tokenizer.eot], tokenizer.encode_documents(documents)))]


def _validation_tokens(folder: Path, tokenizer) -> list:
    index = read_index(folder)
    made_with = index["tokenizer"]
    if made_with and made_with["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"--eval: {folder} was made with another tokenizer ({made_with['name']}) "
            "than the checkpoint's"
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
    """One line with the figures of what --eval names: token shards, texts, or hellaswag[:FILE]."""
    name, _, file = data.partition(":")
    options = {"block_size": block_size, "batch_size": batch_size, "device": device}
    if name == "hellaswag":
        path = fetch_hellaswag(file or "hellaswag_val.jsonl")
        items = read_hellaswag(path)
        r = score_hellaswag(model, items, tokenizer.encode, tokenizer.eot, **options)
        return (
            f"{path}: accuracy {r['accuracy']:.4f}, length-normalised {r['accuracy_norm']:.4f} "
            f"({r['items']:,} items)"
        )
    streams, token_bytes = ids_to_score(data, tokenizer), tokenizer.token_bytes()
    parts = [score_tokens(model, ids, stride=stride, **options) for ids in streams]
    n_tokens = sum(part["tokens"] for part in parts)
    nats = sum(part["loss"] * part["tokens"] for part in parts)
    n_bytes = sum(int(token_bytes[ids[1:]].sum()) for ids in streams)
    loss = nats / n_tokens
    bits = f", {nats / math.log(2) / n_bytes:.4f} bits per byte" if n_bytes else ""
    return (
        f"{data}: loss {loss:.6f} nats per token, perplexity {math.exp(min(loss, 700)):.3f}{bits} "
        f"({n_tokens:,} tokens scored)"
    )
