"""
Raw text in, clean training text out.

    python prep_dataset.py gutenberg --book_ids 11 84 1342                  # download, clean, combine
    python prep_dataset.py gutenberg --data_dir RAW --languages all         # a folder of .txt and archives
    python prep_dataset.py extract --archive books.zip --output_dir books   # unpack an archive safely, nothing more
    python prep_dataset.py tokenize --dataset_subset cosmopedia-v2 --max_documents 100000     # documents -> token shards
    python prep_dataset.py tokenize --dataset_name my_texts --tokenizer bpe:8192 --num_shards 4 --shard_index 0
    python prep_dataset.py merge --parts token_cache/my_texts-*-part-*      # what four machines built, as one folder
    python prep_dataset.py info --path token_cache/my_texts-0123456789ab    # counts; `verify` reads and compares every byte

`gutenberg` writes combined_1.txt, combined_2.txt, ... with a line `<|endoftext|>` between books, and report.json: what
was done to each file and why. Downloads are kept in OUTPUT_DIR/raw; the same line again fetches only what is missing.
39 books (19 MB) take about 5 s on two CPU cores. `pretraining_simple.py --data_dir OUTPUT_DIR` trains on the result.
`tokenize` streams documents of the hub or of local files into --cache_dir; pretraining_advanced.py does the same by itself.

Project Gutenberg asks robots to be slow and to use a mirror for much (https://www.gutenberg.org/policy/robot_access.html):
books come one at a time with a pause, under a user agent that names this program.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C during the imports leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from parts.base.files import add_file_name, make_folder, rename_durably, sha256_of
from parts.base.text import EOT
from parts.cli.config import parse
from parts.cli.launch import error_line, run_script
from parts.cli.progress_bar import tqdm
from parts.data import corpus, gutenberg, shards
from parts.data.archives import extract_archive, is_archive
from parts.data.tokenizers import Tokenizer, byte_tokenizer, gpt2_tokenizer, make_tokenizer

SEPARATOR = re.compile(rf"^{re.escape(EOT)}$", re.MULTILINE)  # inside a line it is text
# A dozen classics, 7 MB: what pretraining_simple.py fetches where there is nothing to read.
CLASSICS = (11, 35, 36, 43, 46, 74, 76, 84, 98, 345, 1342, 1661)


@dataclass
class GutenbergConfig:
    """Download (or read), clean and combine Project Gutenberg books."""

    book_ids: tuple[int, ...] = ()  # Project Gutenberg numbers to download
    # folder of .txt files and .zip/.tar archives of them, or one archive
    data_dir: str | None = None
    output_dir: str = "gutenberg_preprocessed"  # where combined_N.txt and report.json go
    languages: tuple[str, ...] = ("en",)  # ISO 639-1 codes to keep, or: all
    keep_duplicates: bool = False  # keep further editions of a book that is already in
    strip_boilerplate: bool = True  # take off headers, licences, small print, credits and footers
    unwrap: bool = True  # put each prose paragraph on one line; verse and tables keep their lines
    max_size_mb: float = 500.0  # MB of text per combined file; a larger book gets a file of its own
    max_extract_mb: float = 4000.0  # MB that one archive may unpack to
    workers: int | None = None  # processes, each holding one book at a time; None: one per CPU core
    # where books come from; for many, use a mirror near you
    mirror: str = "https://www.gutenberg.org"
    pause_s: float = 2.0  # seconds between two downloads
    debug: bool = False  # show the traceback of an error


@dataclass
class ExtractConfig:
    """Unpack an archive, whole or not at all; nothing leaves the folder, no links, no bombs."""

    archive: str  # .zip, .tar, .tar.gz, .tar.bz2, .tar.xz (.rar with the package rarfile)
    output_dir: str  # folder to unpack into
    max_extract_mb: float = 4000.0  # MB that it may unpack to
    debug: bool = False  # show the traceback of an error


@dataclass
class TokenizeConfig:
    """Tokenise documents into token shards: from the hub, a folder in its layout, parquet, jsonl(.gz), or text files."""

    # name on the hub, or path of a folder or file
    dataset_name: str = "HuggingFaceTB/smollm-corpus"
    # such as cosmopedia-v2:0.7,fineweb-edu-dedup:0.3; None: cosmopedia-v2 of smollm-corpus, else all
    dataset_subset: str | None = None
    text_field: str | None = None  # column with the text; None: text, else content
    tokenizer: str = "gpt2"  # gpt2, bpe, bpe:8192, bytes, or a tokenizer.json
    cache_dir: str = "token_cache"  # where folders of token shards go, one for each combination of these settings
    max_documents: int | None = None  # stop after that many documents; None: all
    val_share: float = 0.01  # share of the documents that is held out for validation, by their hash
    # read from the hub as it goes; otherwise download the whole subset first
    streaming: bool = True
    num_shards: int = 1  # machines or processes that share the work
    shard_index: int = 0  # which of them this is, from 0
    debug: bool = False  # show the traceback of an error


SmollmConfig = TokenizeConfig  # its earlier name


@dataclass
class MergeConfig:
    """Make one folder of token shards of the parts that `tokenize --num_shards N --shard_index I` wrote."""

    parts: tuple[str, ...]  # the N folders
    debug: bool = False  # show the traceback of an error


@dataclass
class InfoConfig:
    """Say what is in a folder of token shards."""

    path: str  # the folder
    debug: bool = False  # show the traceback of an error


@dataclass
class VerifyConfig(InfoConfig):
    """Read a folder of token shards whole and compare it with its hashes."""


# ---------------------------------------------------------------------------------------------------- download

USER_AGENT = "pretraining-in-plain-scripts/0.1 (prep_dataset.py; one book at a time)"
TIMEOUT_S = 20  # per connection and read
DEADLINE_S = 600  # per book; a server that sends a byte now and then never times out
MAX_BOOK_BYTES = 64 << 20  # the longest books have 10 MB


def fetch(url: str, path: Path) -> None:
    """Download url to path through a `.part` file beside it. Raises OSError; a file under its own name is whole."""
    part = path.with_name(path.name + ".part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as response,
            open(part, "wb") as out,
        ):
            if "html" in response.headers.get("Content-Type", ""):
                raise OSError("the server sent a web page instead of a text")
            n, started = 0, time.monotonic()
            while block := response.read1(1 << 16):
                n += len(block)
                if time.monotonic() - started > DEADLINE_S:
                    raise OSError(f"not complete after {DEADLINE_S} s")
                if n > MAX_BOOK_BYTES:
                    raise OSError(f"longer than {MAX_BOOK_BYTES >> 20} MB")
                out.write(block)
            announced = response.headers.get("Content-Length")
            if announced and announced.isdecimal() and n != int(announced):
                raise OSError(f"cut off after {n:,} of {int(announced):,} bytes")
            if n == 0:
                raise OSError("empty")
        rename_durably(part, path)
    except ValueError as e:  # urllib's word for an address it cannot read
        raise OSError(f"{url}: {e}") from e
    finally:
        part.unlink(missing_ok=True)


def download_books(
    book_ids, folder, mirror: str, pause_s: float
) -> tuple[list[Path], dict[int, str]]:
    """
    Fetch each book that `folder` lacks, in order; returns (paths, {book id: why it failed}).

    A book is tried under the two addresses Project Gutenberg uses. Where no server answers, at the first book or three
    times in a row, the rest is not tried: without a network a dozen books would cost a dozen time-outs.
    """
    folder = Path(folder)
    make_folder(folder)
    paths, failed, fetched, silent = [], {}, 0, 0
    for n in tqdm(book_ids, desc="downloading", unit="book"):
        path = folder / f"pg{n}.txt"
        if silent >= (3 if paths else 1) and not path.exists():
            failed[n] = "not tried, no server answered before"
            continue
        if not path.exists():
            if fetched:
                time.sleep(pause_s)
            fetched += 1
            for address in (f"cache/epub/{n}/pg{n}.txt", f"files/{n}/{n}-0.txt"):
                try:
                    fetch(f"{mirror.rstrip('/')}/{address}", path)
                    silent = 0
                    break
                except urllib.error.HTTPError as e:
                    failed[n], silent = f"HTTP {e.code} {e.reason}", 0
                except OSError as e:
                    failed[n], silent = str(getattr(e, "reason", e)), silent + 1
                    break
        if path.exists():
            failed.pop(n, None)
            paths.append(path)
    return paths, failed


# --------------------------------------------------------------------------------------------- clean and combine


def clean_book(path: Path, strip: bool, unwrap: bool) -> dict:
    """
    One file, read and cleaned: {"text", "language", "sketch", ...}, or {"status", "reason"} where it cannot be used.

    Runs in a worker process and holds one book at a time.
    """
    try:
        data = path.read_bytes()
        if not data.strip():
            return {"status": "empty", "reason": "the file is empty"}
        raw, encoding = gutenberg.decode(data)
    except OSError as e:
        return {"status": "unreadable", "reason": error_line(e)}
    except ValueError as e:
        return {"status": "not a book", "reason": str(e)}
    stripped = gutenberg.strip_boilerplate(raw) if strip else gutenberg.Stripped(raw)
    # A text that has the separator as a line of its own must not be cut in two there.
    text = SEPARATOR.sub("<| endoftext |>", gutenberg.normalise(stripped.text))
    text = gutenberg.unwrap(text) if unwrap else text
    done = {
        "encoding": encoding,
        "chars_in": len(raw),
        "chars_out": len(text),
        "header_chars": stripped.header_chars,
    }
    done |= {"footer_chars": stripped.footer_chars, "notices_removed": stripped.notices}
    reason = gutenberg.why_no_book(text)
    if not reason and stripped.notice_chars > max(len(text), 5000):
        reason = "mostly licence and notices of Project Gutenberg"
    if reason:
        return {"status": "not a book", "reason": reason, **done}
    return {
        "text": text,
        "sketch": gutenberg.sketch(text),
        "language": gutenberg.language_of(text, raw),
        **done,
    }


def _leave_signals_to_the_parent() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends Ctrl-C to every process: only one is to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _cleaned(paths, n_workers: int, *options):
    """clean_book of each path, in order; at most two books per worker wait, so memory does not grow with the list."""
    if n_workers == 1:
        yield from (clean_book(path, *options) for path in paths)
        return
    with ProcessPoolExecutor(n_workers, initializer=_leave_signals_to_the_parent) as pool:
        try:
            waiting, left = deque(), iter(paths)
            while True:
                while len(waiting) < 2 * n_workers and (path := next(left, None)) is not None:
                    waiting.append(pool.submit(clean_book, path, *options))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _sources(
    config: GutenbergConfig, work: Path
) -> tuple[dict[str, Path], list[dict], dict[int, str]]:
    """Every file to read, by the name the report gives it, in order; what is no text at all; downloads that failed."""
    files, ignored, failed = {}, [], {}
    if config.book_ids:
        paths, failed = download_books(
            config.book_ids, Path(config.output_dir) / "raw", config.mirror, config.pause_s
        )
        files |= {f"raw/{path.name}": path for path in paths}
    found = []
    if config.data_dir:
        folder = Path(config.data_dir)
        if not folder.exists():
            raise FileNotFoundError(
                f"--data_dir: {folder} does not exist; give a folder of .txt files or an archive of them"
            )
        folder, output = folder.resolve(), Path(config.output_dir).resolve()
        if folder == output:
            raise ValueError(
                f"--output_dir: {config.output_dir} is also --data_dir; choose another folder for the result"
            )
        found = (
            [folder]
            if folder.is_file()
            else sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink())
        )
        if not folder.is_relative_to(output):  # an earlier result inside the folder is no source
            found = [p for p in found if not p.is_relative_to(output)]
        folder = folder.parent if folder.is_file() else folder
    for path in found:
        name = path.relative_to(folder).as_posix()
        if is_archive(path):
            unpacked = work / "unpacked" / name
            extract_archive(path, unpacked, config.max_extract_mb)
            inside = {
                f"{name}/{p.relative_to(unpacked).as_posix()}": p
                for p in sorted(unpacked.rglob("*"))
                if p.is_file()
            }
        else:
            inside = {name: path}
        for inner, p in inside.items():
            if p.suffix.lower() == ".txt":
                files[inner] = p
            else:
                ignored.append({"file": inner, "status": "ignored", "reason": "no .txt file"})
    return files, ignored, failed


def prepare_gutenberg(config: GutenbergConfig) -> dict:
    """
    Download, clean and combine; returns the report that is also written to OUTPUT_DIR/report.json.

    The files appear under their names only when all are written. Raises ValueError or FileNotFoundError for bad
    input or where no book is left, OSError where the output cannot be written; an earlier result is then untouched.
    """
    if not config.book_ids and not config.data_dir:
        raise ValueError("--book_ids or --data_dir: say which books, such as --book_ids 11 84 1342")
    n_workers = config.workers if config.workers is not None else os.cpu_count() or 1
    for name, value in (
        ("workers", n_workers),
        ("max_size_mb", config.max_size_mb),
        ("max_extract_mb", config.max_extract_mb),
    ):
        if not value > 0:
            raise ValueError(f"--{name}: {value} must be positive")
    output = Path(config.output_dir)
    work = output / ".preparing.part"
    shutil.rmtree(work, ignore_errors=True)  # of an attempt that was killed
    try:
        make_folder(work)
        files, rows, failed = _sources(config, work)
        rows += [
            {"file": f"raw/pg{n}.txt", "status": "not downloaded", "reason": why}
            for n, why in failed.items()
        ]
        if not files:
            why = f"; {rows[0]['file']}: {rows[0]['reason']}" if rows else ""
            raise ValueError(f"{config.data_dir or config.mirror}: no .txt files to read{why}")
        n_files = _combine(config, work, files, rows, min(n_workers, len(files)))
        counts = Counter(row["status"] for row in rows)
        report = {
            "version": 1,
            "settings": asdict(config),
            "counts": dict(counts),
            "combined_files": n_files,
            "files": rows,
        }
        if not counts["kept"]:
            causes = ", ".join(f"{n} {status}" for status, n in counts.items())
            first = next((f"{row['file']}: {row['reason']}" for row in rows), "")
            raise ValueError(
                f"{config.data_dir or 'downloads'}: no book is left ({causes}; {first}); see --languages, --keep_duplicates"
            )
        (work / "report.json").write_text(
            json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        for old in output.glob(
            "combined_*.txt"
        ):  # of an earlier, longer result; other files are not ours
            if (
                re.fullmatch(r"combined_\d+\.txt", old.name)
                and int(old.stem.removeprefix("combined_")) > n_files
            ):
                old.unlink()
        for new in (
            *sorted(work.glob("combined_*.txt")),
            work / "report.json",
        ):  # the report last: it says complete
            rename_durably(new, output / new.name)
    except OSError as e:
        add_file_name(e, output)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # leave no empty folder behind a line that failed
            output.rmdir()
    return report


def _combine(
    config: GutenbergConfig, work: Path, files: dict[str, Path], rows: list[dict], n_workers: int
) -> int:
    """Clean all files into work/combined_N.txt, one row of the report each; returns the number of combined files."""
    editions, out, n, size = gutenberg.Editions(), None, 0, 0
    progress = tqdm(
        total=len(files),
        desc="cleaning",
        unit="book",
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    try:
        for name, book in zip(
            files,
            _cleaned(files.values(), n_workers, config.strip_boilerplate, config.unwrap),
            strict=True,
        ):
            progress.update()
            text, mine = book.pop("text", None), book.pop("sketch", None)
            row = {"file": name, **book}
            rows.append(row)
            if text is None:
                continue
            if "all" not in config.languages and book["language"] not in config.languages:
                row |= {
                    "status": "other language",
                    "reason": f"{book['language']}, not among {' '.join(config.languages)}",
                }
                continue
            if not config.keep_duplicates:
                if twin := editions.twin_of(mine):
                    row |= {"status": "duplicate", "reason": f"{twin[1]:.0%} the same as {twin[0]}"}
                    continue
                editions.add(name, mine)
            n_bytes = len(text.encode())
            if out is None or size + n_bytes > config.max_size_mb * 1e6:
                if out:
                    out.close()
                n, size = n + 1, 0
                out = open(work / f"combined_{n}.txt", "w", encoding="utf-8", newline="\n")  # noqa: SIM115
            out.write(f"\n{EOT}\n{text}" if size else text)
            size += n_bytes
            row |= {"status": "kept", "reason": book["language"], "output": f"combined_{n}.txt"}
    finally:
        progress.close()
        if out:
            out.close()
    return n


# ------------------------------------------------------------------------------------------------- reading it back


def read_documents(path) -> list[str]:
    """
    The documents of a folder: what prep_dataset.py wrote (combined_*.txt), or any .txt files in and below it.

    Documents are what stands between lines `<|endoftext|>`; without such lines each file is one. Order is by name.
    Raises FileNotFoundError, or ValueError naming the first file that is not UTF-8 text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--data_dir: {path} does not exist; give a folder of .txt files")
    prepared = (path / "report.json").exists() and (path / "combined_1.txt").exists()
    files = (
        [path]
        if path.is_file()
        else sorted(path.glob("combined_*.txt") if prepared else path.rglob("*.txt"))
    )
    files = [
        file for file in files if not (file.parent / "run.json").exists()
    ]  # samples of a run in here are not its text
    if not files:
        raise ValueError(
            f"--data_dir: {path} has no .txt files; prep_dataset.py gutenberg --data_dir {path} unpacks archives"
        )
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            what = f"byte {e.object[e.start]:#04x} at offset {e.start:,} is not UTF-8"
            raise ValueError(
                f"{file}: {what}; convert it, or let prep_dataset.py gutenberg --data_dir {path} find its encoding"
            ) from e
        if "\0" in text:
            raise ValueError(f"{file}: a binary file (it has NUL bytes); remove it from {path}")
        documents += [
            document.strip("\n") for document in SEPARATOR.split(text) if document.strip()
        ]
    if not documents:
        raise ValueError(
            f"--data_dir: all {len(files)} .txt files of {path} are empty; give some text"
        )
    uncleaned = sum(
        "START OF TH" in d[:20_000] and "PROJECT GUTENBERG" in d[:20_000] for d in documents
    )
    if uncleaned:
        print(
            f"note: {uncleaned} documents carry Project Gutenberg's header; prep_dataset.py gutenberg --data_dir {path} takes it off"
        )
    return documents


def load_documents(data_dir: str | None) -> tuple[list[str], str]:
    """
    The texts to train on and where they come from, in this order: the given folder; books prepared in ./gutenberg_preprocessed;
    a dozen classics, fetched and prepared there; without a network the English that comes with Python.
    """
    if data_dir is not None:
        if not data_dir:
            raise ValueError("--data_dir: is empty text; name a folder, or leave the flag out")
        return read_documents(data_dir), data_dir
    books = GutenbergConfig(book_ids=CLASSICS)
    if not (Path(books.output_dir) / "report.json").exists():
        try:
            prepare_gutenberg(books)
        except (OSError, ValueError) as e:
            print(
                f"no --data_dir, and Project Gutenberg is out of reach ({error_line(e)}): reading the English that Python carries"
            )
            return corpus.python_docs(), "Python's documentation"
    return read_documents(books.output_dir), books.output_dir


# ---------------------------------------------------------------------------------------------------- token shards


def _tokenizer_of(spec: str, config: TokenizeConfig) -> Tokenizer:
    """The tokenizer of --tokenizer. No other one instead: a cache of other ids would be a surprise for months."""
    if spec in ("gpt2", "auto"):
        try:
            return gpt2_tokenizer()
        except OSError as e:
            what = (
                f"GPT-2's vocabulary is neither in tiktoken's cache nor reachable ({error_line(e)})"
            )
            raise ValueError(
                f"--tokenizer: {what}; set TIKTOKEN_CACHE_DIR to a folder that holds it, or give bpe, bytes or a file"
            ) from e
    if spec.split(":")[0] != "bpe":
        return byte_tokenizer() if spec == "bytes" else Tokenizer.load(spec)
    whole = corpus.Corpus(
        config.dataset_name,
        config.dataset_subset,
        config.text_field,
        config.max_documents,
        config.streaming,
    )
    texts = (row["text"] for rows, _ in whole.chunks(None) for row in rows)
    return make_tokenizer(
        spec, (text for text in texts if not corpus.in_validation(text, config.val_share))
    )


def _refuse_other_settings(config: TokenizeConfig, tokenizer_key: str) -> None:
    """Ready-made shards are what they are: a setting that asks for something else would be ignored."""
    source = shards.read_index(config.dataset_name)["source"]
    made = (
        {**source, "tokenizer": tokenizer_key} if source.get("published") else source
    )  # theirs is not told, the flag says it
    asked = {
        name: getattr(config, name)
        for name in ("dataset_subset", "text_field", "max_documents", "val_share")
    }
    for name, value in {**asked, "tokenizer": tokenizer_key}.items():
        if value != TokenizeConfig.__dataclass_fields__[name].default and value != made.get(name):
            what = f"--{name}: {value}, but {config.dataset_name} is ready-made with {made.get(name, 'another choice')}"
            raise ValueError(f"{what}; leave the flag out, or name the text instead of the shards")


def prepare_tokens(config: TokenizeConfig, build: bool = True) -> Path:
    """
    The folder of token shards that belongs to these settings, built if it is not there and `build` says so; returns its path.

    Its name holds a fingerprint of everything that determines the content, so that no two settings share a folder.
    A folder of ready-made shards is its own result. Raises ValueError for bad settings or data, OSError where it
    cannot be written; the same line again goes on from there.
    """
    name = config.dataset_name
    spec = {"auto": "gpt2", "bpe": "bpe:4096"}.get(config.tokenizer, config.tokenizer)
    file = Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)
    key = sha256_of(file) if file.is_file() else spec
    if any(Path(name).glob("*.bin")):
        _refuse_other_settings(config, key)
        return Path(name)
    if name == TokenizeConfig.dataset_name:
        config.dataset_subset = config.dataset_subset or "cosmopedia-v2"
    if not (
        0 < config.val_share < 1
        and 0 <= config.shard_index < config.num_shards
        and (config.max_documents or 1) > 0
    ):
        what = f"--val_share {config.val_share}, --num_shards {config.num_shards}, --shard_index {config.shard_index}"
        raise ValueError(
            f"{what}, --max_documents {config.max_documents}: a share in (0, 1), an index from 0 to N - 1, a positive limit"
        )
    facts = corpus.facts_of(name, config.dataset_subset, config.text_field, config.max_documents)
    facts |= {"tokenizer": key, "val_share": config.val_share, "writer": shards.WRITER}
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(
        r"[^\w.-]+", "-", "-".join(filter(None, (Path(name).name, config.dataset_subset)))
    )[:80]
    target = Path(config.cache_dir) / f"{slug}-{fingerprint}"
    if config.num_shards > 1:
        target = target.with_name(f"{target.name}-part-{config.shard_index}-of-{config.num_shards}")
        facts |= {"num_shards": config.num_shards, "shard_index": config.shard_index}
    if target.exists() or not build:
        return target
    tokenizer = _tokenizer_of(spec, config)
    work = (config.num_shards, config.shard_index)
    source = corpus.Corpus(
        name,
        config.dataset_subset,
        config.text_field,
        config.max_documents,
        config.streaming,
        *work,
    )
    started, seen = time.monotonic(), Counter()
    with tqdm(
        desc="tokenising", unit=" documents", mininterval=0.1 if sys.stderr.isatty() else 30
    ) as bar:

        def progress(n_documents: int, n_bytes: int, n_tokens: int) -> None:
            seen.update(bytes=n_bytes, tokens=n_tokens)
            rate = seen["bytes"] / 1e6 / max(time.monotonic() - started, 1e-3)
            bar.set_postfix_str(f"{rate:.1f} MB/s, {seen['tokens']:,} tokens", refresh=False)
            bar.update(n_documents)

        def tokenise(rows) -> dict:
            return corpus.tokenise(rows, tokenizer, config.val_share)

        return shards.build(
            target, tokenizer, source.chunks, tokenise, facts, os.cpu_count() or 1, progress
        )


def describe_tokens(folder, index: dict) -> str:
    """Counts of a folder of token shards, in lines for people."""
    name = index["tokenizer"]["name"] if index["tokenizer"] else "gpt2, published shards"
    lines = [f"{folder}: {index['source']['dataset_name']}, tokenizer {name}"]
    for split in ("train", "val"):
        mine = [s for s in index["shards"] if ("val" in s["name"]) == (split == "val")]
        tokens, documents, n_bytes = (
            sum(s.get(key, 0) for s in mine) for key in ("tokens", "documents", "bytes")
        )
        counted = (
            f", {documents:,} documents, {n_bytes:,} bytes of text, {n_bytes / max(tokens, 1):.2f} per token"
            if documents
            else ""
        )
        lines.append(f"{split}: {len(mine)} files, {tokens:,} tokens{counted}")
    return "\n".join([*lines, f"content {shards.content_hash(index)}"])


# ---------------------------------------------------------------------------------------------------- command line

COMMANDS = {
    "gutenberg": GutenbergConfig,
    "extract": ExtractConfig,
    "tokenize": TokenizeConfig,
    "merge": MergeConfig,
    "info": InfoConfig,
    "verify": VerifyConfig,
}
EARLIER_COMMANDS = {"smollm": TokenizeConfig}  # still understood, not listed in --help


def commands_for(argv: list[str]) -> dict:
    """The commands that parse() needs for this line: the earlier names only if it uses one."""
    if not argv or argv[0] in COMMANDS or argv[0].startswith("-"):
        return COMMANDS
    return COMMANDS | EARLIER_COMMANDS


def main(config) -> int:
    """Run the command whose configuration this is; returns the exit code."""
    if isinstance(config, TokenizeConfig | MergeConfig):
        merging = isinstance(config, MergeConfig)
        folder = (
            shards.merge(config.parts, config.parts[0].rsplit("-part-", 1)[0])
            if merging
            else prepare_tokens(config)
        )
        print(describe_tokens(folder, shards.read_index(folder)))
        return 0
    if isinstance(config, InfoConfig):
        look = shards.verify if isinstance(config, VerifyConfig) else shards.read_index
        print(describe_tokens(config.path, look(config.path)))
        if isinstance(config, VerifyConfig):
            hashed = shards.read_index(config.path)["tokenizer"] is not None
            print(
                "every byte agrees with its sha256"
                if hashed
                else "sizes agree with the headers; there are no hashes to compare"
            )
        return 0
    if isinstance(config, ExtractConfig):
        n = extract_archive(config.archive, config.output_dir, config.max_extract_mb)
        print(f"{config.archive}: {n} files unpacked into {config.output_dir}")
        return 0
    started = time.time()
    report = prepare_gutenberg(config)
    n_chars = sum(row["chars_out"] for row in report["files"] if row["status"] == "kept")
    for row in report["files"]:
        if row["status"] not in ("kept", "ignored"):
            print(f"{row['status']}: {row['file']}: {row['reason']}")
    counts = ", ".join(f"{n} {status}" for status, n in sorted(report["counts"].items()))
    print(
        f"{counts}; {n_chars / 1e6:.1f} million characters in {config.output_dir}, {time.time() - started:.1f} s; details in report.json"
    )
    if missing := report["counts"].get("not downloaded"):
        raise OSError(
            f"{missing} of {len(config.book_ids)} books could not be downloaded; the others are ready, run the same line again"
        )
    return 0


if __name__ == "__main__":
    run_script(lambda: main(parse(commands_for(sys.argv[1:]))))
