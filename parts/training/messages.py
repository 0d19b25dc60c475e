"""
What a run prints: what was chosen before the first step, the progress bar, figures, how it ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

from parts.base.units import format_bytes
from parts.cli.progress_bar import tqdm
from parts.training.optim import predicted_state_bytes
from parts.training.plan import Setting, wasted
from parts.training.progress import Progress
from parts.training.resume import checkpoint_bytes


def progress_bar(config, step: int, master: bool):
    """The bar of a run; none on other ranks, or if losses are printed anyway."""
    interval_s = 0.5 if sys.stderr.isatty() else 30
    hidden = not master or config.log_exact
    options = {"unit": "step", "disable": hidden, "mininterval": interval_s}
    return tqdm(total=config.max_steps, initial=step, **options)


def speed_line(loss: float, figures: dict) -> str:
    """Loss, tokens/s and MFU behind the bar."""
    mfu = f", MFU {figures['mfu']:.1%}" if figures["mfu"] else ""
    return f"loss {loss:.3f}, {figures['tokens_per_s']:,.0f} tokens/s{mfu}"


def evaluation_line(step: int, result: dict) -> str:
    """The figures of an evaluation."""
    line = f"step {step}: validation loss {result['val_loss']:.4f}"
    if "val_bits_per_byte" in result:
        line += f", {result['val_bits_per_byte']:.3f} bits per byte"
    shown = ("val_loss", "val_perplexity", "val_tokens", "val_bits_per_byte")
    more = [f"{name} {value:.4g}" for name, value in result.items() if name not in shown]
    return ", ".join([line, *more])


def last_line(job, config, progress: Progress, run_dir: Path) -> str:
    """How the run ended, and what is in its folder."""
    step = progress.step
    folder = job.checkpoint_name.format(step=step)
    results = ", ".join(str(Path(job.results, name)) for name in ("loss.png", "samples.txt"))
    files = f"{run_dir} has {results}, metrics.jsonl, checkpoints/{folder}"
    if step < config.max_steps:
        n = progress.stale_evaluations
        return f"stopped early at step {step}: no lower validation loss in {n} evaluations; {files}"
    return f"finished at step {step}: {files}"


def setting_of(config, engine, accum: int) -> Setting:
    """What determines the memory of this run's steps."""
    names = ("batch_size", "dtype", "optimizer", "activation_checkpointing", "cpu_offload")
    elsewhere = config.plan_memory_gb and config.device == "auto"
    parallel, reshard = engine.memory_like(config.reshard)
    return Setting(
        **{name: getattr(config, name) for name in names},
        grad_accum_steps=accum,
        device="cuda" if elsewhere else str(engine.ranks.device),
        parallel=parallel,
        reshard=reshard,
        world=engine.ranks.world // config.replicate,
        keeps_copy=engine.ranks.rank == 0,
    )


def tell_what_runs(job, config, engine, rows_per_step: int, accum: int, step: int) -> bool:
    """Print what was chosen, what it takes and what is left to do; whether the memory suffices."""
    T, fits, lines = job.tokens_per_row, True, []
    if job.plan:
        lines, fits = job.plan(setting_of(config, engine, accum), config.plan_memory_gb)
    one = checkpoint_bytes(job, config)
    kept = one * (config.keep_last + 2)
    lines.append(
        f"disk: {format_bytes(one)} a checkpoint, {format_bytes(kept)} for those that are kept "
        "and the one being written"
    )
    if config.optimizer != "adamw":
        sizes = [
            predicted_state_bytes(job.model, job.blocks, kind, config.galore_rank)
            for kind in (config.optimizer, "adamw")
        ]
        note = " (moments in 8 bits need even less)" if config.optimizer == "galore8bit" else ""
        lines.append(
            f"{config.optimizer}: {sizes[0]:,} bytes of optimizer state, "
            f"{sizes[0] / sizes[1]:.3f} of AdamW's {sizes[1]:,}{note}"
        )
    plural = "es" if accum > 1 else ""
    lines.append(
        f"step: {rows_per_step} x {T:,} tokens, {accum} micro-batch{plural} of "
        f"{config.batch_size} rows on each process{', compiled' if config.compile else ''}"
    )
    if config.max_steps:
        n = config.max_steps - step
        line = f"to go: {n:,} of {config.max_steps:,} steps, {n * rows_per_step * T:,} tokens"
        if job.train_batches:
            line += f"; {job.train_batches.n_rows:,} rows in an epoch"
        lines.append(line)
    lines += wasted(config, config.max_steps)
    engine.ranks.say("\n".join(lines))
    return fits
