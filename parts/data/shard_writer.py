"""
Write token shards: by threads in constant memory, resumable after a kill; merge those of machines.

A build writes into a hidden folder, saves its progress, and is renamed when complete. If several
processes want the same folder, one builds it and the others wait. See shards.py for the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from parts.base.files import (
    add_file_name,
    fsync,
    make_folder,
    rename_durably,
    sha256_of,
    write_file,
)
from parts.data.shards import (
    BLOCK_BYTES,
    HEADER_BYTES,
    SPLITS,
    WRITER,
    block_hash,
    file_size,
    header_of,
    index_hash,
    read_index,
)

SHARD_TOKENS = 100_000_000  # tokens after which a new file begins
SAVE_EVERY = 32 << 20  # tokens between two writes of progress.json
PROGRESS = 2  # version of progress.json; a build that another version began starts again


class _Writer:
    """
    Appends documents to train_000000.bin, train_000001.bin, ... of one split, and to their masks.

    shards: what earlier writers of this build saved, as dicts of name, tokens, documents, bytes.
    """

    def __init__(self, folder: Path, split: str, dtype, shards: list[dict]):
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shards = shards
        self.file = self.mask = None
        if shards:
            self._open(shards[-1])

    def _open(self, shard: dict) -> None:
        self.file = self._open_file(shard["name"], file_size(shard["tokens"], self.dtype))
        self.mask = self._open_file(shard["mask"], shard["tokens"]) if "mask" in shard else None

    def _open_file(self, name: str, size: int):
        """An open file of `size` bytes at its end; what follows was not saved, and is dropped."""
        path = self.folder / name
        if not path.exists():
            path.touch()
            fsync(self.folder)  # so that progress.json never names a file that a power cut removes
        file = open(path, "r+b")  # noqa: SIM115  open until the shard is full
        file.truncate(size)
        file.seek(0, os.SEEK_END)
        return file

    def write(self, ids: np.ndarray, n_documents: int, n_bytes: int, trained=None) -> None:
        """Append whole documents, (T,) uint32; trained (T,) is 1 where a token is a target."""
        if not len(ids):
            return
        if not self.shards or self.shards[-1]["tokens"] >= SHARD_TOKENS:
            self.sync()
            self.close()
            name = f"{self.split}_{len(self.shards):06d}.bin"
            self.shards.append({"name": name, "tokens": 0, "documents": 0, "bytes": 0})
            if trained is not None:
                self.shards[-1]["mask"] = name.replace(".bin", ".mask")
            self._open(self.shards[-1])
        self.file.write(ids.astype(self.dtype).tobytes())
        if self.mask:
            self.mask.write(trained.astype(np.uint8).tobytes())
        self.shards[-1]["tokens"] += len(ids)
        self.shards[-1]["documents"] += n_documents
        self.shards[-1]["bytes"] += n_bytes

    def sync(self) -> list[dict]:
        """Make everything written so far durable; returns the shards so far."""
        if self.file:
            self.file.seek(0)
            self.file.write(header_of(self.shards[-1]["tokens"], self.dtype))
            self.file.seek(0, os.SEEK_END)
        for file in filter(None, (self.file, self.mask)):
            file.flush()
            os.fsync(file.fileno())
        return self.shards

    def close(self) -> None:
        """Close the files."""
        for file in filter(None, (self.file, self.mask)):
            file.close()


def build(target, tokenizer, chunks, tokenise, facts: dict, n_threads: int, progress=None) -> Path:
    """
    Build the folder of shards `target` unless it exists; returns its path.

    chunks(state) yields (documents, state after them), from the beginning if state is None.
    tokenise(documents) runs in threads; it returns, for "train" and "val", (ids (T,), number of
    documents, bytes of text), and as a fourth value, for all documents or none, (T,) uint8: 1 for
    tokens that are trained on, in a .mask file. facts: where the text came from, as JSON values.
    progress(documents, bytes, tokens) is called after each chunk.
    Raises OSError if a file cannot be written; the same call then resumes.
    """
    from filelock import FileLock  # imported here: only a build needs it

    target = Path(target)
    part = target.with_name(f".{target.name}.part")
    make_folder(part.parent)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target
        make_folder(part)
        shards = _write_shards(part, tokenizer, chunks, tokenise, n_threads, progress)
        _write_index(part, tokenizer, shards, facts)
        for name in ("progress.json", "progress.json.part"):
            (part / name).unlink(missing_ok=True)
        rename_durably(part, target)
    return target


def _write_shards(part: Path, tokenizer, chunks, tokenise, n_threads: int, progress) -> list[dict]:
    """Write all shards into `part`, resuming from its progress.json; returns their counts."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
    state, shards = _read_progress(part, tokenizer.fingerprint, dtype)
    writers = {split: _Writer(part, split, dtype, shards[split]) for split in SPLITS}
    in_step = True  # whether the writers hold exactly the documents before `state`
    n_unsaved = 0
    source = chunks(state)
    results = _in_order(source, tokenise, n_threads)
    try:
        for result, state_after in results:
            in_step = False
            for split, (ids, n_documents, n_bytes, *trained) in result.items():
                writers[split].write(ids, n_documents, n_bytes, *trained)
                n_unsaved += len(ids)
                if progress:
                    progress(n_documents, n_bytes, len(ids))
            state = state_after
            in_step = True
            if n_unsaved >= SAVE_EVERY:
                _save_progress(part, tokenizer.fingerprint, state, writers)
                n_unsaved = 0
        return [shard for writer in writers.values() for shard in writer.sync()]
    except ValueError:  # bad data: nothing to resume
        shutil.rmtree(part, ignore_errors=True)
        raise
    except BaseException as e:
        add_file_name(e, part)
        if in_step:
            with contextlib.suppress(OSError):  # on a full disk the earlier progress.json stays
                _save_progress(part, tokenizer.fingerprint, state, writers)
        raise
    finally:
        results.close()
        source.close()
        for writer in writers.values():
            writer.close()


def _in_order(source, tokenise, n_threads: int):
    """Yield (tokenise(documents), state) of each chunk in order; two chunks per thread wait."""
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = deque()
        for documents, state in source:
            waiting.append((pool.submit(tokenise, documents), state))
            if len(waiting) > 2 * n_threads:
                future, state_after = waiting.popleft()
                yield future.result(), state_after
        for future, state_after in waiting:
            yield future.result(), state_after


def _read_progress(part: Path, fingerprint: str, dtype) -> tuple:
    """(state, {split: shards}) of progress.json; if it cannot be used, empties the folder."""
    try:
        saved = json.loads((part / "progress.json").read_text(encoding="utf-8"))
        complete = all(
            (part / shard["name"]).stat().st_size >= file_size(shard["tokens"], dtype)
            and ("mask" not in shard or (part / shard["mask"]).stat().st_size >= shard["tokens"])
            for split in SPLITS
            for shard in saved["shards"][split]
        )
        if (saved["version"], saved["tokenizer"]) == (PROGRESS, fingerprint) and complete:
            return saved["state"], saved["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged: the build starts again
    for old in part.iterdir():
        old.unlink()
    return None, {split: [] for split in SPLITS}


def _save_progress(part: Path, fingerprint: str, state, writers: dict) -> None:
    """Write progress.json; the shards that it describes are durable before it."""
    shards = {split: writer.sync() for split, writer in writers.items()}
    saved = {"version": PROGRESS, "tokenizer": fingerprint, "state": state, "shards": shards}
    write_file(part / "progress.json", json.dumps(saved).encode())


def _write_index(folder: Path, tokenizer, shards: list[dict], facts: dict) -> None:
    """Write tokenizer.json and index.json, and add its hashes to each of `shards`."""
    tokenizer_json = tokenizer.to_json()
    write_file(folder / "tokenizer.json", tokenizer_json)
    for shard in shards:
        path = folder / shard["name"]
        shard |= {"sha256": sha256_of(path), "blocks": _block_hashes(path, HEADER_BYTES)}
        fsync(path)
        if "mask" in shard:
            path = folder / shard["mask"]
            shard |= {"mask_sha256": sha256_of(path), "mask_blocks": _block_hashes(path, 0)}
            fsync(path)
    described = {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "sha256": hashlib.sha256(tokenizer_json).hexdigest(),
    }
    _seal(folder, {"writer": WRITER, "tokenizer": described, "source": facts, "shards": shards})


def _block_hashes(path: Path, start: int) -> str:
    """The hashes of all blocks of a file from `start` on, 16 hexadecimal digits each, in one."""
    hashes = []
    with open(path, "rb") as f:
        f.seek(start)
        while block := f.read(BLOCK_BYTES):
            hashes.append(block_hash(block))
    return "".join(hashes)


def _seal(folder: Path, index: dict) -> None:
    """Write index.json with its own sha256 in it."""
    sealed = index | {"sha256": index_hash(index)}
    write_file(folder / "index.json", json.dumps(sealed, indent=1).encode())


def merge(parts, target) -> Path:
    """
    Make one folder of the shards that several machines built; returns `target`.

    Files are linked if possible, else copied. Raises ValueError if a part is missing, given twice,
    or built with other settings, or if `target` exists.
    """
    target = Path(target)
    folders, indexes = _sorted_parts(parts)
    if target.exists():
        raise ValueError(f"{target}: already exists; delete it first")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    shards = []
    n_files = dict.fromkeys(SPLITS, 0)
    for folder, index in zip(folders, indexes, strict=True):
        for shard in index["shards"]:
            split = shard["name"].split("_")[0]
            name = f"{split}_{n_files[split]:06d}.bin"
            n_files[split] += 1
            _link(folder / shard["name"], part / name)
            renamed = {"name": name}
            if "mask" in shard:
                renamed["mask"] = name.replace(".bin", ".mask")
                _link(folder / shard["mask"], part / renamed["mask"])
            shards.append(shard | renamed)
    write_file(part / "tokenizer.json", (folders[0] / "tokenizer.json").read_bytes())
    source = indexes[0]["source"] | {"num_shards": 1}
    source.pop("shard_index", None)
    shards.sort(key=lambda shard: shard["name"])
    _seal(part, indexes[0] | {"source": source, "shards": shards})
    rename_durably(part, target)
    return target


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(path, target)
    fsync(target)


def _sorted_parts(parts) -> tuple[list[Path], list[dict]]:
    """(folders, indexes) by shard_index. Raises ValueError if they are not all parts of a build."""
    pairs = [(Path(folder), read_index(folder)) for folder in parts]
    pairs.sort(key=lambda pair: pair[1]["source"].get("shard_index", 0))
    folders = [folder for folder, _ in pairs]
    indexes = [index for _, index in pairs]
    sources = [dict(index["source"]) for index in indexes]
    n_parts = sources[0].get("num_shards", 1)
    numbers = [source.pop("shard_index", 0) for source in sources]
    if numbers != list(range(n_parts)):
        what = f"parts {numbers} of {n_parts} (counted from 0)"
        raise ValueError(f"--parts: these are {what}; give each part once")
    for folder, index, source in zip(folders, indexes, sources, strict=True):
        if (source, index["tokenizer"]) != (sources[0], indexes[0]["tokenizer"]):
            what = f"built with other settings than {folders[0]}"
            raise ValueError(f"{folder}: {what}; build all parts with the same command")
    return folders, indexes
