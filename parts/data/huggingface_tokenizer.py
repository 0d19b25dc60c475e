"""
A tokenizer of Hugging Face's `tokenizers` library, for what tiktoken cannot reproduce.

That is: a normalizer (ModernBERT, Qwen2.5), pieces with byte fallback (Llama, Mistral), tokens
added in the middle of the vocabulary. The class has the interface of parts.data.tokenizers
.Tokenizer, whose `load` chooses between the two. It is slower: 2 to 5 MB/s where tiktoken does 40.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np

from parts.base.text import CHAR_TO_BYTE, DOCUMENT_ENDS, one_line, without_surrogates

ENDS = ("[SEP]", *DOCUMENT_ENDS)  # an encoder's end of a document comes first
# what begins one; if none is there, the end of the document before it
BEGINNINGS = ("<|begin_of_text|>", "<bos>", "[CLS]", "<s>")
MAX_GAPS = 65_536  # ids without a token; a model has a row of weights for each
IN_UTF8 = set(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}  # bytes that a text can have
BLANK = "\u2581"  # stands for a blank in the pieces of SentencePiece


class HuggingFaceTokenizer:
    """
    The same interface as Tokenizer: encode, decode, vocab_size, eot, fingerprint.

    data: the bytes of a tokenizer.json. Raises ValueError if the vocabulary does not say which
    bytes a token stands for (WordPiece), or has no end-of-text.
    """

    def __init__(self, data: bytes):
        import tokenizers  # imported here: most runs do not need it

        self._json = data
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        spec = json.loads(data)
        kind = spec["model"]["type"]
        if kind not in ("BPE", "Unigram"):
            raise ValueError(f"its model is {kind}, which does not keep all bytes of a text")
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        self.eot_text = next((text for text in ENDS if text in self.special), None)
        if self.eot_text is None:
            found = sorted(self.special)[:5]
            raise ValueError(f"no end-of-text token among its special tokens {found}")
        self.eot = self.special[self.eot_text]
        self.bos = next((self.special[t] for t in BEGINNINGS if t in self.special), self.eot)
        # merges left out at random are for training: the same text must always give the same ids
        exact = {**spec, "model": {**spec["model"], "dropout": None}}
        text = json.dumps(exact if spec["model"].get("dropout") else spec)
        # special tokens in the text stay text in one of them, and are tokens in the other
        self._plain = tokenizers.Tokenizer.from_str(text)
        self._with_special = tokenizers.Tokenizer.from_str(text)
        for tokenizer in (self._plain, self._with_special):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._plain.encode_special_tokens = True
        vocab = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = _check_ids(vocab, added)
        self.name = f"{kind.lower()}:{self.vocab_size}"
        to_bytes = _bytes_of_piece(spec, vocab)
        self._bytes = [b""] * self.vocab_size
        for piece, i in vocab.items():
            self._bytes[i] = piece.encode() if piece in added else to_bytes(piece)

    def encode(self, text: str, allowed=frozenset()) -> np.ndarray:
        """
        Ids (T,) uint32. Special tokens in the text are text, but for those that are `allowed`.

        Lone surrogates become U+FFFD. Begins and ends as the text does: nothing is added.
        """
        text = without_surrogates(text)
        written = [token for token in self.special if token in text] if allowed else []
        if not set(written) & set(allowed):
            return np.array(self._plain.encode(text, add_special_tokens=False).ids, np.uint32)
        if set(written) <= set(allowed):
            ids = self._with_special.encode(text, add_special_tokens=False).ids
            return np.array(ids, np.uint32)
        pattern = "|".join(re.escape(t) for t in sorted(allowed, key=len, reverse=True))
        parts = []
        for part in re.split(f"({pattern})", text):
            if part in allowed:
                parts.append(np.array([self.special[part]], np.uint32))
            elif part:
                parts.append(self.encode(part))
        return np.concatenate(parts)

    def encode_documents(self, documents) -> np.ndarray:
        """Ids (T,) of all documents in order, end-of-text exactly once after each."""
        texts = [without_surrogates(text) for text in documents]
        ids = []
        for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False):
            ids += encoding.ids
            ids.append(self.eot)
        return np.array(ids, np.uint32)

    def decode(self, ids) -> str:
        """
        Text of a list of ids. Bytes that are not a whole UTF-8 character become U+FFFD.

        What the normalizer changed stays changed, and a blank that it put in front stays there.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids) -> bytes:
        """Bytes of a list of ids: those of each id, joined."""
        return b"".join(self._bytes[i] for i in ids)

    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text of each id, (V,) int64; 0 for special tokens."""
        lengths = np.array([len(token) for token in self._bytes], np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def to_json(self) -> bytes:
        """The tokenizer.json; `Tokenizer.load` gives a tokenizer of the same fingerprint."""
        return self._json


def _check_ids(vocab: dict, added: dict) -> int:
    """The number of ids. Raises ValueError if an id is used twice, or far too large."""
    for token, i in added.items():  # the library gives an id of its own if it does not like one
        if vocab[token] != i:
            raise ValueError(f"its added token {token!r} has the id {i}, the library uses another")
    n_ids = max(vocab.values()) + 1
    if len(set(vocab.values())) != len(vocab):
        raise ValueError("two of its tokens have the same id")
    if n_ids > len(vocab) + MAX_GAPS:
        raise ValueError(f"it has {len(vocab):,} tokens, but ids up to {n_ids - 1:,}")
    return n_ids


def _bytes_of_piece(spec: dict, vocab: dict):
    """
    A function from a piece of the vocabulary to the bytes of text that it stands for.

    Raises ValueError for a tokenizer that would drop a part of a text.
    """
    kinds = {step["type"] for step in _steps(spec.get("decoder"), "decoders")}
    if "ByteLevel" in kinds:
        before = {step["type"] for step in _steps(spec.get("pre_tokenizer"), "pretokenizers")}
        if "ByteLevel" not in before:
            raise ValueError("its decoder is byte-level, but its pre-tokenizer is not")
        missing = [char for char, b in CHAR_TO_BYTE.items() if char not in vocab and b in IN_UTF8]
        convert = _bytes_of_printable
    else:
        missing = [b for b in IN_UTF8 if f"<0x{b:02X}>" not in vocab]
        convert = _bytes_with_fallback
        if not spec["model"].get("byte_fallback"):
            raise ValueError("it is neither byte-level nor has it byte fallback")
    if missing:
        raise ValueError(f"it has no id for {len(missing)} of the bytes of UTF-8")
    return convert


def _steps(step: dict | None, name: str) -> list[dict]:
    """The steps of a decoder or pre-tokenizer, which may be a sequence of them."""
    return step.get(name, [step]) if step else []


def _bytes_of_printable(piece: str) -> bytes:
    return bytes(CHAR_TO_BYTE[c] for c in piece)


def _bytes_with_fallback(piece: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace(BLANK, " ").encode()


def agree(tokenizer, library: HuggingFaceTokenizer) -> bool:
    """
    Whether both give the same ids for a few hundred varied texts.

    The texts are made of pieces of the vocabulary, of blanks, and of characters of many kinds.
    """
    draw = random.Random(0)
    pieces = [piece.decode(errors="replace") for piece in tokenizer.ranks]
    odd = [" ", "  ", "\n", "\r\n", "\t", "'s", "I'll", "12345", "e\u0301", "\u65e5\u672c"]
    odd += [
        "\U0001f600",
        "\u0627\u0644",
        "\u041f\u0440",
        "_x.y(",
        "\u00a0",
        "\u200b",
        *tokenizer.special,
    ]
    for _ in range(300):
        chosen = draw.choices(pieces, k=8) + draw.choices(odd, k=4)
        draw.shuffle(chosen)
        text = "".join(chosen)
        if tokenizer.encode(text).tolist() != library.encode(text).tolist():
            return False
    return True


def json_of_folder(folder) -> bytes:
    """
    The tokenizer.json of a folder that has none, made by transformers from its other files.

    Such as vocab.json and merges.txt (Qwen2.5), or tokenizer.model (Mistral), for which
    transformers needs the package sentencepiece. Raises ValueError.
    """
    folder = Path(folder)
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str().encode()
    except Exception as e:  # noqa: BLE001  transformers raises anything for files it cannot read
        fix = "give a tokenizer.json"
        if (folder / "tokenizer.model").exists():
            fix = "pip install sentencepiece, or give a tokenizer.json"
        why = one_line(e, 150)
        raise ValueError(f"{folder}: transformers cannot read its tokenizer ({why}); {fix}") from e


# keys of a JSON file -> what it is, the first that has one of them
PARTS = {
    ("tokenizer_class", "added_tokens_decoder"): "the settings of a tokenizer",
    ("additional_special_tokens", "eos_token", "unk_token"): "the special tokens of a tokenizer",
    ("model_type", "architectures"): "the settings of a model",
}


def part_of_a_tokenizer(data: bytes) -> str | None:
    """
    What a file holds that belongs to a tokenizer, but is no whole one; None if it is no such file.

    Judged by the contents: people rename files.
    """
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        keys = found.keys() if isinstance(found, dict) else set()
        if keys and all(type(i) is int for i in found.values()):
            whole = len(keys) >= 256
            return "a vocabulary without merges" if whole else "tokens added to a vocabulary"
        parts = (part for names, part in PARTS.items() if keys & set(names))
        return None if "model" in keys else next(parts, None)
    if data[:1] == b"\n" and b"<unk>" in data[:100]:
        return "a vocabulary of SentencePiece"
    lines = data[:2000].decode(errors="replace").splitlines()[:-1]
    if len(lines) > 20 and all(re.fullmatch(r"[A-Za-z0-9+/]+=* \d+", line) for line in lines):
        return "a vocabulary of tiktoken without its pattern"
    pairs = len(lines) > 20 and all(re.fullmatch(r"\S+ \S+", line) for line in lines)
    if pairs or (lines and lines[0].startswith("#version")):
        return "merges without their vocabulary"
    return "a vocabulary of WordPiece" if "[UNK]" in lines else None


def whole_tokenizer_beside(path: Path) -> str:
    """What to give instead of a file that is a part of a tokenizer."""
    folder = path.parent
    if (folder / "tokenizer.json").is_file():
        return f"give {folder / 'tokenizer.json'}"
    pair = ("vocab.json", "merges.txt")
    if all((folder / name).is_file() for name in pair) or (folder / "tokenizer.model").is_file():
        return f"give its folder, {folder}"
    return "give the folder with vocab.json and merges.txt, or a tokenizer.json"
