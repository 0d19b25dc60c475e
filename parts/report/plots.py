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
    An image (kind: png, pdf, svg) of training and validation loss over steps, tokens on a second axis above.

    Four lists of one length; None in a loss list leaves that point out. uniform_loss: a dotted line, None for none.
    """
    from matplotlib.figure import Figure  # here, because matplotlib costs every start a second
    from matplotlib.ticker import EngFormatter

    def points(losses):
        return zip(
            *[(s, loss) for s, loss in zip(steps, losses, strict=True) if loss is not None],
            strict=True,
        )

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if any(loss is not None for loss in train_losses):
        x, y = points(train_losses)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="training, each batch")
        weight, total, smooth = (
            0.0,
            0.0,
            [],
        )  # exponential mean over about 10 points, unbiased at the start
        for loss in y:
            weight, total = 0.9 * weight + 1, 0.9 * total + loss
            smooth.append(total / weight)
        axes.plot(x, smooth, color="tab:blue", linewidth=2, label="training, smoothed")
    if any(loss is not None for loss in val_losses):
        x, y = points(val_losses)
        axes.plot(
            x,
            y,
            color="tab:orange",
            marker="o",
            markersize=4,
            label=f"validation, last {y[-1]:.3f}",
        )
    if uniform_loss is not None:
        axes.axhline(
            uniform_loss,
            color="gray",
            linestyle=":",
            linewidth=1,
            label=f"guessing evenly, {uniform_loss:.2f}",
        )
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    if len(steps) > 1 and steps[-1] > steps[0]:
        per_step = (tokens_seen[-1] - tokens_seen[0]) / (steps[-1] - steps[0])
        if per_step > 0:
            top = axes.secondary_xaxis(
                "top", functions=(lambda s: s * per_step, lambda t: t / per_step)
            )
            top.set_xlabel("tokens seen")
            top.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 under a distant 1e6
    return _image(figure, kind)


def draw_runs(curves, xlabel: str) -> bytes:
    """
    A PNG image of several runs' losses over each other.

    curves: one (name, (x, training losses), (x, validation losses)) for each run; x has the meaning of xlabel.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, lines = figure.subplots(), []
    for i, (_, (x, y), (val_x, val_y)) in enumerate(curves):
        axes.plot(x, y, color=f"C{i}", alpha=0.2, linewidth=0.8)
        lines += axes.plot(x, _centred_mean(y), color=f"C{i}", linewidth=1.8)
        axes.plot(
            val_x,
            val_y,
            color=f"C{i}",
            linestyle=":",
            linewidth=1,
            marker="o",
            markersize=6,
            markeredgecolor="white",
        )
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    names = [
        f" {name if len(name) <= 40 else '...' + name[-37:]}" for name, *_ in curves
    ]  # matplotlib leaves out what begins with _
    legend = axes.legend(
        lines,
        names,
        title="training, smoothed; dots: validation",
        title_fontsize="small",
        alignment="left",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ is a $
    return _image(figure, "png")


def _centred_mean(losses) -> np.ndarray:
    """Each loss as the mean of its neighbourhood, a fiftieth of the curve and ten points at least: it does not lag behind validation."""
    if not losses:
        return np.zeros(0)
    window = np.ones(min(max(10, len(losses) // 50), len(losses)))
    return np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")


def _image(figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
