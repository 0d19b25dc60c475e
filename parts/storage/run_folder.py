"""
The folder of a run: claimed by one process at a time, cleaned of what a killed attempt left.

    runs/simple/
        run.json  metrics.jsonl  samples.txt  loss.png  checkpoints/
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from pathlib import Path

from parts.base.files import make_folder, no_empty_folders, write_file
from parts.base.units import format_bytes
from parts.storage.checkpoint import list_checkpoints


@contextlib.contextmanager
def claimed(run_dir, afresh: bool = False):
    """
    Hold the run folder for this process alone; yields a function that moves an earlier run aside.

    With `afresh` that is done at once. If the run does not start, so that there is no run.json,
    nothing of ours is left in the folder. Raises ValueError if it cannot be had.
    """
    run_dir = Path(run_dir)
    if run_dir.resolve() == Path.cwd():
        raise ValueError(
            f"--output_dir: {run_dir} is the current folder; name another one for the run"
        )
    with no_empty_folders(run_dir):
        locks = [_lock(run_dir)]

        def begin_afresh() -> None:
            # the lock moves along with the earlier run, and is held until its successor ends
            if earlier := move_aside(run_dir):
                print(f"the earlier run is kept as {earlier}", flush=True)
                locks.append(_lock(run_dir))

        try:
            if afresh:
                begin_afresh()
            yield begin_afresh
        finally:
            if not (run_dir / "run.json").exists():
                (run_dir / ".lock").unlink(missing_ok=True)
            for lock in locks:
                lock.release()


def _lock(run_dir: Path):
    from filelock import FileLock, Timeout

    try:
        make_folder(run_dir)
        lock = FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout as e:
        raise ValueError(
            f"--output_dir: {run_dir} is in use by another run; wait for it to end, "
            "or choose another folder"
        ) from e
    except OSError as e:
        raise ValueError(
            f"--output_dir: {e.filename or run_dir}: {e.strerror}; choose a writable folder"
        ) from e
    return lock


def clear_leftovers(run_dir) -> None:
    """Delete half-written files of a killed attempt, by name: other files are the user's."""
    run_dir = Path(run_dir)
    for name in ("run.json", "metrics.jsonl", "samples.txt", "loss.png"):
        (run_dir / f"{name}.part").unlink(missing_ok=True)
    for part in (*run_dir.glob("checkpoints/.*.part"), *run_dir.glob("export/.*.part")):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def enough_disk(run_dir, n_bytes: int, keep_last: int, afresh: bool) -> None:
    """
    Raises ValueError if the disk has no room for the checkpoints of a run.

    n_bytes: of one checkpoint. Room is needed for the `keep_last` newest, the best, and the one
    being written; those that exist already count, unless the run begins `afresh`.
    """
    run_dir = Path(run_dir)
    present = 0
    if not afresh:
        files = (f for folder in list_checkpoints(run_dir) for f in folder.iterdir())
        present = sum(f.stat().st_size for f in files if f.is_file())
    nearest = next(p for p in (run_dir, *run_dir.resolve().parents) if p.is_dir())
    need, free = n_bytes * (keep_last + 2) - present, shutil.disk_usage(nearest).free
    if need > free:
        raise ValueError(
            f"--output_dir: {run_dir}: {keep_last + 2} checkpoints of {format_bytes(n_bytes)} need "
            f"{format_bytes(need)}, the disk has {format_bytes(free)}; free some space, lower "
            "--keep_last, or choose another folder"
        )


def move_aside(run_dir) -> Path | None:
    """Rename a run folder to the next free name (runs/simple-1); None if it holds no run."""
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in ("run.json", "metrics.jsonl", "checkpoints")):
        return None
    free = (run_dir.with_name(f"{run_dir.name}-{n}") for n in itertools.count(1))
    return run_dir.rename(next(path for path in free if not path.exists()))


def trim_samples(path: Path, step: int) -> int | None:
    """
    Drop samples of later steps than `step` from samples.txt: a killed attempt made them.

    Returns the step of the last sample that is left, None if there is none.
    """
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    heads = list(re.finditer(r"^--- step (\d+)$", text, re.MULTILINE))
    kept = [head for head in heads if int(head[1]) <= step]
    later = next((head for head in heads if int(head[1]) > step), None)
    if later:
        kept = heads[: heads.index(later)]
        write_file(path, text[: later.start()].encode())
    return int(kept[-1][1]) if kept else None
