"""
Several runs side by side: the settings that differ, the results, and their losses as curves.

    text, curves, xlabel = compare(["runs/a", "runs/b"])

Reads run folders of both trainers, also while a run is writing them. A run of a million steps is
read line by line and kept as two to four thousand points.
"""

from __future__ import annotations

import array
import json
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np

from parts.base.files import read_json
from parts.base.units import format_duration
from parts.model.families import FAMILIES
from parts.training.metrics import read_metrics
from parts.training.plan import count_parameters

MOST_RUNS = 8  # the colours of more curves cannot be told apart
MOST_POINTS = 2000  # of a curve, before each becomes a mean
SPEED_STEPS = 50  # the tokens_per_s of a record is that of its last 50 steps
NOT_SETTINGS = ("run_name", "output_dir", "config")  # always differ, and change nothing
OF_ADVANCED = {"lr": "max_lr", "data_dir": "dataset_name"}  # names: simple trainer -> advanced
OF_TOKENIZER = {"tokenizer", "tokenizer (hash)", "vocab_size"}
OF_TEXT = {"text (hash)", "data_dir", "dataset_name", "dataset_subset", "val_share", "eval_tokens"}


class Curve:
    """
    (step, tokens or None, loss) points of a run.

    From 2 * MOST_POINTS on, each point is the mean of 2, 4, 8, ... of the losses that were added.
    """

    def __init__(self):
        self.points = []
        self.each = 1  # losses that become one point
        self.waiting = []  # losses of the next point

    def add(self, step: int, tokens: int | None, loss: float) -> None:
        """Add a loss. A mean is placed where its last loss is."""
        self.waiting.append(loss)
        if len(self.waiting) < self.each:
            return
        self.points.append((step, tokens, sum(self.waiting) / self.each))
        self.waiting = []
        if len(self.points) == 2 * MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(*b[:2], (a[2] + b[2]) / 2) for a, b in pairs]
            self.each *= 2


class Run:
    """
    One run: `settings` {name: JSON value}, `figures` {label: text}, the curves `train` and `val`.

    folder: of either trainer; records: those of its metrics.jsonl, in order. Raises ValueError or
    FileNotFoundError if the folder is not that of a run, or the run has no records yet.
    """

    def __init__(self, folder, records):
        facts = _facts(Path(folder))
        self.name = str(folder)
        self.script = _script(facts)
        self.settings = _settings(facts)
        self.train, self.val = Curve(), Curve()
        self.tokens, self.seconds, self.memory_gib = 0, 0.0, 0.0
        self.step = self.last_loss = self.best = self.tokens_per_s = None
        self._read(records)
        if self.step is None:
            raise ValueError(_no_records(folder))
        best = self.best or {}
        self.figures = {
            "parameters": _n_parameters(_model(facts)),
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
            step, tokens, train, val = (_number(r, k) for k in READ[:4])
            bits, rate, gib = (_number(r, k) for k in READ[4:])
            if step is None:
                continue
            if tokens is None and step == self.step:  # an evaluation in a record of its own
                tokens = self.tokens
            elif tokens is None and step == 0:
                tokens = 0
            self.step = step
            self.tokens = tokens or self.tokens
            if train is not None:
                self.last_loss = train
                self.train.add(step, tokens, train)
            if val is not None:
                self.val.add(step, tokens, val)
                if self.best is None or val < self.best["val_loss"]:
                    self.best = {"step": step, "val_loss": val, "bits": bits}
            if rate and tokens:
                # The rates of steps n, n - 50, n - 100, ... are of different steps, and together of
                # all. Which step is the last is not known yet, so each of the 50 rows has its sum.
                before = before or [tokens - tokens // max(step, 1)] * SPEED_STEPS
                row = len(rates) % SPEED_STEPS
                seconds[row] += max(tokens - before[row], 0) / rate
                before[row] = tokens
                self.seconds = seconds[row]
                rates.append(rate)
            self.memory_gib = max(self.memory_gib, gib or 0)
        self.tokens_per_s = float(np.median(np.frombuffer(rates))) if rates else None


# what is read of a record
READ = ("step", "tokens", "train_loss", "val_loss")
READ += ("val_bits_per_byte", "tokens_per_s", "memory_gib")


def compare(folders) -> tuple[str, list, str]:
    """
    A table of the runs in these folders, their curves, and the label of the x axis.

    The curves are what parts.report.plots.draw_runs draws. Raises ValueError or FileNotFoundError
    if the runs cannot be compared.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ValueError(
            f"--compare: {len(folders)} given; "
            f"give 2 to {MOST_RUNS} run folders, such as runs/a runs/b"
        )
    paths = [Path(folder).resolve() for folder in folders]
    twice = [str(f) for f, path in zip(folders, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise ValueError(f"--compare: {' and '.join(twice)} are the same run; give each once")
    runs = [Run(folder, read_metrics(folder)) for folder in folders]
    if len({path.name for path in paths}) == len(paths):
        for run, path in zip(runs, paths, strict=True):
            run.name = path.name
    by_tokens = all(run.tokens for run in runs)
    curves = [(run.name, _xy(run.train, by_tokens), _xy(run.val, by_tokens)) for run in runs]
    return table(runs), curves, "tokens seen" if by_tokens else "optimizer steps"


def table(runs: list[Run]) -> str:
    """
    One column for each run, one row for each setting that differs and for each figure.

    Below them are notes, if a difference limits what can be compared.
    """
    different = differences(runs)
    blank = ("",) * (len(runs) + 1)
    rows = [("", *(run.name for run in runs))]
    rows += [(name, *values) for name, values in different.items()]
    if not different:
        rows.append(("no setting differs", *blank[1:]))
    rows.append(blank)
    rows += [(label, *(run.figures[label] for run in runs)) for label in runs[0].figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values in rows:
        columns = [name.ljust(widths[0]), *map(str.rjust, values, widths[1:])]
        lines.append("  ".join(columns).rstrip())
    notes = []
    if len({run.script for run in runs}) > 1:
        notes.append(
            "The trainers differ: a setting that only one of them has is shown if it differs "
            "between runs of that trainer."
        )
    if OF_TOKENIZER & different.keys():
        notes.append(
            "The tokenizers differ, so a token is not the same amount of text: compare bits per "
            "byte, not losses."
        )
    if OF_TEXT & different.keys():
        notes.append("The texts may differ, and so may what validation is measured on.")
    if any("-" in run.figures.values() for run in runs):
        notes.append("-: not in the records (pretraining_simple.py writes no speed and no memory).")
    return "\n".join([*lines, "", *notes] if notes else lines)


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """
    {setting: its value in each run, "-" if it has none} of all settings that differ.

    One that only one of the trainers has is included if it differs between runs of that trainer.
    """
    settings = [run.settings for run in runs]
    if len({run.script for run in runs}) > 1:
        settings = [{OF_ADVANCED.get(k, k): v for k, v in values.items()} for values in settings]
    different = {}
    for name in dict.fromkeys(name for values in settings for name in values):
        texts = [_text(values[name]) if name in values else "-" for values in settings]
        having = {run.script for run, values in zip(runs, settings, strict=True) if name in values}
        of_these = {t for t, run in zip(texts, runs, strict=True) if run.script in having}
        if len(of_these) > 1:
            different[name] = [_short(text) for text in texts]
    return different


def _no_records(folder) -> str:
    return (
        f"--compare: {folder} has no records in metrics.jsonl; "
        "wait for its first step, or leave it out"
    )


def _facts(folder: Path) -> dict:
    """What run.json holds. Raises ValueError or FileNotFoundError."""
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"--compare: {folder}: has no run.json, so it is not a run; "
            "give run folders such as runs/simple"
        )
    if not (folder / "metrics.jsonl").is_file():  # reading a pipe would wait forever
        raise ValueError(_no_records(folder))
    facts = read_json(path, "leave this run out of --compare")
    if not isinstance(facts.get("config"), dict):
        raise ValueError(f"--compare: {path}: holds no configuration of a run; leave this run out")
    return facts


def _model(facts: dict) -> dict:
    """The shape of the model; its key in run.json differs between the trainers."""
    found = facts.get("model", facts.get("model_config"))
    return found if isinstance(found, dict) else {}


def _n_parameters(shape: dict) -> str:
    """Parameters of a model of this shape; "-" for that of a recipe, which has other keys."""
    family = FAMILIES["llama" if "n_kv_head" in shape else "gpt"]
    known = {field.name for field in fields(family.config)}
    if shape.keys() - known or known - shape.keys() - {"dropout", "tied"}:
        return "-"
    try:
        return f"{count_parameters(family.config(**shape)):,}"
    except (TypeError, ValueError):  # not numbers, or more digits than Python writes
        return "-"


def _script(facts: dict) -> str:
    """The file name of the script that the command of the run started, "-" if there is none."""
    launch = facts.get("launch", facts.get("command"))
    try:
        words = shlex.split(launch) if isinstance(launch, str) else list(launch or ())
    except (TypeError, ValueError):
        words = []
    names = [Path(w).name for w in words if isinstance(w, str) and w.endswith(".py")]
    return names[0] if names else "-"


def _settings(facts: dict) -> dict:
    """
    Every setting by name: the flags, the shape of the model, what the run ran on.

    The shape replaces the flags that left it open.
    """
    found = {"script": _script(facts)}
    found |= {k: v for k, v in facts["config"].items() if k not in NOT_SETTINGS}
    shape = dict(_model(facts))
    if "context_length" in found:  # the same number as the flag
        shape.pop("block_size", None)
    found |= shape
    versions = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
    hashes = {"commit": facts.get("git_commit")}
    if "model_config" in facts:  # only this trainer records hashes of text and tokenizer
        hashes |= {"text (hash)": facts.get("data"), "tokenizer (hash)": facts.get("tokenizer")}
    more = {"processes": facts.get("processes"), "machine": facts.get("device")}
    more |= {name: v[:12] if isinstance(v, str) else v for name, v in hashes.items()}
    more |= {"torch": versions.get("torch", facts.get("torch"))}
    return found | {name: value for name, value in more.items() if value is not None}


def _text(value) -> str:
    """A value on one line, without control characters; 0.1 * 3e-3 is 0.0003."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str) and value.isprintable() or value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value)


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:12]}...{text[-17:]}"


def _number(record: dict, name: str):
    """The number of this name; None if it is missing, not a number, or too large for a picture."""
    value = record.get(name)
    return value if type(value) in (int, float) and -1e15 < value < 1e15 else None


def _xy(curve: Curve, by_tokens: bool) -> tuple[list, list]:
    """(x, losses) of a curve, without the points that have no x."""
    points = [(tokens if by_tokens else step, loss) for step, tokens, loss in curve.points]
    points = [(x, loss) for x, loss in points if x is not None]
    return [x for x, _ in points], [loss for _, loss in points]
