"""
Reads TensorFlow's V2 checkpoints ("tensor bundles", such as OpenAI's GPT-2) without TensorFlow.

    models/124M/
        checkpoint                        text: the prefix of the newest checkpoint
        model.ckpt.index                  a sorted table (LevelDB's layout):
                                          name -> dtype, shape, file, offset, size, crc
        model.ckpt.data-00000-of-00001    the bytes of all variables

Downloads are untrusted: the index is checked completely when it is opened, each variable against
its crc32c when it is read, and nothing is allocated that the files could not fill.

Sources: TensorFlow's core/lib/io/format.cc (the table), core/protobuf/tensor_bundle.proto (its
entries) and core/lib/hash/crc32c.h.
"""

import functools
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

DTYPES = {  # numbers of types.proto
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}
FOOTER_BYTES, MAGIC = 48, 0xDB4775248B80FB57
MAX_INDEX_BYTES = 1 << 20  # the index of GPT-2 XL has about twenty thousand
MAX_NAME_BYTES, MAX_DIMS, MAX_ELEMENTS, MAX_FILES = 512, 16, 1 << 48, 99_999
VARINT, BYTES, FIXED32 = 0, 2, 5  # protobuf's wire types, those that bundles have

# ---------------------------------------------------------------------------------------- checksums
# A crc is linear: crc(a xor b) = crc(a) xor crc(b), with registers that begin at 0. So a word of
# the message may be replaced by what it becomes n bytes later, xored onto the word at that place.
# This is done to many words at once: each block of words is folded onto the next one, then the
# first half of the last block onto the second, down to one word.

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
# a crc32c begins with a register of 0xFFFFFFFF, which is what this word makes of a register of 0
START = 0x641F6454
BLOCK_WORDS = 1 << 14  # 64 KiB: fits into the processor's cache


@functools.cache
def _tables(n_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """
    What n_bytes zeros (a power of two) make of the lower and of the upper 16 bits of a register.

    Two arrays, (65536,) uint32 each.
    """
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if n_bytes == 1:
        for _ in range(8):
            bits = (bits >> 1) ^ (bits & 1) * np.uint32(POLYNOMIAL)
    else:
        bits = _feed_zeros(_feed_zeros(bits, n_bytes // 2), n_bytes // 2)
    low, high = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    for a, b in zip(bits[:16], bits[16:], strict=True):
        low = np.concatenate([low, low ^ a])
        high = np.concatenate([high, high ^ b])
    return low, high


def _feed_zeros(registers: np.ndarray, n_bytes: int) -> np.ndarray:
    low, high = _tables(n_bytes)
    return low[registers & 0xFFFF] ^ high[registers >> 16]


def crc32c(data) -> int:
    """The crc32c of bytes or of an (n,) uint8 array; crc32c(b"123456789") == 0xE3069283."""
    data = np.frombuffer(data, np.uint8)
    words, done = data[: len(data) // 4 * 4].view("<u4"), 0
    # zeros before the first word do not change a register of 0
    block = np.zeros(min(2 * BLOCK_WORDS, 2 << len(words).bit_length()), np.uint32)
    block[-1] = START
    while size := len(block) // 2:
        block = _feed_zeros(block[:size], 4 * size) ^ block[size:]
        while len(words) - done >= size:
            block = _feed_zeros(block, 4 * size) ^ words[done : done + size]
            done += size
    register = _feed_zeros(block, 4)
    for byte in data[4 * done :]:  # at most three
        register = _feed_zeros(register ^ byte, 1)
    return int(register[0]) ^ 0xFFFFFFFF


def _stored_crc(data) -> bytes:
    """
    The crc32c as TensorFlow stores it, 4 bytes.

    It is rotated and shifted by a constant, because the crc of data that ends with its own crc is
    the same whatever the data is.
    """
    crc = crc32c(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


# ---------------------------------------------------------------------------------------- the index


def _varints(data: bytes, i: int, n: int = 1) -> list[int]:
    """
    n numbers from data[i] on, and the position after them.

    A number has 7 bits a byte, lowest first; its last byte is below 128. Raises IndexError at the
    end of the data.
    """
    values = []
    for _ in range(n):
        start = i
        while data[i] > 127:
            i += 1
        i += 1
        digits = data[start : min(i, start + 10)]
        values.append(sum((byte & 127) << 7 * k for k, byte in enumerate(digits)))
    return [*values, i]


def _fields(message: bytes) -> dict[tuple[int, int], list]:
    """
    A protobuf message as {(number of the field, wire type): its values}.

    With the wire type in the key, a field of the wrong type is one that nobody asks for.
    """
    fields, i = {}, 0
    while i < len(message):
        key, i = _varints(message, i)
        number, kind = divmod(key, 8)
        if kind not in (VARINT, BYTES, FIXED32):
            raise ValueError(f"field {number} has type {kind}, which no field of a bundle has")
        value, i = (4, i) if kind == FIXED32 else _varints(message, i)
        if kind != VARINT:  # that was the size of the value
            value, i = message[i : i + value], i + value
        fields.setdefault((number, kind), []).append(value)
    return fields


def _last(fields: dict, number: int, kind: int = VARINT):
    """The value of a field. A field that is 0 or empty is not stored."""
    default = {VARINT: 0, BYTES: b"", FIXED32: bytes(4)}[kind]
    return fields.get((number, kind), [default])[-1]


def _block(index: bytes, offset: int, size: int):
    """
    Keys and values of a block of the table.

    After the block come the kind of its compression (1 byte) and a crc of both (4 bytes). The block
    ends with positions for a binary search, which are skipped.
    """
    end = offset + size
    in_index = end + 5 <= len(index) - FOOTER_BYTES
    if not in_index or _stored_crc(index[offset : end + 1]) != index[end + 1 : end + 5]:
        raise ValueError("a block does not match its crc32c")
    if index[end]:
        kind = index[end]
        raise ValueError(f"a block is compressed (kind {kind}), which is not supported")
    n_positions = int.from_bytes(index[max(end - 4, offset) : end], "little")
    end -= 4 + 4 * n_positions
    i, key = offset, b""
    while i < end:  # a key is the first `shared` bytes of the key before it, and `rest` new bytes
        shared, rest, size, i = _varints(index, i, n=3)
        if i + rest + size > end or shared > len(key) or shared + rest > MAX_NAME_BYTES:
            raise ValueError("a block has an impossible entry")
        key = key[:shared] + index[i : i + rest]
        yield key, index[i + rest : i + rest + size]
        i += rest + size


def _table(index: bytes):
    """
    Keys and values of all blocks, in order.

    The footer has the places of two blocks: one with names of filters, which TensorFlow leaves
    empty, and one with the places of all others.
    """
    if int.from_bytes(index[-8:], "little") != MAGIC:
        limit = f"over {MAX_INDEX_BYTES:,} bytes"
        raise ValueError(f"not the index of a TensorFlow checkpoint, truncated, or {limit}")
    filters_offset, filters_size, offset, size, _ = _varints(index[-FOOTER_BYTES:], 0, n=4)
    next(_block(index, filters_offset, filters_size), None)  # checks its crc
    end = 0
    for _, place in _block(index, offset, size):
        offset, size, _ = _varints(place, 0, n=2)
        if offset < end:  # otherwise a few bytes could claim to be many entries
            raise ValueError("two blocks overlap")
        end = offset + size
        yield from _block(index, offset, size)


def _entry(name: str, value: bytes, n_files: int) -> tuple:
    """(shape, dtype, number of the data file, offset, size in bytes, crc) of a variable."""
    fields = _fields(value)
    kind, file, offset, size = (_last(fields, number) for number in (1, 3, 4, 5))
    if (7, BYTES) in fields:
        raise ValueError(f"{name!r} was saved in slices, which is not supported")
    if kind not in DTYPES:
        known = ", ".join(f"{number} ({dtype})" for number, dtype in DTYPES.items())
        raise ValueError(f"{name!r} has type {kind} of types.proto, supported are {known}")
    dtype = DTYPES[kind]
    dims = _fields(_last(fields, 2, BYTES)).get((2, BYTES), [])
    shape = tuple(_last(_fields(dim), 1) for dim in dims[: MAX_DIMS + 1])
    too_large = len(shape) > MAX_DIMS or math.prod(max(d, 1) for d in shape) > MAX_ELEMENTS
    if too_large or file >= n_files or size != math.prod(shape) * dtype.itemsize:
        place = f"{size:,} bytes of data file {file} of {n_files}"
        raise ValueError(f"{name!r} cannot be {list(shape)} of {dtype} in {place}")
    return shape, dtype, file, offset, size, _last(fields, 6, FIXED32)


def _read(path: str, offset: int, size: int) -> np.ndarray:
    """`size` bytes of a file from `offset`, or fewer if it ends before, (n,) uint8."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: missing; download the checkpoint again, its .index and .data files"
        )
    end = os.path.getsize(path)
    count = max(min(size, end - offset), 0)
    return np.fromfile(path, np.uint8, count=count, offset=min(offset, end))


class Bundle:
    """
    The variables of a TensorFlow checkpoint, read one at a time.

    prefix: the path without `.index`. shapes: {name: shape}; dtypes: {name: torch's}.
    Raises FileNotFoundError if a file is missing, and ValueError if one is damaged or has what is
    not supported: big-endian numbers, other types than DTYPES, variables saved in slices.
    """

    def __init__(self, prefix):
        self.prefix, path = Path(prefix), f"{prefix}.index"
        try:
            entries = _table(_read(path, 0, MAX_INDEX_BYTES).tobytes())
            key, value = next(entries, (None, b""))
            header = _fields(value)
            self.n_files = _last(header, 1)
            if key != b"" or not 1 <= self.n_files <= MAX_FILES:
                raise ValueError("has no header, or one with an impossible number of files")
            if _last(header, 2):
                raise ValueError("has big-endian numbers, which is not supported")
            self._places = {}
            for key, value in entries:
                name = key.decode()
                self._places[name] = _entry(name, value, self.n_files)
        except (ValueError, IndexError) as e:  # IndexError: a number runs past the end
            problem = "damaged" if isinstance(e, IndexError) else e
            raise ValueError(
                f"{path}: {problem}; download it again, or save plain variables"
            ) from e
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, (shape, dtype, *_) in self._places.items():
            self.shapes[name] = shape
            self.dtypes[name] = dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One variable in memory of its own, checked against its crc32c."""
        if name not in self.shapes:
            raise ValueError(
                f"{self.prefix}.index: has no variable {name!r}; use a checkpoint of this model"
            )
        shape, dtype, file, offset, size, crc = self._places[name]
        path = f"{self.prefix}.data-{file:05d}-of-{self.n_files:05d}"
        data = _read(path, offset, size)
        if len(data) < size or _stored_crc(data) != crc:
            raise ValueError(
                f"{path}: {name!r} does not match its crc32c; "
                "the file is damaged or truncated, download it again"
            )
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(data).view(dtype).reshape(shape)


def find_prefix(folder) -> Path | None:
    """
    The prefix of the TensorFlow checkpoint in a folder, None if there is none.

    The one that the file `checkpoint` names (folders in that name are ignored, the checkpoint may
    have been moved), otherwise that of the only *.index.
    """
    folder = Path(folder)
    if os.path.isfile(folder / "checkpoint"):
        data = _read(str(folder / "checkpoint"), 0, MAX_INDEX_BYTES).tobytes()
        line = re.compile(r'^model_checkpoint_path: *"(?:.*[/\\])?([^/\\"\n]+)"', re.MULTILINE)
        named = line.search(data.decode(errors="replace"))
        if named and os.path.isfile(folder / f"{named[1]}.index"):
            return folder / named[1]
    found = list(folder.glob("*.index"))
    return found[0].with_suffix("") if len(found) == 1 else None
