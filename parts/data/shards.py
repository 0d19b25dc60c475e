"""
Token shards on disk: written by threads in constant memory, read by window, checked block by block.

    token_cache/smollm-corpus-cosmopedia-v2-1a2b3c4d5e6f/
        train_000000.bin  train_000001.bin  val_000000.bin      llm.c's layout: 256 int32 of header, then the tokens
        tokenizer.json                                          what the tokens mean
        index.json                                              counts, sha256, source; written last, sealed by its own sha256

Header: magic 20240520, version 1, number of tokens, then uint16 tokens; for vocabularies over 65,536 magic 20240801,
version 7, then uint32 tokens (llm.c, dev/data/data_common.py). Published shards have no index.json; `val` in a name
marks the validation part.

A build writes into a hidden folder, notes how far it is, goes on after a kill, and is renamed when complete; one builder
works at a time, the others wait.
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

WRITER = 1  # version of what a build writes: raised when the same settings would give other files
HEADER_BYTES = 1024
MAGIC = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic -> (version, type of a token)
SHARD_TOKENS = 100_000_000  # tokens after which a new file begins
BLOCK_BYTES = 1 << 18  # what is hashed at once when a window is read for the first time
NOTE_EVERY = 32 << 20  # tokens between two notes of how far a build is


def _header(n_tokens: int, dtype) -> bytes:
    magic = next(m for m, (_, d) in MAGIC.items() if d == dtype)
    header = np.zeros(HEADER_BYTES // 4, dtype=np.int32)
    header[:3] = magic, MAGIC[magic][0], n_tokens
    return header.tobytes()


def _file_size(n_tokens: int, dtype) -> int:
    return HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize


def read_header(path) -> tuple[int, type]:
    """(number of tokens, numpy type of a token) of a shard file. Raises ValueError where it is no shard or cut short."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            header = np.frombuffer(f.read(HEADER_BYTES), dtype=np.int32)
            size = os.fstat(f.fileno()).st_size
    except (OSError, ValueError) as e:
        raise ValueError(
            f"{path}: cannot be read as a token shard ({e}); delete it or build the cache again"
        ) from e
    if len(header) < HEADER_BYTES // 4 or int(header[0]) not in MAGIC:
        raise ValueError(
            f"{path}: not a token shard (wrong magic number); delete it or build the cache again"
        )
    version, dtype = MAGIC[int(header[0])]
    if header[1] != version:
        raise ValueError(
            f"{path}: shard version {header[1]}, this code reads {version}; build it again with prep_dataset.py"
        )
    expected = _file_size(int(header[2]), dtype)
    if size != expected:
        raise ValueError(
            f"{path}: has {size:,} bytes, its header promises {expected:,}; it is damaged, build the cache again"
        )
    return int(header[2]), dtype


# ------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """Appends documents to train_000000.bin, train_000001.bin, ...; knows how to go on from an earlier note of itself."""

    def __init__(self, folder: Path, split: str, dtype, shards: list[dict]):
        self.folder, self.split, self.dtype, self.shards, self.file = (
            folder,
            split,
            dtype,
            shards,
            None,
        )
        if shards:
            self._open(shards[-1])

    def _open(self, shard: dict) -> None:
        path = self.folder / shard["name"]
        if not path.exists():
            path.touch()
            fsync(self.folder)  # progress.json must not name a file that a power cut takes away
        self.file = open(path, "r+b")  # noqa: SIM115  open until the shard is full
        self.file.truncate(_file_size(shard["tokens"], self.dtype))  # drops what no note mentions
        self.file.seek(0, os.SEEK_END)

    def write(self, ids: np.ndarray, n_documents: int, n_bytes: int) -> None:
        """Whole documents, (T,) uint32."""
        if not len(ids):
            return
        if not self.shards or self.shards[-1]["tokens"] >= SHARD_TOKENS:
            self.note()
            self.close()
            name = f"{self.split}_{len(self.shards):06d}.bin"
            self.shards.append({"name": name, "tokens": 0, "documents": 0, "bytes": 0})
            self._open(self.shards[-1])
        self.file.write(ids.astype(self.dtype).tobytes())
        self.shards[-1]["tokens"] += len(ids)
        self.shards[-1]["documents"] += n_documents
        self.shards[-1]["bytes"] += n_bytes

    def note(self) -> list[dict]:
        """Everything up to here is on the disk; returns the shards so far."""
        if self.file:
            self.file.seek(0)
            self.file.write(_header(self.shards[-1]["tokens"], self.dtype))
            self.file.seek(0, os.SEEK_END)
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.shards

    def close(self) -> None:
        if self.file:
            self.file.close()


def build(target, tokenizer, chunks, tokenise, facts: dict, n_threads: int, progress=None) -> Path:
    """
    Write the shards of `target`, unless they are there; returns `target`.

    chunks(state): yields (documents, state behind them), from the beginning for None. tokenise(documents), called in
    threads, gives {"train" and "val": (ids (T,), number of documents, bytes of text)}. facts: where the text came from,
    as JSON values. progress(documents, bytes, tokens) is called as it goes. Raises OSError where it cannot be written;
    the same call goes on from there.
    """
    from filelock import FileLock  # here: only a build needs it

    target = Path(target)
    part = target.with_name(f".{target.name}.part")
    make_folder(part.parent)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target
        make_folder(part)
        dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
        note = _read_note(part, tokenizer.fingerprint, dtype)
        writers = {
            split: _Writer(part, split, dtype, note["shards"][split]) for split in ("train", "val")
        }
        noted, last = 0, note["state"]

        def take(future, state):
            nonlocal noted, last
            for split, (ids, n_documents, n_bytes) in future.result().items():
                writers[split].write(ids, n_documents, n_bytes)
                noted += len(ids)
                if progress:
                    progress(n_documents, n_bytes, len(ids))
            last = state
            if noted >= NOTE_EVERY:
                _write_note(part, tokenizer.fingerprint, last, writers)
                noted = 0

        source = chunks(note["state"])
        try:
            with ThreadPoolExecutor(n_threads) as pool:
                waiting = deque()
                for documents, state in source:
                    waiting.append((pool.submit(tokenise, documents), state))
                    if len(waiting) > 2 * n_threads:
                        take(*waiting.popleft())
                while waiting:
                    take(*waiting.popleft())
            for writer in writers.values():
                writer.note()
        except BaseException as e:
            add_file_name(e, part)
            if isinstance(e, ValueError):  # bad data: nothing to go on from
                shutil.rmtree(part, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # a full disk; the note before stays
                    _write_note(part, tokenizer.fingerprint, last, writers)
            raise
        finally:
            source.close()
            for writer in writers.values():
                writer.close()
        shards = [shard for writer in writers.values() for shard in writer.shards]
        _write_index(part, tokenizer, shards, facts)
        for name in ("progress.json", "progress.json.part"):
            (part / name).unlink(missing_ok=True)
        rename_durably(part, target)
    return target


def _read_note(part: Path, fingerprint: str, dtype) -> dict:
    """What `_write_note` wrote; empties the folder and starts anew if that is missing or useless."""
    try:
        note = json.loads((part / "progress.json").read_text(encoding="utf-8"))
        complete = all(
            (part / shard["name"]).stat().st_size >= _file_size(shard["tokens"], dtype)
            for shards in note["shards"].values()
            for shard in shards
        )
        if note["tokenizer"] == fingerprint and complete:
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or not a whole one: the build begins again
    for old in part.iterdir():
        old.unlink()
    return {"state": None, "shards": {"train": [], "val": []}}


def _write_note(part: Path, fingerprint: str, state, writers: dict) -> None:
    """Save how far the build is; the shards that the note describes are durable before it."""
    shards = {split: writer.note() for split, writer in writers.items()}
    note = {"tokenizer": fingerprint, "state": state, "shards": shards}
    write_file(part / "progress.json", json.dumps(note).encode())


def _write_index(folder: Path, tokenizer, shards: list[dict], facts: dict) -> None:
    write_file(folder / "tokenizer.json", tokenizer.to_json())
    for shard in shards:
        whole, blocks = hashlib.sha256(), []
        with open(folder / shard["name"], "rb") as f:
            whole.update(f.read(HEADER_BYTES))
            while block := f.read(BLOCK_BYTES):
                whole.update(block)
                blocks.append(_short_hash(block))
        fsync(folder / shard["name"])
        shard |= {"sha256": whole.hexdigest(), "blocks": "".join(blocks)}
    digest = hashlib.sha256(tokenizer.to_json()).hexdigest()
    index = {
        "writer": WRITER,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "sha256": digest,
        },
    }
    _seal(folder, index | {"source": facts, "shards": shards})


def _seal(folder: Path, index: dict) -> None:
    sealed = index | {"sha256": _index_hash(index)}
    write_file(folder / "index.json", json.dumps(sealed, indent=1).encode())


def _index_hash(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _short_hash(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()[:16]


def merge(parts, target) -> Path:
    """
    One folder of the shards that several machines built; returns `target`. Raises ValueError where a part is
    missing, doubled, or was built with other settings.
    """
    target = Path(target)
    pairs = [(Path(p), read_index(p)) for p in parts]
    folders, indexes = zip(
        *sorted(pairs, key=lambda pair: pair[1]["source"].get("shard_index", 0)), strict=True
    )
    sources = [dict(index["source"]) for index in indexes]
    wanted, have = (
        sources[0].get("num_shards", 1),
        sorted(source.pop("shard_index", 0) for source in sources),
    )
    if have != list(range(wanted)):
        raise ValueError(
            f"--parts: there are parts {have} (counted from 0) of {wanted}; give each of them once"
        )
    for folder, index, source in zip(folders, indexes, sources, strict=True):
        if (source, index["tokenizer"]) != (sources[0], indexes[0]["tokenizer"]):
            raise ValueError(
                f"{folder}: was built with other settings than {folders[0]}; build all parts with the same line"
            )
    if target.exists():
        raise ValueError(f"{target}: is there already; delete it first")
    part, shards, counts = target.with_name(f".{target.name}.part"), [], {}
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    for folder, index in zip(folders, indexes, strict=True):
        for shard in index["shards"]:
            split = shard["name"].split("_")[0]
            counts[split] = counts.get(split, -1) + 1
            name = f"{split}_{counts[split]:06d}.bin"
            try:
                os.link(folder / shard["name"], part / name)
            except OSError:  # another disk
                shutil.copyfile(folder / shard["name"], part / name)
            fsync(part / name)
            shards.append(shard | {"name": name})
    write_file(part / "tokenizer.json", (folders[0] / "tokenizer.json").read_bytes())
    index = indexes[0] | {
        "source": sources[0] | {"num_shards": 1},
        "shards": sorted(shards, key=lambda s: s["name"]),
    }
    _seal(part, index)
    rename_durably(part, target)
    return target


# ------------------------------------------------------------------------------------------------------- reading


def read_index(folder) -> dict:
    """
    The index of a folder, checked against its own hash; for published shards one made from their headers. Raises
    FileNotFoundError where there are no shards, ValueError where something is damaged.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not os.path.lexists(path):
        names = sorted(p.name for p in folder.glob("*.bin"))
        if not names or (folder / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"{folder}: has no index.json; it is not a folder of token shards, or damaged: delete it and build again"
            )
        shards = [{"name": name, "tokens": read_header(folder / name)[0]} for name in names]
        return {
            "writer": None,
            "tokenizer": None,
            "source": {"dataset_name": folder.name, "published": True},
            "shards": shards,
        }
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        seal = index.pop("sha256")
        if _index_hash(index) != seal:
            raise ValueError("it differs from its own sha256")
        if index["writer"] != WRITER:
            raise ValueError(f"it has version {index['writer']}, this code reads {WRITER}")
        path = folder / "tokenizer.json"
        if sha256_of(path) != index["tokenizer"]["sha256"]:
            raise ValueError("it differs from index.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(
            f"{path}: damaged or of another version ({e}); delete {folder} and build it again"
        ) from e
    return index


def content_hash(index: dict) -> str:
    """One hash for all tokens of a folder, whatever its name and place."""
    return hashlib.sha256(
        repr(sorted((s["name"], s.get("sha256", s["tokens"])) for s in index["shards"])).encode()
    ).hexdigest()


def verify(folder) -> dict:
    """The index of a folder whose every byte was read and compared. Raises ValueError naming the first file that differs."""
    folder, index = Path(folder), read_index(folder)
    for shard in index["shards"]:
        path = folder / shard["name"]
        read_header(path)
        if "sha256" in shard and sha256_of(path) != shard["sha256"]:
            raise ValueError(
                f"{path}: differs from index.json; it is damaged, delete {folder} and build it again"
            )
    return index


class Shards:
    """
    The tokens of one split ("train" or "val"), memory-mapped.

    Each block is compared with its hash when it is first touched: every token trained on was checked, and a terabyte opens at once.
    """

    def __init__(self, folder, split: str, index: dict):
        self.folder, self.split = Path(folder), split
        shards = [s for s in index["shards"] if ("val" in s["name"]) == (split == "val")]
        self.blocks = [s.get("blocks") for s in shards]
        self.paths = [self.folder / s["name"] for s in shards]
        self.tokens = []
        for path, shard in zip(self.paths, shards, strict=True):
            n_tokens, dtype = read_header(path)
            if n_tokens != shard["tokens"]:
                raise ValueError(
                    f"{path}: holds {n_tokens:,} tokens, index.json says {shard['tokens']:,}; build the cache again"
                )
            self.tokens.append(
                np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
            )
        self.checked = [bytearray(-(-t.nbytes // BLOCK_BYTES)) for t in self.tokens]

    def __len__(self) -> int:
        return sum(len(t) for t in self.tokens)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one file as int64, compared with their hash. Raises OSError where they differ."""
        self.check(shard, [start], stop - start)
        return self.tokens[shard][start:stop].astype(np.int64)

    def check(self, shard: int, starts: list[int], n: int) -> None:
        """Compare the blocks that hold n tokens from each of `starts` on, unless they were compared before. Raises OSError."""
        if self.blocks[shard] is None:
            return
        tokens, checked, size = (
            self.tokens[shard],
            self.checked[shard],
            BLOCK_BYTES // self.tokens[shard].itemsize,
        )
        for b in sorted(
            {
                b
                for start in starts
                for b in range(start // size, (start + n - 1) // size + 1)
                if not checked[b]
            }
        ):
            if (
                _short_hash(tokens[b * size : (b + 1) * size].tobytes())
                != self.blocks[shard][16 * b : 16 * b + 16]
            ):
                raise OSError(
                    f"{self.paths[shard]}: block {b} differs from index.json; delete {self.folder} and build it again"
                )
            checked[b] = True
