"""
Streams of rows, each resumable: several mixed by weight, the first so many documents, every n-th.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from parts.base.text import EOT


class Mixture:
    """
    Rows of several streams, drawn at random by weight; ends with the last row of any of them.

    To continue would change the weights or repeat documents.
    """

    def __init__(self, streams: list, weights: list[float]):
        self.streams, self.weights = streams, weights
        self._start = 0
        self.n_drawn, self.positions = 0, []

    def __iter__(self):
        rows = [iter(stream) for stream in self.streams]
        self.n_drawn = self._start
        self.positions = [stream.state_dict() for stream in self.streams]
        return self._rows(rows)

    def _rows(self, rows: list):
        upcoming = [next(of_stream, None) for of_stream in rows]
        for i in itertools.islice(self._draws(), self._start, None):
            if None in upcoming:
                return
            row = upcoming[i]
            self.positions[i] = self.streams[i].state_dict()
            self.n_drawn += 1
            upcoming[i] = next(rows[i], None)
            yield row

    def _draws(self):
        rng = np.random.default_rng(0)
        while True:
            yield from rng.choice(len(self.streams), size=1000, p=self.weights).tolist()

    def state_dict(self) -> dict:
        """The position after the row that was yielded last."""
        return {"drawn": self.n_drawn, "streams": self.positions}

    def load_state_dict(self, state: dict) -> None:
        """Begin the next iteration at a position."""
        self._start = state["drawn"]
        for stream, position in zip(self.streams, state["streams"], strict=True):
            if position is not None:  # of a stream on the hub from which nothing was drawn yet
                stream.load_state_dict(position)


class Selection:
    """The first `limit` documents of a stream, and of these every n-th from number i."""

    def __init__(self, stream, limit: int | None = None, n: int = 1, i: int = 0):
        self.stream, self.limit, self.n, self.i = stream, limit, n, i
        self.n_documents = self._start = 0

    def __iter__(self):
        self.n_documents = self._start
        return self._rows(iter(self.stream))

    def _rows(self, rows):
        while self.limit is None or self.n_documents < self.limit:
            row = next(rows, None)
            if row is None:
                return
            is_mine = self.n_documents % self.n == self.i
            self.n_documents += row.get("ends", True)
            if is_mine:
                yield row

    def state_dict(self) -> dict:
        """The position after the row that was yielded last."""
        return {"documents": self.n_documents, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Begin the next iteration at a position."""
        self._start = state["documents"]
        self.stream.load_state_dict(state["stream"])


@dataclass
class Counts:
    """Rows that were read."""

    texts: int = 0
    without_text: int = 0
    with_separator: int = 0  # inside a line, where it separates nothing
    web_pages: int = 0

    def add(self, row: dict) -> bool:
        """Count a row; whether it has text."""
        text = row["text"]
        if not text or not (text.strip() or "ends" in row):
            self.without_text += 1
            return False
        self.texts += 1
        self.with_separator += EOT in text
        self.web_pages += text[:200].lstrip().lower().startswith(("<!doctype html", "<html"))
        return True

    def notes(self, name: str, n_empty: int) -> list[str]:
        """Lines about what was not read as its author may have meant it."""
        notes = []
        if n_empty:
            notes.append(f"{n_empty:,} files have no rows")
        if self.without_text:
            total = self.texts + self.without_text
            notes.append(f"{self.without_text:,} of {total:,} rows have no text")
        if self.with_separator:
            what = f"{self.with_separator:,} texts have {EOT} inside a line"
            notes.append(f"{what}, where it is read as text; put it on a line of its own")
        if self.web_pages:
            notes.append(f"{self.web_pages:,} texts are HTML pages, read with their tags")
        return [f"{name}: {note}" for note in notes]
