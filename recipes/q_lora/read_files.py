"""
Rows {repo, path, license, text} of a folder of code files, of jsonl or parquet, or of the hub.

    for row in rows("FOLDER", extensions=(".q", ".k")): row["text"]

In a folder, a repository is a folder with .git, or else the first folder below it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from parts.base.text import one_line, without_surrogates
from parts.data import corpus, sources
from parts.data.readers import json_rows

EXTENSIONS = (".q", ".k")
# column -> its names elsewhere, the first that there is
COLUMNS = {
    "repo": ("repo", "repo_name", "repository", "repository_name", "max_stars_repo_name"),
    "path": ("path", "file_path", "max_stars_repo_path"),
    "license": ("license", "licence", "licenses", "max_stars_repo_licenses"),
    "text": ("text", "content", "code"),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def rows(name: str, extensions=EXTENSIONS, leave_out=(), not_read=None):
    """
    Yield {repo, path, license, text} of a folder, file or dataset on the hub, in order.

    All but `text` may be None. `leave_out` are absolute paths to ignore; `not_read` counts what is
    passed over, by reason. Raises FileNotFoundError, or ValueError that names the row.
    """
    not_read = Counter() if not_read is None else not_read
    for where, found in _found(name, extensions, leave_out, not_read):
        row = _with_our_columns(found, where)
        text = row["text"]
        if text is None or not text.strip():
            not_read["rows without text"] += 1
        elif text != without_surrogates(text):
            not_read["not UTF-8 text"] += 1
        elif "\0" in text:
            not_read["not text, it has NUL bytes"] += 1
        else:
            yield row


def _found(name: str, extensions, leave_out, not_read: Counter):
    """(where it is, for messages; row as it stands there) of everything that is to be read."""
    root = Path(name)
    ends = {f".{end.lower().lstrip('.')}" for end in extensions}
    fix = "give a folder of code files, a jsonl file, or a name on the hub"
    if not name:
        raise ValueError(f"--input: is empty; {fix}")
    if not os.path.lexists(root):
        looks_local = sources.kind_of(root) or root.suffix.lower() in ends
        if looks_local or not HUB_NAME.fullmatch(name):
            raise FileNotFoundError(f"--input: {name} does not exist; {fix}")
        with corpus.named_errors(name):
            stream = corpus.load_hub(name, None, streaming=True, flag="--input")
            yield from ((f"{name}: row {n:,}", row) for n, row in enumerate(stream, 1))
        return
    code, tables = _files(root, ends, leave_out, not_read)
    for path in code:
        repo, inside = _repository(
            root, path.relative_to(root) if path != root else Path(root.name)
        )
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        yield str(path), {"repo": repo, "path": inside, "text": text}
    for path in tables:
        yield from _table_rows(path)


def _files(root: Path, ends: set, leave_out, not_read: Counter) -> tuple[list[Path], list[Path]]:
    """(code files, or if there are none, []; tables) of a path. Raises ValueError."""
    found = [(root, sources.why_unreadable(root))]
    if root.is_dir():
        found = sources.entries(root, "--input")
    found = [(p, why) for p, why in found if Path(os.path.abspath(p)) not in leave_out]
    readable = [path for path, why in found if why is None]
    code = [path for path in readable if path.suffix.lower() in ends]
    tables = [path for path in readable if sources.kind_of(path) in ("json", "parquet", "arrow")]
    tables = [] if code else tables
    chosen = {*code, *tables}
    not_read.update(why or sources.end_of(p) for p, why in found if p not in chosen)
    if not chosen:
        has = ", ".join(f"{n:,} {reason}" for reason, n in sorted(not_read.items()))
        what = f"{root} has no {', '.join(sorted(ends))}, .jsonl or .parquet file"
        fix = "name the endings of your files with --extensions"
        raise ValueError(f"--input: {what} (it has {has or 'nothing else'}); {fix}")
    return code, tables


def _repository(root: Path, relative: Path) -> tuple[str | None, str]:
    """(repository of a code file or None, its path in it)."""
    parts = relative.parts
    for n in range(len(parts)):
        if (root.joinpath(*parts[:n]) / ".git").exists():
            return "/".join(parts[:n]) or root.resolve().name, "/".join(parts[n:])
    if len(parts) == 1:
        return None, parts[0]
    return parts[0], "/".join(parts[1:])


def _table_rows(path: Path):
    """(where, row) of a jsonl, parquet or Arrow file."""
    kind = sources.kind_of(path)
    if kind == "json":
        yield from ((f"{path}: line {n:,}", row) for n, row in json_rows(path))
        return
    try:
        import datasets
    except ImportError as e:
        what = f"{path}: needs the package datasets ({e})"
        raise ValueError(f"--input: {what}; pip install datasets, or give a jsonl file") from e
    with corpus.named_errors(str(path)):
        stream = datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True)
        yield from ((f"{path}: row {n:,}", row) for n, row in enumerate(stream, 1))


def _with_our_columns(found: dict, where: str) -> dict:
    """A row with the columns of COLUMNS. Raises ValueError if it has no text, or other values."""
    row = {}
    for column, names in COLUMNS.items():
        name = next((name for name in names if name in found), None)
        if name is None and column == "text":
            what = f"has no column {' or '.join(names)}"
            columns = one_line(", ".join(map(str, found)), 150)
            raise ValueError(f"--input: {where}: {what}; its columns are {columns or 'none'}")
        value = found.get(name)
        if column == "license" and isinstance(value, list):  # all that a tool has found in it
            value = " AND ".join(map(str, value)) or None
        if value is not None and not isinstance(value, str):
            what = f"{name} holds {type(value).__name__}, not text"
            raise ValueError(f"--input: {where}: {what}")
        row[column] = value if column == "text" or not value else without_surrogates(value)
    return row
