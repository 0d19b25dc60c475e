"""
Which steps are not applied, and when the run has to go back: one bad batch or one flipped bit must not cost a month.

A step whose loss or gradient is not finite is left out on all ranks, and counted. After `max_bad_steps` of them in a row
the weights, rather than one batch, are taken for the cause: the run goes back to its last good checkpoint and leaves out
the windows of those steps. With `spike_zscore` the same holds for a loss that many standard deviations above the mean of
the last `spike_window` (off at 0). Nothing here depends on the clock, so a run that was killed decides the same again.
"""

from __future__ import annotations

import math
from collections import deque

LEAST_STD = 1e-3  # nats; a loss that hardly moves would otherwise make a spike of every ripple


class Guard:
    """Counts the bad steps of a run; the same on every rank, because loss and gradient norm are."""

    def __init__(self, max_bad_steps: int, spike_zscore: float, spike_window: int):
        self.max_bad_steps, self.spike_zscore = max_bad_steps, spike_zscore
        self.recent = deque(maxlen=spike_window)  # losses of the last applied steps
        self.bad, self.first = 0, 0  # bad steps in a row; the windows consumed before them

    def objection(self, loss: float) -> str | None:
        """Why a step with this mean loss must not be applied; None where it may."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.spike_zscore and len(self.recent) == self.recent.maxlen:
            mean = math.fsum(self.recent) / len(self.recent)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in self.recent) / len(self.recent))
            if (z := (loss - mean) / max(std, LEAST_STD)) > self.spike_zscore:
                return f"the loss {loss:.3f} is {z:.1f} standard deviations above the last {len(self.recent)}"
        return None

    def note(self, why: str | None, loss: float, windows_before: int) -> bool:
        """Count a step that was left out (`why`) or applied (None); true where the run has to go back."""
        if why is None:
            self.bad = 0
            if self.spike_zscore:
                self.recent.append(loss)
            return False
        if self.bad == 0:
            self.first = windows_before
        self.bad += 1
        return self.bad >= self.max_bad_steps

    def state_dict(self) -> dict:
        """{"bad", "first", "recent"}: JSON values."""
        return {"bad": self.bad, "first": self.first, "recent": list(self.recent)}

    def load_state_dict(self, state: dict) -> None:
        """What `state_dict` gave."""
        self.bad, self.first = state["bad"], state["first"]
        self.recent.clear()
        self.recent.extend(state["recent"])
