"""The adapters of a checkpoint added to the weights that they were trained on: one model again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from parts.base.files import no_empty_folders, rename_durably
from parts.cli.config import positional
from parts.model import lora
from parts.storage import checkpoint, formats
from parts.storage.formats import Stored
from recipes.q_lora.bases import open_base
from wt_load import ADAPTERS

CHECKPOINT_NAME = "checkpoint-{step}"


@dataclass
class MergeConfig:
    """Merge the adapters of a checkpoint into their base, as a Hugging Face folder."""

    checkpoint: positional("CHECKPOINT")  # run folder or checkpoint folder
    out: positional("OUT")  # folder for the merged model
    base: str | None = None  # the base, if it is no longer where the run found it
    debug: bool = False  # show the traceback of an error


def merge(config: MergeConfig) -> Path:
    """
    Write the base in its own dtype with the adapters added; returns the folder.

    Raises ValueError if it exists, and as `write_merged`.
    """
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out}: already exists; choose another folder")
    folder = checkpoint.newest_checkpoint(config.checkpoint, CHECKPOINT_NAME)
    part = out.with_name(f".{out.name}.part")
    with no_empty_folders(out.parent):
        shutil.rmtree(part, ignore_errors=True)
        try:
            base = write_merged(folder, part, config.base)
            rename_durably(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {folder.name} of {config.checkpoint}, merged into {base}")
    return out


def write_merged(folder: Path, out: Path, base_name: str | None = None) -> str:
    """
    Write a merged model to a new folder; returns the name of its base.

    One shard at a time is in memory. base_name: None means the one that the run had. Raises
    ValueError if the checkpoint has no adapters, or they were trained on other weights.
    """
    adapters, state = checkpoint.load_checkpoint(folder)
    settings = state.get("config", {})
    if state.get("weights_file") != ADAPTERS or "base" not in state:
        raise ValueError(f"{folder}: holds no adapters; a full checkpoint needs no merge")
    name = base_name or settings["model_name"]
    base = open_base(name, settings["max_seq_length"])
    if base.tensors is None:
        raise ValueError(f"{folder}: its base is random; train on a model to merge into it")
    if base.hash() != state["base"]:
        what = f"was trained on other weights than {name} has"
        raise ValueError(f"{folder}: {what}; give the right ones with --base")
    lora.check_merge({n: t.shape for n, t in base.tensors.items()}, adapters)
    scaling = settings["lora_alpha"] / settings["lora_rank"]

    def merged(name: str, stored: Stored) -> Stored:
        def read(_transposed: bool) -> torch.Tensor:
            return lora.merged(name, stored.read(), adapters, scaling)

        return Stored(stored.shape, read, stored.dtype)

    tensors = {name: merged(name, stored) for name, stored in base.tensors.items()}
    out.mkdir(parents=True)
    formats.write_folder(out, tensors, next(iter(base.tensors.values())).read().dtype)
    for file, data in base.files.items():
        (out / file).write_bytes(data)
    return name
