"""
Files that survive a kill and a power cut.

Write under a temporary name, fsync, rename, fsync the folder.

    write_file(path, data)               one small file, whole or not at all
    rename_durably(part, target)         a finished file or folder gets its final name
    append_lines(path, lines)            a log; a full disk costs a warning, not the run
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from parts.base.text import one_line


def fsync(path) -> None:
    """Make a file or folder durable. Raises OSError."""
    if os.name == "nt":  # Windows syncs neither folders nor files that are open for reading
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_durably(part, target) -> None:
    """Give a finished file or folder its final name: fsync it, rename it, fsync its parent."""
    fsync(part)
    os.replace(part, target)
    fsync(Path(target).parent)


def make_folder(path) -> None:
    """Create a folder and its parents, each of them durable. Raises OSError."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


@contextlib.contextmanager
def no_empty_folders(path):
    """Afterwards delete `path` and the folders above it if they are new, and empty."""
    path = Path(path)
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def work_folder(output, name: str):
    """
    A new folder `name` in a folder to write in: yields it, and deletes it afterwards.

    What a kill left in it is deleted first; `output` too, if it was made for this and is empty.
    """
    work = Path(output) / name
    with no_empty_folders(output):
        shutil.rmtree(work, ignore_errors=True)
        try:
            make_folder(work)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_writable(folder, flag: str) -> None:
    """
    Raises ValueError, naming the flag, if no file can be made in a folder; it may be missing.

    Of a missing one the nearest folder above is tried. It is not made: ranks that check at the same
    time would delete each other's.
    """
    folder = Path(folder)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()  # refuses a name that no folder can have
        nearest = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as e:
        why = f"{folder}: {e.strerror or e}"
        raise ValueError(f"{flag}: {why}; choose a writable folder") from e


def add_file_name(e: BaseException, path) -> None:
    """Set the file name of an OSError that has none: a failed write does not name its file."""
    if isinstance(e, OSError) and e.strerror and not e.filename:
        e.filename = str(path)


def why_not_written(e: Exception, folder) -> str:
    """
    Why a library could not write a file in `folder`, in the system's words.

    torch and numpy only say how many bytes they have written.
    """
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    text = " ".join(str(e).split())
    if found := re.search(r"([\w ]+) \(os error \d+\)", text):
        return found[1].strip()
    if shutil.disk_usage(folder).free < 1 << 20:
        return "No space left on device"
    return f"it cannot be written ({one_line(text, 150)})"


def write_file(path, data: bytes) -> None:
    """Write a small file whole or not at all, through `.part` beside it. Raises OSError."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        make_folder(path.parent)
        part.write_bytes(data)
        rename_durably(part, path)
    except BaseException as e:
        part.unlink(missing_ok=True)
        add_file_name(e, path)
        raise


def append_lines(path, lines: list) -> None:
    """
    Append lines (dicts as JSON) to a text file and empty the list.

    If the disk refuses, print a warning and keep the lines in the list for the next call.
    """
    size = os.path.getsize(path) if os.path.exists(path) else 0
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
        lines.clear()
    except OSError as e:
        if os.path.exists(path):
            os.truncate(path, size)  # half a line would make the rest unreadable
        print(f"warning: {path}: {e.strerror}; the run continues", flush=True)


def sha256_of(path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path, fix: str = "") -> dict:
    """
    The JSON object in a file.

    Raises ValueError that names the file and ends with `fix`, what to do.

    Refuses anything that is not a regular file: reading a pipe would wait forever.
    """
    fix = f"; {fix}" if fix else ""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: missing, or not a file{fix}")
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        reason = one_line(e, 150)
        raise ValueError(f"{path}: not readable as JSON ({reason}){fix}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object{fix}")
    return found
