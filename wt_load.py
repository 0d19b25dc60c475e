"""
Looking into checkpoints: are they whole, and which weights do they hold?

    python wt_load.py verify runs/advanced                              # the newest checkpoint of a run
    python wt_load.py verify runs/advanced/checkpoints/step_001000      # this one
    python wt_load.py info runs/advanced                                # names, shapes and types of its weights

Both read every file and compare it with the checkpoint's hashes, and write nothing. The last line of `verify` is a hash of
the weights alone: two runs with the same last line end with the same bits. Seconds per GB.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C in those seconds leaves no traceback
    from parts.launch import quiet_ctrl_c

    quiet_ctrl_c()

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from parts.checkpoint import load_checkpoint, newest_checkpoint
from parts.config import parse
from parts.launch import run_script


@dataclass
class VerifyConfig:
    """Compare a checkpoint with its hashes; the last line printed is the sha256 of its weights."""

    path: tyro.conf.Positional[str]  # run folder (its newest checkpoint) or checkpoint folder
    debug: bool = False  # show the traceback of an error


@dataclass
class InfoConfig(VerifyConfig):
    """List the weights of a checkpoint, once it has been compared with its hashes."""


def weights_hash(tensors: dict) -> str:
    """sha256 of named tensors: of names, types, shapes and bits, in the order of the names; no file format is part of it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(config: VerifyConfig | InfoConfig) -> None:
    """Verify the checkpoint and print what it holds."""
    path = Path(config.path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; give a run folder or a checkpoint folder")
    folder = newest_checkpoint(path)
    weights, state = load_checkpoint(folder)
    n_numbers = sum(t.numel() for t in weights.values())
    print(f"{folder}: whole; step {state.get('step')}, {len(weights)} tensors, {n_numbers:,} numbers")
    if isinstance(config, InfoConfig):
        for name, t in weights.items():
            print(f"{str(t.dtype).removeprefix('torch.'):9} {' x '.join(map(str, t.shape)):16} {name}")
    else:
        print(weights_hash(weights))


if __name__ == "__main__":
    run_script(lambda: main(parse({"verify": VerifyConfig, "info": InfoConfig})))
