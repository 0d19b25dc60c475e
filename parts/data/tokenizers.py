"""
Text to token ids and back. Every tokenizer here is a byte-level BPE run by tiktoken; they differ in their merges only:

    gpt2        50,257 ids, GPT-2's own merges (0.5 MB, fetched once and then read from tiktoken's cache)
    bpe         4,096 ids trained on the text at hand in seconds; bpe:8192 for another size; needs no network
    bytes       257 ids, no merges at all: one id per byte
    FILE        a Hugging Face tokenizer.json (byte-level BPE), or GPT-2's vocab.bpe / merges.txt
    auto        gpt2 on a GPU; bpe on a CPU, where GPT-2's 50,257-wide output layer would be most of a small model's time

`<|endoftext|>` is the one special id and stands after each document. Written out in a text it is text.
Source of the byte-level scheme and of the splitting pattern: Radford et al. 2019, section 2.2.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import regex  # tiktoken needs it, too
import tiktoken

from parts.base.files import make_folder, rename_durably, sha256_of
from parts.base.text import EOT

# GPT-2 merges only inside these pieces: contractions, words, numbers, punctuation, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same pattern in brackets: tiktoken's engine tries whatever stands beside a look-ahead branch by branch, a group without one at once.
BRACKETED = {
    GPT2_PATTERN: r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"""
}
# OpenAI's merges, which are all of GPT-2's vocabulary, and the sha256 that tiktoken expects of them.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
DEFAULT_BPE_SIZE = 4096
BPE_SAMPLE_CHARS = 50_000_000  # more text does not change 4,096 merges, only the time to find them


def _byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, used in its files: the byte's own character where it is visible, else 256 + n."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + n) for n, b in enumerate(hidden)}}


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def _written(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in token)


def _token_of(written: str) -> bytes:
    return bytes(CHAR_TO_BYTE[c] for c in written)


class Tokenizer:
    """
    One interface for all of them: encode, decode, vocab_size, eot, fingerprint.

    name: for people. ranks: token bytes -> id, lower ids merge first. special: text -> id; must hold `eot_text`.
    """

    def __init__(
        self,
        name: str,
        ranks: dict[bytes, int],
        special: dict[str, int],
        eot_text: str = EOT,
        pattern: str = GPT2_PATTERN,
    ):
        self.merges = None  # pairs as written in a tokenizer.json, where a file said them; else `to_json` finds them
        self.name, self.ranks, self.special, self.eot_text, self.pattern = (
            name,
            ranks,
            special,
            eot_text,
            pattern,
        )
        self._threads = threading.local()
        self.vocab_size = self.encoding.n_vocab
        self.eot = special[eot_text]
        table = repr(
            (
                pattern,
                sorted(ranks.items(), key=lambda item: item[1]),
                sorted(special.items()),
                eot_text,
            )
        )
        self.fingerprint = hashlib.sha256(table.encode()).hexdigest()[
            :16
        ]  # equal fingerprints give equal ids
        self._json = None

    @property
    def encoding(self) -> tiktoken.Encoding:
        """This thread's own: two threads with one would wait for each other inside its regular expression."""
        if not hasattr(self._threads, "encoding"):
            pattern = BRACKETED.get(self.pattern, self.pattern)
            self._threads.encoding = tiktoken.Encoding(
                self.name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special
            )
        return self._threads.encoding

    def encode(self, text: str) -> np.ndarray:
        """Ids (T,) uint32. Special tokens written in the text are text. Lone surrogates become U+FFFD."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except (
            ValueError,
            RuntimeError,
        ):  # tiktoken's pattern gives up on a million blanks in a row: cut them
            if len(text) < 2:
                raise
            return np.concatenate(
                [self.encode(text[: len(text) // 2]), self.encode(text[len(text) // 2 :])]
            )

    def encode_documents(self, documents) -> np.ndarray:
        """Ids (T,) of all documents in order, end-of-text exactly once after each."""
        ended = [text + self.eot_text for text in documents]
        if all(
            text.find(self.eot_text) == len(text) - len(self.eot_text) for text in ended
        ):  # it is nowhere written in them
            with contextlib.suppress(ValueError, RuntimeError):  # see `encode`
                # in one call, in which no thread waits for another: end-of-text parts the documents before anything is merged
                return self.encoding.encode_to_numpy(
                    "".join(ended), allowed_special={self.eot_text}, disallowed_special=()
                )
        eot = np.array([self.eot], dtype=np.uint32)
        return np.concatenate(
            [part for text in documents for part in (self.encode(text), eot)] or [eot[:0]]
        )

    def decode(self, ids) -> str:
        """Text of a list of ids. Bytes that are no whole UTF-8 character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids) -> bytes:
        """Bytes of a list of ids: the exact inverse, also where they end inside a character."""
        return self.encoding.decode_bytes(list(ids))

    def token_bytes(self) -> np.ndarray:
        """Bytes of text behind each id, (V,) int64; 0 for special tokens, which stand for no text."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self.ranks.items():
            lengths[i] = len(token)
        return lengths

    def to_json(self) -> bytes:
        """A Hugging Face tokenizer.json of this tokenizer; `load` reads it back to the same fingerprint."""
        if self._json is None:

            def added(text: str, i: int) -> dict:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                return {"id": i, "content": text, **flags, "special": True}

            tokens = sorted(self.ranks, key=self.ranks.__getitem__)
            merges = self.merges or [
                [_written(part) for part in _last_merge(t, self.ranks)]
                for t in tokens
                if len(t) > 1
            ]
            split = {
                "type": "Split",
                "pattern": {"Regex": self.pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            byte_level = {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            }
            spec = {
                "version": "1.0",
                "added_tokens": [added(text, i) for text, i in self.special.items()],
                "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                "post_processor": None,
                "decoder": byte_level,
                "model": {
                    "type": "BPE",
                    "vocab": {_written(t): self.ranks[t] for t in tokens},
                    "merges": merges,
                },
            }
            self._json = json.dumps(spec, ensure_ascii=True).encode()
        return self._json

    @classmethod
    def load(cls, path) -> Tokenizer:
        """
        The tokenizer of a file (or of the one in a folder): tokenizer.json, or GPT-2's vocab.bpe / merges.txt.

        Raises FileNotFoundError, or ValueError where the file asks for what tiktoken does not do (normalising, other
        pre-tokenizers), since the ids would silently differ.
        """
        path = Path(path)
        if path.is_dir():
            names = ("tokenizer.json", "vocab.bpe", "merges.txt")
            path = next((path / n for n in names if (path / n).exists()), path / names[0])
        if not path.is_file():
            raise FileNotFoundError(
                f"--tokenizer: {path} does not exist; give auto, gpt2, bpe, bpe:SIZE, bytes or a tokenizer.json"
            )
        if sha256_of(path) == GPT2_SHA256:
            return _gpt2_of_merges(path)
        try:
            return cls._from_json(json.loads(path.read_bytes()))
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            regex.error,
        ) as e:
            what = (
                e
                if type(e) is ValueError
                else f"it is not a Hugging Face tokenizer.json ({repr(e)[:200]})"
            )
            raise ValueError(
                f"{path}: cannot be used as a tokenizer: {what}; give a byte-level BPE tokenizer.json"
            ) from e

    @classmethod
    def _from_json(cls, spec: dict) -> Tokenizer:
        model, steps = spec["model"], spec["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        if (
            model["type"] != "BPE"
            or spec.get("normalizer")
            or steps[-1]["type"] != "ByteLevel"
            or len(steps) > 2
        ):
            raise ValueError("only a byte-level BPE without a normalizer gives the same ids here")
        if steps[-1].get("add_prefix_space"):
            raise ValueError("add_prefix_space changes the text")
        own_pattern = not steps[-1].get("use_regex", True)
        split = steps[0] if len(steps) == 2 else None
        if own_pattern != bool(split) or (
            split
            and (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False)
        ):
            raise ValueError("its pre-tokenizer is neither GPT-2's nor one pattern of its own")
        pattern = split["pattern"]["Regex"] if split else GPT2_PATTERN
        if any(
            m.start() == m.end() for m in regex.finditer(pattern, "".join(map(chr, range(256))))
        ):  # tiktoken crashes on such a piece
            raise ValueError(f"its pattern {pattern[:50]!r} matches where there is no text")
        special = {t["content"]: t["id"] for t in spec["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        ranks = {_token_of(token): i for token, i in vocab.items()}
        if {*ranks.values(), *special.values()} != set(
            range(len(ranks) + len(special))
        ):  # tiktoken crashes, or cannot decode the gaps
            raise ValueError("its ids are not 0, 1, 2, ... each once")
        if missing := 256 - sum(len(token) == 1 for token in ranks):
            raise ValueError(f"{missing} of the 256 bytes have no id in it")
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        made = list(dict.fromkeys(ranks[_token_of("".join(m))] for m in merges))
        if made != sorted(made):
            raise ValueError("its merges are not in the order of their ids")
        eot = next((t for t in (EOT, "</s>", "<eos>", "<|end_of_text|>") if t in special), None)
        if eot is None:
            raise ValueError(f"no end-of-text token among its special tokens {sorted(special)[:5]}")
        return cls(
            f"bpe:{len(ranks) + len(special)}" if merges else "bytes", ranks, special, eot, pattern
        )


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes this one: what merging its bytes by the lower ranks ends in."""
    parts, limit = [bytes([b]) for b in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= limit:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {token!r} is not reached by any merge")
    return parts


# --------------------------------------------------------------------------------------------- where they come from


def byte_tokenizer() -> Tokenizer:
    """257 ids: the bytes, and end-of-text."""
    return Tokenizer("bytes", {bytes([b]): b for b in range(256)}, {EOT: 256})


def train_bpe(texts, vocab_size: int = DEFAULT_BPE_SIZE) -> Tokenizer:
    """
    A byte-level BPE of up to `vocab_size` ids (end-of-text is the last), trained on an iterable of texts.

    The same texts give the same tokenizer. A short text yields fewer ids. Raises ValueError for a size under 257.
    """
    if not 257 <= vocab_size <= 1_000_000:
        raise ValueError(
            f"--tokenizer: bpe:{vocab_size} is out of range; 256 bytes and end-of-text need 257, the most is 1000000"
        )
    import tokenizers  # imported here: only a run that trains a vocabulary needs it

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    vocab = model.get_vocab(with_added_tokens=False)
    ranks = {_token_of(token): i for token, i in vocab.items()}
    return Tokenizer(f"bpe:{len(ranks) + 1}", ranks, {EOT: len(ranks)})


def _download(url: str, path: Path, timeout_s: float) -> None:
    """Fetch url to path through a `.part` file. Raises OSError, also when the whole takes longer than timeout_s."""
    failed: list[Exception] = []

    def work():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            make_folder(path.parent)
            with urllib.request.urlopen(url, timeout=timeout_s) as response:
                part.write_bytes(response.read())
            rename_durably(part, path)
        except Exception as e:  # noqa: BLE001  whatever it is, the caller below raises it
            failed.append(e)
            part.unlink(missing_ok=True)

    # A daemon thread: the socket timeout bounds neither a slow name server nor a server that sends a byte a second.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise OSError(f"no answer within {timeout_s:g} s")
    if failed:
        raise OSError(str(failed[0])) from failed[0]


def gpt2_tokenizer(timeout_s: float = 10.0) -> Tokenizer:
    """GPT-2's tokenizer from tiktoken's cache, filled from OpenAI's server if need be. Raises OSError where neither is there."""
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = Path(
        os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default
    )
    path = folder / hashlib.sha1(GPT2_URL.encode()).hexdigest()  # tiktoken's own naming
    if not path.exists() or sha256_of(path) != GPT2_SHA256:
        _download(GPT2_URL, path, timeout_s)
        if sha256_of(path) != GPT2_SHA256:
            path.unlink()
            raise OSError(f"{GPT2_URL} has another sha256 than expected")
    return _gpt2_of_merges(path)


def _gpt2_of_merges(path: Path) -> Tokenizer:
    """GPT-2's numbering: 256 bytes in the order of their stand-ins, one id per merge, end-of-text last."""
    merges = [
        line.split(" ") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line
    ]  # the first line is a version
    tokens = [bytes([b]) for b in BYTE_TO_CHAR] + [_token_of(a + b) for a, b in merges]
    tokenizer = Tokenizer("gpt2", {token: i for i, token in enumerate(tokens)}, {EOT: len(tokens)})
    tokenizer.merges = merges
    return tokenizer


def make_tokenizer(spec: str, texts, on_gpu: bool = False) -> Tokenizer:
    """
    The tokenizer that `--tokenizer SPEC` asks for (see the top of this file); `texts` is what a BPE is trained on.

    Where GPT-2's files cannot be had, says so in one line and trains a BPE: a run must not need a network.
    Raises ValueError or FileNotFoundError for a spec that names nothing.
    """
    kind, _, size = spec.partition(":")
    if spec == "auto":
        kind = "gpt2" if on_gpu else "bpe"
    if spec == "bytes":
        return byte_tokenizer()
    if kind == "gpt2" and not size:
        try:
            return gpt2_tokenizer()
        except OSError as e:
            print(
                f"GPT-2's vocabulary is neither cached nor reachable ({e}): training a BPE of {DEFAULT_BPE_SIZE:,} instead"
            )
            kind = "bpe"
    if kind == "bpe":
        if size and not size.isdecimal():
            raise ValueError(
                f"--tokenizer: {spec!r} has no number behind the colon; write bpe:8192"
            )
        return train_bpe(_sample(texts), int(size or DEFAULT_BPE_SIZE))
    return Tokenizer.load(spec)


def vocabulary_of(spec: str, on_gpu: bool = True) -> int:
    """How many ids the tokenizer of `--tokenizer SPEC` will have, where it is not made yet; a small text gives a BPE fewer."""
    kind, _, size = ("gpt2" if on_gpu else "bpe", "", "") if spec == "auto" else spec.partition(":")
    if spec == "bytes":
        return byte_tokenizer().vocab_size
    if kind == "bpe" and (not size or size.isdecimal()):
        return int(size or DEFAULT_BPE_SIZE)
    return 50257 if kind == "gpt2" else Tokenizer.load(spec).vocab_size


def _sample(texts):
    """Texts up to BPE_SAMPLE_CHARS in all, the last one cut; long runs of white space too, which take quadratic time."""
    left = BPE_SAMPLE_CHARS
    for text in texts:
        yield re.sub(r"(\s{100})\s+", r"\1", text[:left])
        left -= len(text)
        if left <= 0:
            return
