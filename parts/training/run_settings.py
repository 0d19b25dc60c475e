"""
What all attempts of one run must have in common.

A checkpoint is resumed only with the settings it was made with, or with those whose change was
allowed by name (--allow_change). The configuration is a dataclass with three class variables:
MAY_CHANGE names the settings that may always differ, IN_DATA those that are compared by the data
they lead to, OTHER_NAMES (see parts/cli/config.py) further names of a setting.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields

from parts.storage.run_folder import clear_leftovers

MAY_BE_ZERO = (
    "dropout",
    "lora_dropout",
    "max_grad_norm",
    "max_unsaved_minutes",
    "min_lr",
    "save_retry_minutes",
    "seed",
    "spike_zscore",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
)
BELOW_ONE = ("dropout", "lora_dropout", "warmup_ratio")
LENGTH = ("max_steps", "min_lr", "warmup_steps")  # what resolve_length fills in


def check_settings(config) -> None:
    """Refuse values that cannot be right. Raises ValueError with the first of them."""
    for problem in setting_problems(config):
        raise ValueError(problem)


def setting_problems(config) -> list[str]:
    """What is wrong with values that cannot be right, one line each."""
    found = []
    for name, value in asdict(config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        lowest = 0 if name in MAY_BE_ZERO else 1e-300
        if not lowest <= value < (1 if name in BELOW_ONE else math.inf):
            found.append(f"--{name}: {value} is out of range; give a positive number")
    if config.run_name in ("", ".", "..") or config.output_dir == "":
        found.append("--run_name, --output_dir: a name is empty; give the run one of its own")
    if config.seed >= 2**32:
        found.append(f"--seed: {config.seed} does not fit into 32 bits")
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        found.append("--warmup_steps, --warmup_ratio: give one of them")
    if config.min_lr is not None and config.min_lr > config.max_lr:
        found.append(
            f"--min_lr: {config.min_lr:g} is above --max_lr {config.max_lr:g}; lower one of them"
        )
    known = {field.name for field in fields(config)}
    if unknown := [name for name in allowed_changes(config) if name not in known]:
        names = ", ".join(unknown)
        found.append(
            f"--allow_change: {names}: no such setting; write --allow_change max_lr,max_steps"
        )
    return found


def allowed_changes(config) -> list[str]:
    """Names in --allow_change."""
    return [name for name in config.allow_change.split(",") if name]


def check_resumed(state: dict, config, facts: dict, rows_per_step: int) -> None:
    """
    Raises ValueError listing every setting that differs from the checkpoint's and may not.

    state: a checkpoint's; config: of this attempt; facts: the job's. Of a draft (see start.py),
    whose "data" is None, text and length are not compared as long as they depend on the text.
    """
    allowed = allowed_changes(config)
    if "max_lr" in allowed:
        allowed.append("min_lr")  # a tenth of it unless given
    differs = []
    # a setting that an older version did not have was at its default
    saved = {**asdict(type(config)()), **state["config"]}
    model_config = facts["model_config"]
    is_draft = facts["data"] is None
    if not is_draft and state["data"] != facts["data"]:
        changed = [name for name in config.IN_DATA if saved.get(name) != getattr(config, name)]
        names = changed or list(config.IN_DATA[:1]) or ["data"]
        differs += [f"{name} (other text)" for name in names if name not in allowed]
    for name, value in asdict(config).items():
        if name in (*config.MAY_CHANGE, *config.IN_DATA, *allowed) or saved.get(name) == value:
            continue
        if name in model_config and name != "dropout":
            continue  # compared with the model
        if is_draft and name in LENGTH and (value is None or config.n_epochs is not None):
            continue
        differs.append(f"{name} {saved.get(name)} then, {value} now")
    resized = rows_per_step != state["rows_per_step"]
    if resized and not {"batch_size", "grad_accum_steps"} & set(allowed):
        differs.append(
            f"rows per step {state['rows_per_step']} then, {rows_per_step} now "
            "(batch_size x grad_accum_steps x processes)"
        )
    if differs:
        names = ",".join(text.split()[0] for text in differs).replace("rows", "batch_size")
        raise ValueError(
            f"{state['folder']}: other settings than now: {'; '.join(differs)}; "
            f"give the same ones, or --allow_change {names}"
        )
    if config.max_steps is not None and state["step"] > config.max_steps:
        raise ValueError(
            f"--max_steps: {config.max_steps} is before step {state['step']} of {state['folder']}; "
            "give a larger number, or another --run_name"
        )


def resolve_length(config, saved: dict, batches, rows_per_step: int) -> None:
    """
    Fill in max_steps, min_lr and warmup_steps if they are None, and eval_freq if
    validations_per_epoch asks for it.

    A resumed run (`saved` are its settings) keeps its warmup, and its min_lr with its max_lr.
    Raises ValueError if the text (a RowBatches) is less than one step.
    """
    if config.max_steps is None or config.n_epochs is not None:
        epochs = config.n_epochs or 1
        by_epochs = int(min(epochs * batches.n_rows, 2**62)) // rows_per_step
        if by_epochs == 0:
            raise ValueError(
                f"the training text: {batches.n_rows:,} rows of {batches.tokens_per_row} tokens "
                f"are fewer than one step of {rows_per_step} rows; give more text, or a smaller "
                "--batch_size or --context_length"
            )
        config.max_steps = min(by_epochs, config.max_steps or by_epochs)
    if config.min_lr is None:
        kept = saved.get("max_lr") == config.max_lr
        config.min_lr = saved["min_lr"] if kept else config.max_lr / 10
    if config.warmup_steps is None:
        by_default = min(2000, config.max_steps // 10)
        if config.warmup_ratio is not None:
            by_default = int(config.warmup_ratio * config.max_steps)
        config.warmup_steps = saved.get("warmup_steps", by_default)
    if config.validations_per_epoch is not None:
        steps = batches.n_rows / rows_per_step / config.validations_per_epoch
        config.eval_freq = max(1, round(steps))


def rows_of_step(config, saved: dict, saved_rows: int, world: int) -> int:
    """
    Rows per step over all ranks; a resumed run keeps them on any number of processes.

    saved: settings of the resumed run, {} for a new one; saved_rows: its rows per step. Raises
    ValueError if the processes cannot share them evenly.
    """
    B = config.batch_size
    rows = B * config.grad_accum_steps * world
    sizes = ("batch_size", "grad_accum_steps")
    same_flags = saved and all(saved[name] == getattr(config, name) for name in sizes)
    if not same_flags or rows == saved_rows or set(sizes) & set(allowed_changes(config)):
        return rows
    if saved_rows % (B * world):
        raise ValueError(
            f"the resumed run has {saved_rows} rows per step, which {world} processes with "
            f"--batch_size {B} cannot share evenly; use another number of processes, or a "
            f"--batch_size that divides {saved_rows / world:g}"
        )
    return saved_rows


def divide_rows(job, config, state: dict, ranks) -> tuple[int, int]:
    """
    (rows per step, micro-batches per step on this rank); fills in the length of the run.

    Raises ValueError if settings differ from the resumed run's that may not. Ranks exchange.
    """
    B, world, saved = config.batch_size, ranks.world, state.get("config", {})
    with ranks.agree():
        rows = rows_of_step(config, saved, state.get("rows_per_step", 0), world)
        job.train_batches.share(ranks.rank, world, B, rows)
        resolve_length(config, saved, job.train_batches, rows)
        if state:
            check_resumed(state, config, job.facts, rows)
        if ranks.rank == 0:
            clear_leftovers(config.output_dir)
    accum = rows // (B * world)
    if accum != config.grad_accum_steps:
        ranks.say(
            f"{rows} rows per step as before: {accum} micro-batches on each of {world} processes"
        )
    return rows, accum
