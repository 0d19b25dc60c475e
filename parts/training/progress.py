"""
Where a run is: what its next step depends on, and what it has been asked to do.

Progress is saved in every checkpoint, flat in trainer_state.json. Requests belong to this attempt
of the run: signals, the time limit, data that cannot be read.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

from parts.cli.launch import StopRequest
from parts.training.guard import Guard
from parts.training.ranks import Ranks


@dataclass
class Progress:
    """
    Everything the next step depends on besides tensors; the same on every rank.

    A field that an older checkpoint does not have keeps its default.
    """

    data_cursor: dict  # RowBatches.state_dict() after the last step
    rows_per_step: int  # over all micro-batches and ranks
    step: int = 0  # optimizer steps
    tokens: int = 0  # targets trained on
    best: dict | None = None  # {"step", "val_loss"} of the best checkpoint
    split: int = 1  # parts that each micro-batch is cut into, because memory did not suffice
    lowest_val_loss: float | None = None  # of all evaluations so far
    stale_evaluations: int = 0  # evaluations since then, all without a lower loss
    evaluated_step: int | None = None  # step of the last evaluation that was counted

    @classmethod
    def of_checkpoint(cls, state: dict, cursor: dict, rows_per_step: int) -> Progress:
        """
        The progress in a checkpoint's state; that of a new run if `state` is empty.

        cursor: of the RowBatches, which were restored: an older state has other names in it.
        """
        known = {name: state[name] for name in cls.__dataclass_fields__ if name in state}
        return cls(**{**known, "data_cursor": cursor, "rows_per_step": rows_per_step})

    def advance(self, n_targets: float, cursor: dict) -> None:
        """Count a step, applied or skipped."""
        self.step += 1
        self.tokens += int(n_targets)
        self.data_cursor = cursor

    def consider_best(self, record: dict) -> None:
        """Take the record of a step that has a checkpoint as the best one if its loss is lowest."""
        val_loss = record.get("val_loss")
        if val_loss is None or not math.isfinite(val_loss):
            return
        if self.best is None or val_loss < self.best["val_loss"]:
            self.best = {"step": record["step"], "val_loss": val_loss}

    def count_evaluation(self, val_loss: float) -> None:
        """Count the evaluation of this step for --patience, once however often it is repeated."""
        if self.evaluated_step == self.step:
            return
        self.evaluated_step = self.step
        lowest = math.inf if self.lowest_val_loss is None else self.lowest_val_loss
        if val_loss < lowest:
            self.lowest_val_loss, self.stale_evaluations = val_loss, 0
        else:
            self.stale_evaluations += 1

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations found no lower validation loss."""
        return patience is not None and self.stale_evaluations >= patience

    def state(self, guard: Guard) -> dict:
        """JSON values for trainer_state.json."""
        return asdict(self) | {"guard": guard.state_dict()}


class Requests:
    """
    What this attempt was asked to do. Ranks agree on it once per step.

    stop: stop after this step and save; unreadable: why there are no further batches, else None. A
    context manager; inside it signals are requests.
    """

    def __init__(self, ranks: Ranks, max_minutes: float | None):
        self.ranks, self.max_minutes = ranks, max_minutes
        self.signals = StopRequest()
        self.stop = False
        self.unreadable = None
        self.began = time.monotonic()

    def __enter__(self) -> Requests:
        self.signals.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.signals.__exit__(*error)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C on this rank, else 75."""
        return self.signals.exit_code or 75

    def signalled(self) -> bool:
        """Whether a signal arrived at this rank."""
        return bool(self.signals)

    def pending(self) -> dict[str, float]:
        """{"stop"} as this rank sees it; the clock is that of rank 0."""
        minutes = (time.monotonic() - self.began) / 60
        master = self.ranks.rank == 0
        out_of_time = master and self.max_minutes is not None and minutes > self.max_minutes
        return {"stop": self.signalled() or out_of_time}

    def agree(self, everyone: list[dict]) -> None:
        """Take over what any rank asks for; `everyone` is `pending` of all ranks, gathered."""
        self.stop = self.stop or any(rank["stop"] for rank in everyone)

    def stop_unreadable(self, why: str) -> None:
        """Stop because the data cannot be read."""
        self.stop, self.unreadable = True, why
