"""
Decides which steps are not applied, and when a run rolls back to a checkpoint.

A step whose loss or gradient is not finite is skipped on all ranks and counted. After
`max_bad_steps` of them in a row the weights are at fault, not one batch: the run rolls back to its
last good checkpoint and skips the rows of those steps. With `spike_zscore` (0: off) a loss that
many standard deviations above the mean of the last `spike_window` is bad too. Nothing here depends
on the clock, so a run that is killed and resumed decides the same.
"""

from __future__ import annotations

import math
from collections import deque

LEAST_STD = 1e-3  # nats; otherwise each ripple of a loss that hardly moves would be a spike


class Guard:
    """Counts the bad steps of a run; the same on every rank, as loss and gradient norm are."""

    def __init__(self, max_bad_steps: int, spike_zscore: float, spike_window: int):
        self.max_bad_steps = max_bad_steps
        self.spike_zscore = spike_zscore
        self.recent = deque(maxlen=spike_window)  # losses of the last applied steps
        self.bad = 0  # bad steps in a row
        self.first = 0  # rows consumed before the first of them

    def objection(self, loss: float) -> str | None:
        """Why a step with this mean loss must not be applied; None if it may be."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        n = len(self.recent)
        if self.spike_zscore and n == self.recent.maxlen:
            mean = math.fsum(self.recent) / n
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in self.recent) / n)
            z = (loss - mean) / max(std, LEAST_STD)
            if z > self.spike_zscore:
                return f"the loss {loss:.3f} is {z:.1f} standard deviations above the last {n}"
        return None

    def note(self, why: str | None, loss: float, rows_before: int) -> bool:
        """
        Count a step; returns whether the run must roll back.

        why: the reason if it was skipped, None if it was applied; rows_before: rows consumed before
        the step.
        """
        if why is None:
            self.bad = 0
            if self.spike_zscore:
                self.recent.append(loss)
            return False
        if self.bad == 0:
            self.first = rows_before
        self.bad += 1
        return self.bad >= self.max_bad_steps

    def state_dict(self) -> dict:
        """{"bad", "first", "recent"}: JSON values."""
        return {"bad": self.bad, "first": self.first, "recent": list(self.recent)}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` returned."""
        self.bad = state["bad"]
        self.first = state["first"]
        self.recent.clear()
        self.recent.extend(state["recent"])
