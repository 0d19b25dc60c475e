"""
Several runs beside each other: which settings differ, what came out, and their losses as curves to be drawn.

Reads run folders of both trainers, also while they are being written. A run of a million steps is read line by line and kept
as two thousand points.
"""

from __future__ import annotations

import array
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from parts.base.files import read_json
from parts.base.units import format_duration
from parts.training.metrics import read_metrics
from parts.training.plan import count_parameters

MOST_RUNS = 8  # more curves are no longer told apart by their colours
MOST_POINTS = 2000  # of one curve
SPEED_STEPS = 50  # tokens_per_s of a record is that of so many steps, itself the last of them
NOT_SETTINGS = (
    "run_name",
    "output_dir",
    "config",
)  # these differ in any two runs and change nothing
OF_ADVANCED = {
    "lr": "max_lr",
    "data_dir": "dataset_name",
}  # name in pretraining_simple.py -> the same in pretraining_advanced.py


class Curve:
    """(step, tokens or None, loss) points; from MOST_POINTS on each stands for the mean of 2, 4, 8, ... of those that were added."""

    def __init__(self):
        self.points, self.each, self.waiting = (
            [],
            1,
            [],
        )  # of `each` points that become one, those that are there

    def add(self, step: int, tokens: int | None, loss: float) -> None:
        """One more loss. Its place is kept exactly; a mean stands at the place of its last loss."""
        self.waiting.append(loss)
        if len(self.waiting) < self.each:
            return
        self.points.append((step, tokens, sum(self.waiting) / self.each))
        self.waiting = []
        if len(self.points) == 2 * MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self.each = [(*b[:2], (a[2] + b[2]) / 2) for a, b in pairs], 2 * self.each


class Run:
    """
    What is known of one run: `settings` {name: JSON value}, `figures` {label: text}, the curves
    `train` and `val`.

    folder: of either trainer; records: those of its metrics.jsonl, in order. Raises ValueError or
    FileNotFoundError if the folder holds no run, or one without records.
    """

    def __init__(self, folder, records):
        facts = _facts(Path(folder))
        self.name, self.script, self.settings = str(folder), _script(facts), _settings(facts)
        self.train, self.val = Curve(), Curve()
        self.tokens, self.seconds, self.memory_gib = 0, 0.0, 0.0
        self.step = self.last_loss = self.best = self.tokens_per_s = None
        self._read(records)
        if self.step is None:
            raise ValueError(
                f"--compare: {folder} has no records in metrics.jsonl; wait for its first step, or leave it out"
            )
        n = _n_parameters(_model(facts))
        best = self.best or {}
        self.figures = {
            "parameters": f"{n:,}" if n else "-",
            "steps": f"{self.step:,}",
            "tokens": f"{self.tokens:,}" if self.tokens else "-",
            "best validation loss": f"{best['val_loss']:.4f}" if best else "-",
            "  at step": f"{best['step']:,}" if best else "-",
            "  bits per byte": f"{best['bits']:.4f}" if best.get("bits") else "-",
            "last training loss": f"{self.last_loss:.4f}" if self.last_loss is not None else "-",
            "tokens/s (median)": f"{self.tokens_per_s:,.0f}" if self.tokens_per_s else "-",
            "time in training steps": format_duration(self.seconds) if self.tokens_per_s else "-",
            "highest memory, GiB": f"{self.memory_gib:.2f}" if self.memory_gib else "-",
        }

    def _read(self, records) -> None:
        """Fill in curves and figures, one record at a time."""
        rates, seconds, before = array.array("d"), [0.0] * SPEED_STEPS, None
        for r in records:
            step, tokens, train, val, bits, rate, gib = (_number(r, name) for name in READ)
            if step is None:
                continue
            if (
                tokens is None
            ):  # an evaluation in a record of its own; before the first step there were none
                tokens = self.tokens if step == self.step else None if step else 0
            self.step, self.tokens = step, tokens or self.tokens
            if train is not None:
                self.last_loss = train
                self.train.add(step, tokens, train)
            if val is not None:
                self.val.add(step, tokens, val)
                if self.best is None or val < self.best["val_loss"]:
                    self.best = {"step": step, "val_loss": val, "bits": bits}
            if rate and tokens:
                # The rates of the last step, of 50 steps before it, of 100, ... are of different steps, and of all of them together.
                # Which step is the last is not known yet, so each of the fifty rows has its sum.
                before = before or [tokens - tokens // max(step, 1)] * SPEED_STEPS
                row = len(rates) % SPEED_STEPS
                seconds[row] += max(tokens - before[row], 0) / rate
                before[row], self.seconds = tokens, seconds[row]
                rates.append(rate)
            self.memory_gib = max(self.memory_gib, gib or 0)
        self.tokens_per_s = float(np.median(np.frombuffer(rates))) if rates else None


GPT_SETTINGS = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "tied"}
READ = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "tokens_per_s",
    "memory_gib",
)  # of a record


def compare(folders) -> tuple[str, list, str]:
    """
    (table of the runs in these folders, their curves for draw_runs, the label of its x axis).

    Raises ValueError or FileNotFoundError for runs that cannot be compared.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ValueError(
            f"--compare: {len(folders)} given; give 2 to {MOST_RUNS} run folders, such as runs/a runs/b"
        )
    places = [Path(folder).resolve() for folder in folders]
    if twice := [
        str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1
    ]:
        raise ValueError(f"--compare: {' and '.join(twice)} are the same run; give each once")
    runs = [Run(folder, read_metrics(folder)) for folder in folders]
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        for run, name in zip(runs, names, strict=True):
            run.name = name
    by_tokens = all(run.tokens for run in runs)
    curves = [
        (run.name, *(_xy(curve, by_tokens) for curve in (run.train, run.val))) for run in runs
    ]
    return table(runs), curves, "tokens seen" if by_tokens else "optimizer steps"


def table(runs: list[Run]) -> str:
    """One row for each setting that differs, one for each figure, one column for each run; below it what one has to know to read it."""
    rows, notes = [("", *(run.name for run in runs))], []
    different = differences(runs)
    rows += [(name, *values) for name, values in different.items()] or [
        ("no setting differs", *[""] * len(runs))
    ]
    rows += [
        ("",) * (len(runs) + 1),
        *((label, *(run.figures[label] for run in runs)) for label in runs[0].figures),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    if len({run.script for run in runs}) > 1:
        notes.append(
            "The trainers differ: a setting that only one of them has is told where it differs between its own runs."
        )
    if {"tokenizer", "tokenizer (hash)", "vocab_size"} & different.keys():
        notes.append(
            "The tokenizers differ, so a token is not the same amount of text: compare bits per byte, not losses."
        )
    if {
        "text (hash)",
        "data_dir",
        "dataset_name",
        "dataset_subset",
        "val_share",
        "eval_tokens",
    } & different.keys():
        notes.append("The texts may differ, and so may what validation is measured on.")
    if any("-" in run.figures.values() for run in runs):
        notes.append("-: not in the records (pretraining_simple.py writes no speed and no memory).")
    return "\n".join(lines + [""] * bool(notes) + notes)


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """
    {setting: its value in each run, "-" where it has none} of all that differ.

    A setting that only one of the trainers has is told where it differs between runs of that trainer.
    """
    scripts = {run.script for run in runs}
    settings = [run.settings for run in runs]
    if len(scripts) > 1:
        settings = [
            {OF_ADVANCED.get(name, name): value for name, value in values.items()}
            for values in settings
        ]
    different = {}
    for name in dict.fromkeys(name for values in settings for name in values):
        knowing = {run.script for run, values in zip(runs, settings, strict=True) if name in values}
        texts = [_text(values[name]) if name in values else "-" for values in settings]
        if len({text for text, run in zip(texts, runs, strict=True) if run.script in knowing}) > 1:
            different[name] = [_short(text) for text in texts]
    return different


def _facts(folder: Path) -> dict:
    """What run.json holds. Raises ValueError or FileNotFoundError."""
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"--compare: {folder}: has no run.json, so it is not a run; "
            "give run folders such as runs/simple"
        )
    if not path.is_file() or not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"--compare: {folder} has no records in metrics.jsonl; wait for its first step, "
            "or leave it out"
        )
    try:
        facts = read_json(path, "leave this run out")
    except ValueError as e:
        raise ValueError(f"--compare: {e}") from e
    if not isinstance(facts.get("config"), dict):
        raise ValueError(f"--compare: {path}: holds no configuration of a run; leave this run out")
    return facts


def _n_parameters(model: dict) -> int | None:
    """Parameters of a GPT of this configuration; None if it is not one."""
    if model.keys() - GPT_SETTINGS:
        return None  # of another family, whose settings only look alike
    try:
        return count_parameters(SimpleNamespace(**{"tied": True, **model}))
    except (AttributeError, TypeError):
        return None


def _model(facts: dict) -> dict:
    found = facts.get(
        "model", facts.get("model_config")
    )  # of pretraining_simple.py, of pretraining_advanced.py
    return found if isinstance(found, dict) else {}


def _script(facts: dict) -> str:
    """The file name of the script in the line that started the run."""
    launch = facts.get("launch", facts.get("command"))
    try:
        words = (
            shlex.split(launch)
            if isinstance(launch, str)
            else [w for w in launch or () if isinstance(w, str)]
        )
    except (TypeError, ValueError):
        words = []
    return next((Path(word).name for word in words if word.endswith(".py")), "-")


def _settings(facts: dict) -> dict:
    """Every setting under one name: the flags, the model's shape in place of the flags that left it open, and what the run ran on."""
    versions = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
    # The context is a flag already; only one of the trainers keeps hashes of its text and its tokenizer.
    found = {
        "script": _script(facts),
        **{k: v for k, v in facts["config"].items() if k not in NOT_SETTINGS},
    }
    found |= {
        k: v for k, v in _model(facts).items() if k != "block_size" or "context_length" not in found
    }
    more = {
        "processes": facts.get("processes"),
        "machine": facts.get("device"),
        "commit": facts.get("git_commit"),
    }
    if "model_config" in facts:
        more |= {"text (hash)": facts.get("data"), "tokenizer (hash)": facts.get("tokenizer")}
    more = {
        k: v[:12] if isinstance(v, str) and k != "machine" else v for k, v in more.items()
    }  # of a hash as much as tells it apart
    more["torch"] = versions.get("torch", facts.get("torch"))
    return found | {name: value for name, value in more.items() if value is not None}


def _text(value) -> str:
    """A value on one line; what a terminal would obey is spelled out, and 0.1 * 3e-3 is 0.0003."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str) and value.isprintable() or value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value)


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:12]}...{text[-17:]}"


def _number(record: dict, name: str):
    """The number under this name; None where it is missing, no number, not finite, or beyond what a picture can show."""
    value = record.get(name)
    return value if type(value) in (int, float) and -1e15 < value < 1e15 else None


def _xy(curve: Curve, by_tokens: bool) -> tuple[list, list]:
    points = [(tokens if by_tokens else step, loss) for step, tokens, loss in curve.points]
    points = [(x, loss) for x, loss in points if x is not None]
    return [x for x, _ in points], [loss for _, loss in points]
