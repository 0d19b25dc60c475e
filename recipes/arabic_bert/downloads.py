"""
Fetch one link into one file: over HTTP or from the disk, from Google Drive, from the hub.

While a file is incomplete it is NAME.part, beside NAME.part.json, which says what it is the
beginning of: address, length, ETag or date. Another attempt, or another start, resumes there if
the source is still the same, and otherwise begins again.
"""

from __future__ import annotations

import html
import http.client
import importlib.util
import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from parts.base.files import (
    make_folder,
    read_json,
    rename_durably,
    sha256_of,
    write_file,
)
from parts.base.text import one_line, without_surrogates
from parts.cli.launch import error_line
from parts.cli.progress_bar import tqdm
from parts.data.sources import kind_of, why_unreadable

USER_AGENT = "pretraining-in-plain-scripts/0.1 (recipes/arabic_bert/data_collection.py)"
BLOCK_BYTES = 1 << 18
MAX_WAIT_S = 120  # between two tries, whatever the server asks for
SLOW_S = 60  # a server that sends less than SLOW_BYTES in this time is given up
SLOW_BYTES = 60_000
TRY_AGAIN = (408, 425, 429)  # HTTP codes, and all from 500 on, that may pass
ROWS_PER_NOTE = 10_000  # of a dataset: how often the place to resume from is written
NOTE_S = 30


class LinkError(Exception):
    """Why a link failed; another try would not help."""


class Unreachable(LinkError):
    """A server from which not one byte came in all tries."""


@dataclass
class Patience:
    """How long a source is tried: `retries` times in a row without a new byte."""

    retries: int = 5
    backoff_s: float = 1.0  # before the first of them; doubled each time
    timeout_s: float = 30.0  # per connection and read


@dataclass
class _Source:
    """An open source; its stream is at byte `start`."""

    stream: BinaryIO
    start: int
    total: int | None  # bytes of the whole file, None if the server does not say
    facts: dict  # as in NAME.part.json
    is_page: bool = False  # the server calls it HTML


# ------------------------------------------------------------------------------------ one file


def fetch(url: str, path: Path, wanted: dict, patience: Patience, say=print) -> None:
    """
    Fetch an http, https or file address into `path`, through .part beside it.

    wanted: size in bytes and sha256 of the file, each None if unknown. `say` prints a line.
    Raises LinkError; what was fetched before a connection failed is kept for the next call.
    """
    part, n_tries, furthest = part_of(path), 0, 0
    make_folder(path.parent)
    while True:
        try:
            _attempt(url, part, wanted, patience.timeout_s)
            break
        except (OSError, http.client.HTTPException) as e:
            why = _why(e)
            n_bytes = _size(part)
            if n_bytes > furthest:  # it went on: count the tries from here
                n_tries, furthest = 0, n_bytes
            n_tries += 1
            if n_tries > patience.retries:
                if not n_bytes:
                    raise Unreachable(why) from e
                kept = f"{n_bytes:,} bytes are kept, the next start resumes there"
                raise LinkError(f"{why}; {kept}") from e
            wait_s = min(patience.backoff_s * 2 ** (n_tries - 1), MAX_WAIT_S)
            wait_s = min(max(wait_s, getattr(e, "retry_after_s", 0)), MAX_WAIT_S)
            say(f"{path.name}: {why}; try {n_tries} of {patience.retries} in {wait_s:g} s")
            time.sleep(wait_s)
        except ValueError as e:  # no address
            raise LinkError(f"{error_line(e)}: not a usable address") from e
    _publish(part, path)


def _attempt(url: str, part: Path, wanted: dict, timeout_s: float) -> None:
    """Complete `part` and check it. Raises LinkError, OSError or HTTPException."""
    facts = _read_facts(part, url)
    n_before = _size(part) if facts.get("validator") or (facts and wanted["sha256"]) else 0
    if not n_before or n_before != facts.get("total"):
        n_before = _receive(url, part, facts, n_before, wanted, timeout_s)
    try:
        check(part, wanted)
    except LinkError as e:
        forget(part)
        if n_before:  # the two pieces may not belong together
            raise OSError(f"{e}; it was resumed at {n_before:,} bytes") from e
        raise


def _receive(url, part: Path, facts: dict, n_before: int, wanted: dict, timeout_s: float) -> int:
    """Append the rest of the file to `part`, or all of it; returns where it began."""
    source = _open(url, n_before, facts, timeout_s)
    with source.stream as stream:
        if wanted["size"] is not None and source.total not in (None, wanted["size"]):
            what = f"has {source.total:,} bytes, the links file says {wanted['size']:,}"
            raise LinkError(f"{what}; correct it there")
        n_bytes = source.start
        block = _read(stream)
        if not n_bytes and (source.is_page or looks_like_html(block)):
            raise LinkError(f"a web page came instead of the file{_title(block)}")
        with _opened_part(part, n_bytes) as out:
            if not n_bytes:  # not before the old bytes are gone: these are the facts of the new
                write_file(_facts_file(part), json.dumps(source.facts).encode())
            name = part.name.removesuffix(".part")
            bar = {"desc": name, "unit": "B", "unit_scale": True, "mininterval": 1}
            with tqdm(total=source.total, initial=n_bytes, **bar) as progress:
                since_s, since_bytes = time.monotonic(), n_bytes
                while block:
                    _write(out, block, part)
                    n_bytes += len(block)
                    progress.update(len(block))
                    if (now_s := time.monotonic()) - since_s > SLOW_S:
                        if n_bytes - since_bytes < SLOW_BYTES:
                            raise OSError(f"less than {SLOW_BYTES:,} bytes in {SLOW_S} s")
                        since_s, since_bytes = now_s, n_bytes
                    block = _read(stream)
    if source.total is not None and n_bytes != source.total:
        raise OSError(f"cut off after {n_bytes:,} of {source.total:,} bytes")
    return source.start


def _read(stream) -> bytes:
    """The next bytes, as soon as there are any; http.client.read waits for a whole block."""
    return getattr(stream, "read1", stream.read)(BLOCK_BYTES)


def _opened_part(part: Path, n_bytes: int):
    """`part` open for appending after its first n_bytes bytes."""
    try:
        out = open(part, "ab")  # noqa: SIM115  the caller closes it
        out.truncate(n_bytes)
        return out
    except OSError as e:
        raise LinkError(f"{part}: {e.strerror}") from e


def _write(out, block: bytes, part: Path) -> None:
    try:
        out.write(block)
    except OSError as e:  # of the disk here: another try would not help
        raise LinkError(f"{part}: {e.strerror}; free some space") from e


def check(part: Path, wanted: dict) -> None:
    """Raise LinkError if a complete file is empty or not the one of the links file."""
    n_bytes = _size(part)
    if not n_bytes:
        raise LinkError("the file is empty")
    if wanted["size"] not in (None, n_bytes):
        what = f"{n_bytes:,} bytes came, the links file says {wanted['size']:,}"
        raise LinkError(f"{what}; correct it there")
    if wanted["sha256"] and (found := sha256_of(part)) != wanted["sha256"]:
        what = f"its sha256 is {found}, the links file says {wanted['sha256']}"
        raise LinkError(f"{what}; it is damaged, or another version")


def looks_like_html(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page."""
    start = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head"))


def _title(page: bytes) -> str:
    """What a web page calls itself, in quotes; often the reason why it came."""
    found = re.search(r"<title[^>]*>(.*?)</title", page.decode("utf-8", "replace"), re.S | re.I)
    title = one_line(html.unescape(found[1]), 80) if found else ""
    return f": {title!r}" if title else ""


# ------------------------------------------------------------------------------------ sources


def _open(url: str, n_before: int, facts: dict, timeout_s: float) -> _Source:
    """The source from byte n_before on if it is the one of `facts`, else from its beginning."""
    if urlsplit(url).scheme == "file":
        return _open_file(url, n_before, facts)
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if n_before:
        headers["Range"] = f"bytes={n_before}-"
        if facts["validator"]:
            headers["If-Range"] = facts["validator"]
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 416 and n_before:  # shorter than before: another file
                return _open(url, 0, {}, timeout_s)
            why = f"HTTP {e.code} {e.reason}"
            if e.code in TRY_AGAIN or e.code >= 500:
                failure = OSError(why)
                after = e.headers.get("Retry-After", "")
                failure.retry_after_s = int(after) if after.isdecimal() else 0
                raise failure from e
            needs_login = e.code in (401, 403)
            raise LinkError(why + ("; it may need a login" if needs_login else "")) from e
    start, total = 0, _number(response.headers.get("Content-Length"))
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start, total = (int(span[1]), _number(span[2])) if span else (-1, None)
    found = {"url": url, "total": total, "validator": _validator(response.headers)}
    is_same = facts.get("total") == total and found["validator"] in (None, facts.get("validator"))
    if start and not (start == n_before and is_same):
        response.close()
        return _open(url, 0, {}, timeout_s)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise LinkError("the server compresses it for the transfer, which was not asked for")
    is_page = "html" in response.headers.get("Content-Type", "")
    return _Source(response, start, total, found, is_page)


def _open_file(url: str, n_before: int, facts: dict) -> _Source:
    """As _open, of a file:// address."""
    address = urlsplit(url)
    if address.netloc not in ("", "localhost"):
        what = f"the file is on {address.netloc}"
        raise LinkError(f"{what}; an address of this machine begins with file:///")
    path = Path(urllib.request.url2pathname(address.path))
    if not os.path.lexists(path):
        raise LinkError(f"{path}: no such file")
    if why := why_unreadable(path):
        raise LinkError(f"{path}: is a {why}")
    try:
        stat = path.stat()
        stream = open(path, "rb")  # noqa: SIM115  the caller closes it
    except OSError as e:
        raise LinkError(error_line(e)) from e
    found = {"url": url, "total": stat.st_size, "validator": str(stat.st_mtime_ns)}
    start = n_before if found == facts else 0
    stream.seek(start)
    return _Source(stream, start, stat.st_size, found)


def _validator(headers) -> str | None:
    """What tells two versions of a file apart, as If-Range takes it; None if there is nothing."""
    etag = headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _why(e: Exception) -> str:
    """A failed connection in a few words."""
    reason = getattr(e, "reason", e)  # of a URLError: what the socket said
    if isinstance(reason, TimeoutError):
        return "the server does not answer"
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
    return one_line(text, 200) or type(e).__name__


# ------------------------------------------------------------------------------------ .part files


def part_of(path: Path) -> Path:
    """Where a file is while it is incomplete."""
    return path.with_name(path.name + ".part")


def forget(part: Path) -> None:
    """Delete an incomplete file and what is known about it."""
    part.unlink(missing_ok=True)
    _facts_file(part).unlink(missing_ok=True)


def _publish(part: Path, path: Path) -> None:
    """Give a complete and checked file its name."""
    rename_durably(part, path)
    _facts_file(part).unlink(missing_ok=True)


def _facts_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_facts(part: Path, url: str) -> dict:
    """What NAME.part.json says, {} if it is missing, damaged or about another address."""
    try:
        facts = read_json(_facts_file(part))
    except ValueError:
        return {}
    return facts if facts.get("url") == url else {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ------------------------------------------------------------------------------------ Google Drive


def drive_id(text: str) -> str | None:
    """The id of a file on Google Drive, from the id itself or an address; None if it has none."""
    if re.fullmatch(r"[\w-]{10,}", text):
        return text
    if not (urlsplit(text).hostname or "").endswith(("google.com", "googleusercontent.com")):
        return None
    found = re.search(r"(?:/d/|[?&]id=)([\w-]{10,})", text)
    return found[1] if found else None


def fetch_from_drive(file_id: str, path: Path, wanted: dict) -> None:
    """Fetch a file from Google Drive through the package gdown. Raises LinkError."""
    try:
        import gdown  # optional: no other link needs it
    except ImportError as e:
        raise LinkError("Google Drive needs the package gdown; pip install gdown") from e
    make_folder(path.parent)
    part = part_of(path)
    try:
        done = gdown.download(id=file_id, output=str(part), resume=True)
    except Exception as e:  # noqa: BLE001  gdown raises errors of its own and of requests
        raise LinkError(f"gdown: {one_line(e, 300) or type(e).__name__}") from e
    if done is None or not part.exists():
        raise LinkError("gdown fetched nothing; the file may be private, or its quota used up")
    try:
        with open(part, "rb") as f:
            head = f.read(BLOCK_BYTES)
        if looks_like_html(head):
            raise LinkError(f"a web page came instead of the file{_title(head)}")
        check(part, wanted)
    except LinkError:
        forget(part)
        raise
    _publish(part, path)


# ------------------------------------------------------------------------------------ the hub


def fetch_dataset(link: dict, path: Path) -> dict:
    """
    Write the texts of a dataset to a .jsonl of {"text": ...}; returns its counts for the report.

    link: `dataset`, a name on the hub or a local folder, and if given `config`, `split`,
    `data_files` (a pattern), `text_column`. Raises LinkError. What was written stays in .part, and
    the next call resumes there if the dataset has the same revision.
    """
    make_folder(path.parent)
    part = part_of(path)
    stream, revision = _open_dataset(link)
    about = {name: link.get(name) for name in ("config", "split", "data_files", "text_column")}
    facts = {"url": link["dataset"], "revision": revision, **about}
    before = _read_facts(part, link["dataset"])
    counts = {"rows": 0, "bytes": 0, "empty_rows": 0}
    same = before and revision and all(before.get(k) == v for k, v in facts.items())
    if same and before["bytes"] <= _size(part):
        counts = {name: before[name] for name in counts}
    column = link.get("text_column") or "text"
    try:
        with open(part, "ab") as out:
            out.truncate(counts["bytes"])  # what came after the last note
            bar = {"desc": path.name, "unit": " rows", "mininterval": 1}
            rows = stream.skip(counts["rows"]) if counts["rows"] else stream
            noted_s = time.monotonic()
            for row in tqdm(_rows(rows), initial=counts["rows"], **bar):
                counts["rows"] += 1
                line = _line(row, column)
                counts["empty_rows"] += not line
                _write(out, line, part)
                counts["bytes"] += len(line)
                late = time.monotonic() - noted_s > NOTE_S
                if late or counts["rows"] % ROWS_PER_NOTE == 0:
                    out.flush()
                    write_file(_facts_file(part), json.dumps({**facts, **counts}).encode())
                    noted_s = time.monotonic()
    except OSError as e:
        raise LinkError(error_line(e)) from e
    finally:
        if not counts["bytes"]:
            forget(part)
    if not counts["bytes"]:
        raise LinkError(f"{link['dataset']} has no row with text in the column {column}")
    _publish(part, path)
    return counts


def _open_dataset(link: dict):
    """(stream of rows, its revision or None) of a dataset on the hub or in a local folder."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
        import huggingface_hub
    except ImportError as e:
        what = f"a dataset of the hub needs the package datasets ({one_line(e, 100)})"
        raise LinkError(f"{what}; pip install datasets") from e
    name, pattern, revision = link["dataset"], link.get("data_files"), None
    if pattern and pattern.endswith(".zst") and not importlib.util.find_spec("zstandard"):
        raise LinkError(f"{pattern} needs the package zstandard; pip install zstandard")
    options = {"split": link.get("split") or "train", "streaming": True}
    try:
        where = name
        if not Path(name).is_dir():
            revision = huggingface_hub.HfApi().dataset_info(name, timeout=30).sha
            where = f"hf://datasets/{name}@{revision}"
        if pattern:  # the files themselves: current versions of datasets run no loading script
            kind = kind_of(Path(pattern.removesuffix(".zst")))
            files = f"{where}/{pattern}"
            return datasets.load_dataset(kind, data_files=files, **options), revision
        if revision:
            options["revision"] = revision
        return datasets.load_dataset(name, link.get("config"), **options), revision
    except Exception as e:  # noqa: BLE001  the hub's client raises errors of its http library
        raise LinkError(_of_hub(name, e)) from e


def _rows(stream):
    """The rows; whatever the hub or a damaged file raises as LinkError."""
    try:
        yield from stream
    except Exception as e:  # noqa: BLE001  see _open_dataset
        raise LinkError(f"reading it failed ({one_line(e.__cause__ or e, 300)})") from e


def _of_hub(name: str, e: Exception) -> str:
    who = f"{name} cannot be read" if Path(name).is_dir() else f"the hub did not provide {name}"
    text = f"{who} ({one_line(e, 300) or type(e).__name__})"
    if "gated" in str(e).lower():
        text += "; ask for access on its page and log in: hf auth login"
    return text


def _line(row: dict, column: str) -> bytes:
    """A row as a line of JSON, b"" if it has no text. Raises LinkError if it has no such column."""
    if column not in row:
        what = f"its rows have no column {column}, only {one_line(', '.join(map(str, row)), 150)}"
        raise LinkError(f'{what}; give "text_column" in the links file')
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise LinkError(f"its column {column} holds {type(text).__name__}, not text")
    if not (text or "").strip():
        return b""
    return (json.dumps({"text": without_surrogates(text)}, ensure_ascii=False) + "\n").encode()
