"""
Extend a byte-level BPE tokenizer by Arabic tokens, without moving an id.

    spec = with_arabic_split(json.loads(data))   # of a tokenizer.json, after check_family(spec)
    spec, tokens = continued(spec, counts, 80_000, min_freq=20)

Marked affixes (see AFFIXES) are pieces of their own and get a token first; a word is one piece
together with its vowel marks. Of the two methods, `continued` applies the old merges, continues BPE
training on the result, and appends the new merges; `whole_words` adds the most frequent pieces.

Text without characters of U+0600-06FF keeps its ids: a new token has a byte 0xD8-0xDB, with which
the UTF-8 of only these characters begins.
"""

from __future__ import annotations

import json
from collections import Counter

import regex
import tokenizers

from parts.base.text import BYTE_TO_CHAR, CHAR_TO_BYTE
from parts.data.huggingface_tokenizer import IN_UTF8

# --- Arabic, and how its affixes are marked

WAW, FA, BA, KAF, LAM, SIN = "\u0648", "\u0641", "\u0628", "\u0643", "\u0644", "\u0633"
ALEF, HA, TA, NUN, MEEM, YA = "\u0627", "\u0647", "\u062a", "\u0646", "\u0645", "\u064a"
TA_MARBUTA = "\u0629"
PREFIXES = (WAW, FA, BA, KAF, LAM, SIN, ALEF + LAM)  # written x+
SUFFIXES = (  # written +x
    *(TA_MARBUTA, ALEF + TA, ALEF + NUN, WAW + NUN, YA + NUN, WAW + ALEF, ALEF, TA, NUN, YA),
    *(HA, HA + ALEF, HA + MEEM, HA + NUN, HA + MEEM + ALEF, NUN + ALEF, NUN + YA),
    *(KAF, KAF + MEEM, KAF + NUN, KAF + MEEM + ALEF, TA + MEEM, TA + NUN),
)
# a prefix is one piece with the blank before it, and one without
AFFIXES = (
    *(f"{blank}{prefix}+" for prefix in PREFIXES for blank in (" ", "")),
    *(f"+{suffix}" for suffix in SUFFIXES),
)
ARABIC = "\u0600-\u06ff"
LETTERS = "\u0620-\u064a\u0671-\u06d3"
MARKS = "\u064b-\u0652\u0670"  # vowel marks, which some texts keep
# What GPT-2 splits a text into, here for two engines: Oniguruma of the library, and `regex`.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Marked affixes, and words with their vowel marks, at which GPT-2 cuts a word.
ARABIC_PATTERN = (
    f" ?(?:[{WAW}{FA}{BA}{KAF}{LAM}{SIN}][{MARKS}]*|{ALEF}[{MARKS}]*{LAM}[{MARKS}]*)\\+"
    f"|\\+[{LETTERS}{MARKS}]+"
    f"| ?[{LETTERS}][{LETTERS}{MARKS}]*"
)
ARABIC_PIECE = regex.compile(rf" ?\+?[{ARABIC}]+\+?")
LEAD_BYTES = {BYTE_TO_CHAR[b] for b in range(0xD8, 0xDC)}  # of the UTF-8 of U+0600-06FF

MAX_PIECE_CHARS = 60  # no Arabic word is as long; a merge takes quadratic time in the length
MAX_NOT_TAKEN = 100_000  # different pieces that are looked at together, which is faster
MAX_FED = 100_000_000  # pieces that the trainer is fed one by one; more are scaled down
PRIVATE = 0xF0000  # code points of planes 15 and 16 are for private use: one for each old id


def to_printable(text: str) -> str:
    """A text as the vocabulary writes it: one printable character for each byte of its UTF-8."""
    return "".join(BYTE_TO_CHAR[b] for b in text.encode())


def to_text(token: str) -> str:
    """The text of a token of the vocabulary; bytes that are no whole character become U+FFFD."""
    return bytes(CHAR_TO_BYTE[c] for c in token).decode(errors="replace")


# --- the old tokenizer


def check_family(spec: dict) -> None:
    """Raises ValueError, saying why, if a tokenizer.json cannot be extended here."""
    kind = spec.get("model", {}).get("type")
    if kind != "BPE":
        raise ValueError(f"its model is {kind}, not the byte-level BPE of ModernBERT")
    model = spec["model"]
    _pattern_of(spec)
    decoder = (spec.get("decoder") or {}).get("type")
    if decoder != "ByteLevel" or any(BYTE_TO_CHAR[b] not in model["vocab"] for b in IN_UTF8):
        raise ValueError("it does not have a token for every byte, as ModernBERT's has")
    if model.get("dropout") or model.get("continuing_subword_prefix"):
        raise ValueError("its BPE leaves out merges or marks parts of words; ModernBERT's does not")
    ids = all_ids(spec)
    if len(set(ids.values())) != len(ids):
        raise ValueError("two of its tokens have the same id")


def all_ids(spec: dict) -> dict[str, int]:
    """{token: id}, added tokens (as they are written in a text) among them."""
    return {**spec["model"]["vocab"], **{t["content"]: t["id"] for t in spec["added_tokens"]}}


def _pattern_of(spec: dict) -> str:
    """The expression that the pre-tokenizer splits a text with. Raises ValueError."""
    step = spec.get("pre_tokenizer") or {}
    if step.get("type") == "ByteLevel" and step.get("use_regex", True):
        if not step.get("add_prefix_space"):
            return GPT2_PATTERN
    elif step.get("type") == "Sequence" and len(step["pretokenizers"]) == 2:
        split, to_bytes = step["pretokenizers"]
        if (
            (split["type"], to_bytes["type"]) == ("Split", "ByteLevel")
            and split["behavior"] == "Isolated"
            and not split["invert"]
            and "Regex" in split["pattern"]
            and not to_bytes.get("use_regex", True)
            and not to_bytes.get("add_prefix_space")
        ):
            return split["pattern"]["Regex"]
    raise ValueError("it splits a text in another way than ModernBERT's")


def with_arabic_split(spec: dict) -> dict:
    """
    The tokenizer with marked affixes, and words with their vowel marks, as pieces of their own.

    Text that is not Arabic is split as before.
    """
    pattern = _pattern_of(spec)
    if not pattern.startswith(ARABIC_PATTERN):  # it has been extended before
        pattern = f"{ARABIC_PATTERN}|{pattern}"
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False}
    to_bytes |= {"trim_offsets": True, "use_regex": False}
    return {**spec, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]}}


def merges_of(spec: dict) -> list[tuple[str, str]]:
    """The merges, from either format of tokenizer.json: "a b" or ["a", "b"]."""
    return [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]
    ]


def only_merges(spec: dict) -> tokenizers.Tokenizer:
    """The BPE without what comes before and after it: it reads a piece as the vocabulary does."""
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return tokenizers.Tokenizer.from_str(json.dumps({**spec, **bare, "added_tokens": []}))


# --- counting


class PieceCounter:
    """
    How often each piece with Arabic letters occurs, in bounded memory.

    spec: as from `with_arabic_split`. If more than max_pieces different ones are found, the
    rarest are dropped, and at most half are left. `n_dropped` counts that; at most `n_not_counted`
    occurrences of a piece are missing. The result depends on the texts and their order alone, and
    is complete after finish().
    """

    def __init__(self, spec: dict, max_pieces: int):
        self._pattern = regex.compile(_pattern_of(spec))
        self._max_pieces = max_pieces
        self._normalizer = tokenizers.Tokenizer.from_str(json.dumps(spec)).normalizer
        self.counts = Counter()
        self._not_taken = Counter()  # pieces of the last texts, also those that are not Arabic
        self.n_too_long = 0  # pieces over MAX_PIECE_CHARS
        self.n_dropped = 0
        self.n_not_counted = 0

    def add(self, text: str) -> None:
        """Count the pieces of a text."""
        self._not_taken.update(self._split(text))
        if len(self._not_taken) > min(self._max_pieces, MAX_NOT_TAKEN):
            self.finish()

    def finish(self) -> None:
        """Complete the counts, after the last text."""
        for piece, n in self._not_taken.items():
            if not ARABIC_PIECE.fullmatch(piece):
                continue
            if len(piece) > MAX_PIECE_CHARS:
                self.n_too_long += n
            else:
                self.counts[piece] += n
        self._not_taken.clear()
        if len(self.counts) > self._max_pieces:
            self._drop_rarest()

    def _split(self, text: str) -> list[str]:
        if self._normalizer:
            text = self._normalizer.normalize_str(text)
        return self._pattern.findall(text)

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text that are Arabic as a whole, in order."""
        return [piece for piece in self._split(text) if ARABIC_PIECE.fullmatch(piece)]

    def _drop_rarest(self) -> None:
        of_rank = sorted(self.counts.values(), reverse=True)
        rare = of_rank[self._max_pieces // 2]
        kept = {piece: n for piece, n in self.counts.items() if n > rare}
        self.n_not_counted += rare
        self.n_dropped += len(self.counts) - len(kept)
        self.counts = Counter(kept)


# --- new tokens


def affix_merges(spec: dict) -> list[tuple[str, str]]:
    """Merges after which each of AFFIXES is one token."""
    merges = []
    for encoding in only_merges(spec).encode_batch([to_printable(affix) for affix in AFFIXES]):
        first, *rest = _merged(encoding.tokens, merges)
        for part in rest:
            merges.append((first, part))
            first += part
    return merges


def _merged(tokens: list[str], merges) -> list[str]:
    """The tokens after merges, which are few, in their order."""
    for a, b in merges:
        result = []
        for token in tokens:
            if token == b and result and result[-1] == a:
                result[-1] = a + b
            else:
                result.append(token)
        tokens = result
    return tokens


def continued(spec: dict, counts, n_new: int, min_freq: int) -> tuple[dict, list[str]]:
    """
    (the tokenizer with up to n_new tokens more, these tokens in the order of their ids).

    counts: {piece: count}. A new merge is of a pair that occurs at least min_freq times. Raises
    ValueError if n_new is too small for the affixes.
    """
    merges = affix_merges(spec)
    with_affixes, tokens = extended(spec, merges)
    _check_room(n_new, len(tokens))
    merges += _trained_merges(with_affixes, counts, n_new, min_freq)
    return extended(spec, merges, n_new)


def _check_room(n_new: int, n_affixes: int) -> None:
    if n_new < n_affixes:
        what = f"{n_new:,} new tokens are fewer than the {n_affixes:,} that the affixes need"
        raise ValueError(f"--max_vocab_size: {what}; give more")


def scale_of(counts) -> int:
    """What `continued` divides the counts by, so that training takes minutes at most."""
    return max(1, -(-sum(counts.values()) // MAX_FED))


def _trained_merges(spec: dict, counts, n_new: int, min_freq: int) -> list[tuple[str, str]]:
    """
    Merges of old tokens by BPE training, the most frequent pair first.

    Each old id becomes one private character, so that the library's trainer starts from tokens
    where it would start from bytes.
    """
    bpe, of_id, docs = only_merges(spec), {}, []
    ordered = sorted(counts)
    for begin in range(0, len(ordered), 10_000):  # encodings take much more memory than texts
        batch = [to_printable(piece) for piece in ordered[begin : begin + 10_000]]
        for encoding in bpe.encode_batch_fast(batch):
            chars = (of_id.setdefault(i, chr(PRIVATE + len(of_id))) for i in encoding.ids)
            docs.append("".join(chars))
    scale = scale_of(counts)

    def repeated():
        for piece, doc in zip(ordered, docs, strict=True):
            left = round(counts[piece] / scale)
            while left > 0:
                yield " ".join([doc] * min(left, 10_000))
                left -= 10_000

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(
        # some merges give a token that is there, and are not counted
        vocab_size=len(of_id) + n_new + n_new // 10 + 1000,
        min_frequency=max(1, round(min_freq / scale)),
        initial_alphabet=[],
        show_progress=False,
    )
    trained.train_from_iterator(repeated(), trainer)
    token_of = {i: token for token, i in all_ids(spec).items()}
    token_of_char = {char: token_of[i] for i, char in of_id.items()}

    def back(private: str) -> str:
        return "".join(token_of_char[char] for char in private)

    return [(back(a), back(b)) for a, b in merges_of(json.loads(trained.to_str()))]


def extended(spec: dict, merges, n_new: int | None = None) -> tuple[dict, list[str]]:
    """
    (the tokenizer with more merges, its new tokens in the order of their ids, at most n_new).

    A merge is left out if it is there already, if its result may occur in text that is not Arabic,
    or if one of its parts was left out.
    """
    ids, old_merges = all_ids(spec), merges_of(spec)
    known, first_id = set(old_merges), max(ids.values()) + 1
    appended, tokens = [], []
    for a, b in merges:
        token = a + b
        if (a, b) in known or not LEAD_BYTES & set(token) or a not in ids or b not in ids:
            continue
        if token not in ids:
            if len(tokens) == n_new:
                break
            ids[token] = first_id + len(tokens)
            tokens.append(token)
        known.add((a, b))
        appended.append((a, b))
    model = {**spec["model"], "vocab": _in_order(ids)}
    model["merges"] = _written_as(spec, old_merges + appended)
    return {**spec, "model": model}, tokens


def _in_order(ids: dict[str, int]) -> dict[str, int]:
    """
    The vocabulary in the order of ids, with the added tokens.

    They have to be in it: the library numbers added tokens that are not from the size of the
    vocabulary, so that [MASK] and its like would move when it grows.
    """
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _written_as(spec: dict, merges) -> list:
    """Merges in the format of the file; the library refuses a file with both formats."""
    if any(isinstance(merge, str) for merge in spec["model"]["merges"]):
        return [f"{a} {b}" for a, b in merges]
    return [list(merge) for merge in merges]


def whole_words(spec: dict, counts, n_new: int, min_freq: int) -> tuple[dict, list[str]]:
    """
    (the tokenizer with up to n_new tokens more, these tokens in the order of their ids).

    Affixes first, then the pieces that occur at least min_freq times, the most frequent first. A
    piece that is in the vocabulary is one token; any other is split by the old merges. Raises
    ValueError as `continued`, and if the old tokenizer has tokens that its merges do not make: the
    ids of text with them would change.
    """
    ids = all_ids(spec)
    tokens = [token for token in map(to_printable, AFFIXES) if token not in ids]
    _check_room(n_new, len(tokens))
    if not spec["model"].get("ignore_merges") and (odd := unreachable(spec)):
        what = f"{len(odd):,} of the old tokens, such as {odd[0]!r}, are not made by its merges"
        raise ValueError(f"--method words: {what}, and would appear; use --method continued")
    frequent = sorted((-n, piece) for piece, n in counts.items() if n >= min_freq)
    tokens += [to_printable(piece) for _, piece in frequent]
    tokens = [token for token in dict.fromkeys(tokens) if token not in ids][:n_new]
    first_id = max(ids.values()) + 1
    ids |= {token: first_id + i for i, token in enumerate(tokens)}
    model = {**spec["model"], "vocab": _in_order(ids), "ignore_merges": True}
    return {**spec, "model": model}, tokens


def unreachable(spec: dict) -> list[str]:
    """Tokens of the vocabulary that the merges never make, added ones left out."""
    added = {t["content"] for t in spec["added_tokens"]}
    tokens = [token for token in spec["model"]["vocab"] if token not in added]
    encodings = only_merges(spec).encode_batch_fast(tokens)
    return [token for token, e in zip(tokens, encodings, strict=True) if len(e.ids) != 1]
