"""
What the attempts of one run must have in common: a checkpoint goes on only with the settings that it was made with, or with
those whose change was allowed by name. `config` is the trainer's dataclass, with every flag resolved but the length.
"""

from __future__ import annotations

from dataclasses import asdict

# May differ when a run is resumed: they change neither data nor arithmetic. batch_size and grad_accum_steps are compared as rows per step.
FREE = """config cache_dir streaming batch_size grad_accum_steps n_epochs eval_freq eval_tokens print_sample_iter
save_ckpt_freq init_from save_ckpt_minutes keep_last max_minutes resume allow_change device parallel compile
activation_checkpointing cpu_offload deterministic run_name output_dir log_exact use_wandb wandb_project tensorboard
debug model_size max_bad_steps plan plan_memory_gb""".split()
DATA = (
    "dataset_name",
    "dataset_subset",
    "text_field",
    "tokenizer",
    "max_documents",
    "val_share",
)  # compared by what they lead to


def must_agree(state: dict, config, facts: dict, rows_per_step: int) -> None:
    """Raises ValueError listing every setting that was another one when the checkpoint was written and may not change silently."""
    allowed, differs = config.allow_change.split(","), []
    allowed += ["min_lr"] if "max_lr" in allowed else []  # a tenth of it, unless it is given
    saved = {
        **asdict(type(config)()),
        **state["config"],
    }  # what an older version did not know was as by default
    now = facts["model_config"]
    if state["data"] != facts["data"]:
        names = [name for name in DATA if saved.get(name) != getattr(config, name)] or [
            "dataset_name"
        ]
        differs += [f"{name} (other text)" for name in names if name not in allowed]
    for name, value in asdict(config).items():
        in_model = name in now and name != "dropout"
        if name not in (*FREE, *DATA, *allowed) and not in_model and saved.get(name) != value:
            differs.append(f"{name} {saved.get(name)} then, {value} now")
    if rows_per_step != state["rows_per_step"] and not {"batch_size", "grad_accum_steps"} & set(
        allowed
    ):
        differs.append(
            f"rows per step {state['rows_per_step']} then, {rows_per_step} now (batch_size x grad_accum_steps x processes)"
        )
    if differs:
        names = ",".join(text.split()[0] for text in differs).replace("rows", "batch_size")
        raise ValueError(
            f"{state['folder']}: other settings than now: {'; '.join(differs)}; give the same ones, or --allow_change {names}"
        )
    if state["step"] > config.max_steps:
        what = f"{config.max_steps} lies before step {state['step']} of {state['folder']}"
        raise ValueError(f"--max_steps: {what}; give a larger number, or another --run_name")


def resolve_length(config, saved: dict, n_windows: int, rows_per_step: int) -> None:
    """
    Fill in max_steps, min_lr and warmup_steps where they are None; a resumed run (its `saved` settings) keeps its warmup,
    and its min_lr with its max_lr. Raises ValueError where the text is too short.
    """
    if config.max_steps is None or config.n_epochs is not None:
        by_epochs = int(min((config.n_epochs or 1) * n_windows, 2**62)) // rows_per_step
        if by_epochs == 0:
            what = f"{n_windows} windows of {config.context_length} tokens are fewer than one step of {rows_per_step} rows"
            raise ValueError(
                f"--dataset_name: {what}; give more text, or a smaller --batch_size or --context_length"
            )
        config.max_steps = min(by_epochs, config.max_steps or by_epochs)
    if config.min_lr is None:
        config.min_lr = (
            saved["min_lr"] if saved.get("max_lr") == config.max_lr else config.max_lr / 10
        )
    if config.warmup_steps is None:
        config.warmup_steps = saved.get("warmup_steps", min(2000, config.max_steps // 10))
