"""
Which rows of the text are in which batch: a pure function of (seed, epoch, index), without state.

    global row g = epoch * n_rows + k     ->  row shuffled(k) of that epoch
    step s takes the next `rows_per_step` global rows, cut into micro-batches, dealt to the ranks

So a checkpoint holds one integer, the rows consumed. Finding the place again costs the same at step
0 and at step 1,000,000, and any number of ranks, or rows per micro-batch, sees the same rows at the
same step.
"""

from __future__ import annotations

import queue
import threading

import numpy as np
import torch

STRETCH = 2**13  # rows whose places are computed together

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """A well-mixed uint64 for each uint64. Source: splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def stir(*numbers: int) -> int:
    """One 63-bit seed from several integers; changing any of them gives an unrelated seed."""
    state = np.zeros(1, dtype=np.uint64)
    for n in numbers:
        state = _mix(state + np.uint64(n % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return int(state[0]) >> 1


def shuffled(k, n: int, seed: int, epoch: int) -> np.ndarray:
    """
    Where each of the places k goes in a shuffle of range(n): int64 array of the same shape.

    Takes constant memory. A Feistel network of six rounds permutes the next even power of two; a
    result outside range(n) is permuted again until it is inside (Black and Rogaway 2002, "cycle
    walking"), so the whole is a permutation of range(n).
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


class RowBatches:
    """
    Endless steps of one rank: each a list of its micro-batches, {name: tensor with rows first}.

    A subclass calls __init__ with the rows of an epoch and their length, and has `batch(first, n)`.
    `share` says which part of each step is this rank's. `state_dict` is the place after the last
    step that was handed out.
    """

    def __init__(self, n_rows: int, tokens_per_row: int, seed: int):
        self.n_rows, self.tokens_per_row, self.seed = n_rows, tokens_per_row, seed
        self.consumed = 0  # global rows of the steps so far
        self.skipped = []  # [first, end) of global rows that no step takes
        self._stretch, self._rows_of_stretch = None, None
        self.share(0, 1, 1, 1)

    def batch(self, first: int, n: int) -> dict:
        """
        Global rows first .. first + n - 1 as {"targets": (n, ...), name: (n, ...)}.

        A pure function: it neither reads nor changes the place. Targets that are -100 are not
        predicted. `row_numbers` gives the shuffled order.
        """
        raise NotImplementedError

    def share(self, rank: int, world: int, batch_size: int, rows_per_step: int) -> None:
        """This rank takes micro-batches rank, rank + world, ... of each step."""
        self.rank, self.world = rank, world
        self.batch_size, self.rows_per_step = batch_size, rows_per_step

    def skip(self, first: int, end: int) -> None:
        """A step that would begin in the global rows first .. end - 1 begins at `end` instead."""
        self.skipped = [*self.skipped, [first, end]]

    def state_dict(self) -> dict:
        """{"rows": global rows consumed, "skipped": [[first, end], ...], "tokens_per_row"}."""
        cursor = {"rows": self.consumed, "skipped": self.skipped}
        return cursor | {"tokens_per_row": self.tokens_per_row}

    def load_state_dict(self, state: dict) -> None:
        """Continue after that many rows. Raises ValueError if the rows had another length."""
        state = _current_names(state)
        length = state.get("tokens_per_row") or self.tokens_per_row
        if length != self.tokens_per_row:
            raise ValueError(
                f"the checkpoint counts rows of {length} tokens, this run has rows of "
                f"{self.tokens_per_row}; give the same --context_length, or another --run_name"
            )
        self.consumed, self.skipped = int(state["rows"]), state["skipped"]

    def row_numbers(self, first: int, n: int) -> np.ndarray:
        """Row numbers (n,) int64 in 0 .. n_rows - 1 of the global rows first .. first + n - 1."""
        stretch = first // STRETCH
        if self._stretch != stretch:
            g = np.arange(stretch * STRETCH, (stretch + 1) * STRETCH)
            epochs = g // self.n_rows
            parts = [
                shuffled(g[epochs == epoch] % self.n_rows, self.n_rows, self.seed, int(epoch))
                for epoch in np.unique(epochs)
            ]
            self._stretch, self._rows_of_stretch = stretch, np.concatenate(parts)
        rows = self._rows_of_stretch[first - stretch * STRETCH :][:n]
        if len(rows) < n:
            rows = np.concatenate([rows, self.row_numbers(first + len(rows), n - len(rows))])
        return rows

    def __iter__(self):
        while True:
            first = self.consumed
            for start, end in self.skipped:  # in the order in which they were met
                first = end if start <= first < end else first
            B = self.batch_size
            mine = range(self.rank, self.rows_per_step // B, self.world)
            micro_batches = [self.batch(first + m * B, B) for m in mine]
            self.consumed = first + self.rows_per_step
            yield micro_batches


def _current_names(state: dict) -> dict:
    """A data cursor of an earlier version, {"windows", "left_out"}, under its present names."""
    if "windows" not in state:
        return state
    return {**state, "rows": state["windows"], "skipped": state.get("left_out", [])}


class TrainBatches(RowBatches):
    """
    Rows of token shards: micro-batches {"inputs", "targets"}, each (B, T) int64.

    shards: a Shards of training text. Every window of T tokens occurs once in every epoch; where a
    mask says that a token is no target, the target is -100. Raises ValueError if the text is
    shorter than one row, or has ids that are not in the vocabulary.
    """

    def __init__(self, shards, T: int, seed: int, vocab_size: int):
        self.shards, self.T, self.vocab_size = shards, T, vocab_size
        # windows up to the end of each file
        self.ends = np.cumsum([(max(len(t), 1) - 1) // T for t in shards.tokens])
        super().__init__(int(self.ends[-1]) if len(self.ends) else 0, T, seed)
        # each file as (windows, T + 1); a row begins with the last token of the one before it.
        # Nothing is copied.
        counts = np.diff(self.ends, prepend=0)
        self.views, self.mask_views = [
            [
                np.ndarray((n, T + 1), a.dtype, a, strides=(T * a.itemsize, a.itemsize))
                for n, a in zip(counts, arrays, strict=bool(arrays))
            ]
            for arrays in (shards.tokens, shards.masks)
        ]

    def batch(self, first: int, n: int) -> dict:
        """As RowBatches.batch. Raises OSError if the tokens differ from their hash."""
        if not self.n_rows:
            raise ValueError(
                f"{self.shards.folder}: {len(self.shards):,} training tokens are less than one row "
                f"of {self.T}; give more text, or a smaller --context_length"
            )
        windows = self.row_numbers(first, n)
        batch = _batch(self._rows(windows, self.views), self.vocab_size, self.shards.folder)
        if self.mask_views:
            is_target = torch.from_numpy(self._rows(windows, self.mask_views)[:, 1:] != 0)
            batch["targets"] = batch["targets"].where(is_target, -100)
        return batch

    def rows(self, first: int, n: int) -> np.ndarray:
        """Global rows first .. first + n - 1: (n, T + 1) int64. Raises OSError."""
        return self._rows(self.row_numbers(first, n), self.views)

    def _rows(self, windows: np.ndarray, views: list) -> np.ndarray:
        """Windows (n,) of tokens or masks: (n, T + 1) int64. Raises OSError."""
        n = len(windows)
        if len(views) == 1:
            return self._read(0, windows, views)
        files = np.searchsorted(self.ends, windows, side="right")
        out = np.empty((n, self.T + 1), dtype=np.int64)
        for file in set(files.tolist()):
            rows = files == file
            first_window = int(self.ends[file - 1]) if file else 0
            out[rows] = self._read(file, windows[rows] - first_window, views)
        return out

    def _read(self, file: int, numbers: np.ndarray, views: list) -> np.ndarray:
        self.shards.check(file, (numbers * self.T).tolist(), self.T + 1)
        return views[file][numbers].astype(np.int64)


def val_batches(shards, T: int, batch_size: int, vocab_size: int, max_tokens: int | None = None):
    """
    All of the validation text in order: {"inputs", "targets"}, each (B, T) int64.

    What is missing in a row, or in the last batch, has target -100. Every batch has the same
    shape, so that a compiled model is not compiled anew. max_tokens ends it after that many
    targets, always the same ones.
    """
    rows, is_target = [], []
    left = max_tokens if max_tokens is not None else len(shards)
    for shard, tokens in enumerate(shards.tokens):
        for start in range(0, len(tokens) - 1, T):
            n = min(T, len(tokens) - 1 - start, left)
            if n > 0:
                row = np.full(T + 1, -1, dtype=np.int64)
                row[: n + 1] = shards.read(shard, start, start + n + 1)
                rows.append(row)
                is_target.append(row >= 0)
                if shards.masks:
                    is_target[-1][: n + 1] = shards.masks[shard][start : start + n + 1] != 0
                left -= n
            if len(rows) == batch_size:
                yield _ragged_batch(rows, is_target, vocab_size, shards.folder)
                rows, is_target = [], []
    if rows:
        n_missing = batch_size - len(rows)
        rows += [np.full(T + 1, -1, dtype=np.int64)] * n_missing
        is_target += [np.zeros(T + 1, dtype=bool)] * n_missing
        yield _ragged_batch(rows, is_target, vocab_size, shards.folder)


def _batch(rows: np.ndarray, vocab_size: int, source) -> dict:
    """{"inputs", "targets"} (B, T) of rows (B, T + 1). Raises ValueError for an unknown id."""
    if rows.max() >= vocab_size:
        raise ValueError(
            f"{source}: has token {rows.max()}, but the tokenizer has {vocab_size:,} tokens; "
            "it was made with another --tokenizer"
        )
    # numpy slices in a tenth of torch's time
    return {"inputs": torch.from_numpy(rows[:, :-1]), "targets": torch.from_numpy(rows[:, 1:])}


def _ragged_batch(rows: list, is_target: list, vocab_size: int, source) -> dict:
    """The same of rows (T + 1,) that end with -1; is_target (T + 1,) bool each."""
    batch = _batch(np.stack(rows), vocab_size, source)
    targets = batch["targets"].where(torch.from_numpy(np.stack(is_target)[:, 1:]), -100)
    return {"inputs": batch["inputs"].clamp(min=0), "targets": targets}


class BatchError(ValueError):
    """A batch breaks the contract of a Job."""


def check_batch(batch, n_rows: int | None = None) -> None:
    """
    Raises BatchError unless a batch is {name: tensor} with "targets" and rows as first dimension.

    n_rows: how many there must be; None: as many as targets.
    """
    if not isinstance(batch, dict) or not isinstance(batch.get("targets"), torch.Tensor):
        names = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise BatchError(f"a batch has no tensor 'targets', only {names or 'nothing'}; add one")
    targets = batch["targets"]
    n_rows = n_rows or (len(targets) if targets.ndim else 0)
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.ndim or len(tensor) != n_rows:
            shape = (
                list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise BatchError(
                f"batch[{name!r}] has shape {shape}; its first dimension must be the {n_rows} rows"
            )


def cut(batch: dict, n: int) -> list[dict]:
    """A batch in n parts, by rows; in as many parts as it has rows if these are fewer."""
    parts = {name: t.tensor_split(min(n, len(t))) for name, t in batch.items()}
    return [dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True)]


class Prefetch:
    """
    Steps of a RowBatches, made ready in a thread and moved to the device while one is used.

    Iterating gives (micro-batches on the device, number of targets in them); `cursor` is the data
    cursor after them. What the thread raises is raised here. A context manager; `close()` ends it
    too.
    """

    def __init__(self, batches: RowBatches, device, depth: int = 2):
        self.device, self.queue, self.stopped = device, queue.Queue(depth), threading.Event()
        self.cursor = None
        self.thread = threading.Thread(target=self._work, args=(batches,), daemon=True)
        self.thread.start()

    def _work(self, batches) -> None:
        pin = self.device.type == "cuda"  # a copy from pinned memory runs beside the computation
        try:
            if pin:
                torch.cuda.set_device(self.device)  # a new thread begins with GPU 0
            for micro_batches in batches:
                if self.stopped.is_set():
                    return
                ready, n_targets = [], 0
                for batch in micro_batches:
                    check_batch(batch)
                    # counted here: on the device the count would have to be waited for
                    n_targets += int((batch["targets"] != -100).sum())
                    batch = {name: t.contiguous() for name, t in batch.items()}
                    if pin:
                        batch = {name: t.pin_memory() for name, t in batch.items()}
                    ready.append(batch)
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
        return self

    def __next__(self):
        item = self.queue.get()
        if isinstance(item, Exception):
            raise item
        micro_batches, n_targets, self.cursor = item
        moved = [
            {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}
            for batch in micro_batches
        ]
        return moved, n_targets

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self.stopped.set()
        self.thread.join(timeout=5)
