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

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # torch's names, safetensors' names
DTYPES |= {"int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs neither folders nor files that are open for reading
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _name(e: BaseException, path: Path) -> None:
    """A failed write does not say which file it was for; a message must."""
    if isinstance(e, OSError) and e.strerror and not e.filename:
        e.filename = str(path)


def write_file(path, data: bytes) -> None:
    """Write a small file whole or not at all: `.part` beside it, fsync, rename, fsync of the folder. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        _fsync(part)
        os.replace(part, path)
        _fsync(path.parent)
    except BaseException as e:
        part.unlink(missing_ok=True)
        _name(e, path)
        raise


def append_lines(path, lines: list) -> None:
    """
    Add lines (dicts as JSON) to a text file and empty the list. A disk that refuses costs a warning, not the run; what
    could not be written stays in the list for the next call.
    """
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(
                "".join(
                    (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
                )
            )
        lines.clear()
    except OSError as e:
        if os.path.exists(path):
            os.truncate(path, size)  # half a line would make the rest unreadable
        print(f"warning: {path}: {e.strerror}; the run goes on", flush=True)


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
        dtype = DTYPES[str(t.dtype).removeprefix("torch.")]
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
    parent.mkdir(parents=True, exist_ok=True)
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
        _fsync(part)
        if target.exists():
            shutil.rmtree(target)
        os.rename(part, target)
        for folder in (parent, parent.parent):
            _fsync(folder)
    except BaseException as e:
        shutil.rmtree(part, ignore_errors=True)
        _name(e, target)
        raise
    older = [
        folder
        for folder in list_checkpoints(run_dir)
        if folder != target and step_of(folder) not in keep
    ]
    for old in older[: max(len(older) - keep_last + 1, 0)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


@contextlib.contextmanager
def claimed(run_dir, afresh: bool):
    """
    The run folder for this process alone. With `afresh` an earlier run in it is moved aside. Where the run then does not
    begin, so that there is no run.json, nothing of ours is left in it. Raises ValueError where it cannot be had.
    """
    from filelock import Timeout

    run_dir = Path(run_dir)
    if run_dir.resolve() == Path.cwd():
        raise ValueError(
            f"--output_dir: {run_dir} is the current folder; name another one for the run"
        )
    created = not run_dir.exists()
    try:
        lock = _lock(run_dir)
        if afresh:
            lock.release()
            if earlier := move_aside(run_dir):
                print(f"the earlier run is kept as {earlier}", flush=True)
            lock = _lock(run_dir)
    except Timeout as e:
        raise ValueError(
            f"--output_dir: {run_dir} belongs to a run that is going on; wait for it, or choose another --run_name"
        ) from e
    except OSError as e:
        raise ValueError(
            f"--output_dir: {e.filename or run_dir}: {e.strerror}; choose a folder that can be written"
        ) from e
    try:
        yield
    finally:
        if not (run_dir / "run.json").exists():
            (run_dir / ".lock").unlink(missing_ok=True)
        lock.release()
        if created and run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()


def clear_leftovers(run_dir) -> None:
    """Delete what an attempt that was killed left half written, by its names: other files in the folder are the user's."""
    for name in ("run.json", "metrics.jsonl", "samples.txt", "loss.png"):
        (Path(run_dir) / f"{name}.part").unlink(missing_ok=True)
    for part in Path(run_dir).glob("checkpoints/.step_*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _lock(run_dir: Path):
    from filelock import FileLock

    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    lock.acquire(timeout=0)
    return lock


def enough_disk(run_dir, one: int, keep_last: int, afresh: bool) -> None:
    """Raises ValueError where the disk has no room for the checkpoints that will be kept, of `one` byte count each, and the next one."""
    run_dir = Path(run_dir)
    there = (
        0
        if afresh
        else sum(f.stat().st_size for f in run_dir.glob("checkpoints/step_*/*") if f.is_file())
    )
    nearest = next(p for p in (run_dir, *run_dir.resolve().parents) if p.is_dir())
    need, free = one * (keep_last + 2) - there, shutil.disk_usage(nearest).free
    if need > free:
        what = f"{keep_last + 2} checkpoints of {one / 1e9:.2f} GB need {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f}"
        raise ValueError(
            f"--output_dir: {run_dir}: {what}; free some space, lower --keep_last, or choose another folder"
        )


def move_aside(run_dir) -> Path | None:
    """Rename a run folder that holds a run to the next free name (runs/simple-1), and return that; None where there is none."""
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in ("run.json", "metrics.jsonl", "checkpoints")):
        return None
    free = (run_dir.with_name(f"{run_dir.name}-{n}") for n in itertools.count(1))
    return run_dir.rename(next(path for path in free if not path.exists()))


def trim_samples(path: Path, step: int) -> int | None:
    """Take samples behind `step` out of samples.txt (an attempt that was killed made them); returns the step of the last one left."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    heads = list(re.finditer(r"^--- step (\d+)$", text, re.MULTILINE))
    behind = next((head for head in heads if int(head[1]) > step), None)
    if behind:
        write_file(path, text[: behind.start()].encode())
    kept = heads[: heads.index(behind)] if behind else heads
    return int(kept[-1][1]) if kept else None


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


def _json_object(path: Path) -> dict:
    """What a JSON file holds. Raises ValueError naming it: missing, not a file (a pipe would be waited for), not JSON, no object."""
    way_out = "the checkpoint is damaged, use another one"
    if not os.path.isfile(path):
        raise ValueError(f"{path}: missing, or not a file; {way_out}")
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{path}: not readable as JSON ({' '.join(str(e).split())[:150]}); {way_out}"
        ) from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; {way_out}")
    return found


def verify_checkpoint(folder) -> None:
    """Compare every file with the manifest. Raises ValueError naming the first that differs, or that it does not list."""
    folder = Path(folder)
    manifest = folder / "MANIFEST.json"
    files = _json_object(manifest).get("files")
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
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
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
    state = _json_object(path)
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
