"""
Pictures of a run, drawn without a display.
"""

from __future__ import annotations

import io


def draw_losses(steps, tokens_seen, train_losses, val_losses, xlabel: str, uniform_loss: float | None, kind: str) -> bytes:
    """
    An image (kind: png, pdf, svg) of training and validation loss over steps, tokens on a second axis above.

    Four lists of one length; None in a loss list leaves that point out. uniform_loss: a dotted line, None for none.
    """
    from matplotlib.figure import Figure  # here, because matplotlib costs every start a second
    from matplotlib.ticker import EngFormatter

    def points(losses):
        return zip(*[(s, loss) for s, loss in zip(steps, losses, strict=True) if loss is not None], strict=True)

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if any(loss is not None for loss in train_losses):
        x, y = points(train_losses)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="training, each batch")
        weight, total, smooth = 0.0, 0.0, []  # exponential mean over about 10 points, unbiased at the start
        for loss in y:
            weight, total = 0.9 * weight + 1, 0.9 * total + loss
            smooth.append(total / weight)
        axes.plot(x, smooth, color="tab:blue", linewidth=2, label="training, smoothed")
    if any(loss is not None for loss in val_losses):
        x, y = points(val_losses)
        axes.plot(x, y, color="tab:orange", marker="o", markersize=4, label=f"validation, last {y[-1]:.3f}")
    if uniform_loss is not None:
        axes.axhline(uniform_loss, color="gray", linestyle=":", linewidth=1, label=f"guessing evenly, {uniform_loss:.2f}")
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    if len(steps) > 1 and steps[-1] > steps[0]:
        per_step = (tokens_seen[-1] - tokens_seen[0]) / (steps[-1] - steps[0])
        if per_step > 0:
            top = axes.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
            top.set_xlabel("tokens seen")
            top.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M, not 1.5 under a distant 1e6
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
