"""
Which window of the text is in which batch: a pure function of (seed, epoch, index), so nothing has to be remembered.

    global window g = epoch * n_windows + k     ->  window number shuffle(k) of that epoch
    step s takes the next `rows_per_step` global windows; they are cut into micro-batches, dealt to the ranks in turn

So a checkpoint holds one integer, the windows consumed; finding the place again costs the same at step 0 and at step
1,000,000; and any number of ranks, or rows per micro-batch, sees the same rows at the same step.
"""

from __future__ import annotations

import queue
import threading

import numpy as np
import torch

AT_ONCE = 2**13  # windows whose places are worked out together

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """A well-stirred uint64 for each uint64. Source: splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def stir(*numbers: int) -> int:
    """One 63-bit seed of several integers; any change in any of them gives an unrelated one."""
    state = np.zeros(1, dtype=np.uint64)
    for n in numbers:
        state = _mix(state + np.uint64(n % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return int(state[0]) >> 1


def shuffled(k, n: int, seed: int, epoch: int) -> np.ndarray:
    """
    Where each of the places k lands in a shuffle of range(n): int64 array of the same shape, in constant memory.

    A Feistel network of six rounds permutes the next even power of two; what lands outside of range(n) walks on until it
    is inside (Black and Rogaway 2002, "cycle walking"), so the whole is a permutation of range(n).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    keys = [np.uint64(stir(seed, epoch, r)) for r in range(6)]
    x = np.asarray(k, dtype=np.uint64).copy()
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        x[outside] = (left << shift) | right
        outside = x >= n
    return x.astype(np.int64)


class TrainBatches:
    """
    Endless micro-batches {"inputs", "targets"} of one rank, each (B, T) int64.

    shards: a shards.Shards of training text. Every window of T tokens stands once in every epoch. `share` says what part
    of each step is this rank's; `state_dict` is the place behind the last whole step that was handed out.
    Raises ValueError where the text is shorter than one step, or holds ids that the vocabulary does not have.
    """

    def __init__(self, shards, T: int, seed: int, vocab_size: int):
        self.shards, self.T, self.seed, self.vocab_size = shards, T, seed, vocab_size
        self.ends = np.cumsum(
            [(max(len(t), 1) - 1) // T for t in shards.tokens]
        )  # windows up to the end of each file
        self.n_windows = int(self.ends[-1]) if len(self.ends) else 0
        # each file as (windows, T + 1), every row beginning with the last token of the one before it; nothing is copied
        counts = np.diff(self.ends, prepend=0)
        self.views = [
            np.ndarray((n, T + 1), t.dtype, t, strides=(T * t.itemsize, t.itemsize))
            for n, t in zip(counts, shards.tokens, strict=True)
        ]
        self.windows, self.left_out, self.placed = 0, [], (None, None)
        self.share(0, 1, 1, 1)

    def share(self, rank: int, world: int, batch_size: int, rows_per_step: int) -> None:
        """This rank takes micro-batches rank, rank + world, ... of the rows_per_step // batch_size of each step."""
        self.rank, self.world, self.batch_size, self.rows_per_step = (
            rank,
            world,
            batch_size,
            rows_per_step,
        )

    def leave_out(self, first: int, end: int) -> None:
        """Where the next step would begin in the global windows first .. end - 1, it begins at `end` instead."""
        self.left_out = [*self.left_out, [first, end]]

    def state_dict(self) -> dict:
        """{"windows": place in the order of global windows, "left_out": [[first, end], ...]}."""
        return {"windows": self.windows, "left_out": self.left_out}

    def load_state_dict(self, state: dict) -> None:
        """Go on behind that many windows."""
        self.windows, self.left_out = int(state["windows"]), state.get("left_out", [])

    def _places(self, first: int, n: int) -> np.ndarray:
        """Window numbers (n,) of the global windows first .. first + n - 1, from a stretch of the order that is kept for the next call."""
        stretch = first // AT_ONCE
        if self.placed[0] != stretch:
            n_windows, g = self.n_windows, np.arange(stretch * AT_ONCE, (stretch + 1) * AT_ONCE)
            parts = [
                (int(e), g[g // n_windows == e] % n_windows) for e in np.unique(g // n_windows)
            ]
            self.placed = (
                stretch,
                np.concatenate([shuffled(places, n_windows, self.seed, e) for e, places in parts]),
            )
        here = self.placed[1][first - stretch * AT_ONCE :][:n]
        return (
            here
            if len(here) == n
            else np.concatenate([here, self._places(first + len(here), n - len(here))])
        )

    def rows(self, first: int, n: int) -> np.ndarray:
        """Global windows first .. first + n - 1: (n, T + 1) int64. Raises OSError where they differ from their hash."""
        windows = self._places(first, n)
        if len(self.views) == 1:
            return self._read(0, windows)
        files, out = (
            np.searchsorted(self.ends, windows, side="right"),
            np.empty((n, self.T + 1), dtype=np.int64),
        )
        for file in set(files.tolist()):
            rows = files == file
            out[rows] = self._read(file, windows[rows] - (int(self.ends[file - 1]) if file else 0))
        return out

    def _read(self, file: int, numbers: np.ndarray) -> np.ndarray:
        self.shards.check(file, (numbers * self.T).tolist(), self.T + 1)
        return self.views[file][numbers].astype(np.int64)

    def __iter__(self):
        if not self.n_windows:
            raise ValueError(
                f"{self.shards.folder}: {len(self.shards):,} training tokens are less than one row of {self.T}"
            )
        while True:
            B, first = self.batch_size, self.windows
            for start, end in self.left_out:  # in the order in which they were met
                first = end if start <= first < end else first
            mine = range(self.rank, self.rows_per_step // B, self.world)
            for m in mine:
                if m == mine[-1]:
                    self.windows = first + self.rows_per_step
                yield _batch(self.rows(first + m * B, B), self.vocab_size, self.shards.folder)


def val_batches(shards, T: int, batch_size: int, vocab_size: int, max_tokens: int | None = None):
    """
    All of the validation text in order, {"inputs", "targets"} of (B, T) int64 each; what is missing in a row, or in the
    last batch, has target -100. Every batch has the same shape, so that a compiled model is not compiled anew.
    max_tokens ends it after that many targets, always the same ones.
    """
    rows, left = [], max_tokens if max_tokens is not None else len(shards)
    for shard, tokens in enumerate(shards.tokens):
        for start in range(0, len(tokens) - 1, T):
            n = min(T, len(tokens) - 1 - start, left)
            if n > 0:
                row = np.full(T + 1, -1, dtype=np.int64)
                row[: n + 1] = shards.read(shard, start, start + n + 1)
                rows.append(row)
                left -= n
            if len(rows) == batch_size:
                yield _ragged_batch(rows, vocab_size, shards.folder)
                rows = []
    if rows:
        rows += [np.full(T + 1, -1, dtype=np.int64)] * (batch_size - len(rows))
        yield _ragged_batch(rows, vocab_size, shards.folder)


def _batch(rows: np.ndarray, vocab_size: int, where) -> dict:
    """{"inputs", "targets"} (B, T) of rows (B, T + 1). Raises ValueError for an id that the vocabulary does not have."""
    if rows.max() >= vocab_size:
        raise ValueError(
            f"{where}: holds token {rows.max()}, the tokenizer has {vocab_size:,}; it was made with another --tokenizer"
        )
    return {
        "inputs": torch.from_numpy(rows[:, :-1]),
        "targets": torch.from_numpy(rows[:, 1:]),
    }  # numpy slices in a tenth of torch's time


def _ragged_batch(rows: list[np.ndarray], vocab_size: int, where) -> dict:
    """The same of rows in which -1 marks what is missing."""
    batch = _batch(np.stack(rows), vocab_size, where)
    return {
        "inputs": batch["inputs"].clamp(min=0),
        "targets": batch["targets"].where(batch["targets"] >= 0, -100),
    }


def cut(batch: dict, n: int) -> list[dict]:
    """A batch in n parts, by rows; in as many as it has rows where these are fewer."""
    parts = {name: t.tensor_split(min(n, len(t))) for name, t in batch.items()}
    return [dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True)]


class Prefetch:
    """
    Batches of an iterable with `state_dict`, made ready in a thread and moved to the device while the last one is used.

    Iterating gives (batch on the device, number of targets in it, state behind it). What the thread raises is raised
    here. A context manager; `close()` ends it too.
    """

    def __init__(self, batches, device, depth: int = 4):
        self.device, self.queue, self.stopped = device, queue.Queue(depth), threading.Event()
        self.thread = threading.Thread(target=self._work, args=(batches,), daemon=True)
        self.thread.start()

    def _work(self, batches) -> None:
        pin = self.device.type == "cuda"  # a copy from pinned memory runs beside the computation
        try:
            if pin:
                torch.cuda.set_device(self.device)  # a new thread begins with GPU 0
            for batch in batches:
                if self.stopped.is_set():
                    return
                n_targets = int(
                    (batch["targets"] != -100).sum()
                )  # counted here: on the device it would have to wait
                ready = {
                    k: v.contiguous().pin_memory() if pin else v.contiguous()
                    for k, v in batch.items()
                }
                self._put((ready, n_targets, batches.state_dict()))
        except Exception as e:  # noqa: BLE001  whatever it is, the training loop raises it
            self._put(e)

    def _put(self, item) -> None:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def __iter__(self):
        while True:
            item = self.queue.get()
            if isinstance(item, Exception):
                raise item
            batch, n_targets, state = item
            yield (
                {k: v.to(self.device, non_blocking=True) for k, v in batch.items()},
                n_targets,
                state,
            )

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self.stopped.set()
        self.thread.join(timeout=5)
