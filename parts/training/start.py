"""
What can be refused before any text is read: a mistake must not cost the hours of tokenising.

`check_start` is for every job; `check_draft` for a job of which all but its text is known, which is
then a draft: a Job on the meta device without batches, and without a tokenizer that is still to be
trained on the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from parts.cli.launch import error_line
from parts.data.tokenizers import Tokenizer, byte_tokenizer, gpt2_tokenizer
from parts.model.families import config_of, shape_of_size, shape_to_continue
from parts.storage import checkpoint, run_folder
from parts.training.optim import check_kind
from parts.training.resume import check_state, checkpoint_bytes, find_checkpoint, path_to_resume
from parts.training.run_settings import check_resumed, rows_of_step


def check_start(config, engine, stack) -> Callable | None:
    """
    Claim the run folder until `stack` closes; returns what moves an earlier run in it aside.

    None on other ranks than 0. Raises ValueError if the ranks were started with different settings,
    if the folder cannot be had, or the settings do not fit this engine, device and installation;
    FileNotFoundError if --resume names nothing. Ranks exchange.
    """
    fix = "start all ranks with the same file and the same command line"
    engine.ranks.same(asdict(config), "has other settings than rank 0", fix)
    engine.check_options(config.cpu_offload, config.reshard, config.replicate)
    check_kind(config.optimizer, engine.ranks.device, sharded=engine.shards)
    if engine.ranks.rank != 0:
        return None
    path_to_resume(config)
    return stack.enter_context(run_folder.claimed(config.output_dir))


def check_draft(draft, config, ranks) -> None:
    """
    Compare a draft with the disk, and with the checkpoint that the run would resume; on rank 0.

    Raises ValueError or FileNotFoundError.
    """
    if ranks.rank != 0:
        return
    run_dir, afresh = Path(config.output_dir), config.resume == "never"
    run_folder.enough_disk(run_dir, checkpoint_bytes(draft, config), config.keep_last, afresh)
    found = None if afresh else find_checkpoint(config, run_dir, draft.checkpoint_name)
    if not found:
        return
    state = {**checkpoint.read_state(found), "folder": str(found)}
    check_state(found, state, draft)
    rows = rows_of_step(config, state["config"], state["rows_per_step"], ranks.world)
    check_resumed(state, config, {**draft.facts, "data": None}, rows)


# ------------------------------------------------------------------------ tokenizer and model


def ready_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer that needs no text to be trained on. Raises OSError or ValueError."""
    ready = {"gpt2": gpt2_tokenizer, "auto": gpt2_tokenizer, "bytes": byte_tokenizer}
    return ready.get(spec, lambda: Tokenizer.load(spec))()


def published_tokenizer(config) -> Tokenizer:
    """Published shards have no tokenizer: GPT-2's, unless --tokenizer names another."""
    try:
        return ready_tokenizer(config.tokenizer)
    except OSError as e:
        raise ValueError(
            f"--tokenizer {config.tokenizer}: {error_line(e)}; "
            "give a tokenizer.json, or set TIKTOKEN_CACHE_DIR"
        ) from e


def model_shape(config):
    """
    The shape of --init_from, or the one that the flags ask for, before its vocabulary is known.

    Raises ValueError on conflict.
    """
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "dropout")
    asked = {name: getattr(config, name) for name in names if getattr(config, name)}
    if not config.init_from:
        asked["block_size"] = config.context_length
        return shape_of_size(config.model_size, asked)
    folder = checkpoint.newest_checkpoint(config.init_from)
    try:
        found = config_of(checkpoint.read_state(folder))
        return shape_to_continue(found, asked, config.context_length)
    except ValueError as e:
        raise ValueError(f"--init_from: {folder}: {e}") from e


def check_origin(config, tokenizer) -> Path:
    """The checkpoint of --init_from. Raises ValueError if it belongs to another tokenizer."""
    folder = checkpoint.newest_checkpoint(config.init_from)
    if checkpoint.read_state(folder).get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(
            f"--init_from: {folder} was trained with another tokenizer; "
            "give its tokenizer.json as --tokenizer"
        )
    return folder
