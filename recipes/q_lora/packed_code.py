"""
Rows of code for training: files packed into rows of tokens, each reading only itself.

The files of a data type (see prepare_data.py) become token shards once. A row has as many tokens as
--max_seq_length; a file that does not fit continues in the next row. "text" is trained on whole; of
"prompt" and "completion" only the completion, and the end of the text.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parts.data import shard_writer
from parts.data.batches import TrainBatches, val_batches
from parts.data.readers import json_rows
from parts.data.shards import Shards, content_hash, read_index
from parts.data.sources import identity_of
from parts.data.tokenizers import Tokenizer
from recipes.q_lora.prepare_data import data_files


@dataclass
class CodeText:
    """Token shards of the training and the test file, and their tokenizer."""

    train: Shards
    test: Shards
    tokenizer: Tokenizer
    data: str  # hash of all tokens

    def training(self, config, vocab_size: int) -> PackedBatches:
        """The rows to train on, endlessly. config: a QConfig."""
        options = (config.max_seq_length, config.seed, vocab_size)
        return PackedBatches(self.train, *options, self.tokenizer.eot)

    def testing(self, config, vocab_size: int):
        """A fresh pass over the batches to test on. config: a QConfig."""
        options = (config.max_seq_length, config.batch_size, vocab_size, config.eval_tokens)
        for batch in val_batches(self.test, *options):
            yield batch | {"documents": documents_of(batch["inputs"], self.tokenizer.eot)}


def open_code(config, tokenizer: Tokenizer) -> CodeText:
    """
    The token shards of the data files, built if they do not exist yet.

    config: a QConfig. Raises ValueError or FileNotFoundError for files that cannot be used.
    """
    sides = data_files(config.data_type, config.data_dir)
    files = {"train": sides["train"], "val": sides["test"]}
    facts = {"files": [], "tokenizer": tokenizer.fingerprint, "writer": shard_writer.WRITER}
    for path in files.values():
        facts["files"].append(identity_of(path))
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir) / f"q-{config.data_type}-{digest}"
    facts |= {"dataset_name": str(config.data_dir), "dataset_subset": config.data_type}

    def chunks(state):
        return _chunks(files, state)

    def tokenise(rows) -> dict:
        return {split: _tokens(rows, split, tokenizer) for split in files}

    shard_writer.build(folder, tokenizer, chunks, tokenise, facts, os.cpu_count() or 1)
    index = read_index(folder)
    train, test = Shards(folder, "train", index), Shards(folder, "val", index)
    for path, part in zip(files.values(), (train, test), strict=True):
        if len(part) < 2:
            raise ValueError(f"{path}: holds no code; prepare it again with more files")
    return CodeText(train, test, tokenizer, content_hash(index))


def _chunks(files: dict[str, Path], state):
    """Yield ([(split, kind, row)], state after them) of the files, one after the other."""
    state = state or {"file": 0, "row": 0}
    first = None  # kind of the first row
    for i, (split, path) in enumerate(files.items()):
        if i < state["file"]:
            continue
        rows, skip = [], state["row"] if i == state["file"] else 0
        for n, row in json_rows(path, 0):
            kind = _kind_of(row, path, n)
            first = first or kind
            if kind != first:
                what = f"a row of {kind}, but the rows before have {first}"
                raise ValueError(f"{path}: line {n:,}: {what}; keep them in separate data types")
            if n <= skip:
                continue
            rows.append((split, kind, row))
            if len(rows) == 64:
                yield rows, {"file": i, "row": n}
                rows = []
        yield rows, {"file": i + 1, "row": 0}


def _kind_of(row: dict, path: Path, n: int) -> str:
    """The kind of a row: "text", or "prompt and completion". Raises ValueError for any other."""
    for names in (("text",), ("prompt", "completion")):
        if all(isinstance(row.get(name), str) for name in names):
            return " and ".join(names)
    columns = ", ".join(map(str, row))[:80] or "nothing"
    what = f"has {columns}, but neither a text nor a prompt and a completion"
    raise ValueError(f"{path}: line {n:,}: {what}; prepare_data.py writes such rows")


def _tokens(rows: list, split: str, tokenizer: Tokenizer) -> tuple:
    """(ids, documents, bytes) of the rows of a split, and for prompts which tokens are trained."""
    ids, trained, n_bytes, n_documents = [], [], 0, 0
    has_prompts = rows and rows[0][1] != "text"
    for _, _, row in (row for row in rows if row[0] == split):
        prompt, code = ("", row["text"]) if not has_prompts else (row["prompt"], row["completion"])
        before, after = tokenizer.encode(prompt), tokenizer.encode(code)
        ids += [before, after, [tokenizer.eot]]
        trained += [np.zeros(len(before)), np.ones(len(after) + 1)]
        n_bytes += len(f"{prompt}{code}".encode(errors="replace"))
        n_documents += 1
    ids = np.concatenate([np.zeros(0), *ids]).astype(np.uint32)
    result = (ids, n_documents, n_bytes)
    if not has_prompts:
        return result
    return (*result, np.concatenate([np.zeros(0), *trained]).astype(np.uint8))


def documents_of(inputs: torch.Tensor, eot: int) -> torch.Tensor:
    """Number (B, T) of the document of each token of packed rows (B, T), from 0 in each row."""
    ends = (inputs == eot).long()
    return ends.cumsum(dim=1) - ends


class PackedBatches(TrainBatches):
    """Rows of token shards whose documents are kept apart: a batch also has "documents"."""

    def __init__(self, shards: Shards, T: int, seed: int, vocab_size: int, eot: int):
        super().__init__(shards, T, seed, vocab_size)
        self.eot = eot

    def batch(self, first: int, n: int) -> dict:
        """As TrainBatches.batch, with documents (n, T) int64."""
        batch = super().batch(first, n)
        return batch | {"documents": documents_of(batch["inputs"], self.eot)}
