"""
Turn files of documents into files of lines, on all cores, so that a kill loses two seconds.

    job = FileJob(output, "from_xml", settings, sources)
    job.run(read, transform, accept, workers=8, batch_size=1000)
    report = job.finish()

Results are written in the order of the documents, whatever the number of processes. While a job
runs, its files are in OUTPUT/.NAME.part with progress.json; finish() gives the folder its name. The
same job resumes there; another one, of other files or settings, begins anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from pathlib import Path

from parts.base.files import add_file_name, make_folder, read_json, rename_durably, write_file
from parts.cli.progress_bar import tqdm

SAVE_SECONDS = 2.0
BATCH_CHARS = 1 << 18  # a batch has fewer documents if they are long
_transform = None  # of this worker process


# ---------------------------------------------------------------------------------- processes


def _begin_worker(transform, parent: int) -> None:
    global _transform
    _transform = transform
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process if its parent was killed: it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(batch: list[str]):
    return _transform(batch)


class Workers:
    """Processes that apply a function to batches; the caller's own process if there is only one."""

    def __init__(self, transform, n: int):
        self.transform = transform
        self.n = n
        self._pool = None

    def __enter__(self) -> Workers:
        if self.n > 1:
            arguments = (self.transform, os.getpid())
            self._pool = multiprocessing.Pool(self.n, _begin_worker, arguments)
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.terminate()
            self._pool.join()

    def map(self, batches):
        """Yield transform(batch) in the order of the batches; few of them are in memory."""
        if self._pool is None:
            yield from map(self.transform, batches)
            return
        waiting = deque()
        for batch in batches:
            waiting.append(self._pool.apply_async(_work, (batch,)))
            if len(waiting) > 2 * self.n:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def in_batches(documents, size: int):
    """Lists of at most `size` documents, and of about BATCH_CHARS characters."""
    batch, n_chars = [], 0
    for document in documents:
        batch.append(document)
        n_chars += len(document)
        if len(batch) >= size or n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------- the job


class FileJob:
    """
    A step that reads `sources`, {name: path}, and writes a file NAME.txt for each that has lines.

    settings: JSON values that the result depends on. Sizes and times of the sources count, too.
    """

    def __init__(self, output: Path, name: str, settings: dict, sources: dict[str, Path]):
        self.target = output / name
        self.work = output / f".{name}.part"
        self.sources = sources
        stats = {source: path.stat() for source, path in sources.items()}
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
        text = json.dumps([settings, facts], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._progress = {"fingerprint": self.fingerprint, "file": 0, "read": 0, "bytes": 0}
        self._progress |= {"files": {}, "is_complete": False}

    def resume(self) -> bool:
        """Take up what a killed run left; False if there is nothing of this job."""
        if not (self.work / "progress.json").is_file():
            return False
        progress = read_json(self.work / "progress.json")
        if progress.get("fingerprint") != self.fingerprint:
            shutil.rmtree(self.work)
            return False
        self._progress = progress
        return True

    def written(self) -> dict[Path, int]:
        """{file: bytes of it that count} of the files so far."""
        names = list(self.sources)[: self._progress["file"] + 1]
        paths = [self._path(name) for name in names]
        sizes = {path: path.stat().st_size for path in paths if path.exists()}
        if paths and paths[-1] in sizes:
            sizes[paths[-1]] = min(sizes[paths[-1]], self._progress["bytes"])
        return sizes

    def _path(self, name: str) -> Path:
        return self.work / "lines" / (name if name.endswith(".txt") else f"{name}.txt")

    def run(self, read, transform, accept, workers: int, batch_size: int, title: str) -> None:
        """
        Write what is missing of the files.

        read(path, facts) yields documents and fills the dict `facts` for the report; transform
        makes a list of a list of documents, in any process; accept(result) gives (line or None,
        reason or None) for each, here and in order.
        """
        if self._progress["is_complete"]:
            return
        make_folder(self.work / "lines")
        names = list(self.sources)
        n_known = sum(facts["read"] for facts in self._progress["files"].values())
        bar = tqdm(desc=title, unit=" documents", initial=n_known, mininterval=1)
        with bar, Workers(transform, workers) as pool:
            for i in range(self._progress["file"], len(names)):
                bar.set_postfix_str(f"file {i + 1} of {len(names)}", refresh=False)
                self._run_file(names[i], read, accept, pool, batch_size, bar)
                self._progress |= {"file": i + 1, "read": 0, "bytes": 0}
                self._save()
        self._progress["is_complete"] = True
        self._save()

    def _run_file(self, name, read, accept, pool: Workers, batch_size: int, bar) -> None:
        facts = self._progress["files"].get(name, {"read": 0, "kept": 0, "dropped": {}})
        found = {}
        documents = itertools.islice(read(self.sources[name], found), facts["read"], None)
        path = self._path(name)
        make_folder(path.parent)
        saved = time.monotonic()
        with open(path, "ab") as out:
            out.truncate(self._progress["bytes"])
            out.seek(0, os.SEEK_END)
            try:
                for results in pool.map(in_batches(documents, batch_size)):
                    lines = []
                    dropped = Counter(facts["dropped"])
                    for line, reason in map(accept, results):
                        if line is not None:
                            lines.append(line + "\n")
                        if reason is not None:
                            dropped[reason] += 1
                    out.write("".join(lines).encode())
                    facts = {
                        "read": facts["read"] + len(results),
                        "kept": facts["kept"] + len(lines),
                        "dropped": dict(sorted(dropped.items())),
                    }
                    bar.update(len(results))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save_within(out, name, facts)
                        saved = time.monotonic()
            except OSError as e:
                add_file_name(e, path)
                raise
            self._save_within(out, name, {**facts, **found})
        if not path.stat().st_size:
            path.unlink()

    def _save_within(self, out, name: str, facts: dict) -> None:
        out.flush()
        os.fsync(out.fileno())
        self._progress["files"][name] = facts
        self._progress |= {"read": facts["read"], "bytes": out.tell()}
        self._save()

    def _save(self) -> None:
        write_file(self.work / "progress.json", json.dumps(self._progress).encode())

    def files(self) -> dict:
        """{source: what became of its documents} for the report."""
        return {name: self._progress["files"][name] for name in self.sources}

    def discard(self) -> None:
        """Delete what was written."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        """Give the folder its name; it replaces an earlier one."""
        lines = self.work / "lines"
        if lines.exists():
            for folder in sorted(lines.rglob("*"), reverse=True):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            shutil.rmtree(self.target, ignore_errors=True)
            rename_durably(lines, self.target)
