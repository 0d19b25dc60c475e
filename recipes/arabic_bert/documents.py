"""
The documents in files of a folder, cleaned, one in a line, each once.

    files, not_read = find_files(folder, "xml")       # or "text"
    for document in read_documents(files[0], counts): ...
    line, why_dropped = Cleaning().clean(document)
    duplicates.why_dropped(line, fingerprint(line))   # then duplicates.add(...)
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parts.data.near_duplicates import NearDuplicates, sketch
from recipes.arabic_bert.arabic_text import has_arabic, normalise, without_marks
from recipes.arabic_bert.segmentation import desegment
from recipes.arabic_bert.xml_text import (
    DAMAGED,
    MAX_TEXT_CHARS,
    XmlTexts,
    encoding_of,
    is_redirect,
    open_text,
    without_markup,
)

# file names; a dump of Wikipedia in parts is called ...xml-p1p2.bz2
_NAMES = {
    "xml": re.compile(r"\.xml(-p\d+p\d+)?(\.bz2|\.gz)?$", re.IGNORECASE),
    "text": re.compile(r"\.(txt|jsonl)(\.bz2|\.gz)?$", re.IGNORECASE),
}
_VERSE = re.compile(r"^\d+:\d+:\s*")
TEXT_COLUMNS = ("text", "content")
SKETCH_SIZE = 256


# ---------------------------------------------------------------------------------- read


def find_files(folder, kind: str, skip=()) -> tuple[list[Path], Counter]:
    """
    (files of a kind, "xml" or "text", in a folder and below it, in order of their names; how many
    files there are of each other ending).

    A compressed file is left out if what is in it lies beside it; `skip` are folders to leave out.
    Raises FileNotFoundError if the folder is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--input_dir: {folder}: no such folder")
    skipped = {Path(path).resolve() for path in skip}
    files, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or skipped & {path.resolve(), *path.resolve().parents}:
            continue
        if not _NAMES[kind].search(path.name):
            others[path.suffix.lower() or "no ending"] += 1
        elif path.suffix.lower() not in (".bz2", ".gz") or not path.with_suffix("").exists():
            files.append(path)
    return files, others


@dataclass
class FileCounts:
    """What was found in a file while it was read."""

    documents: int = 0
    not_read: Counter = field(default_factory=Counter)  # reason -> documents
    problems: list = field(default_factory=list)  # lines for people


def read_documents(path: Path, kind: str, counts: FileCounts):
    """
    Yield the documents of a file, as they are; `counts` is filled, completely only at the end.

    XML: the articles, without markup if it is Wikipedia's. Text: the lines; jsonl: the column text
    or content. What cannot be read is counted, and no error: the rest of the corpus is read.
    """
    try:
        with open_text(path) as (file, head):
            encoding, problem = encoding_of(head)
            if problem:
                counts.problems.append(problem)
            if kind == "xml":
                yield from _read_xml(file, head, encoding, counts)
            else:
                yield from _read_lines(file, encoding, ".jsonl" in path.suffixes, counts)
    except DAMAGED as e:
        why = getattr(e, "strerror", None) or str(e)
        counts.problems.append(f"damaged after {counts.documents:,} documents ({why})")


def _read_xml(file, head: bytes, encoding: str, counts: FileCounts):
    is_wiki = b"<mediawiki" in head[:4096]
    texts = XmlTexts(file, encoding)
    for text in texts:
        counts.documents = texts.n_articles
        if texts.namespace:  # a template, a category, a discussion
            counts.not_read["page that is no article"] += 1
        elif is_wiki and is_redirect(text):
            counts.not_read["redirect"] += 1
        else:
            yield without_markup(text) if is_wiki else text
    counts.documents = texts.n_articles
    if texts.n_unfinished:
        counts.not_read["text without an end tag"] += texts.n_unfinished
    if texts.n_too_long:
        counts.not_read[f"over {MAX_TEXT_CHARS:,} characters"] += texts.n_too_long
    if not texts.n_articles:
        counts.problems.append("has no <text> element")


def _read_lines(file, encoding: str, is_json: bool, counts: FileCounts):
    for line in _lines(file, encoding):
        counts.documents += 1
        if line is None:
            counts.not_read[f"over {MAX_TEXT_CHARS:,} characters"] += 1
        elif not is_json:
            yield line
        elif line.strip():
            text = _text_of_row(line)
            if text is None:
                counts.not_read["row without a text"] += 1
            else:
                yield text


def _lines(file, encoding: str):
    """Yield the lines of a binary file; None for one of more than MAX_TEXT_CHARS."""
    text = io.TextIOWrapper(file, encoding, errors="replace")
    while line := text.readline(MAX_TEXT_CHARS):
        is_long = len(line) == MAX_TEXT_CHARS and not line.endswith("\n")
        while len(line) == MAX_TEXT_CHARS and not line.endswith("\n"):
            line = text.readline(MAX_TEXT_CHARS)
        yield None if is_long else line
    text.detach()


def _text_of_row(line: str) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    return next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)


# ---------------------------------------------------------------------------------- clean


@dataclass(frozen=True)
class Cleaning:
    """How a document becomes a line."""

    letters: dict | None = None  # of letter_table()
    min_words: int = 0  # fewer: dropped
    max_words: int | None = None  # more: dropped

    def clean(self, document: str) -> tuple[str | None, str | None]:
        """(the document in one line, or None; why it is dropped, or None)."""
        if not document or document.isspace():
            return None, "empty"
        kept = []
        for line in normalise(document, self.letters).split("\n"):
            line = _VERSE.sub("", line)
            if has_arabic(line):
                kept.append(line)
        if not kept:
            return None, "no Arabic letters"
        line = " ".join(kept)
        n_words = line.count(" ") + 1
        if n_words < self.min_words:
            return None, f"below {self.min_words} words"
        if self.max_words is not None and n_words > self.max_words:
            return None, f"above {self.max_words} words"
        return line, None


# ---------------------------------------------------------------------------------- duplicates


def key_of(line: str) -> int:
    """64 bits of a hash of a document; diacritics and segments make no difference."""
    text = desegment(without_marks(line))
    text = desegment(text)  # of a segmented line, what has a + of its own
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def fingerprint(line: str) -> tuple[int, np.ndarray]:
    """(key, sketch of the runs of five words) of a document."""
    return key_of(line), sketch(without_marks(line), SKETCH_SIZE)


class Keys:
    """A set of 64-bit numbers that takes 8 bytes for each."""

    LOOSE = 100_000

    def __init__(self):
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._loose = set()

    def __contains__(self, key: int) -> bool:
        if key in self._loose:
            return True
        i = np.searchsorted(self._sorted, np.uint64(key))
        return i < len(self._sorted) and int(self._sorted[i]) == key

    def add(self, key: int) -> None:
        """Add a number that is not in the set."""
        self._loose.add(key)
        if len(self._loose) >= self.LOOSE:
            loose = np.fromiter(self._loose, dtype=np.uint64)
            self._sorted = np.sort(np.concatenate([self._sorted, loose]))
            self._loose = set()


class Duplicates:
    """
    Whether a document is among those kept so far, or nearly.

    All kept documents are remembered by 8 bytes, the last `window` to twice as many by sketches:
    a near duplicate that comes later than that is not found. alike is the share of runs of five
    words in common from which a document is a near duplicate; 0 turns this off.
    """

    def __init__(self, alike: float, window: int):
        self.alike = alike
        self.window = window
        self.n_kept = 0
        self._keys = Keys()
        self._older = self._newer = self._empty()

    def _empty(self) -> NearDuplicates:
        return NearDuplicates(self.alike, SKETCH_SIZE)

    def why_dropped(self, key: int, runs: np.ndarray) -> str | None:
        """Why a document is not kept, from its fingerprint; None if it is new."""
        if key in self._keys:
            return "exact duplicate"
        near = self.alike and (self._newer.twin_of(runs) or self._older.twin_of(runs))
        return "near duplicate" if near else None

    def add(self, key: int, runs: np.ndarray) -> None:
        """Remember a document."""
        self._keys.add(key)
        if self.n_kept % self.window == 0:
            self._older, self._newer = self._newer, self._empty()
        self._newer.add(str(self.n_kept), runs)
        self.n_kept += 1

    def add_known(self, lines, n_lines: int) -> None:
        """Remember documents that were kept before; sketches only the last ones of n_lines."""
        n_total = self.n_kept + n_lines
        first = (n_total - 1) // self.window * self.window - self.window
        nothing = np.zeros(0, dtype=np.uint64)
        for line in lines:
            near = self.alike and self.n_kept >= first
            key, runs = fingerprint(line) if near else (key_of(line), nothing)
            self.add(key, runs)
