"""
What the notebook shows: columns of numbers from the records of a run, figures and tables that can be read on white and on black.

Nothing here uses pyplot, so that no figure outlives the cell that drew it, and all text is escaped. A run is
{name: (n,) float64, nan where a step has none}, one row per step; see `columns`.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import EngFormatter

GREY = "#808080"  # of everything written in a figure
PANELS = {
    "train_loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_s": "speed (tokens/s)",
    "memory_gib": "memory, highest so far (GiB)",
}
NOISY = ("train_loss", "grad_norm", "tokens_per_s")  # drawn raw and smoothed
MOST_POINTS = 2000  # of a curve; more cannot be seen


def columns(records) -> dict[str, np.ndarray]:
    """
    The records {"step": ..., ...} of a run as columns, in the order of the steps.

    Records of one step become one row (the simple trainer writes its validation loss as a record of its own), and what is no
    number becomes nan. Raises ValueError where there is no record.
    """
    rows = {}
    for record in records:
        rows.setdefault(record["step"], {}).update(record)
    if not rows:
        raise ValueError("there is no record of a step yet")

    def number(value) -> float:
        return float(value) if isinstance(value, int | float) and abs(value) < 1e18 else math.nan

    return {
        name: np.array([number(rows[step].get(name)) for step in sorted(rows)])
        for name in ("step", "tokens", *PANELS)
    }


def place(run: dict, axis: str) -> np.ndarray:
    """
    Where each row stands on the axis "steps", "tokens" or "time" (seconds of training alone), (n,) float64.

    Raises ValueError where the records do not tell it: those of the simple trainer have no speed.
    """
    if axis == "steps":
        return run["step"]
    known = (
        np.isfinite(run["tokens"])
        & (np.isfinite(run["tokens_per_s"]) if axis == "time" else True)
        & (run["step"] > 0)
    )
    if not known.any():
        raise ValueError(
            f"its records have no {'tokens/s' if axis == 'time' else 'tokens'}, so it cannot be drawn against {axis}"
        )
    step, tokens = np.append(0, run["step"][known]), np.append(0, run["tokens"][known])
    seconds = np.append(
        0, np.cumsum(np.diff(tokens) / np.maximum(run["tokens_per_s"][known], 1e-9))
    )
    return np.interp(run["step"], step, tokens if axis == "tokens" else seconds)


def smoothed(y, n: int) -> np.ndarray:
    """Exponential mean of y (m,) over about n points, unbiased at the start."""
    keep, weight, total, out = 1 - 1 / n, 0.0, 0.0, []
    for value in y:
        weight, total = keep * weight + 1, keep * total + value
        out.append(total / weight)
    return np.array(out)


def drawable(text: str) -> str:
    """The text as matplotlib can draw it: no formula, a box for what its font lacks, no first `_`, which hides from a legend."""
    font = get_font(findfont("DejaVu Sans"))
    drawn = ("\\$" if c == "$" else c if font.get_char_index(ord(c)) else "\u25a1" for c in text)
    return " " * text.startswith("_") + "".join(drawn)


def draw_runs(
    runs: dict, axis: str, n_smooth: int, names=tuple(PANELS), mark: int | None = None
) -> Figure:
    """
    Curves of runs {name: run}, one panel for each of the columns `names`, raw and smoothed over n_smooth points.

    mark: a step, drawn as a vertical line. Raises ValueError, as `place` does.
    """
    wide, high = min(2, len(names)), math.ceil(len(names) / 2)
    figure = Figure(figsize=(5.5 * wide, 3 * high), layout="constrained")
    places, unit = {name: place(run, axis) for name, run in runs.items()}, "s"
    if axis == "time" and max(x.max() for x in places.values()) > 300:
        places, unit = {name: x / 60 for name, x in places.items()}, "min"
    xlabel = {
        "steps": "optimizer steps",
        "tokens": "tokens seen",
        "time": f"time in training ({unit})",
    }[axis]
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for panel, column in zip(panels, names, strict=False):
        panel.set(xlabel=xlabel, ylabel=PANELS[column])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 under a distant 1e6
        for i, (name, run) in enumerate(runs.items()):
            known, color = np.isfinite(run[column]), f"C{i % 10}"
            x, y = places[name][known], run[column][known]
            thin = slice(None, None, len(y) // MOST_POINTS + 1)
            if column in NOISY and n_smooth > 1:
                panel.plot(x[thin], y[thin], color=color, alpha=0.35, linewidth=1)
                y = smoothed(y, n_smooth)
            marker = "o" if column == "val_loss" or len(y) == 1 else None
            panel.plot(
                x[thin], y[thin], color=color, marker=marker, markersize=4, label=drawable(name)
            )
            if mark is not None:
                panel.axvline(
                    np.interp(mark, run["step"], places[name]), color=color, linestyle=":"
                )
        if column in ("tokens_per_s", "memory_gib"):
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter("{x:,g}")
    panels[0].legend(fontsize="small", framealpha=0)
    return figure


def draw_attention(maps, labels: list[str], layer: int, head: int) -> Figure:
    """One head's probabilities large, with the tokens beside them where they can be read; all heads of the layer small. maps (H, T, T)."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    norm = PowerNorm(0.5, 0, 1)  # most shares are small, and differ
    axes = left.subplots()
    left.colorbar(
        axes.imshow(maps[head], norm=norm), ax=axes, shrink=0.8, label="share of what is read"
    )
    axes.set(
        title=f"layer {layer}, head {head}", xlabel="token that is read", ylabel="token that reads"
    )
    if len(labels) <= 40:
        names = [drawable(label) for label in labels]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    n = math.ceil(math.sqrt(len(maps)))
    for i, small in enumerate(right.subplots(math.ceil(len(maps) / n), n, squeeze=False).flatten()):
        small.set_axis_off()
        if i < len(maps):
            small.imshow(maps[i], norm=norm)
            small.set_title(f"head {i}", fontsize=9)
    return figure


def draw_lines(curves: dict, strong: str, xlabel: str, ylabel: str) -> Figure:
    """Curves {name: (x, y)}, the one named `strong` before the others."""
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(curves.items()):
        first = name == strong
        axes.plot(
            x,
            y,
            color=f"C{i}",
            alpha=1 if first else 0.35,
            linewidth=2.5 if first else 1,
            label=drawable(name),
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small", framealpha=0)
    return figure


def draw_bars(bars: dict, xlabel: str) -> Figure:
    """Stacked horizontal bars {name of the bar: {name of the part: length}}, all with the same parts."""
    figure = Figure(figsize=(11, 0.8 + 0.45 * len(bars)), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(bars))
    for part in next(iter(bars.values())):
        lengths = np.array([parts[part] for parts in bars.values()])
        axes.barh([drawable(name) for name in bars], lengths, left=left, label=drawable(part))
        left += lengths
    axes.invert_yaxis()
    axes.set(xlabel=xlabel)
    axes.legend(fontsize="small", framealpha=0, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def as_html(figure: Figure, says: str) -> str:
    """An <img> without a background, all writing in it in a grey that can be read on white and on black; `says` describes it."""
    for axes in figure.axes:
        axes.tick_params(colors=GREY, which="both")
        if not axes.images and not axes.collections:
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
        texts = axes.get_legend().get_texts() if axes.get_legend() else []
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *texts):
            text.set_color(GREY)
        for spine in axes.spines.values():
            spine.set_color(GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(says)}" src="data:image/png;base64,{data}" style="max-width: 100%">'


# ---------------------------------------------------------------------------------------------------------- text


def samples_of(text: str) -> dict[int, str]:
    """{step: what the run wrote then} of a run's samples.txt, whose sections begin with `--- step N`."""
    heads = list(re.finditer(r"^--- step (\d{1,15})$", text, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {
        int(head[1]): text[head.end() : end].strip()
        for head, end in zip(heads, ends[: len(heads)], strict=True)
    }


def table(head, rows, shade=lambda i, j: 0.0) -> str:
    """Rows of text as a table; shade(row, column) in [0, 1], such as a probability, colours a cell."""
    cell = '<td style="padding: 1px 8px; white-space: pre; background: rgba(31, 119, 180, {:.2f})">{}</td>'
    lines = [
        "".join(
            cell.format(0.6 * shade(i, j) ** 0.5, html.escape(str(c))) for j, c in enumerate(row)
        )
        for i, row in enumerate(rows)
    ]
    top = "".join(
        f'<th style="padding: 1px 8px; text-align: left">{html.escape(str(c))}</th>' for c in head
    )
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def paragraph(text: str) -> str:
    """Text with its blanks and line ends; a long one can be scrolled."""
    return f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12em; overflow-y: auto">{html.escape(text)}</div>'


def surprise(pieces: list[tuple[str, str, float]]) -> str:
    """A text of pieces (text, its name, its loss in nats), the redder the higher the loss, which is told under the pointer."""
    span = '<span title="{}: {:.2f} nats" style="background: rgba(214, 39, 40, {:.2f})">{}</span>'
    spans = [
        span.format(html.escape(name), loss, min(loss / 12, 1), html.escape(text))
        for text, name, loss in pieces
    ]
    return f'<div style="white-space: pre-wrap; line-height: 1.7">{"".join(spans)}</div>'


def progress(name: str, n_steps: int, step: int, told: str) -> str:
    """A bar and a line about a training."""
    return f'<div><progress value="{step}" max="{n_steps}"></progress> <code>{html.escape(name)}</code>: {html.escape(told)}</div>'
