"""
What a run would take and find, before it costs anything: parameters, memory, disk, data, batches.

Everything is computed from shapes and file names; no model has memory, and nothing is written.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from parts.base.dtypes import DTYPES
from parts.base.machine import choose_dtype, free_memory, pick_device
from parts.base.text import one_line
from parts.base.units import format_bytes
from parts.data import corpus
from parts.data.shards import read_index, shards_of
from parts.model.cpu_products import attends_in_products
from parts.model.families import FAMILIES, shell
from parts.training.optim import check_kind
from parts.training.plan import (
    Setting,
    memory_line,
    memory_of,
    parameter_line,
    ways_to_fit,
)
from parts.training.resume import checkpoint_bytes
from prep_dataset import prepare_tokens
from pretraining_advanced import Job, gpt_loss, text_settings
from recipes.orchestrator.config_loader import (
    OrchestratorConfig,
    deepspeed_plan,
    in_words_of_the_file,
    strategy_settings,
)
from recipes.orchestrator.model_sizes import kind_of, open_base, shape_of
from recipes.orchestrator.orchestrator import PYTHON_DOCS, choose_tokenizer, row_length


def report(
    config: OrchestratorConfig, ranks: int | None, memory_gb: float | None
) -> tuple[list[str], list[str]]:
    """(lines about the run, problems) for so many ranks of so much memory; None: as it is here."""
    world = ranks or int(os.environ.get("WORLD_SIZE", 1))
    config, problems = replace(config), []  # what is filled in here is not the run's

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except (ValueError, OSError) as e:
            problems.append(f"{config.config}: {one_line(in_words_of_the_file(str(e)))}")
            return None

    base = attempt(open_base, config) if config.init_from else None
    if config.init_from and base is None:
        return [], problems
    n_ids = attempt(choose_tokenizer, config, base)
    shape = base.config if base else attempt(shape_of, config, n_ids or 1)
    if shape is None or (T := attempt(row_length, config, shape)) is None:
        return [], problems
    device = torch.device("cuda") if memory_gb else pick_device(config.device)
    if config.dtype == "auto":
        config.dtype = "bf16"
        if not memory_gb:
            kind, _ = choose_dtype("auto", device)
            config.dtype = next(name for name, found in DTYPES.items() if found == kind)
    _, notes, _ = strategy_settings(config, world)
    lines = [f"note: {note}" for note in notes]
    lines.append(f"model: {kind_of(shape)}, rows of {T:,} tokens")
    setting = setting_of(config, world, device)
    of_memory, fits = memory_lines(config, replace(shape, block_size=T), setting, memory_gb)
    lines += of_memory
    if memory_gb and not fits:
        problems.append(f"{config.config}: {'; '.join(of_memory[1:])}")
    draft = Job(
        *(shape.family, shell(shape), None, None, gpt_loss, (FAMILIES[shape.family].block,)),
        *(1.0, T, {"model_config": asdict(shape)}),
    )
    lines.append(disk_line(config, checkpoint_bytes(draft, config)))
    attempt(check_kind, config.optimizer, device, config.parallel in ("fsdp", "deepspeed"))
    found = attempt(data_line, config)
    lines += batch_lines(config, world, T, found[1] if found else None)
    lines += [found[0]] if found else []
    return lines, problems


def setting_of(config: OrchestratorConfig, world: int, device: torch.device) -> Setting:
    """What determines the memory of a step on each rank."""
    parallel, reshard = config.parallel, config.reshard
    if parallel == "deepspeed":  # as the engine of the core with the same shards
        native = deepspeed_plan(config, world).run_settings(native=True)
        parallel, reshard = native["parallel"], native.get("reshard", True)
    return Setting(
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        dtype=config.dtype,
        optimizer=config.optimizer,
        activation_checkpointing=config.activation_checkpointing,
        device=str(device),
        parallel=parallel,
        world=max(1, world // config.replicate),
        reshard=reshard,
        cpu_offload=config.cpu_offload,
        keeps_copy=True,
    )


def memory_lines(
    config: OrchestratorConfig, shape, setting: Setting, memory_gb: float | None
) -> tuple[list[str], bool]:
    """(lines about parameters and the memory of each rank, whether it fits), computed."""
    if memory_gb:
        limit, where = memory_gb * 1e9, "each GPU"
    else:
        limit, where = free_memory(setting.device)
    device, T = torch.device(setting.device), shape.block_size
    products = attends_in_products(device, DTYPES[setting.dtype], T, config.dropout)
    setting = replace(setting, attends_in_products=products)
    rank = config.galore_rank
    parts = memory_of(shape, setting, rank)
    line, fits = memory_line(parts, limit, where, "memory per rank, computed")
    lines = [parameter_line(shape), line]
    if not fits:
        ways = ways_to_fit(setting, limit, lambda s: memory_of(shape, s, rank)["peak"])
        advice = "; or ".join(in_words_of_the_file(way) for way in ways)
        lines.append(f"what would fit: {advice or 'more ranks under fsdp, or a smaller model'}")
    return lines, fits


def disk_line(config: OrchestratorConfig, one: int) -> str:
    """What the checkpoints take, and what the disk of the run has."""
    run_dir = Path(config.output_dir or f"runs/{config.run_name}").resolve()
    nearest = next(p for p in (run_dir, *run_dir.parents) if p.is_dir())
    free = format_bytes(shutil.disk_usage(nearest).free)
    kept = format_bytes(one * (config.keep_last + 2))
    what = "for those that are kept and the one being written"
    return f"disk: {format_bytes(one)} a checkpoint, {kept} {what}; {free} free here"


def batch_lines(config: OrchestratorConfig, world: int, T: int, n_tokens: int | None) -> list[str]:
    """The arithmetic of a step, and the length of the run in tokens."""
    B, accum = config.batch_size, config.grad_accum_steps
    rows = B * accum * world
    names = "batch_size x gradient_accumulation_steps x ranks"
    lines = [f"step: {B} x {accum} x {world} = {rows:,} rows ({names}), {rows * T:,} tokens"]
    if config.max_steps:
        line = f"run: {config.max_steps:,} steps, {config.max_steps * rows * T:,} tokens"
        if n_tokens:
            line += f", {config.max_steps * rows * T / n_tokens:.2f} epochs"
        lines.append(line)
    return lines


def data_line(config: OrchestratorConfig) -> tuple[str, int | None]:
    """(what is found of the data, tokens for training if they are known). Raises ValueError."""
    if config.dataset_name == PYTHON_DOCS:
        path = Path(config.cache_dir) / f"{PYTHON_DOCS}.txt"
        if not path.exists():
            return "data: the English that comes with Python, not tokenised yet", None
        config.dataset_name = str(path)
    name = config.dataset_name
    folder = prepare_tokens(text_settings(config), build=False)
    if folder.exists():
        index = read_index(folder)
        n = {split: sum(s["tokens"] for s in shards_of(index, split)) for split in ("train", "val")}
        counts = f"{n['train']:,} tokens for training, {n['val']:,} for validation"
        return f"data: {name}, tokenised in {folder}: {counts}", n["train"]
    sources = [
        corpus.local_source(name, part) for part, _ in corpus.parse_subsets(config.dataset_subset)
    ]
    if None in sources:
        return f"data: {name} is not on this disk; it would be read from the hub", None
    files = [path for source in sources for path in source.files]
    n_bytes = sum(path.stat().st_size for path in files)
    line = f"data: {name}, {len(files):,} files, {format_bytes(n_bytes)}, not tokenised yet"
    notes = "; ".join(source.note for source in sources if source.note)
    return f"{line}; {notes}" if notes else line, None
