"""
What the notebook shows: columns of numbers from the records of a run, figures, tables.

All can be read on white and on black, and all text is escaped. Nothing here uses pyplot, so no
figure outlives the cell that drew it. A run is {name: (n,) float64, nan if a step has no such
number}, one row per step; see `columns`.
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

GREY = "#808080"  # of all writing in a figure
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

    Records of one step become one row (the simple trainer writes its validation loss as a record of
    its own); a value that is not a number becomes nan. Raises ValueError if there is no record.
    """
    by_step = {}
    for record in records:
        by_step.setdefault(record["step"], {}).update(record)
    if not by_step:
        raise ValueError("there is no record of a step yet")
    rows = [by_step[step] for step in sorted(by_step)]

    def number(value) -> float:
        return float(value) if isinstance(value, int | float) and abs(value) < 1e18 else math.nan

    names = ("step", "tokens", *PANELS)
    return {name: np.array([number(row.get(name)) for row in rows]) for name in names}


def place(run: dict, axis: str) -> np.ndarray:
    """
    Where each row is on the axis "steps", "tokens" or "time" (seconds of training), (n,) float64.

    Raises ValueError if the records do not say: those of the simple trainer have no speed.
    """
    if axis == "steps":
        return run["step"]
    known = np.isfinite(run["tokens"]) & (run["step"] > 0)
    if axis == "time":
        known &= np.isfinite(run["tokens_per_s"])
    if not known.any():
        missing = "tokens/s" if axis == "time" else "tokens"
        raise ValueError(f"its records have no {missing}, so it cannot be drawn against {axis}")
    step = np.append(0, run["step"][known])
    tokens = np.append(0, run["tokens"][known])
    if axis == "tokens":
        return np.interp(run["step"], step, tokens)
    rate = np.maximum(run["tokens_per_s"][known], 1e-9)
    seconds = np.append(0, np.cumsum(np.diff(tokens) / rate))
    return np.interp(run["step"], step, seconds)


def smoothed(y, n: int) -> np.ndarray:
    """Exponential mean of y (m,) over about n points, unbiased at the start."""
    keep = 1 - 1 / n
    weight, total, means = 0.0, 0.0, []
    for value in y:
        weight = keep * weight + 1
        total = keep * total + value
        means.append(total / weight)
    return np.array(means)


def drawable(text: str) -> str:
    """
    The text as matplotlib can draw it: no formulas, and a box for what its font lacks.

    A blank precedes a first `_`, which would hide it from a legend.
    """
    font = get_font(findfont("DejaVu Sans"))
    drawn = ("\\$" if c == "$" else c if font.get_char_index(ord(c)) else "\u25a1" for c in text)
    return " " * text.startswith("_") + "".join(drawn)


def draw_runs(
    runs: dict, axis: str, n_smooth: int, names=tuple(PANELS), mark: int | None = None
) -> Figure:
    """
    Curves of runs {name: run}, one panel for each of the columns `names`.

    Noisy ones are drawn raw and smoothed over n_smooth points. mark: a step, drawn as a vertical
    line. Raises ValueError, as `place` does.
    """
    n_columns, n_rows = min(2, len(names)), math.ceil(len(names) / 2)
    figure = Figure(figsize=(5.5 * n_columns, 3 * n_rows), layout="constrained")
    places = {name: place(run, axis) for name, run in runs.items()}
    xlabel = {"steps": "optimizer steps", "tokens": "tokens seen"}.get(axis)
    if axis == "time" and max(x.max() for x in places.values()) > 300:
        places = {name: x / 60 for name, x in places.items()}
        xlabel = "time in training (min)"
    elif axis == "time":
        xlabel = "time in training (s)"
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for panel, column in zip(panels, names, strict=False):
        panel.set(xlabel=xlabel, ylabel=PANELS[column])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 far from 1e6
        for i, (name, run) in enumerate(runs.items()):
            color = f"C{i % 10}"
            known = np.isfinite(run[column])
            x, y = places[name][known], run[column][known]
            thin = slice(None, None, len(y) // MOST_POINTS + 1)
            if column in NOISY and n_smooth > 1:
                panel.plot(x[thin], y[thin], color=color, alpha=0.35, linewidth=1)
                y = smoothed(y, n_smooth)
            marker = "o" if column == "val_loss" or len(y) == 1 else None
            style = {"color": color, "marker": marker, "markersize": 4}
            panel.plot(x[thin], y[thin], label=drawable(name), **style)
            if mark is not None:
                marked = np.interp(mark, run["step"], places[name])
                panel.axvline(marked, color=color, linestyle=":")
        if column in ("tokens_per_s", "memory_gib"):
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter("{x:,g}")
    panels[0].legend(fontsize="small", framealpha=0)
    return figure


def draw_attention(maps, labels: list[str], layer: int, head: int) -> Figure:
    """
    The probabilities of one head large, those of all heads of the layer small. maps (H, T, T).

    The tokens are written beside the large one if they are few enough to read.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    norm = PowerNorm(0.5, 0, 1)  # most shares are small, and differ
    axes = left.subplots()
    image = axes.imshow(maps[head], norm=norm)
    left.colorbar(image, ax=axes, shrink=0.8, label="share of what is read")
    axes.set(title=f"layer {layer}, head {head}")
    axes.set(xlabel="token that is read", ylabel="token that reads")
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
    """Curves {name: (x, y)}; the one named `strong` stands out."""
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(curves.items()):
        alpha, linewidth = (1, 2.5) if name == strong else (0.35, 1)
        style = {"color": f"C{i}", "alpha": alpha, "linewidth": linewidth}
        axes.plot(x, y, label=drawable(name), **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small", framealpha=0)
    return figure


def draw_bars(bars: dict, xlabel: str) -> Figure:
    """Stacked horizontal bars {bar: {part: length}}; all have the same parts."""
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
    """
    An <img> without a background; `says` describes it for those who cannot see it.

    All writing is in a grey that can be read on white and on black.
    """
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
    source = f'alt="{html.escape(says)}" src="data:image/png;base64,{data}"'
    return f'<img {source} style="max-width: 100%">'


# --------------------------------------------------------------------------------------------- text


def samples_of(text: str) -> dict[int, str]:
    """{step: sample} of a run's samples.txt, whose sections begin with `--- step N`."""
    heads = list(re.finditer(r"^--- step (\d{1,15})$", text, re.MULTILINE))
    samples = {}
    for i, head in enumerate(heads):
        end = heads[i + 1].start() if i + 1 < len(heads) else len(text)
        samples[int(head[1])] = text[head.end() : end].strip()
    return samples


def table(head, rows, shade=lambda i, j: 0.0) -> str:
    """Rows of text as a table; shade(row, column) in [0, 1], as a probability, colours a cell."""
    style = "padding: 1px 8px; white-space: pre; background: rgba(31, 119, 180, {:.2f})"
    cell = f'<td style="{style}">{{}}</td>'
    th = '<th style="padding: 1px 8px; text-align: left">{}</th>'
    lines = ["".join(th.format(html.escape(str(text))) for text in head)]
    for i, row in enumerate(rows):
        shades = [0.6 * shade(i, j) ** 0.5 for j in range(len(row))]
        texts = [html.escape(str(text)) for text in row]
        lines.append("".join(map(cell.format, shades, texts)))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def paragraph(text: str) -> str:
    """Text with its blanks and line ends; a long one can be scrolled."""
    style = "white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12em; overflow-y: auto"
    return f'<div style="{style}">{html.escape(text)}</div>'


def surprise(pieces: list[tuple[str, str, float]]) -> str:
    """
    A text of pieces (text, its name, its loss in nats), redder where the loss is higher.

    The pointer shows name and loss.
    """
    span = '<span title="{}: {:.2f} nats" style="background: rgba(214, 39, 40, {:.2f})">{}</span>'
    spans = []
    for text, name, loss in pieces:
        spans.append(span.format(html.escape(name), loss, min(loss / 12, 1), html.escape(text)))
    return f'<div style="white-space: pre-wrap; line-height: 1.7">{"".join(spans)}</div>'


def progress(name: str, n_steps: int, step: int, status: str) -> str:
    """A bar and a line about a training."""
    bar = f'<progress value="{step}" max="{n_steps}"></progress>'
    return f"<div>{bar} <code>{html.escape(name)}</code>: {html.escape(status)}</div>"
