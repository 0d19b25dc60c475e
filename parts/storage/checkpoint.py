"""
A checkpoint on disk: a folder that is either whole or not there. Knows no model.

    runs/simple/checkpoints/step_000500/
        model.safetensors      weights
        optimizer.safetensors  what the optimizer remembers (of runs that can be resumed)
        tokenizer.json         what the weights were trained with
        trainer_state.json     step, tokens, configuration
        MANIFEST.json          bytes and sha256 of each file above, written last

Writing goes to a hidden folder beside it, is fsynced, and is renamed when complete, so a kill or a full disk leaves
the older checkpoints as they were. Reading compares the hashes first: no common weight format notices a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from parts.base.dtypes import SAFETENSORS_NAMES
from parts.base.files import add_file_name, make_folder, read_json, rename_durably, sha256_of

DAMAGED = "the checkpoint is damaged, use another one"


def _write(path: Path, parts) -> dict:
    """Write buffers one after the other, down to the disk; returns {"bytes", "sha256"} for the manifest."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for part in parts:
            f.write(part)
            digest.update(part)
            size += len(part)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _as_safetensors(named: dict):
    """The buffers of a safetensors file: length of the header, header, then each tensor's bytes where they lie."""
    tensors = {
        k: t.detach().cpu().contiguous()
        for k, t in sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))
    }
    header, start = {}, 0
    for name, t in tensors.items():
        dtype = SAFETENSORS_NAMES[t.dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(t.shape),
            "data_offsets": [start, start + t.nbytes],
        }
        start += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in tensors.values():
        yield memoryview(t.reshape(-1).view(torch.uint8).numpy())


def save_checkpoint(
    run_dir, step: int, tensors: dict, state: dict, files: dict[str, bytes], keep_last: int, keep=()
) -> Path:
    """
    Write `run_dir/checkpoints/step_NNNNNN` and drop all but the newest `keep_last` and the steps in `keep`; returns the folder.

    tensors: file name -> {name: tensor}; state: JSON values; files: name -> bytes, kept beside them. Raises OSError where
    it cannot be written, and then nothing is left of it and the older checkpoints are untouched.
    """
    parent = Path(run_dir) / "checkpoints"
    make_folder(parent)
    target, part = parent / f"step_{step:06d}", parent / f".step_{step:06d}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
        part.mkdir()
        contents = {name: _as_safetensors(named) for name, named in tensors.items()}
        contents |= {
            "trainer_state.json": [json.dumps(state, indent=1).encode()],
            **{name: [data] for name, data in files.items()},
        }
        listed = {name: _write(part / name, contents[name]) for name in sorted(contents)}
        _write(
            part / "MANIFEST.json", [json.dumps({"version": 1, "files": listed}, indent=1).encode()]
        )
        if target.exists():
            shutil.rmtree(target)
        rename_durably(part, target)
    except BaseException as e:
        shutil.rmtree(part, ignore_errors=True)
        add_file_name(e, target)
        raise
    older = [
        folder
        for folder in list_checkpoints(run_dir)
        if folder != target and step_of(folder) not in keep
    ]
    for old in older[: max(len(older) - keep_last + 1, 0)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(run_dir) -> list[Path]:
    """Checkpoint folders of a run, oldest first. A copy under a name of your own is not one of them, nor ever deleted."""
    found = [
        f
        for f in Path(run_dir).glob("checkpoints/step_*")
        if f.is_dir() and re.fullmatch(r"step_\d+", f.name)
    ]
    return sorted(found, key=step_of)


def step_of(folder) -> int:
    """The step in a checkpoint folder's name."""
    return int(Path(folder).name.removeprefix("step_"))


def verify_checkpoint(folder) -> None:
    """Compare every file with the manifest. Raises ValueError naming the first that differs, or that it does not list."""
    folder = Path(folder)
    manifest = folder / "MANIFEST.json"
    files = read_json(manifest, DAMAGED).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()
    ):
        raise ValueError(
            f"{manifest}: has no list of files with bytes and sha256; the checkpoint is damaged, use another one"
        )
    if odd := [name for name in files if Path(name).name != name]:
        raise ValueError(
            f"{manifest}: names {odd[0][:200]!r}, which is no file beside it; the checkpoint is damaged, use another one"
        )
    for name in (
        "model.safetensors",
        "trainer_state.json",
        "tokenizer.json",
    ):  # what is read: a short list would make it unverified
        if name not in files and os.path.lexists(folder / name):
            raise ValueError(
                f"{folder / name}: is not in MANIFEST.json; the checkpoint is damaged, use another one"
            )
    for name, entry in files.items():
        path = folder / name
        if not os.path.isfile(path):  # to read a pipe would be to wait for it
            raise ValueError(
                f"{str(path)[:500]}: missing, or not a file; the checkpoint is damaged, use another one"
            )
        try:
            if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                raise ValueError(
                    f"{path}: differs from its MANIFEST.json; the file is damaged, use another checkpoint"
                )
        except OSError as e:
            raise ValueError(
                f"{path}: {e.strerror}; the checkpoint is damaged, use another one"
            ) from e


def newest_checkpoint(path) -> Path:
    """
    The checkpoint folder meant by `path`: itself, or the newest undamaged one of a run folder (a damaged newer one is
    named on the way). Raises FileNotFoundError where there is none, ValueError where all are damaged.
    """
    path = Path(path)
    if os.path.lexists(path / "MANIFEST.json"):
        verify_checkpoint(path)
        return path
    candidates = list_checkpoints(path)
    if not candidates:
        raise FileNotFoundError(
            f"{path}: no checkpoint here; give a run folder such as runs/simple, or train one first"
        )
    for folder in reversed(candidates):
        try:
            verify_checkpoint(folder)
            return folder
        except ValueError as e:
            print(f"warning: {e}", flush=True)
            problem = e
    raise ValueError(
        f"{path}: all {len(candidates)} checkpoints are damaged ({problem}); train again, in another folder"
    )


def load_tensors(path) -> dict:
    """Tensors (memory-mapped) of a safetensors file that was verified. Raises ValueError."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as e:
        raise ValueError(f"{path}: not a file of tensors ({e})") from e


def read_state(folder) -> dict:
    """The trainer state of a checkpoint folder. Raises ValueError where it is none, or holds what cannot be told or gone on from."""
    path = Path(folder) / "trainer_state.json"
    state = read_json(path, DAMAGED)
    kinds = {"step": int, "tokens": int, "model_config": dict, "config": dict, "best": dict | None}
    best = state.get("best") or {"step": 0, "val_loss": 0.0}
    wrong = [
        name for name, kind in kinds.items() if name in state and not isinstance(state[name], kind)
    ]
    if (
        "step" not in state
        or wrong
        or not (isinstance(best.get("step"), int) and isinstance(best.get("val_loss"), int | float))
    ):
        what = f"its {wrong[0] if wrong else 'best' if 'step' in state else 'step'} is missing or of the wrong type"
        raise ValueError(
            f"{path}: {what}; not a checkpoint of this project, or damaged: use another one"
        )
    return state


def load_checkpoint(folder) -> tuple[dict, dict]:
    """Weights (memory-mapped) and trainer state of a checkpoint folder that was verified. Raises ValueError."""
    state = read_state(folder)
    return load_tensors(Path(folder) / "model.safetensors"), state
