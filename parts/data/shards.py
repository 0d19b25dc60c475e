"""
Token shards on disk: written by threads in constant memory, read by window, checked block by block.

    token_cache/smollm-corpus-cosmopedia-v2-1a2b3c4d5e6f/
        train_000000.bin  train_000001.bin  val_000000.bin   llm.c's layout: a header, then tokens
        tokenizer.json                                       what the tokens mean
        index.json                                           counts, sha256, source; written last

The header is 256 int32: magic 20240520, version 1, number of tokens, then uint16 tokens. For
vocabularies over 65,536 ids the magic is 20240801, the version 7 and the tokens are uint32 (llm.c,
dev/data/data_common.py). index.json contains its own sha256. Published shards have no index.json;
`val` in the name of a file marks the validation part.

A build writes into a hidden folder, saves its progress, resumes after a kill, and is renamed when
complete. If several processes want the same folder, one builds it and the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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

WRITER = 1  # version of what a build writes; raise it if the same settings give other files
HEADER_BYTES = 1024
MAGIC = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic -> (version, token dtype)
SPLITS = ("train", "val")
VAL_NAME = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)  # not medieval
SHARD_TOKENS = 100_000_000  # tokens after which a new file begins
BLOCK_BYTES = 1 << 18  # bytes under one hash; a block is checked when it is first read
SAVE_EVERY = 32 << 20  # tokens between two writes of progress.json


def _header(n_tokens: int, dtype) -> bytes:
    magic = next(m for m, (_, d) in MAGIC.items() if d == dtype)
    header = np.zeros(HEADER_BYTES // 4, dtype=np.int32)
    header[:3] = magic, MAGIC[magic][0], n_tokens
    return header.tobytes()


def _file_size(n_tokens: int, dtype) -> int:
    return HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize


def read_header(path) -> tuple[int, type]:
    """(number of tokens, dtype) of a shard file. Raises ValueError if it is damaged or no shard."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            header = np.frombuffer(f.read(HEADER_BYTES), dtype=np.int32)
            size = os.fstat(f.fileno()).st_size
    except (OSError, ValueError) as e:
        raise ValueError(
            f"{path}: not readable as a token shard ({e}); delete or rebuild it"
        ) from e
    if len(header) < HEADER_BYTES // 4 or int(header[0]) not in MAGIC:
        raise ValueError(
            f"{path}: not a token shard, or damaged (wrong magic number); "
            "give shards in llm.c's layout, as prep_dataset.py tokenize writes them"
        )
    version, dtype = MAGIC[int(header[0])]
    if header[1] != version:
        what = f"shard version {header[1]}, this code reads {version}"
        raise ValueError(f"{path}: {what}; rebuild it with prep_dataset.py")
    expected = _file_size(int(header[2]), dtype)
    if size != expected:
        what = f"has {size:,} bytes, but its header says {expected:,}"
        raise ValueError(f"{path}: {what}; it is damaged, delete or rebuild it")
    return int(header[2]), dtype


def holds_shards(folder) -> bool:
    """
    Whether a folder has token shards: an index of ours, or a file that begins as shards do.

    nanoGPT's train.bin and weights such as pytorch_model.bin are something else.
    """
    folder = Path(folder)
    files = list(folder.glob("*.bin"))
    return bool(files) and ((folder / "index.json").exists() or any(map(_has_magic, files)))


def _has_magic(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as f:
        return int.from_bytes(f.read(4), "little") in MAGIC
    return False


# ------------------------------------------------------------------------------------ writing


class _Writer:
    """
    Appends documents to train_000000.bin, train_000001.bin, ... of one split.

    shards: what earlier writers of this build saved, as dicts of name, tokens, documents, bytes.
    """

    def __init__(self, folder: Path, split: str, dtype, shards: list[dict]):
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shards = shards
        self.file = None
        if shards:
            self._open(shards[-1])

    def _open(self, shard: dict) -> None:
        path = self.folder / shard["name"]
        if not path.exists():
            path.touch()
            fsync(self.folder)  # so that progress.json never names a file that a power cut removes
        self.file = open(path, "r+b")  # noqa: SIM115  open until the shard is full
        self.file.truncate(_file_size(shard["tokens"], self.dtype))  # drop what was not saved
        self.file.seek(0, os.SEEK_END)

    def write(self, ids: np.ndarray, n_documents: int, n_bytes: int) -> None:
        """Append whole documents, (T,) uint32."""
        if not len(ids):
            return
        if not self.shards or self.shards[-1]["tokens"] >= SHARD_TOKENS:
            self.sync()
            self.close()
            name = f"{self.split}_{len(self.shards):06d}.bin"
            self.shards.append({"name": name, "tokens": 0, "documents": 0, "bytes": 0})
            self._open(self.shards[-1])
        self.file.write(ids.astype(self.dtype).tobytes())
        self.shards[-1]["tokens"] += len(ids)
        self.shards[-1]["documents"] += n_documents
        self.shards[-1]["bytes"] += n_bytes

    def sync(self) -> list[dict]:
        """Make everything written so far durable; returns the shards so far."""
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
    Build the folder of shards `target` unless it exists; returns its path.

    chunks(state) yields (documents, state after them), from the beginning if state is None.
    tokenise(documents) runs in threads; it returns, for "train" and "val", (ids (T,), number of
    documents, bytes of text). facts says where the text came from, in JSON values.
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
            for split, (ids, n_documents, n_bytes) in result.items():
                writers[split].write(ids, n_documents, n_bytes)
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
            (part / shard["name"]).stat().st_size >= _file_size(shard["tokens"], dtype)
            for split in SPLITS
            for shard in saved["shards"][split]
        )
        if saved["tokenizer"] == fingerprint and complete:
            return saved["state"], saved["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged: the build starts again
    for old in part.iterdir():
        old.unlink()
    return None, {split: [] for split in SPLITS}


def _save_progress(part: Path, fingerprint: str, state, writers: dict) -> None:
    """Write progress.json; the shards that it describes are durable before it."""
    shards = {split: writer.sync() for split, writer in writers.items()}
    saved = {"tokenizer": fingerprint, "state": state, "shards": shards}
    write_file(part / "progress.json", json.dumps(saved).encode())


def _write_index(folder: Path, tokenizer, shards: list[dict], facts: dict) -> None:
    """Write tokenizer.json and index.json, and add its hashes to each of `shards`."""
    tokenizer_json = tokenizer.to_json()
    write_file(folder / "tokenizer.json", tokenizer_json)
    for shard in shards:
        path = folder / shard["name"]
        shard |= {"sha256": sha256_of(path), "blocks": _block_hashes(path)}
        fsync(path)
    described = {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "sha256": hashlib.sha256(tokenizer_json).hexdigest(),
    }
    _seal(folder, {"writer": WRITER, "tokenizer": described, "source": facts, "shards": shards})


def _block_hashes(path: Path) -> str:
    """The hashes of all blocks of tokens of a shard, 16 hexadecimal digits each, in one string."""
    hashes = []
    with open(path, "rb") as f:
        f.seek(HEADER_BYTES)
        while block := f.read(BLOCK_BYTES):
            hashes.append(_block_hash(block))
    return "".join(hashes)


def _block_hash(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()[:16]


def _seal(folder: Path, index: dict) -> None:
    """Write index.json with its own sha256 in it."""
    sealed = index | {"sha256": _index_hash(index)}
    write_file(folder / "index.json", json.dumps(sealed, indent=1).encode())


def _index_hash(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


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
            try:
                os.link(folder / shard["name"], part / name)
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(folder / shard["name"], part / name)
            fsync(part / name)
            shards.append(shard | {"name": name})
    write_file(part / "tokenizer.json", (folders[0] / "tokenizer.json").read_bytes())
    source = indexes[0]["source"] | {"num_shards": 1}
    source.pop("shard_index", None)
    shards.sort(key=lambda shard: shard["name"])
    _seal(part, indexes[0] | {"source": source, "shards": shards})
    rename_durably(part, target)
    return target


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


# ------------------------------------------------------------------------------------ reading


def read_index(folder) -> dict:
    """
    The index of a folder, checked against its own sha256; for published shards, one made from
    their headers.

    Raises FileNotFoundError if there are no shards, ValueError if something is damaged.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not os.path.lexists(path):
        return _published_index(folder)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        sha256 = index.pop("sha256")
        if _index_hash(index) != sha256:
            raise ValueError("it differs from its own sha256")
        if index["writer"] != WRITER:
            raise ValueError(f"it has version {index['writer']}, this code reads {WRITER}")
        path = folder / "tokenizer.json"
        if sha256_of(path) != index["tokenizer"]["sha256"]:
            raise ValueError("it differs from index.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        what = f"damaged or of another version ({e})"
        raise ValueError(f"{path}: {what}; delete {folder} and rebuild it") from e
    return index


def _published_index(folder: Path) -> dict:
    """An index of shards without index.json. Raises FileNotFoundError if there are none."""
    names = sorted(p.name for p in folder.glob("*.bin"))
    if not names:
        what = "has no token shards" if folder.exists() else "does not exist"
        fix = "give a folder that prep_dataset.py tokenize wrote"
        raise FileNotFoundError(f"{folder}: {what}; {fix}")
    if (folder / "tokenizer.json").exists():  # published shards have none: a build that was damaged
        raise FileNotFoundError(
            f"{folder}: index.json is missing; delete the folder and rebuild it"
        )
    return {
        "writer": None,
        "tokenizer": None,
        "source": {"dataset_name": folder.name, "published": True},
        "shards": [{"name": name, "tokens": read_header(folder / name)[0]} for name in names],
    }


def shards_of(index: dict, split: str) -> list[dict]:
    """The shards of one split in an index: "val" has those with that word in their name."""
    return [s for s in index["shards"] if bool(VAL_NAME.search(s["name"])) == (split == "val")]


def content_hash(index: dict) -> str:
    """One hash of all tokens of a folder, whatever its name and place."""
    named = sorted((s["name"], s.get("sha256", s["tokens"])) for s in index["shards"])
    return hashlib.sha256(repr(named).encode()).hexdigest()


def verify(folder) -> dict:
    """Compare every byte of a folder; returns its index. Raises ValueError naming the bad file."""
    folder, index = Path(folder), read_index(folder)
    for shard in index["shards"]:
        path = folder / shard["name"]
        read_header(path)
        if "sha256" in shard and sha256_of(path) != shard["sha256"]:
            what = "damaged, it differs from index.json"
            raise ValueError(f"{path}: {what}; delete {folder} and rebuild it")
    return index


class Shards:
    """
    The tokens of one split ("train" or "val"), memory-mapped; `tokens` has one array per file.

    Each block is compared with its hash when it is first read: every token trained on was checked,
    and a terabyte opens at once.
    """

    def __init__(self, folder, split: str, index: dict):
        self.folder = Path(folder)
        self.split = split
        shards = shards_of(index, split)
        self.hashes = [shard.get("blocks") for shard in shards]  # None: published without hashes
        self.paths = [self.folder / shard["name"] for shard in shards]
        self.tokens = []
        for path, shard in zip(self.paths, shards, strict=True):
            n_tokens, dtype = read_header(path)
            if n_tokens != shard["tokens"]:
                what = f"{n_tokens:,} tokens, but index.json says {shard['tokens']:,}"
                raise ValueError(f"{path}: {what}; delete {self.folder} and rebuild it")
            mapped = np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
            self.tokens.append(mapped)
        self.checked = [bytearray(-(-t.nbytes // BLOCK_BYTES)) for t in self.tokens]

    def __len__(self) -> int:
        return sum(len(t) for t in self.tokens)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one file as int64. Raises OSError if their hash differs."""
        self.check(shard, [start], stop - start)
        return self.tokens[shard][start:stop].astype(np.int64)

    def check(self, shard: int, starts: list[int], n: int) -> None:
        """
        Compare the blocks that hold n tokens from each of `starts` with their hashes, each once.

        Raises OSError if they differ.
        """
        hashes, checked = self.hashes[shard], self.checked[shard]
        if hashes is None:
            return
        tokens = self.tokens[shard]
        size = BLOCK_BYTES // tokens.itemsize  # tokens per block
        unchecked = {
            b
            for start in starts
            for b in range(start // size, (start + n - 1) // size + 1)
            if not checked[b]
        }
        for b in sorted(unchecked):
            block = tokens[b * size : (b + 1) * size].tobytes()
            if _block_hash(block) != hashes[16 * b : 16 * b + 16]:
                what = f"block {b} differs from index.json; delete {self.folder} and rebuild it"
                raise OSError(f"{self.paths[shard]}: {what}")
            checked[b] = True
