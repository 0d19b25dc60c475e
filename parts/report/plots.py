"""
Pictures of a run, drawn without a display.
"""

from __future__ import annotations

import io

import numpy as np


def draw_losses(
    steps, tokens_seen, train_losses, val_losses, xlabel: str, uniform_loss: float | None, kind: str
) -> bytes:
    """
    An image of training and validation loss over steps, with tokens on a second axis above.

    Four lists of one length; None in a loss list leaves that point out. uniform_loss: a dotted
    line, None for none. kind: png, pdf or svg.
    """
    from matplotlib.figure import Figure  # here: importing matplotlib takes a second
    from matplotlib.ticker import EngFormatter

    def points(losses) -> tuple[list, list]:
        known = [(s, loss) for s, loss in zip(steps, losses, strict=True) if loss is not None]
        return [s for s, _ in known], [loss for _, loss in known]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    x, y = points(train_losses)
    if x:
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="training, each batch")
        smooth = _smoothed(y)
        axes.plot(x, smooth, color="tab:blue", linewidth=2, label="training, smoothed")
    x, y = points(val_losses)
    if x:
        label = f"validation, last {y[-1]:.3f}"
        axes.plot(x, y, color="tab:orange", marker="o", markersize=4, label=label)
    if uniform_loss is not None:
        label = f"guessing evenly, {uniform_loss:.2f}"
        axes.axhline(uniform_loss, color="gray", linestyle=":", linewidth=1, label=label)
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    if len(steps) > 1 and steps[-1] > steps[0]:
        per_step = (tokens_seen[-1] - tokens_seen[0]) / (steps[-1] - steps[0])
        if per_step > 0:
            both_ways = (lambda s: s * per_step, lambda t: t / per_step)
            top = axes.secondary_xaxis("top", functions=both_ways)
            top.set_xlabel("tokens seen")
            top.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 far from 1e6
    return _image(figure, kind)


def draw_runs(curves, xlabel: str) -> bytes:
    """
    A PNG image with the losses of several runs.

    curves: one (name, (x, training losses), (x, validation losses)) for each run; xlabel says what
    x is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines, names = [], []
    dots = {"linestyle": ":", "marker": "o", "markersize": 6, "markeredgecolor": "white"}
    for i, (name, (x, y), (val_x, val_y)) in enumerate(curves):
        axes.plot(x, y, color=f"C{i}", alpha=0.2, linewidth=0.8)
        lines += axes.plot(x, _centred_mean(y), color=f"C{i}", linewidth=1.8)
        axes.plot(val_x, val_y, color=f"C{i}", linewidth=1, **dots)
        short = name if len(name) <= 40 else "..." + name[-37:]
        names.append(f" {short}")  # matplotlib leaves out a name that begins with _
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    title = "training, smoothed; dots: validation"
    legend = axes.legend(lines, names, title=title, title_fontsize="small", alignment="left")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ is a $
    return _image(figure, "png")


def _smoothed(losses) -> list[float]:
    """Exponential mean over about ten losses, unbiased at the start."""
    weight, total, smooth = 0.0, 0.0, []
    for loss in losses:
        weight = 0.9 * weight + 1
        total = 0.9 * total + loss
        smooth.append(total / weight)
    return smooth


def _centred_mean(losses) -> np.ndarray:
    """
    Each loss as the mean of the losses around it, which does not lag behind validation.

    The window is a fiftieth of the curve, at least ten points.
    """
    if not losses:
        return np.zeros(0)
    window = np.ones(min(max(10, len(losses) // 50), len(losses)))
    return np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")


def _image(figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
