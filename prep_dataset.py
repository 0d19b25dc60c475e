"""
Raw text in, clean training text or token shards out.

    python prep_dataset.py gutenberg --book_ids 11 84 1342           # download, clean, combine
    python prep_dataset.py gutenberg --data_dir RAW --languages all  # a folder of .txt, archives
    python prep_dataset.py extract --archive books.zip --output_dir books   # unpack safely
    python prep_dataset.py tokenize --dataset_subset cosmopedia-v2 --max_documents 100000
    python prep_dataset.py tokenize --dataset_name my_texts --num_shards 4 --shard_index 0
    python prep_dataset.py merge --parts token_cache/my_texts-*-part-*      # of four machines
    python prep_dataset.py info --path token_cache/my_texts-0123456789ab    # counts
    python prep_dataset.py verify --path token_cache/my_texts-0123456789ab  # checks every byte

`gutenberg` writes combined_1.txt, combined_2.txt, ... with a line `<|endoftext|>` between books,
and report.json, which says what was done to each file and why. Downloads are kept in
OUTPUT_DIR/raw; a rerun fetches only what is missing. 39 books (19 MB) take about 5 s on two CPU
cores. `pretraining_simple.py --data_dir OUTPUT_DIR` trains on the result.
`tokenize` streams documents of the hub or of local files into token shards in --cache_dir;
pretraining_advanced.py does the same on its own. A build that was stopped resumes.

Project Gutenberg asks robots to be slow and to use a mirror for many books
(https://www.gutenberg.org/policy/robot_access.html): books are fetched one at a time with a pause,
under a user agent that names this program.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C during the imports leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import hashlib
import http.client
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

from parts.base.files import add_file_name, check_writable, make_folder, rename_durably
from parts.base.text import EOT
from parts.cli.config import parse
from parts.cli.launch import error_line, print_notes, run_script
from parts.cli.progress_bar import tqdm
from parts.data import corpus, gutenberg, shard_writer, shards, sources, tokenizers
from parts.data.archives import extract_archive, is_archive
from parts.data.near_duplicates import NearDuplicates, sketch
from parts.data.python_docs import python_docs
from parts.data.tokenizers import Tokenizer, byte_tokenizer, gpt2_tokenizer, make_tokenizer

SEPARATOR = re.compile(rf"^{re.escape(EOT)}$", re.MULTILINE)  # inside a line it is text
# A dozen classics, 7 MB: what pretraining_simple.py fetches if there is nothing to read.
CLASSICS = (11, 35, 36, 43, 46, 74, 76, 84, 98, 345, 1342, 1661)


@dataclass
class GutenbergConfig:
    """Download (or read), clean and combine Project Gutenberg books."""

    book_ids: tuple[int, ...] = ()  # Project Gutenberg numbers to download
    # folder of .txt files and .zip/.tar archives of them, or one archive
    data_dir: str | None = None
    output_dir: str = "gutenberg_preprocessed"  # where combined_N.txt and report.json go
    languages: tuple[str, ...] = ("en",)  # ISO 639-1 codes to keep, or: all
    keep_duplicates: bool = False  # keep further editions of a book that is already included
    strip_boilerplate: bool = True  # remove headers, licences, small print, credits and footers
    unwrap: bool = True  # put each prose paragraph on one line; verse and tables keep their lines
    max_size_mb: float = 500.0  # MB of text per combined file; a larger book gets its own file
    max_extract_mb: float = 4000.0  # MB that one archive may unpack to
    workers: int | None = None  # processes, each holding one book at a time; None: one per CPU core
    mirror: str = "https://www.gutenberg.org"  # server of the books; for many, use one near you
    pause_s: float = 2.0  # seconds between two downloads
    debug: bool = False  # show the traceback of an error


@dataclass
class ExtractConfig:
    """Unpack an archive, whole or not at all; refuses links, bombs and paths out of the folder."""

    archive: str  # .zip, .tar, .tar.gz, .tar.bz2, .tar.xz (.rar with the package rarfile)
    output_dir: str  # folder to unpack into
    max_extract_mb: float = 4000.0  # MB that it may unpack to
    debug: bool = False  # show the traceback of an error


@dataclass
class TokenizeConfig:
    """Tokenise documents of the hub or of parquet, jsonl(.gz) or text files into token shards."""

    # name on the hub, or path of a folder or file
    dataset_name: str = "HuggingFaceTB/smollm-corpus"
    # name, or one:0.7,two:0.3; None: cosmopedia-v2 of the default dataset, all of any other
    dataset_subset: str | None = None
    text_field: str | None = None  # column with the text; None: text, else content
    tokenizer: str = "gpt2"  # gpt2, bpe, bpe:8192, bytes, or a tokenizer.json
    cache_dir: str = "token_cache"  # gets one folder for each combination of these settings
    max_documents: int | None = None  # stop after that many documents; None: all
    val_share: float = 0.01  # share of the documents held out for validation, by their hash
    streaming: bool = True  # read from the hub as needed; otherwise download the subset first
    num_shards: int = 1  # machines or processes that share the work
    shard_index: int = 0  # which of them this is, from 0
    debug: bool = False  # show the traceback of an error


SmollmConfig = TokenizeConfig  # its earlier name


@dataclass
class MergeConfig:
    """Merge the parts that `tokenize --num_shards N --shard_index I` wrote into one folder."""

    parts: tuple[str, ...]  # the N folders
    debug: bool = False  # show the traceback of an error


@dataclass
class InfoConfig:
    """Say what is in a folder of token shards."""

    path: str  # the folder
    debug: bool = False  # show the traceback of an error


@dataclass
class VerifyConfig(InfoConfig):
    """Read a whole folder of token shards and compare it with its hashes."""


# ------------------------------------------------------------------------------------ download

USER_AGENT = "pretraining-in-plain-scripts/0.1 (prep_dataset.py; one book at a time)"
TIMEOUT_S = 20  # per connection and read
DEADLINE_S = 600  # per book; a server that sends a byte now and then never times out
MAX_BOOK_BYTES = 64 << 20  # the longest books have 10 MB


def fetch(url: str, path: Path) -> None:
    """Download url to path through `.part` beside it. Raises OSError if it is not complete."""
    part = path.with_name(path.name + ".part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as response,
            open(part, "wb") as out,
        ):
            if "html" in response.headers.get("Content-Type", ""):
                raise OSError("the server sent a web page instead of a text")
            n_bytes, started = 0, time.monotonic()
            while block := response.read1(1 << 16):
                n_bytes += len(block)
                if time.monotonic() - started > DEADLINE_S:
                    raise OSError(f"not complete after {DEADLINE_S} s")
                if n_bytes > MAX_BOOK_BYTES:
                    raise OSError(f"longer than {MAX_BOOK_BYTES >> 20} MB")
                out.write(block)
            announced = response.headers.get("Content-Length")
            if announced and announced.isdecimal() and n_bytes != int(announced):
                raise OSError(f"cut off after {n_bytes:,} of {int(announced):,} bytes")
            if n_bytes == 0:
                raise OSError("empty")
        rename_durably(part, path)
    except (ValueError, http.client.HTTPException) as e:  # a bad address, or no HTTP server
        raise OSError(f"{url}: {e or type(e).__name__}") from e
    finally:
        part.unlink(missing_ok=True)


def download_books(book_ids, folder, mirror: str, pause_s: float) -> tuple[list, dict[int, str]]:
    """
    Fetch each book that `folder` lacks, in order; returns (paths, {book id: why it failed}).

    A book is tried under the two addresses that Project Gutenberg uses. If no server answers, at
    the first book or three times in a row, the rest is not tried: a dozen time-outs take minutes.
    """
    folder = Path(folder)
    make_folder(folder)
    paths, failed = [], {}
    n_fetched, n_silent = 0, 0
    for n in tqdm(book_ids, desc="downloading", unit="book"):
        path = folder / f"pg{n}.txt"
        if n_silent >= (3 if paths else 1) and not path.exists():
            failed[n] = "not tried, no server answered before"
            continue
        if not path.exists():
            if n_fetched:
                time.sleep(pause_s)
            n_fetched += 1
            for address in (f"cache/epub/{n}/pg{n}.txt", f"files/{n}/{n}-0.txt"):
                try:
                    fetch(f"{mirror.rstrip('/')}/{address}", path)
                    n_silent = 0
                    break
                except urllib.error.HTTPError as e:
                    failed[n] = f"HTTP {e.code} {e.reason}"
                    n_silent = 0
                except OSError as e:
                    failed[n] = str(getattr(e, "reason", e))
                    n_silent += 1
                    break
        if path.exists():
            failed.pop(n, None)
            paths.append(path)
    return paths, failed


# ------------------------------------------------------------------------------------ clean


def clean_book(path: Path, strip: bool, unwrap: bool) -> dict:
    """
    Read and clean one file: {"text", "language", "sketch", ...}, or {"status", "reason", ...}.

    Runs in a worker process and holds one book at a time.
    """
    try:
        data = path.read_bytes()
        if not data.strip():
            return {"status": "empty", "reason": "the file is empty"}
        raw, encoding, n_replaced = gutenberg.decode(data)
    except OSError as e:
        return {"status": "unreadable", "reason": error_line(e)}
    except ValueError as e:
        return {"status": "not a book", "reason": str(e)}
    stripped = gutenberg.strip_boilerplate(raw) if strip else gutenberg.Stripped(raw)
    # A text with the separator on a line of its own must not be cut in two there.
    text = SEPARATOR.sub("<| endoftext |>", gutenberg.normalise(stripped.text))
    text = gutenberg.unwrap(text) if unwrap else text
    facts = {
        "encoding": encoding,
        "replaced_bytes": n_replaced,
        "chars_in": len(raw),
        "chars_out": len(text),
        "header_chars": stripped.header_chars,
        "footer_chars": stripped.footer_chars,
        "notices_removed": stripped.notices,
    }
    reason = gutenberg.why_no_text(raw) or gutenberg.why_no_book(text)
    if not reason and stripped.notice_chars > max(len(text), 5000):
        reason = "mostly licence and notices of Project Gutenberg"
    if reason:
        return {"status": "not a book", "reason": reason, **facts}
    language = gutenberg.language_of(text, raw)
    return {"text": text, "sketch": sketch(text), "language": language, **facts}


def _leave_signals_to_the_parent() -> None:
    # a terminal sends Ctrl-C to all processes, but only one of them may answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _cleaned(paths, n_workers: int, *options):
    """Yield clean_book of each path in order; at most two books per worker are in memory."""
    if n_workers == 1:
        yield from (clean_book(path, *options) for path in paths)
        return
    with ProcessPoolExecutor(n_workers, initializer=_leave_signals_to_the_parent) as pool:
        try:
            waiting, rest = deque(), iter(paths)
            while True:
                while len(waiting) < 2 * n_workers and (path := next(rest, None)) is not None:
                    waiting.append(pool.submit(clean_book, path, *options))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------ combine


def prepare_gutenberg(config: GutenbergConfig) -> dict:
    """
    Download, clean and combine; returns the report that is also written to OUTPUT_DIR/report.json.

    The files get their names only after all are written; if it fails, an earlier result is intact.
    Raises ValueError or FileNotFoundError for bad input or if no book is left, OSError if the
    output cannot be written.
    """
    n_workers = config.workers if config.workers is not None else os.cpu_count() or 1
    _check_gutenberg(config, n_workers)
    output = Path(config.output_dir)
    work = output / ".preparing.part"
    shutil.rmtree(work, ignore_errors=True)  # left by a kill
    try:
        make_folder(work)
        files, rows = _sources(config, work)
        if not files:
            why = f"; {rows[0]['file']}: {rows[0]['reason']}" if rows else ""
            raise ValueError(f"{config.data_dir or config.mirror}: no .txt files to read{why}")
        n_files = _combine(config, work, files, rows, min(n_workers, len(files)))
        counts = Counter(row["status"] for row in rows)
        if not counts["kept"]:
            causes = ", ".join(f"{n} {status}" for status, n in counts.items())
            what = f"no book is left ({causes}; {rows[0]['file']}: {rows[0]['reason']})"
            source = config.data_dir or "downloads"
            raise ValueError(f"{source}: {what}; see --languages, --keep_duplicates")
        report = {
            "version": 1,
            "settings": asdict(config),
            "counts": dict(counts),
            "combined_files": n_files,
            "files": rows,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        (work / "report.json").write_text(text, encoding="utf-8")
        for old in output.glob("combined_*.txt"):  # of an earlier, longer result
            number = re.fullmatch(r"combined_(\d+)\.txt", old.name)
            if number and int(number[1]) > n_files:
                old.unlink()
        # the report last: it says that the result is complete
        for new in (*sorted(work.glob("combined_*.txt")), work / "report.json"):
            rename_durably(new, output / new.name)
    except OSError as e:
        add_file_name(e, output)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # a command that failed leaves no empty folder
            output.rmdir()
    return report


def _check_gutenberg(config: GutenbergConfig, n_workers: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if not config.book_ids and not config.data_dir:
        raise ValueError("--book_ids or --data_dir: say which books, such as --book_ids 11 84 1342")
    sizes = {"max_size_mb": config.max_size_mb, "max_extract_mb": config.max_extract_mb}
    for name, value in {"workers": n_workers, **sizes}.items():
        if not value > 0:
            raise ValueError(f"--{name}: {value} must be positive")


def _sources(config: GutenbergConfig, work: Path) -> tuple[dict[str, Path], list[dict]]:
    """
    ({name in the report: file} of all .txt files in order, rows of the report for the rest).

    Downloads books and unpacks archives into `work`.
    """
    local = _local_sources(config)  # first: a wrong --data_dir must not cost a download
    files, ignored, failed = {}, [], {}
    if config.book_ids:
        folder = Path(config.output_dir) / "raw"
        paths, failed = download_books(config.book_ids, folder, config.mirror, config.pause_s)
        files |= {f"raw/{path.name}": path for path in paths}
    for name, path, reason in local:
        found = {name: (path, reason)}
        if reason is None and is_archive(path):
            unpacked = work / "unpacked" / name
            extract_archive(path, unpacked, config.max_extract_mb)
            inside = sources.entries(unpacked, str(path))
            found = {f"{name}/{p.relative_to(unpacked).as_posix()}": (p, why) for p, why in inside}
        for inner, (p, why) in found.items():
            if why == "broken link":
                ignored.append({"file": inner, "status": "unreadable", "reason": why})
            elif why or sources.kind_of(p) != "text":
                reason = why or "no .txt file"
                ignored.append({"file": inner, "status": "ignored", "reason": reason})
            else:
                files[inner] = p
    others = sources.other_splits([Path(name) for name in files])
    for name, split in others.items():
        del files[name.as_posix()]
        reason = f"of the split {split}"
        ignored.append({"file": name.as_posix(), "status": "ignored", "reason": reason})
    for n, why in failed.items():
        ignored.append({"file": f"raw/pg{n}.txt", "status": "not downloaded", "reason": why})
    return files, ignored


def _local_sources(config: GutenbergConfig) -> list[tuple[str, Path, str | None]]:
    """(name, path, why it is ignored or None) of each file in --data_dir but an earlier result."""
    if not config.data_dir:
        return []
    root, output = Path(config.data_dir), Path(config.output_dir).resolve()
    if not root.exists():
        fix = "give a folder of .txt files or an archive of them"
        raise FileNotFoundError(f"--data_dir: {root} does not exist; {fix}")
    root = root.resolve()
    if root == output:
        what = f"{config.output_dir} is also --data_dir"
        raise ValueError(f"--output_dir: {what}; choose another folder for the result")
    if not root.is_dir():
        return [(root.name, root, sources.why_unreadable(root))]
    found = sources.entries(root, "--data_dir")
    if not root.is_relative_to(output):
        found = [(p, why) for p, why in found if not p.is_relative_to(output)]
    return [(p.relative_to(root).as_posix(), p, why) for p, why in found]


def _combine(config: GutenbergConfig, work: Path, files: dict, rows: list, n_workers: int) -> int:
    """
    Clean all files into work/combined_N.txt; returns the number of combined files.

    Appends one row of the report per file to `rows`.
    """
    editions = NearDuplicates()
    out, n, size = None, 0, 0
    interval_s = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(total=len(files), desc="cleaning", unit="book", mininterval=interval_s)
    books = _cleaned(files.values(), n_workers, config.strip_boilerplate, config.unwrap)
    try:
        for name, book in zip(files, books, strict=True):
            bar.update()
            text, sketch = book.pop("text", None), book.pop("sketch", None)
            row = {"file": name, **book}
            rows.append(row)
            if text is None:
                continue
            if "all" not in config.languages and book["language"] not in config.languages:
                reason = f"{book['language']}, not among {' '.join(config.languages)}"
                row |= {"status": "other language", "reason": reason}
                continue
            if not config.keep_duplicates:
                if twin := editions.twin_of(sketch):
                    row |= {"status": "duplicate", "reason": f"{twin[1]:.0%} the same as {twin[0]}"}
                    continue
                editions.add(name, sketch)
            n_bytes = len(text.encode())
            if out is None or size + n_bytes > config.max_size_mb * 1e6:
                if out:
                    out.close()
                n, size = n + 1, 0
                path = work / f"combined_{n}.txt"
                out = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
            out.write(f"\n{EOT}\n{text}" if size else text)
            size += n_bytes
            row |= {"status": "kept", "reason": book["language"], "output": path.name}
    finally:
        books.close()
        bar.close()
        if out:
            out.close()
    return n


# ------------------------------------------------------------------------------------ read it back


def read_documents(path, flag: str = "--data_dir") -> list[str]:
    """
    The documents of a file or folder of text, as `tokenize` reads them; ordered by name.

    Lines `<|endoftext|>` separate documents; a file without them is one document. Prints what is
    left out. Raises FileNotFoundError, or ValueError naming the first file that cannot be read.
    """
    documents, notes = corpus.documents_of(path, flag)
    prepare = f"prep_dataset.py gutenberg --data_dir {path}"
    heads = [document[:20_000] for document in documents]
    n_raw = sum("START OF TH" in head and "PROJECT GUTENBERG" in head for head in heads)
    if n_raw:
        notes.append(f"{n_raw} documents have Project Gutenberg's header; {prepare} removes it")
    print_notes(notes)
    return documents


def load_documents(data_dir: str | None) -> tuple[list[str], str]:
    """
    (the texts to train on, where they come from): the first source that there is.

    In this order: the given folder; books prepared in ./gutenberg_preprocessed; a dozen classics,
    which are downloaded and prepared there; without a network, the English that comes with Python.
    """
    if data_dir is not None:
        if not data_dir:
            raise ValueError("--data_dir: is empty; name a folder, or leave the flag out")
        return read_documents(data_dir), data_dir
    books = GutenbergConfig(book_ids=CLASSICS)
    if not (Path(books.output_dir) / "report.json").exists():
        try:
            prepare_gutenberg(books)
        except (OSError, ValueError) as e:
            reason = f"no --data_dir, and Project Gutenberg is not reachable ({error_line(e)})"
            print(f"{reason}: reading the English that comes with Python")
            return python_docs(), "Python's documentation"
    return read_documents(books.output_dir), books.output_dir


# ------------------------------------------------------------------------------------ token shards


def prepare_tokens(config: TokenizeConfig, build: bool = True) -> Path:
    """
    The folder of token shards of these settings, built if it is missing and `build` is true.

    Its name has a fingerprint of everything that determines its content, so that no two settings
    share a folder. A folder of token shards as --dataset_name is returned as it is.
    Raises ValueError for bad settings or data, OSError if a file cannot be written; the same
    command then resumes.
    """
    name = config.dataset_name
    spec = {"auto": "gpt2", "bpe": "bpe:4096"}.get(config.tokenizer, config.tokenizer)
    tokenizer_key = tokenizers.content_key(spec)
    if shards.holds_shards(name):
        _refuse_other_settings(config, tokenizer_key)
        return Path(name)
    if name == TokenizeConfig.dataset_name:
        config.dataset_subset = config.dataset_subset or "cosmopedia-v2"
    _check_tokenize(config)
    target, facts = _token_folder(config, tokenizer_key)
    if build:  # a draft or a plan only asks for the folder
        print_notes(corpus.notes_of(name, config.dataset_subset))
    if target.exists() or not build:
        return target
    check_writable(target.parent, "--cache_dir")
    tokenizer = _tokenizer_of(spec, config)
    val_share, passage = corpus.divide(_rows(_corpus_of(config)), config.val_share)
    source = _corpus_of(config, num_shards=config.num_shards, shard_index=config.shard_index)
    started, counts = time.monotonic(), Counter()
    interval_s = 0.1 if sys.stderr.isatty() else 30
    with tqdm(desc="tokenising", unit=" documents", mininterval=interval_s) as bar:

        def progress(n_documents: int, n_bytes: int, n_tokens: int) -> None:
            counts.update(bytes=n_bytes, tokens=n_tokens)
            rate = counts["bytes"] / 1e6 / max(time.monotonic() - started, 1e-3)
            bar.set_postfix_str(f"{rate:.1f} MB/s, {counts['tokens']:,} tokens", refresh=False)
            bar.update(n_documents)

        def tokenise(rows) -> dict:
            return corpus.tokenise(rows, tokenizer, val_share, passage)

        n_threads = os.cpu_count() or 1
        shard_writer.build(target, tokenizer, source.chunks, tokenise, facts, n_threads, progress)
    print_notes(source.notes())
    return target


def _check_tokenize(config: TokenizeConfig) -> None:
    """Raise ValueError for a number that is out of range."""
    if not 0 < config.val_share < 1:
        raise ValueError(f"--val_share: {config.val_share} must be above 0 and below 1")
    if not 0 <= config.shard_index < config.num_shards:
        what = f"{config.shard_index} is not below --num_shards {config.num_shards}"
        raise ValueError(f"--shard_index: {what}; parts are counted from 0")
    if config.max_documents is not None and config.max_documents < 1:
        raise ValueError(f"--max_documents: {config.max_documents} must be positive")


def _corpus_of(config: TokenizeConfig, **work) -> corpus.Corpus:
    """The documents of these settings; `work` says which part of them is for this machine."""
    limits = (config.text_field, config.max_documents, config.streaming)
    return corpus.Corpus(config.dataset_name, config.dataset_subset, *limits, **work)


def _rows(source: corpus.Corpus):
    """The rows of a corpus, one by one."""
    return (row for rows, _ in source.chunks(None) for row in rows)


def _token_folder(config: TokenizeConfig, tokenizer_key: str) -> tuple[Path, dict]:
    """(folder of these settings, everything that determines its content as JSON values)."""
    name, subset = config.dataset_name, config.dataset_subset
    facts = corpus.facts_of(name, subset, config.text_field, config.max_documents)
    facts |= {"tokenizer": tokenizer_key, "val_share": config.val_share, "writer": shards.WRITER}
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (Path(name).name, subset))))[:80]
    folder_name = f"{slug}-{fingerprint}"
    if config.num_shards > 1:
        folder_name += f"-part-{config.shard_index}-of-{config.num_shards}"
        facts |= {"num_shards": config.num_shards, "shard_index": config.shard_index}
    return Path(config.cache_dir) / folder_name, facts


def _tokenizer_of(spec: str, config: TokenizeConfig) -> Tokenizer:
    """The tokenizer of --tokenizer; never another one instead, because a cache lasts for months."""
    if spec == "gpt2":
        try:
            return gpt2_tokenizer()
        except OSError as e:
            why = f"is neither in tiktoken's cache nor reachable ({error_line(e)})"
            fix = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use bpe, bytes or a file"
            raise ValueError(f"--tokenizer: GPT-2's vocabulary {why}; {fix}") from e
    if spec.split(":")[0] != "bpe":
        return byte_tokenizer() if spec == "bytes" else Tokenizer.load(spec)
    # trained on all documents for training, also by a machine that tokenises only a part of them
    texts = (row["text"] for row in _rows(_corpus_of(config)))
    for_training = (text for text in texts if not corpus.in_validation(text, config.val_share))
    return make_tokenizer(spec, for_training)


def _refuse_other_settings(config: TokenizeConfig, tokenizer_key: str) -> None:
    """Raise ValueError for settings that the existing shards of --dataset_name do not have."""
    built = shards.read_index(config.dataset_name)["source"]
    if built.get("published"):  # such shards do not name their tokenizer: the flag does
        built = {**built, "tokenizer": tokenizer_key}
    asked = {"tokenizer": tokenizer_key}
    for name in ("dataset_subset", "text_field", "max_documents", "val_share"):
        asked[name] = getattr(config, name)
    for name, value in asked.items():
        if value != TokenizeConfig.__dataclass_fields__[name].default and value != built.get(name):
            found = built.get(name, "another choice")
            what = f"{value}, but {config.dataset_name} was built with {found}"
            raise ValueError(f"--{name}: {what}; leave the flag out, or name the text instead")


def describe_tokens(folder, index: dict) -> str:
    """Counts of a folder of token shards, in lines for people."""
    name = index["tokenizer"]["name"] if index["tokenizer"] else "gpt2, published shards"
    lines = [f"{folder}: {index['source']['dataset_name']}, tokenizer {name}"]
    for split in shards.SPLITS:
        files = shards.shards_of(index, split)
        n_tokens = sum(shard["tokens"] for shard in files)
        n_documents = sum(shard.get("documents", 0) for shard in files)
        n_bytes = sum(shard.get("bytes", 0) for shard in files)
        line = f"{split}: {len(files)} files, {n_tokens:,} tokens"
        if n_documents:
            per_token = n_bytes / max(n_tokens, 1)
            line += (
                f", {n_documents:,} documents, {n_bytes:,} bytes of text, {per_token:.2f} per token"
            )
        lines.append(line)
    return "\n".join([*lines, f"content {shards.content_hash(index)}"])


# ------------------------------------------------------------------------------------ command line

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


def run_gutenberg(config: GutenbergConfig) -> None:
    """Prepare books and print what became of each. Raises OSError if a download failed."""
    started = time.time()
    report = prepare_gutenberg(config)
    n_chars = sum(row["chars_out"] for row in report["files"] if row["status"] == "kept")
    for row in report["files"]:
        if row["status"] not in ("kept", "ignored"):
            print(f"{row['status']}: {row['file']}: {row['reason']}")
    counts = ", ".join(f"{n} {status}" for status, n in sorted(report["counts"].items()))
    result = f"{n_chars / 1e6:.1f} million characters in {config.output_dir}"
    print(f"{counts}; {result}, {time.time() - started:.1f} s; details in report.json")
    if n_missing := report["counts"].get("not downloaded"):
        what = f"{n_missing} of {len(config.book_ids)} books could not be downloaded"
        raise OSError(f"{what}; the others are ready, run the same command again")


def merge_parts(config: MergeConfig) -> Path:
    """Merge parts into the folder that their names share; returns it."""
    target, is_part, _ = (config.parts or ("",))[0].rpartition("-part-")
    if not is_part:
        raise ValueError("--parts: name the folders whose names end with -part-I-of-N")
    return shard_writer.merge(config.parts, target)


def main(config) -> int:
    """Run the command whose configuration this is; returns the exit code."""
    if isinstance(config, GutenbergConfig):
        run_gutenberg(config)
    elif isinstance(config, ExtractConfig):
        n_files = extract_archive(config.archive, config.output_dir, config.max_extract_mb)
        print(f"{config.archive}: {n_files} files unpacked into {config.output_dir}")
    elif isinstance(config, TokenizeConfig):
        folder = prepare_tokens(config)
        print(describe_tokens(folder, shards.read_index(folder)))
    elif isinstance(config, MergeConfig):
        folder = merge_parts(config)
        print(describe_tokens(folder, shards.read_index(folder)))
    elif isinstance(config, VerifyConfig):
        index = shards.verify(config.path)
        print(describe_tokens(config.path, index))
        if index["tokenizer"]:
            print("every byte agrees with its sha256")
        else:
            print("sizes agree with the headers; there are no hashes to compare")
    elif isinstance(config, InfoConfig):
        print(describe_tokens(config.path, shards.read_index(config.path)))
    return 0


if __name__ == "__main__":
    run_script(lambda: main(parse(commands_for(sys.argv[1:]))))
