"""
Text to token ids and back. Most are byte-level BPE, run by tiktoken; only the merges differ:

    gpt2        50,257 ids, GPT-2's own merges (0.5 MB, downloaded once into tiktoken's cache)
    bpe         4,096 ids trained on the given text in seconds, without a network; or bpe:8192.
                A token has at most 500 characters: longer runs are cut in training, not in encoding
    bytes       257 ids, no merges: one id per byte
    FILE        a tokenizer.json of Hugging Face, or GPT-2's vocab.bpe / merges.txt; or a folder
                with one of them, or with what transformers makes a tokenizer of. What tiktoken
                cannot reproduce is run by their library (huggingface_tokenizer.py)
    auto        gpt2 on a GPU; bpe on a CPU, where an output layer of 50,257 ids would take most of
                the time of a small model

`<|endoftext|>` is the one special id and follows each document. Written in a text it is text.
Source of the byte-level scheme and of the splitting pattern: Radford et al. 2019, section 2.2.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np

from parts.base.files import make_folder, rename_durably, sha256_of
from parts.base.text import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    DOCUMENT_ENDS,
    EOT,
    without_surrogates,
)
from parts.data import bpe_training
from parts.data.byte_encoding import ByteEncoding
from parts.data.huggingface_tokenizer import (
    HuggingFaceTokenizer,
    agree,
    json_of_folder,
    part_of_a_tokenizer,
    whole_tokenizer_beside,
)

# GPT-2 merges only inside these pieces: contractions, words, numbers, punctuation, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same with a group around the branches without a look-ahead, which tiktoken's engine then tries
# at once instead of one by one.
FASTER_PATTERNS = {
    GPT2_PATTERN: (
        r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"""
    )
}
# OpenAI's merges, which define GPT-2's vocabulary, and the sha256 that tiktoken expects.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
DEFAULT_BPE_SIZE = 4096
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")  # of a BPE that is not byte-level
# files of a folder that has a tokenizer, the first that is there
FILES = ("tokenizer.json", "vocab.bpe", "merges.txt", "vocab.json", "tokenizer.model")


def _to_printable(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in token)


def _from_printable(printable: str) -> bytes:
    return bytes(CHAR_TO_BYTE[c] for c in printable)


class Tokenizer:
    """
    One interface for all of them: encode, decode, vocab_size, eot, fingerprint.

    name is for people. ranks is {token bytes: id}; lower ids merge first. special is {text: id} and
    must contain eot_text. Equal fingerprints mean equal ids.
    """

    def __init__(self, name: str, ranks: dict, special: dict, eot_text=EOT, pattern=GPT2_PATTERN):
        self.name = name
        self.ranks = ranks
        self.special = special
        self.eot_text = eot_text
        self.eot = special[eot_text]
        self.bos = self.eot  # begins a text that is continued: what came before it in training
        self.pattern = pattern
        self.merges = None  # pairs for a tokenizer.json, if known; else `to_json` computes them
        self._json = None
        self._of_thread = threading.local()
        self.vocab_size = self.encoding.n_vocab
        by_id = sorted(ranks.items(), key=lambda item: item[1])
        table = repr((pattern, by_id, sorted(special.items()), eot_text))
        self.fingerprint = hashlib.sha256(table.encode()).hexdigest()[:16]

    @property
    def encoding(self):
        """The encoding of this thread; threads that share one wait for its regular expression."""
        if not hasattr(self._of_thread, "encoding"):
            if all(len(token) == 1 for token in self.ranks):  # bytes need no package
                self._of_thread.encoding = ByteEncoding(self.ranks, self.special)
                return self._of_thread.encoding
            import tiktoken

            self._of_thread.encoding = tiktoken.Encoding(
                self.name,
                pat_str=FASTER_PATTERNS.get(self.pattern, self.pattern),
                mergeable_ranks=self.ranks,
                special_tokens=self.special,
            )
        return self._of_thread.encoding

    def encode(self, text: str, allowed=frozenset()) -> np.ndarray:
        """
        Ids (T,) uint32. Special tokens in the text are text, but for those that are `allowed`.

        Lone surrogates become U+FFFD.
        """
        special = {"allowed_special": set(allowed), "disallowed_special": ()}
        try:
            return self.encoding.encode_to_numpy(text, **special)
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text), allowed)
        except (ValueError, RuntimeError):  # tiktoken gives up on a million blanks: cut them
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate(
                [self.encode(part, allowed) for part in (text[:half], text[half:])]
            )

    def encode_documents(self, documents) -> np.ndarray:
        """Ids (T,) of all documents in order, end-of-text exactly once after each."""
        ended = [text + self.eot_text for text in documents]
        # whether end-of-text is nowhere written in the documents
        if all(text.find(self.eot_text) == len(text) - len(self.eot_text) for text in ended):
            with contextlib.suppress(ValueError, RuntimeError):  # see `encode`
                # One call, in which threads do not wait for each other. End-of-text separates the
                # documents before anything is merged.
                special = {"allowed_special": {self.eot_text}, "disallowed_special": ()}
                return self.encoding.encode_to_numpy("".join(ended), **special)
        eot = np.array([self.eot], dtype=np.uint32)
        parts = [part for text in documents for part in (self.encode(text), eot)]
        return np.concatenate(parts or [eot[:0]])

    def decode(self, ids) -> str:
        """Text of a list of ids. Bytes that are not a whole UTF-8 character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids) -> bytes:
        """Bytes of a list of ids: the exact inverse, even if they end inside a character."""
        return self.encoding.decode_bytes(list(ids))

    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text of each id, (V,) int64; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self.ranks.items():
            lengths[i] = len(token)
        return lengths

    def to_json(self) -> bytes:
        """A Hugging Face tokenizer.json; `load` gives a tokenizer of the same fingerprint."""
        if self._json is None:
            self._json = json.dumps(self._spec(), ensure_ascii=True).encode()
        return self._json

    def _spec(self) -> dict:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [
            {"id": i, "content": text, **flags, "special": True} for text, i in self.special.items()
        ]
        tokens = sorted(self.ranks, key=self.ranks.__getitem__)
        merges = self.merges
        if not merges:
            pairs = [_last_merge(token, self.ranks) for token in tokens if len(token) > 1]
            merges = [[_to_printable(part) for part in pair] for pair in pairs]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}}
        split |= {"behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False}
        byte_level |= {"trim_offsets": False, "use_regex": False}
        vocab = {_to_printable(token): self.ranks[token] for token in tokens}
        return {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }

    @classmethod
    def load(cls, path) -> Tokenizer | HuggingFaceTokenizer:
        """
        The tokenizer of a file or folder, see FILE at the top.

        A tokenizer.json of which tiktoken would give other ids is run by Hugging Face's library.
        Raises FileNotFoundError, or ValueError if neither can run it.
        """
        path = Path(path)
        if path.is_dir():
            there = [name for name in FILES if (path / name).exists()]
            of_gpt2 = "merges.txt" in there and sha256_of(path / "merges.txt") == GPT2_SHA256
            if not {"tokenizer.json", "vocab.bpe"} & set(there) and there and not of_gpt2:
                return HuggingFaceTokenizer(json_of_folder(path))
            path = path / (there or FILES)[0]
        if not path.is_file():
            fix = "give auto, gpt2, bpe, bpe:SIZE, bytes or a tokenizer.json"
            raise FileNotFoundError(f"--tokenizer: {path} does not exist; {fix}")
        if sha256_of(path) == GPT2_SHA256:
            return _gpt2_of_merges(path)
        data = path.read_bytes()
        if part := part_of_a_tokenizer(data):
            raise ValueError(f"--tokenizer: {path} holds {part}; {whole_tokenizer_beside(path)}")
        ours = any((path.parent / name).exists() for name in ("MANIFEST.json", "index.json"))
        damage = (LookupError, TypeError, AttributeError, RecursionError)
        tokenizer = None
        try:
            tokenizer = cls._from_json(json.loads(data))
        except (ValueError, *damage) as e:
            why = e
        if tokenizer and ours:
            return tokenizer
        try:
            library = HuggingFaceTokenizer(data)
            if tokenizer:  # a file that was not written here is compared before it is trusted
                return tokenizer if agree(tokenizer, library) else library
            return library
        except Exception as e:  # noqa: BLE001  the library raises Exception for a file it rejects
            if tokenizer:
                why = e
            elif type(e) is ValueError and type(why) is ValueError:  # both know the format
                why = f"{why}, and {e}"
            elif type(why) is not ValueError:
                why = f"it is not a Hugging Face tokenizer.json ({repr(why)[:200]})"
            fix = "give a tokenizer.json of a byte-level or byte-fallback model"
            raise ValueError(f"{path}: cannot be used as a tokenizer: {why}; {fix}") from e

    @classmethod
    def _from_json(cls, spec: dict) -> Tokenizer:
        """The tokenizer of a tokenizer.json. Raises ValueError if its ids would differ here."""
        model = spec["model"]
        if model["type"] != "BPE" or spec.get("normalizer"):
            raise ValueError("only a byte-level BPE without a normalizer gives the same ids here")
        for name in ("dropout", "ignore_merges", "byte_fallback", *AFFIXES):
            if model.get(name):
                raise ValueError(f"its model has {name}")
        pattern = _pattern_of(spec["pre_tokenizer"])
        special = {t["content"]: t["id"] for t in spec["added_tokens"]}
        for token in spec["added_tokens"]:
            odd = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
            if odd or not token["special"]:
                raise ValueError(f"its added token {token['content']!r} is matched in plain text")
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        ranks = {_from_printable(token): i for token, i in vocab.items()}
        vocab_size = len(ranks) + len(special)
        # tiktoken would crash, or could not decode the gaps
        if {*ranks.values(), *special.values()} != set(range(vocab_size)):
            raise ValueError("its ids are not 0, 1, 2, ..., each once")
        if n_missing := 256 - sum(len(token) == 1 for token in ranks):
            raise ValueError(f"it has no id for {n_missing} of the 256 bytes")
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        merged_ids = list(dict.fromkeys(ranks[_from_printable("".join(m))] for m in merges))
        if merged_ids != sorted(merged_ids):
            raise ValueError("its merges are not in the order of their ids")
        if len(merged_ids) != sum(len(token) > 1 for token in ranks):
            raise ValueError("it has tokens that no merge reaches")
        eot = next((text for text in DOCUMENT_ENDS if text in special), None)
        if eot is None:
            raise ValueError(f"no end-of-text token among its special tokens {sorted(special)[:5]}")
        return cls(f"bpe:{vocab_size}" if merges else "bytes", ranks, special, eot, pattern)


def _pattern_of(pre_tokenizer: dict) -> str:
    """The splitting pattern of a tokenizer.json. Raises ValueError for other pre-tokenizers."""
    steps = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    if not steps:
        raise ValueError("it has no pre-tokenizer")
    *before, last = steps
    if last["type"] != "ByteLevel" or len(before) > 1:
        raise ValueError("its pre-tokenizer is not byte-level with at most one pattern")
    if last.get("add_prefix_space"):
        raise ValueError("its add_prefix_space changes the text")
    if bool(last.get("use_regex", True)) == bool(before):
        raise ValueError("its pre-tokenizer is neither GPT-2's nor one pattern of its own")
    if not before:
        return GPT2_PATTERN
    split = before[0]
    if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
        raise ValueError("its pre-tokenizer is neither GPT-2's nor one pattern of its own")
    pattern = split["pattern"]["Regex"]
    if pattern == GPT2_PATTERN:
        return pattern
    import regex  # tiktoken requires it

    try:
        pieces = regex.finditer(pattern, "".join(map(chr, range(256))))
        if any(m.start() == m.end() for m in pieces):  # tiktoken would crash on an empty piece
            raise ValueError(f"its pattern {pattern[:50]!r} matches an empty text")
    except regex.error as e:
        raise ValueError(f"its pattern {pattern[:50]!r} is not valid: {e}") from e
    return pattern


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge gives this one, found by merging its bytes in order of rank."""
    parts, limit = [bytes([b]) for b in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= limit:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {token!r} is not the result of any merge")
    return parts


# ------------------------------------------------------------------------------------ making one


def byte_tokenizer() -> Tokenizer:
    """257 ids: the bytes, and end-of-text."""
    return Tokenizer("bytes", {bytes([b]): b for b in range(256)}, {EOT: 256})


def train_bpe(texts, vocab_size: int = DEFAULT_BPE_SIZE) -> Tokenizer:
    """
    A byte-level BPE of up to vocab_size ids, trained on an iterable of texts; end-of-text is last.

    The same texts give the same tokenizer; a short text gives fewer ids. No token is longer than
    bpe_training.MAX_RUN characters. Raises ValueError for a size that is out of range.
    """
    ranks = bpe_training.train(texts, vocab_size)
    return Tokenizer(f"bpe:{len(ranks) + 1}", ranks, {EOT: len(ranks)})


def gpt2_tokenizer(timeout_s: float = 10.0) -> Tokenizer:
    """
    GPT-2's tokenizer from tiktoken's cache, which is filled from OpenAI's server if needed.

    Raises OSError if it is in neither.
    """
    temporary = Path(tempfile.gettempdir()) / "data-gym-cache"
    names = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")  # tiktoken's own, as is the file name
    folder = next((Path(os.environ[name]) for name in names if os.environ.get(name)), temporary)
    path = folder / hashlib.sha1(GPT2_URL.encode()).hexdigest()
    if not path.exists() or sha256_of(path) != GPT2_SHA256:
        _download(GPT2_URL, path, timeout_s)
        if sha256_of(path) != GPT2_SHA256:
            path.unlink()
            raise OSError(f"{GPT2_URL} has another sha256 than expected")
    return _gpt2_of_merges(path)


def _download(url: str, path: Path, timeout_s: float) -> None:
    """Fetch url to path through a `.part` file. Raises OSError, also after timeout_s in all."""
    errors: list[Exception] = []

    def work():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            make_folder(path.parent)
            with urllib.request.urlopen(url, timeout=timeout_s) as response:
                part.write_bytes(response.read())
            rename_durably(part, path)
        except Exception as e:  # noqa: BLE001  whatever it is, the caller below raises it
            errors.append(e)
            part.unlink(missing_ok=True)

    # A daemon thread, because the timeout of a socket limits neither a slow name server nor a
    # server that sends one byte per second.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise OSError(f"no answer within {timeout_s:g} s")
    if errors:
        raise OSError(str(errors[0])) from errors[0]


def _gpt2_of_merges(path: Path) -> Tokenizer:
    """GPT-2's ids: 256 bytes in the order of BYTE_TO_CHAR, one per merge, end-of-text last."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first line is a version
    merges = [line.split(" ") for line in lines if line]
    tokens = [bytes([b]) for b in BYTE_TO_CHAR] + [_from_printable(a + b) for a, b in merges]
    tokenizer = Tokenizer("gpt2", {token: i for i, token in enumerate(tokens)}, {EOT: len(tokens)})
    tokenizer.merges = merges
    return tokenizer


def make_tokenizer(spec: str, texts, on_gpu: bool = False) -> Tokenizer:
    """
    The tokenizer of `--tokenizer SPEC` (see the top of this file); a BPE is trained on `texts`.

    If GPT-2's files are not available, says so in one line and trains a BPE: a run must not need a
    network. Raises ValueError or FileNotFoundError for an unknown spec.
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
            what = f"GPT-2's vocabulary is neither cached nor reachable ({e})"
            print(f"{what}: training a BPE of {DEFAULT_BPE_SIZE:,} instead")
            kind = "bpe"
    if kind == "bpe":
        if size and not size.isdecimal():
            raise ValueError(f"--tokenizer: {spec!r} needs a number after bpe:, such as bpe:8192")
        return train_bpe(bpe_training.sample(texts), int(size or DEFAULT_BPE_SIZE))
    return Tokenizer.load(spec)


def content_key(spec: str) -> str:
    """What identifies the tokenizer of `--tokenizer SPEC`: the sha256 of its file, or SPEC."""
    path = Path(spec)
    if not path.is_dir():
        return sha256_of(path) if path.is_file() else spec
    there = [name for name in FILES if (path / name).is_file()]
    if there[:1] == ["tokenizer.json"]:
        return sha256_of(path / "tokenizer.json")
    names = sorted(p.name for p in path.iterdir() if p.is_file())  # transformers reads several
    hashes = [f"{name} {sha256_of(path / name)}" for name in names]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def vocabulary_of(spec: str, on_gpu: bool = True) -> int:
    """
    Number of ids that `--tokenizer SPEC` will give; a BPE of a short text gets fewer.

    Raises ValueError or FileNotFoundError for an unknown spec.
    """
    kind, _, size = spec.partition(":")
    if spec == "auto":
        kind = "gpt2" if on_gpu else "bpe"
    if spec == "bytes":
        return byte_tokenizer().vocab_size
    if kind == "bpe" and (not size or size.isdecimal()):
        bpe_training.check_size(int(size or DEFAULT_BPE_SIZE))
        return int(size or DEFAULT_BPE_SIZE)
    return 50257 if kind == "gpt2" else Tokenizer.load(spec).vocab_size
