"""
Train the merges of a byte-level BPE: in linear time, also on text with long runs of one character.
"""

from __future__ import annotations

import re

from parts.base.text import CHAR_TO_BYTE

SAMPLE_CHARS = 50_000_000  # more text takes longer and does not change 4,096 merges
MAX_RUN = 500  # characters; no word of any language is as long
MAX_VOCAB_SIZE = 1_000_000


def check_size(vocab_size: int) -> None:
    """Raises ValueError for a size that no BPE of bytes can have."""
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        what = f"bpe:{vocab_size} is out of range"
        limits = f"256 bytes and end-of-text need 257, the most is {MAX_VOCAB_SIZE}"
        raise ValueError(f"--tokenizer: {what}; {limits}")


def train(texts, vocab_size: int) -> dict[bytes, int]:
    """{token: id} of up to vocab_size - 1 tokens. Raises ValueError as `check_size`."""
    check_size(vocab_size)
    import tokenizers  # imported here: only a run that trains a vocabulary needs it

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    model.train_from_iterator(_without_long_runs(texts), trainer)
    vocab = model.get_vocab(with_added_tokens=False)
    return {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}


def sample(texts):
    """Yield texts up to SAMPLE_CHARS in all, the last one cut."""
    left = SAMPLE_CHARS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _without_long_runs(texts):
    """
    Yield the texts in parts, so that no run of letters, digits or signs exceeds MAX_RUN.

    A merge takes quadratic time in the length of such a run, and gives tokens that are of no use
    anywhere else. Runs of white space are shortened to 100 characters. Other text stays as it is.
    """
    import regex  # tiktoken requires it

    for text in texts:
        text = re.sub(r"(\s{100})\s+", r"\1", text)
        begin = 0
        for stretch in re.finditer(rf"(?<!\S)\S{{{MAX_RUN + 1},}}", text):
            for run in regex.finditer(r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+", stretch[0]):
                first = stretch.start() + run.start()
                for end in range(first + MAX_RUN, first + len(run[0]), MAX_RUN):
                    yield text[begin:end]
                    begin = end
        yield text[begin:]
