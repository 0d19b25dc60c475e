"""
Rows of a masked language model for new tokens: each a weighted mean of old rows, or random.

    weights = mean_weights(old, tokens, n_old)               # or those of translations
    grow(model, n_ids, weights)

weights: {new id: {old id: share}}, the shares of a new id adding up to 1.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import tokenizers
import torch

from parts.base.text import one_line
from recipes.arabic_bert.bpe_continued import only_merges

WEIGHT_FILES = ("model*.safetensors*", "pytorch_model*.bin*")
FAMILY = "modernbert"  # model_type in config.json
HEAD_DIM = 32  # of a small random model

# ------------------------------------------------------------------------------------ weights


def mean_weights(spec: dict, tokens: list[str], n_old: int) -> dict[int, dict[int, float]]:
    """
    The mean of the old tokens that a new one consists of.

    spec: the old tokenizer. tokens: the new ones as the vocabulary writes them; their ids begin at
    n_old.
    """
    bpe, weights = only_merges(spec), {}
    for begin in range(0, len(tokens), 10_000):
        batch = tokens[begin : begin + 10_000]
        for i, encoding in enumerate(bpe.encode_batch_fast(batch), n_old + begin):
            weights[i] = _shares(Counter(encoding.ids))
    return weights


def translation_weights(pairs, old, new, n_old: int) -> dict[int, dict[int, float]]:
    """
    For each new token of the Arabic side of a pair, the mean of the old tokens of the translations.

    pairs: (Arabic, translation, weight). old and new: the tokenizers (of the library). A pair gives
    its weight in equal parts to every pair of a token of the one side and one of the other, once
    for the words after a blank and once without one, where tokens differ. New tokens of no pair
    are left out. Source: Remy et al. 2024, Trans-Tokenization (arXiv:2408.04303), with a dictionary
    in place of an aligned corpus.
    """
    sums = defaultdict(Counter)
    for arabic, translation, weight in pairs:
        blanks = ("",) if arabic.startswith("+") else (" ", "")  # a suffix follows no blank
        for blank in blanks:
            of_arabic = new.encode(blank + arabic, add_special_tokens=False).ids
            of_translation = old.encode(blank + translation, add_special_tokens=False).ids
            share = weight / (len(of_arabic) * len(of_translation))
            for i in of_arabic:
                for j in of_translation if i >= n_old else ():
                    sums[i][j] += share
    return {i: _shares(of_old) for i, of_old in sorted(sums.items())}


def _shares(amounts: Counter) -> dict[int, float]:
    total = sum(amounts.values())
    return {i: amount / total for i, amount in sorted(amounts.items())}


def read_pairs(path) -> list[tuple[str, str, float]]:
    """
    (Arabic, translation, weight) of the lines of a file: columns separated by tabs.

    The third column may be missing: 1. Empty lines and those that begin with # are no pairs. Raises
    ValueError with the line, OSError if the file cannot be read.
    """
    pairs = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 text (byte {e.start:,}); convert it") from e
    for n, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        arabic, translation, weight, *more = [*map(str.strip, line.split("\t")), "1", ""][:4]
        if "\t" not in line or len(line.split("\t")) > 3 or not arabic or not translation:
            what = f"{one_line(line, 60)!r} is not ARABIC<tab>TRANSLATION, with or without a weight"
            raise ValueError(f"{path}: line {n}: {what}; correct the line")
        try:
            pairs.append((arabic, translation, float(weight)))
        except ValueError as e:
            raise ValueError(f"{path}: line {n}: the weight {weight!r} is not a number") from e
        if not 0 < pairs[-1][2] < math.inf:
            raise ValueError(f"{path}: line {n}: the weight {weight} is not above 0 and finite")
    if not pairs:
        raise ValueError(f"{path}: has no pairs; write lines of ARABIC<tab>TRANSLATION")
    return pairs


# ------------------------------------------------------------------------------------ the model


def has_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder has weights."""
    return any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)


def open_model(folder: Path):
    """
    The model with its head in a folder, in the dtype of its files, on the CPU.

    Raises ValueError if it is no ModernBERT with a head for masked language modelling.
    """
    from transformers import AutoModelForMaskedLM

    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        what = f"transformers cannot load it ({one_line(e, 150)})"
        raise ValueError(f"--model_name: {folder}: {what}; give a checkpoint of ModernBERT") from e
    if missing := sorted(info["missing_keys"]):
        what = f"its weights lack {len(missing):,} tensors, such as {missing[0]}"
        raise ValueError(f"--model_name: {folder}: {what}; give the model with its head")
    return model.eval()


def check_sizes(hidden_size: int, num_layers: int) -> None:
    """Raises ValueError for a size that no random model can have."""
    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        what = f"{hidden_size} is not a multiple of {HEAD_DIM}, the width of a head"
        raise ValueError(f"--hidden_size: {what}")
    if num_layers < 1:
        raise ValueError(f"--num_layers: {num_layers} is below 1")


def random_model(spec: dict, n_ids: int, hidden_size: int, num_layers: int, seed: int):
    """
    A small ModernBERT with random weights for a tokenizer with n_ids ids.

    The generator of torch is left as it was.
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[CLS]", "eos": "[SEP]"}
    config = ModernBertConfig(
        vocab_size=n_ids,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        **{f"{name}_token_id": special[token] for name, token in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ModernBertForMaskedLM(config).eval()


def grow(model, n_ids: int, n_old: int, weights: dict | None, seed: int = 0) -> None:
    """
    Give a model rows for the ids n_old to n_ids - 1; every old row stays to the bit.

    weights: those of every new id, None for random rows as the model's own were at first. The bias
    of a new token in the head is 0. A model that has more rows than n_old (rows for no token) has
    these set too; it never gets fewer rows.
    """
    n_rows = model.get_input_embeddings().weight.shape[0]
    if n_ids > n_rows:
        model.resize_token_embeddings(n_ids, mean_resizing=False)
    head = model.get_output_embeddings()
    matrices = {id(m): m for m in (model.get_input_embeddings().weight, head.weight)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in matrices.values():  # one if they are tied
            new = matrix[n_old:n_ids]
            if weights is None:
                std = model.config.initializer_range
                rows = torch.randn(new.shape, generator=generator) * std
            else:
                rows = _mixed(matrix[:n_old], [weights[i] for i in range(n_old, n_ids)])
            new.copy_(rows)
        if head.bias is not None:
            head.bias[n_old:n_ids] = 0


def _mixed(old, weights: list[dict[int, float]]) -> torch.Tensor:
    """Weighted means of rows, (len(weights), C) fp32."""
    ids = torch.tensor([i for row in weights for i in row])
    shares = torch.tensor([share for row in weights for share in row.values()])
    begins = torch.tensor([0, *(len(row) for row in weights)]).cumsum(0)[:-1]
    return torch.nn.functional.embedding_bag(
        ids, old.float(), begins, mode="sum", per_sample_weights=shares
    )


def write_model(folder: Path, model) -> None:
    """A folder that AutoModelForMaskedLM loads, with the permissions of its config.json."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    for path in folder.iterdir():  # safetensors lets nobody else read the weights
        shutil.copymode(folder / "config.json", path)


def library_tokenizer(spec: dict) -> tokenizers.Tokenizer:
    """The tokenizer of the library that reads this tokenizer.json."""
    return tokenizers.Tokenizer.from_str(json.dumps(spec))
