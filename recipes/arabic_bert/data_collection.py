"""
Fetch the corpora that a links file names, and unpack them.

    mkdir -p data && cp recipes/arabic_bert/links.json data/links.json
    python recipes/arabic_bert/data_collection.py --links-json data/links.json \\
        --output-dir ./data/raw --extract

writes into --output_dir

    xml/  text/  google_drive/    the files, and with --extract what was in them
    huggingface/NAME.jsonl        the texts of a dataset, {"text": ...} in each line
    collection_report.json        of each link: fetched, there already or failed and why, bytes

An archive NAME.rar is unpacked into the folder NAME beside it, NAME.bz2 into the file NAME; both
stay. A link that fails is reported and the rest is fetched; the exit code is 1 then, and the same
command fetches what is missing. After Ctrl-C or a kill it resumes in the middle of a file.

The links file has lists or {name: link} under these keys. A link is an address, for the hub a name,
or an object; only "url", "dataset" or "id" must be there:

    xml_links, text_links    {"url": "https://...", "file": "a.rar", "size": 9, "sha256": "...",
                              "keep": "*-sentences.txt"}     keep: of an archive, only these files
    google_drive             {"id": "...", "file": "a.zip", ...}
    huggingface_datasets     {"dataset": "owner/name", "config": "ar", "split": "train",
                              "data_files": "ar/*.jsonl.zst", "text_column": "content"}

file:///... addresses are copied. A link may have a "note", which goes into the report. A .rar needs
the package rarfile and the program unar, Google Drive the package gdown.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C during the imports leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import fnmatch
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from parts.base.files import (
    check_writable,
    make_folder,
    read_json,
    rename_durably,
    sha256_of,
    write_file,
)
from parts.base.text import one_line
from parts.base.units import format_bytes
from parts.cli.config import nearest_name
from parts.cli.launch import error_line, run_script
from parts.data import archives
from parts.data.sources import kind_of
from recipes.arabic_bert.common import parse_script
from recipes.arabic_bert.downloads import (
    LinkError,
    Patience,
    Unreachable,
    check,
    drive_id,
    fetch,
    fetch_dataset,
    fetch_from_drive,
)

REPORT = "collection_report.json"
FOLDERS = {  # key of the links file -> folder in --output_dir
    "xml_links": "xml",
    "text_links": "text",
    "google_drive": "google_drive",
    "huggingface_datasets": "huggingface",
}
OF_A_FILE = {"file", "size", "sha256", "keep", "note"}
FIELDS = {
    "xml_links": {"url", *OF_A_FILE},
    "text_links": {"url", *OF_A_FILE},
    "google_drive": {"id", *OF_A_FILE},
    "huggingface_datasets": {
        *("dataset", "config", "split", "data_files", "text_column", "file", "note"),
    },
}
MAIN_FIELD = {
    "xml_links": "url",
    "text_links": "url",
    "google_drive": "id",
    "huggingface_datasets": "dataset",
}


@dataclass
class CollectConfig:
    """Fetch the corpora that a links file names, and unpack them."""

    links_json: str = "data/links.json"  # what to fetch
    output_dir: str = "data/raw"  # folder for it
    extract: bool = False  # unpack archives and compressed files
    max_extract_mb: float = 50_000.0  # largest size that one archive may unpack to
    retries: int = 5  # tries in a row without a new byte, before a link has failed
    backoff_s: float = 1.0  # seconds before the first of them; doubled each time
    timeout_s: float = 30.0  # seconds to wait for a server
    config: str | None = None  # YAML file with these settings; the command line overrides it
    print_default_config: bool = False  # print such a file and exit
    log_file: str | None = None  # file that gets what is printed, too
    debug: bool = False  # show the traceback of an error


@dataclass
class Link:
    """One entry of the links file."""

    key: str  # of FOLDERS
    name: str  # as in the links file, else the name of the file
    path: Path  # where its file belongs
    entry: dict  # with all fields of FIELDS[key]

    @property
    def target(self) -> Path | None:
        """Where it is unpacked to; None if it is neither archive nor compressed."""
        lower = self.path.name.lower()
        for suffix in sorted((*archives.SUFFIXES, *archives.COMPRESSED), key=len, reverse=True):
            if lower.endswith(suffix) and lower != suffix:
                target = self.path.with_name(self.path.name[: -len(suffix)])
                is_file = not archives.is_archive(self.path)
                if is_file and self.key == "xml_links" and target.suffix != ".xml":
                    # pieces of a dump: arwiki-...1.xml-p1p340838.bz2
                    return target.with_name(target.name + ".xml")
                return target
        return None


# ------------------------------------------------------------------------------------ links file


def read_links(path, output_dir) -> list[Link]:
    """
    The links of a file, in order, with the path of each below output_dir.

    Raises ValueError with the first problem: no such file, an unknown key or field, a wrong value,
    or two links that would have the same file.
    """
    if not Path(path).exists():
        fix = "cp recipes/arabic_bert/links.json there, or write your own"
        raise FileNotFoundError(f"--links_json: {path} does not exist; {fix}")
    found = read_json(path)
    links = []
    for key, entries in found.items():
        if key not in FOLDERS:
            known = ", ".join(FOLDERS)
            nearest = nearest_name(key, FOLDERS) or f"; the keys are {known}"
            raise ValueError(f"{path}: {one_line(key, 50)!r}: no such key{nearest}")
        if isinstance(entries, list):
            named = [("", entry) for entry in entries]
        elif isinstance(entries, dict):
            named = list(entries.items())
        else:
            raise ValueError(f"{path}: {key}: must hold a list of links, or {{name: link}}")
        for n, (name, entry) in enumerate(named, 1):
            where = f"{path}: {key}: {one_line(name, 50) or f'link {n}'}"
            links.append(_link(key, name, entry, Path(output_dir), where))
    if not links:
        raise ValueError(f"{path}: names no link; the keys are {', '.join(FOLDERS)}")
    taken = {}
    for link in links:
        for written in {link.path, link.target} - {None}:
            other = taken.setdefault(written, link)
            if other is not link:
                what = f"{other.name} and {link.name} would both be {written}"
                raise ValueError(f'{path}: {what}; give one of them another "file"')
    return links


def _link(key: str, name: str, entry, output_dir: Path, where: str) -> Link:
    """A checked link. Raises ValueError that begins with `where`."""
    main = MAIN_FIELD[key]
    entry = {main: entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: must be text or {{"{main}": ...}}')
    if unknown := entry.keys() - FIELDS[key]:
        field = min(unknown)
        fields = ", ".join(sorted(FIELDS[key]))
        nearest = nearest_name(field, FIELDS[key]) or f"; the fields are {fields}"
        raise ValueError(f"{where}: {one_line(field, 50)!r}: no such field{nearest}")
    entry = {**dict.fromkeys(FIELDS[key]), **entry}
    for field, value in entry.items():
        if field == "size" and value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: size: must be a number of bytes above 0")
        elif value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{where}: {field}: must be text, and not empty")
    if entry[main] is None:
        raise ValueError(f'{where}: has no "{main}"')
    if sha256 := entry.get("sha256"):
        entry["sha256"] = sha256.lower()
        if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"{where}: sha256: must be 64 hexadecimal digits")
    file = _file_of(key, name, entry, where)
    if not re.fullmatch(r"[^/\\\x00-\x1f\x7f]+", file) or file.startswith("."):
        raise ValueError(f'{where}: {file[:80]!r} is no name for a file; give another "file"')
    if file.endswith((".part", ".part.json")) or len(file.encode()) > 200:
        raise ValueError(f'{where}: a file cannot be named {file[:80]!r} here; give another "file"')
    link = Link(key, name or file, output_dir / FOLDERS[key] / file, entry)
    if entry.get("keep") and not archives.is_archive(file):
        raise ValueError(f"{where}: keep: {file} is no archive")
    return link


def _file_of(key: str, name: str, entry: dict, where: str) -> str:
    """The name of the file of a link. Checks the address, id or dataset."""
    main = entry[MAIN_FIELD[key]]
    if key == "google_drive":
        entry["id"] = drive_id(main)
        if entry["id"] is None:
            raise ValueError(f"{where}: {main[:80]!r} is neither the id of a file nor its address")
        return entry["file"] or name or entry["id"]
    if key == "huggingface_datasets":
        pattern = entry["data_files"]
        if pattern and not kind_of(Path(pattern.removesuffix(".zst"))):
            ends = ".jsonl, .json, .parquet, .txt"
            raise ValueError(f"{where}: data_files: {pattern[:80]!r} does not end with {ends}")
        base = entry["file"] or name or main.rstrip("/").replace("/", "-").lstrip("-.")
        return base if base.endswith(".jsonl") else f"{base}.jsonl"
    address = urlsplit(main)
    if address.scheme not in ("http", "https", "file") or re.search(r"[\s\x00-\x1f]", main):
        what = f"{one_line(main, 80)!r} is no address"
        raise ValueError(f"{where}: {what}; it must begin with https://, http:// or file:///")
    if address.scheme != "file" and not address.hostname:
        raise ValueError(f"{where}: {one_line(main, 80)!r} names no server")
    return entry["file"] or unquote(address.path.rstrip("/").rpartition("/")[2])


# ------------------------------------------------------------------------------------ one link


def collect(link: Link, config: CollectConfig, patience: Patience) -> dict:
    """Fetch one link and unpack it; returns its part of the report. Raises LinkError."""
    result = {}
    wanted = {"size": link.entry.get("size"), "sha256": link.entry.get("sha256")}
    if _is_there(link, wanted):
        result["status"] = "there already"
    else:
        started = time.monotonic()
        if link.target:
            _remove(link.target)  # of another version
        if link.key == "google_drive":
            fetch_from_drive(link.entry["id"], link.path, wanted)
        elif link.key == "huggingface_datasets":
            result |= fetch_dataset(link.entry, link.path)
        else:
            fetch(link.entry["url"], link.path, wanted, patience, say)
        result |= {"status": "fetched", "seconds": round(time.monotonic() - started, 1)}
        result["sha256"] = wanted["sha256"] or sha256_of(link.path)
    result |= {"file": str(link.path), "bytes": link.path.stat().st_size}
    if config.extract and link.target:
        result |= _extract(link, config.max_extract_mb)
    if note := _note_on(link):
        say(f"note: {link.name}: {note}")
        result["notes"] = [note]
    return result


def _is_there(link: Link, wanted: dict) -> bool:
    """Whether the file is there; one that is not as the links file says is fetched again."""
    if not link.path.is_file():
        return False
    try:
        check(link.path, wanted)
        return True
    except LinkError as e:
        say(f"{link.name}: {link.path} is fetched again: {e}")
        return False


def _extract(link: Link, max_mb: float) -> dict:
    """Unpack the file of a link if it is not unpacked yet; returns facts for the report."""
    target = link.target
    if not target.exists():
        try:
            if archives.is_archive(link.path):
                _extract_archive(link, target, max_mb)
            else:
                archives.extract_compressed(link.path, target, max_mb)
        except ValueError as e:
            again = f"; delete {link.path} to fetch it again" if "refused" in str(e) else ""
            raise LinkError(one_line(e) + again) from e
        except OSError as e:
            raise LinkError(error_line(e)) from e
    files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
    n_bytes = sum(path.stat().st_size for path in files)
    return {"extracted": str(target), "extracted_files": len(files), "extracted_bytes": n_bytes}


def _extract_archive(link: Link, target: Path, max_mb: float) -> None:
    """Unpack an archive into the folder `target`, which is complete or not there."""
    work = target.with_name(f".{target.name}.extracting")
    _remove(work)  # left by a kill
    try:
        archives.extract_archive(link.path, work, max_mb)
        if pattern := link.entry["keep"]:
            files = [path for path in work.rglob("*") if path.is_file()]
            kept = [path for path in files if fnmatch.fnmatch(path.name, pattern)]
            if not kept:
                names = one_line(", ".join(sorted(path.name for path in files)), 150)
                raise ValueError(f"{link.path}: no file in it is named {pattern!r}, only {names}")
            for path in set(files) - set(kept):
                path.unlink()
        rename_durably(work, target)
    finally:
        _remove(work)


def _remove(path: Path) -> None:
    """Delete a file or folder of ours, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _note_on(link: Link) -> str | None:
    """What the user may not expect of a file that was fetched and, if asked for, unpacked."""
    path = link.target if link.target and link.target.is_file() else link.path
    if link.key != "text_links":
        return None
    with open(path, "rb") as f:
        head = f.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((b"<?xml", b"<mediawiki")):
        return "it is XML, not text; move it to xml_links"
    return None


# ------------------------------------------------------------------------------------ all links


def say(line: str) -> None:
    """Print a line about a link, at once."""
    print(line, flush=True)


def collect_all(links: list[Link], config: CollectConfig) -> dict:
    """Fetch every link; returns the report, which is written to --output_dir after each of them."""
    output = Path(config.output_dir)
    report = {"version": 1, "links_json": config.links_json, "extract": config.extract}
    report["links"] = []
    for link in links:
        source = {"key": link.key, "name": link.name, "source": link.entry[MAIN_FIELD[link.key]]}
        source |= {"note": link.entry["note"]} if link.entry["note"] else {}
        report["links"].append({**source, "status": "not tried"})
    silent = set()  # servers that did not answer: other links of theirs are tried once
    for n, (link, row) in enumerate(zip(links, report["links"], strict=True), 1):
        _write_report(output, report)
        row["status"] = "interrupted"
        server = urlsplit(link.entry.get("url") or "").netloc
        retries = 0 if server in silent else config.retries
        say(f"[{n}/{len(links)}] {link.name}")
        try:
            row |= collect(link, config, Patience(retries, config.backoff_s, config.timeout_s))
            unpacked = ""
            if "extracted" in row:
                unpacked = f"; {row['extracted']}: {format_bytes(row['extracted_bytes'])}"
            say(f"{link.name}: {row['status']}, {format_bytes(row['bytes'])}{unpacked}")
        except LinkError as e:
            row |= {"status": "failed", "why": one_line(e, 600)}
            print(f"failed: {link.name}: {row['why']}", file=sys.stderr, flush=True)
            if isinstance(e, Unreachable):
                silent.add(server)
        except BaseException:
            _write_report(output, report)
            raise
    _write_report(output, report)
    return report


def _write_report(output: Path, report: dict) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_file(output / REPORT, (text + "\n").encode())


# ------------------------------------------------------------------------------------ command line


def check_config(config: CollectConfig) -> None:
    """Raise ValueError, naming the flag, for a setting that makes no sense."""
    for flag in ("max_extract_mb", "timeout_s"):
        if not getattr(config, flag) > 0:
            raise ValueError(f"--{flag}: {getattr(config, flag)} must be above 0")
    for flag in ("retries", "backoff_s"):
        if not getattr(config, flag) >= 0:
            raise ValueError(f"--{flag}: {getattr(config, flag)} must not be below 0")


@contextlib.contextmanager
def _alone_in(output: Path):
    """Raise ValueError if another process collects into this folder."""
    from filelock import FileLock, Timeout  # here: --help needs none

    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        what = f"{output} is in use by another data_collection.py"
        raise ValueError(f"--output_dir: {what}; wait for it to end") from e
    try:
        yield
    finally:
        lock.release()


def main() -> int:
    """Fetch the links; returns the exit code, 1 if a link failed."""
    config = parse_script(CollectConfig)
    check_config(config)
    links = read_links(config.links_json, config.output_dir)
    check_writable(config.output_dir, "--output_dir")
    make_folder(config.output_dir)
    with _alone_in(Path(config.output_dir)):
        rows = collect_all(links, config)["links"]
    report = Path(config.output_dir) / REPORT
    failed = [row["name"] for row in rows if row["status"] == "failed"]
    if failed:
        what = f"{len(failed)} of {len(rows)} links failed: {one_line(', '.join(failed), 300)}"
        fix = "the same command tries them again and fetches nothing twice"
        print(f"error: {what}; {report} says why; {fix}", file=sys.stderr)
        return 1
    n_fetched = sum(row["status"] == "fetched" for row in rows)
    print(f"{n_fetched} of {len(rows)} links fetched, the others were there; see {report}")
    return 0


if __name__ == "__main__":
    run_script(main)
