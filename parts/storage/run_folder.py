"""
The folder of a run: claimed by one process at a time, cleaned of what a killed attempt left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from pathlib import Path

from parts.base.files import make_folder, write_file


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

    make_folder(run_dir)
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
