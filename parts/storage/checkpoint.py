"""
A checkpoint on disk: a folder that is either complete or not there. Knows no model.

    runs/simple/checkpoints/step_000500/
        model.safetensors      weights
        optimizer.safetensors  the optimizer's state (of runs that can be resumed)
        tokenizer.json         the tokenizer the weights were trained with
        trainer_state.json     step, tokens, configuration
        MANIFEST.json          bytes and sha256 of each file above, written last

A checkpoint is written to a hidden folder beside it, fsynced, and renamed when complete, so a kill
or a full disk leaves the older checkpoints as they were. Reading compares the hashes first: no
common weight format detects a flipped bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import string
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from parts.base.dtypes import SAFETENSORS_NAMES
from parts.base.files import add_file_name, make_folder, read_json, rename_durably, sha256_of
from parts.base.text import one_line
from parts.storage.formats import instead_of_a_run

DAMAGED = "the checkpoint is damaged, use another one"
DEFAULT_NAME = "step_{step:06d}"  # of a checkpoint folder
WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


def _write(path: Path, parts) -> dict:
    """Write and fsync buffers one after the other; returns the manifest's {"bytes", "sha256"}."""
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
    """The buffers of a safetensors file: length of the header, header, bytes of each tensor."""
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
    run_dir,
    step: int,
    tensors: dict,
    state: dict,
    files: dict[str, bytes],
    keep_last: int,
    keep=(),
    name: str = DEFAULT_NAME,
) -> Path:
    """
    Write `run_dir/checkpoints/NAME` and delete older checkpoints; returns the folder.

    tensors: file name -> {name: tensor}. state: JSON values. files: name -> bytes, kept beside
    them. The newest `keep_last` and those of the steps in `keep` stay. Raises OSError if it cannot
    be written; then nothing is left of it, and the older checkpoints are untouched.
    """
    parent = Path(run_dir) / "checkpoints"
    make_folder(parent)
    target = parent / name.format(step=step)
    part = parent / f".{target.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
        part.mkdir()
        contents = {file: _as_safetensors(named) for file, named in tensors.items()}
        contents["trainer_state.json"] = [json.dumps(state, indent=1).encode()]
        contents |= {file: [data] for file, data in files.items()}
        listed = {file: _write(part / file, contents[file]) for file in sorted(contents)}
        manifest = json.dumps({"version": 1, "files": listed}, indent=1).encode()
        _write(part / "MANIFEST.json", [manifest])
        if target.exists():
            shutil.rmtree(target)
        rename_durably(part, target)
    except BaseException as e:
        shutil.rmtree(part, ignore_errors=True)
        add_file_name(e, target)
        raise
    older = [
        folder
        for folder in list_checkpoints(run_dir, name)
        if folder != target and step_of(folder, name) not in keep
    ]
    for old in older[: max(len(older) - keep_last + 1, 0)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


# ------------------------------------------------------------------------------------ names


def name_of_run(run_dir) -> str:
    """The pattern of a run's checkpoint names, from its run.json; the default if it says none."""
    with contextlib.suppress(ValueError):
        name = read_json(Path(run_dir) / "run.json").get("checkpoint_name")
        check_name(name)
        return name
    return DEFAULT_NAME


def check_name(name) -> str:
    """
    The regular expression of a pattern such as "step_{step:06d}", with the step as its group.

    Raises ValueError unless it is a file name with {step} in it once.
    """
    regex, n_steps = "", 0
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
        for text, field, _, _ in string.Formatter().parse(name):
            regex += re.escape(text)
            if field == "step":
                regex += r"(\d+)"
                n_steps += 1
        example = name.format(step=7)  # refuses any other field
        plain = Path(example).name == example and not example.startswith(".")
        match = re.fullmatch(regex, example)
        if plain and n_steps == 1 and match and int(match[1]) == 7:
            return regex
    raise ValueError(f"checkpoint_name: {name!r}: give a file name with {{step}}, {DEFAULT_NAME}")


def list_checkpoints(run_dir, name: str | None = None) -> list[Path]:
    """
    Checkpoint folders of a run, oldest first.

    name: the pattern of their names; None: as run.json says. A copy under another name is not one
    of them, and is never deleted.
    """
    name = name or name_of_run(run_dir)
    regex = check_name(name)
    found = Path(run_dir).glob("checkpoints/*")
    found = [f for f in found if re.fullmatch(regex, f.name) and f.is_dir()]
    return sorted(found, key=lambda folder: step_of(folder, name))


def step_of(folder, name: str | None = None) -> int:
    """The step in a checkpoint folder's name. Raises ValueError if the name has none."""
    folder = Path(folder)
    match = re.fullmatch(check_name(name or name_of_run(folder.parent.parent)), folder.name)
    if not match:
        raise ValueError(f"{folder}: its name has no step")
    return int(match[1])


# ---------------------------------------------------------------------------------- reading


def verify_checkpoint(folder) -> None:
    """Compare every file with the manifest. Raises ValueError naming the first that differs."""
    folder = Path(folder)
    manifest = folder / "MANIFEST.json"
    files = read_json(manifest, DAMAGED).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise ValueError(f"{manifest}: has no list of files with bytes and sha256; {DAMAGED}")
    if odd := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{manifest}: names {odd[0][:200]!r}, not a file beside it; {DAMAGED}")
    # a file that is read, but not listed, would be read unverified
    read = {"trainer_state.json", "tokenizer.json"} | {f.name for f in folder.glob("*.safetensors")}
    for name in sorted(read - files.keys()):
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name}: is not in MANIFEST.json; {DAMAGED}")
    for name, entry in files.items():
        path = folder / name
        if not os.path.isfile(path):  # reading a pipe would wait forever
            raise ValueError(f"{str(path)[:500]}: missing, or not a file; {DAMAGED}")
        try:
            same = path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]
        except OSError as e:
            raise ValueError(f"{path}: {e.strerror}; {DAMAGED}") from e
        if not same:
            raise ValueError(f"{path}: differs from its MANIFEST.json; {DAMAGED}")
    if "trainer_state.json" in files:
        resumable = "optimizer_numbers" in read_json(folder / "trainer_state.json", DAMAGED)
        if resumable and OPTIMIZER_FILE not in files:
            raise ValueError(f"{manifest}: does not list {OPTIMIZER_FILE}; {DAMAGED}")


def newest_checkpoint(path, name: str | None = None) -> Path:
    """
    The checkpoint folder meant by `path`: itself, or the newest undamaged one of a run folder.

    name: as for list_checkpoints. Prints a warning for each damaged one. Raises FileNotFoundError
    if there is none, ValueError if all are damaged.
    """
    path = Path(path)
    if os.path.lexists(path / "MANIFEST.json"):
        verify_checkpoint(path)
        return path
    candidates = list_checkpoints(path, name)
    if not candidates:
        raise FileNotFoundError(f"{path}: no checkpoint here{instead_of_a_run(path)}")
    for folder in reversed(candidates):
        try:
            verify_checkpoint(folder)
            return folder
        except ValueError as e:
            print(f"warning: {one_line(e)}", flush=True)
            problem = e
    raise ValueError(
        f"{path}: all {len(candidates)} checkpoints are damaged ({problem}); "
        "train again, in another folder"
    )


def load_tensors(path) -> dict:
    """Tensors (memory-mapped) of a safetensors file that was verified. Raises ValueError."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as e:
        raise ValueError(f"{path}: not a file of tensors ({e})") from e


def read_state(folder) -> dict:
    """The trainer state of a checkpoint folder. Raises ValueError if it is missing or wrong."""
    path = Path(folder) / "trainer_state.json"
    state = read_json(path, DAMAGED)
    kinds = {
        "step": int,
        "tokens": int,
        "model_config": dict,
        "config": dict,
        "best": dict | None,
        "weights_file": str,
    }
    wrong = [] if "step" in state else ["step"]
    wrong += [
        name for name, kind in kinds.items() if name in state and not isinstance(state[name], kind)
    ]
    best = state.get("best") or {"step": 0, "val_loss": 0.0}
    if not wrong and not isinstance(best.get("step"), int):
        wrong = ["best"]
    if not wrong and not isinstance(best.get("val_loss"), int | float):
        wrong = ["best"]
    if wrong:
        raise ValueError(
            f"{path}: its {wrong[0]} is missing or of the wrong type; not a checkpoint of this "
            "project, or damaged: use another one"
        )
    return state


def load_checkpoint(folder) -> tuple[dict, dict]:
    """(weights, trainer state) of a verified checkpoint folder; the weights are memory-mapped."""
    state = read_state(folder)
    file = state.get("weights_file", WEIGHTS_FILE)
    if Path(file).name != file:
        raise ValueError(
            f"{folder}: its weights_file is {file[:200]!r}, not a file in it; {DAMAGED}"
        )
    return load_tensors(Path(folder) / file), state
