"""
Texts that are nearly the same: further editions of a book, copies of a source file.

    kept = NearDuplicates(alike=0.8)
    a = sketch(text)
    if not kept.twin_of(a): kept.add("name", a)

How alike two texts are is the share of runs of five words that they have in common (Jaccard).
Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

import re
import zlib
from collections import Counter

import numpy as np

SKETCH_SIZE = 256
N_LOWEST = 16  # hashes of a sketch by which alike texts are found
MOST_TEXTS = 1000  # that are remembered for each of them; it bounds the time for boilerplate
MOST_CANDIDATES = 8  # compared with a new text, those that share most of these hashes


def sketch(text: str, size: int = SKETCH_SIZE) -> np.ndarray:
    """
    The `size` smallest hashes of the text's runs of five words, sorted, uint64; fewer if it is
    short, none below five words.

    Case, punctuation and line breaks do not matter.
    """
    words = " ".join(re.findall(r"[^\W_]+", text.lower())).encode(errors="replace").split()
    words = np.fromiter(map(zlib.crc32, words), dtype=np.uint64)
    n_runs = max(len(words) - 4, 0)
    runs = np.zeros(n_runs, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(5):
            runs = (runs ^ words[i : i + n_runs]) * np.uint64(0x9E3779B97F4A7C15)
            runs ^= runs >> np.uint64(29)
    return np.unique(runs)[:size]


def resemblance(a: np.ndarray, b: np.ndarray, size: int = SKETCH_SIZE) -> float:
    """
    Share, 0 to 1, of runs of five words that two texts have in common, from sketches of `size`.

    Exact if both texts have fewer runs than `size`, else an estimate: 0.8 +- 0.025 for 256.
    """
    both = np.sort(np.concatenate([a, b]))
    shared = both[:-1][both[1:] == both[:-1]]
    n_union = len(both) - len(shared)
    if max(len(a), len(b)) >= size:  # of longer texts, only the `size` smallest are known
        n_union = min(n_union, size)
        largest = np.unique(both)[n_union - 1]
        shared = shared[shared <= largest]
    return len(shared) / n_union if n_union else 0.0


class NearDuplicates:
    """
    The texts kept so far, and whether one more is nearly the same as one of them.

    Takes 8 * size bytes per text, so that tens of thousands of texts are no problem.
    """

    def __init__(self, alike: float = 0.6, size: int = SKETCH_SIZE):
        # different books share almost no runs of five words, editions of one book share most
        self.alike = alike
        self.size = size
        self._sketches: dict[str, np.ndarray] = {}
        self._having: dict[int, list[str]] = {}  # low hash -> names of texts

    def twin_of(self, text: np.ndarray) -> tuple[str, float] | None:
        """(name, resemblance) of the kept text most like a sketched one; None if it is new."""
        shared = Counter()
        for h in text[:N_LOWEST].tolist():
            shared.update(self._having.get(h, ()))
        names = [name for name, _ in shared.most_common(MOST_CANDIDATES)]
        found = [(name, resemblance(text, self._sketches[name], self.size)) for name in names]
        best = max(found, key=lambda pair: pair[1], default=None)
        return best if best and best[1] >= self.alike else None

    def add(self, name: str, text: np.ndarray) -> None:
        """Remember the sketch of a kept text."""
        self._sketches[name] = text
        for h in text[:N_LOWEST].tolist():
            names = self._having.setdefault(h, [])
            if len(names) < MOST_TEXTS:
                names.append(name)
