"""
Token shards on disk: read by window, checked block by block. shard_writer.py writes them.

    token_cache/smollm-corpus-cosmopedia-v2-1a2b3c4d5e6f/
        train_000000.bin  train_000001.bin  val_000000.bin   llm.c's layout: a header, then tokens
        tokenizer.json                                       what the tokens mean
        index.json                                           counts, sha256, source; written last
        train_000000.mask  val_000000.mask                   if only some tokens are trained on

The header is 256 int32: magic 20240520, version 1, number of tokens, then uint16 tokens. For
vocabularies over 65,536 ids the magic is 20240801, the version 7 and the tokens are uint32 (llm.c,
dev/data/data_common.py). index.json contains its own sha256. Published shards have no index.json;
`val` in the name of a file marks the validation part. A mask has one byte per token, 1 where the
token is a target, 0 where it is only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from parts.base.files import sha256_of

WRITER = 1  # version of what a build writes; raise it if the same settings give other files
HEADER_BYTES = 1024
MAGIC = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic -> (version, token dtype)
SPLITS = ("train", "val")
VAL_NAME = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)  # not medieval
BLOCK_BYTES = 1 << 18  # bytes under one hash; a block is checked when it is first read


def header_of(n_tokens: int, dtype) -> bytes:
    """The header of a shard."""
    magic = next(m for m, (_, d) in MAGIC.items() if d == dtype)
    header = np.zeros(HEADER_BYTES // 4, dtype=np.int32)
    header[:3] = magic, MAGIC[magic][0], n_tokens
    return header.tobytes()


def file_size(n_tokens: int, dtype) -> int:
    """Bytes of a shard."""
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
    expected = file_size(int(header[2]), dtype)
    if size != expected:
        what = f"has {size:,} bytes, but its header says {expected:,}"
        raise ValueError(f"{path}: {what}; it is damaged, delete or rebuild it")
    return int(header[2]), dtype


def block_hash(block: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(block).hexdigest()[:16]


def index_hash(index: dict) -> str:
    """sha256 of an index without its own sha256."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


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
        if index_hash(index) != sha256:
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
        hashes = {path: shard.get("sha256")}
        if "mask" in shard:
            hashes[folder / shard["mask"]] = shard["mask_sha256"]
        for file, expected in hashes.items():
            if expected and sha256_of(file) != expected:
                what = "damaged, it differs from index.json"
                raise ValueError(f"{file}: {what}; delete {folder} and rebuild it")
    return index


class _Mapped:
    """
    An array in a file, memory-mapped; its blocks are compared with their hashes when first read.

    hashes: 16 hexadecimal digits per block in one string, or None if there are none.
    """

    def __init__(self, path: Path, dtype, offset: int, n: int, hashes: str | None):
        self.path, self.hashes = path, hashes
        self.array = np.memmap(path, dtype, mode="r", offset=offset, shape=(n,))
        self.checked = bytearray(-(-self.array.nbytes // BLOCK_BYTES))

    def check(self, starts: list[int], n: int) -> None:
        """Compare the blocks of n items from each of `starts`. Raises OSError if they differ."""
        if self.hashes is None:
            return
        size = BLOCK_BYTES // self.array.itemsize  # items per block
        unchecked = {
            b
            for start in starts
            for b in range(start // size, (start + n - 1) // size + 1)
            if not self.checked[b]
        }
        for b in sorted(unchecked):
            block = self.array[b * size : (b + 1) * size].tobytes()
            if block_hash(block) != self.hashes[16 * b : 16 * b + 16]:
                what = f"block {b} differs from index.json"
                raise OSError(f"{self.path}: {what}; delete {self.path.parent} and rebuild it")
            self.checked[b] = True


class Shards:
    """
    The tokens of one split ("train" or "val"), memory-mapped; `tokens` has one array per file.

    `masks` has one array (T,) uint8 per file, 1 where a token is a target; it is empty if all are.
    Each block is compared with its hash when it is first read: every token trained on was checked,
    and a terabyte opens at once.
    """

    def __init__(self, folder, split: str, index: dict):
        self.folder = Path(folder)
        self.split = split
        self._files, self._mask_files = [], []
        for shard in shards_of(index, split):
            path = self.folder / shard["name"]
            n_tokens, dtype = read_header(path)
            if n_tokens != shard["tokens"]:
                what = f"{n_tokens:,} tokens, but index.json says {shard['tokens']:,}"
                raise ValueError(f"{path}: {what}; delete {self.folder} and rebuild it")
            # published shards have no hashes
            self._files.append(_Mapped(path, dtype, HEADER_BYTES, n_tokens, shard.get("blocks")))
            if "mask" in shard:
                self._mask_files.append(self._mask(shard))
        self.tokens = [file.array for file in self._files]
        self.masks = [file.array for file in self._mask_files]

    def _mask(self, shard: dict) -> _Mapped:
        path, n = self.folder / shard["mask"], shard["tokens"]
        if not path.exists() or path.stat().st_size != n:
            what = f"is missing or has not the {n:,} bytes of index.json"
            raise ValueError(f"{path}: {what}; delete {self.folder} and rebuild it")
        return _Mapped(path, np.uint8, 0, n, shard["mask_blocks"])

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
        self._files[shard].check(starts, n)
        if self._mask_files:
            self._mask_files[shard].check(starts, n)
