"""
Reads TensorFlow's V2 checkpoints ("tensor bundles", such as OpenAI's GPT-2) without TensorFlow.

    models/124M/
        checkpoint                        text: which prefix is the newest
        model.ckpt.index                  a sorted table (LevelDB's layout): name -> type, shape, file, offset, size, crc
        model.ckpt.data-00000-of-00001    the bytes of all variables

Nothing in a download is believed: the index is checked whole when it is opened, a variable is compared with its crc32c
when it is read, and nothing is allocated that the files could not fill. Sources: TensorFlow's core/lib/io/format.cc (the
table), core/protobuf/tensor_bundle.proto (what is in it), core/lib/hash/crc32c.h.
"""

import functools
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}  # types.proto
FOOTER_BYTES, MAGIC = 48, 0xDB4775248B80FB57
INDEX_BYTES = 1 << 20  # at most; the index of GPT-2 XL has some twenty thousand
NAME_BYTES, MAX_DIMS, MAX_ELEMENTS = 512, 16, 1 << 48
VARINT, BYTES, FIXED32 = 0, 2, 5  # protobuf's wire types, those that bundles have

# --------------------------------------------------------------------------------------------------- checksums
# A crc is linear: crc(a xor b) = crc(a) xor crc(b), with registers that begin at 0. So a word of the message may be
# replaced by what it becomes n bytes later, xored onto the word there. That is done to many words at once: each block of
# words is folded onto the next one, then the first half of what is left onto the second, down to one word.

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
START = (
    0x641F6454  # this word, fed to a register of 0, makes it 0xFFFFFFFF, with which a crc32c begins
)
BLOCK_WORDS = 1 << 14  # 64 KiB: stays in the processor's cache


@functools.cache
def _tables(n_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """What the lower and the upper 16 bits of a register become when n_bytes (a power of two) zeros are fed, (65536,) uint32 each."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if n_bytes == 1:
        for _ in range(8):
            bits = (bits >> 1) ^ (bits & 1) * np.uint32(POLYNOMIAL)
    else:
        bits = _feed_zeros(_feed_zeros(bits, n_bytes // 2), n_bytes // 2)
    low, high = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    for a, b in zip(bits[:16], bits[16:], strict=True):
        low, high = np.concatenate([low, low ^ a]), np.concatenate([high, high ^ b])
    return low, high


def _feed_zeros(registers: np.ndarray, n_bytes: int) -> np.ndarray:
    low, high = _tables(n_bytes)
    return low[registers & 0xFFFF] ^ high[registers >> 16]


def crc32c(data) -> int:
    """The crc32c of bytes or of an (n,) uint8 array. Example: crc32c(b"123456789") == 0xE3069283."""
    data = np.frombuffer(data, np.uint8)
    words, done = data[: len(data) // 4 * 4].view("<u4"), 0
    block = np.zeros(
        min(2 * BLOCK_WORDS, 2 << len(words).bit_length()), np.uint32
    )  # zeros do not change a register of 0
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
    """As TensorFlow stores it: turned and shifted, lest data that holds its own crc look alike whatever it is."""
    crc = crc32c(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


# ------------------------------------------------------------------------------------------------------ the index


def _varints(data: bytes, i: int, n: int = 1) -> list[int]:
    """n numbers from data[i] on, each 7 bits a byte, lowest first, the last byte below 128; and where they end."""
    values = []
    for _ in range(n):
        start = i
        while data[i] > 127:
            i += 1
        i += 1
        values.append(
            sum((byte & 127) << 7 * k for k, byte in enumerate(data[start : min(i, start + 10)]))
        )
    return [*values, i]


def _fields(message: bytes) -> dict[tuple[int, int], list]:
    """A protobuf message as {(number of the field, wire type): its values}. So a field of the wrong type is only an unknown one."""
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
    """The value of a field; one that is 0 or empty is not written."""
    return fields.get((number, kind), [{VARINT: 0, BYTES: b"", FIXED32: bytes(4)}[kind]])[-1]


def _block(index: bytes, offset: int, size: int):
    """Keys and values of a block of the table; behind it are the kind of its compression (1 byte) and a crc of both (4 bytes)."""
    end = offset + size
    if (
        end + 5 > len(index) - FOOTER_BYTES
        or _stored_crc(index[offset : end + 1]) != index[end + 1 : end + 5]
    ):
        raise ValueError("a block differs from its crc32c")
    if index[end]:
        raise ValueError(
            f"a block is compressed (kind {index[end]}), this code reads what TensorFlow's saver writes: plain ones"
        )
    end -= 4 + 4 * int.from_bytes(
        index[max(end - 4, offset) : end], "little"
    )  # where to begin a search: skipped
    i, key = offset, b""
    while i < end:  # a key is the first `shared` bytes of the one before it, and `rest` of its own
        shared, rest, size, i = _varints(index, i, n=3)
        if i + rest + size > end or shared > len(key) or shared + rest > NAME_BYTES:
            raise ValueError("a block has an impossible entry")
        key = key[:shared] + index[i : i + rest]
        yield key, index[i + rest : i + rest + size]
        i += rest + size


def _table(index: bytes):
    """Keys and values of all blocks, in order. The footer says where the block is that says where the others are."""
    if int.from_bytes(index[-8:], "little") != MAGIC:
        raise ValueError(
            f"not the index of a TensorFlow checkpoint, cut short, or over {INDEX_BYTES:,} bytes"
        )
    meta_offset, meta_size, offset, size, _ = _varints(index[-FOOTER_BYTES:], 0, n=4)
    next(
        _block(index, meta_offset, meta_size), None
    )  # names of filters: there are none, but it has a crc
    end = 0
    for _, handle in _block(index, offset, size):
        offset, size, _ = _varints(handle, 0, n=2)
        if offset < end:  # else a few bytes could stand for many
            raise ValueError("two blocks overlap")
        end = offset + size
        yield from _block(index, offset, size)


def _entry(name: str, value: bytes, n_files: int) -> tuple:
    """Of a variable: shape, dtype, number of the data file, offset, size in bytes, crc."""
    fields = _fields(value)
    kind, file, offset, size = (_last(fields, number) for number in (1, 3, 4, 5))
    if (7, BYTES) in fields:
        raise ValueError(f"{name!r} was saved in slices, this code reads whole variables")
    if kind not in DTYPES:
        raise ValueError(
            f"{name!r} has type {kind}, this code reads {sorted(DTYPES)} of TensorFlow's types.proto"
        )
    dims = _fields(_last(fields, 2, BYTES)).get((2, BYTES), [])
    shape = tuple(_last(_fields(dim), 1) for dim in dims[: MAX_DIMS + 1])
    absurd = (
        len(shape) > MAX_DIMS
        or math.prod(max(d, 1) for d in shape) > MAX_ELEMENTS
        or file >= n_files
    )
    if absurd or size != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(
            f"{name!r} cannot be {list(shape)} of {DTYPES[kind]} in {size:,} bytes of data file {file} of {n_files}"
        )
    return shape, DTYPES[kind], file, offset, size, _last(fields, 6, FIXED32)


def _read(path: str, offset: int, size: int) -> np.ndarray:
    """`size` bytes of a file, or fewer where it ends before, (n,) uint8."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: missing; a TensorFlow checkpoint has a .index and .data files, download it again"
        )
    end = os.path.getsize(path)
    return np.fromfile(
        path, np.uint8, count=max(min(size, end - offset), 0), offset=min(offset, end)
    )


class Bundle:
    """
    The variables of a TensorFlow checkpoint, read one at a time. prefix: the path without `.index`. shapes: {name: shape};
    dtypes: {name: torch's}.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged or has what this does not read:
    big-endian numbers, types that are not in DTYPES, variables that were saved in slices.
    """

    def __init__(self, prefix):
        self.prefix, path = Path(prefix), f"{prefix}.index"
        try:
            entries = _table(_read(path, 0, INDEX_BYTES).tobytes())
            key, value = next(entries, (None, b""))
            header = _fields(value)
            self.n_files = _last(header, 1)
            if key != b"" or not 1 <= self.n_files <= 99_999 or _last(header, 2):
                raise ValueError(
                    "has no header, or its numbers are big-endian, this code reads little-endian"
                )
            self._places = {
                key.decode(): _entry(key.decode(), value, self.n_files) for key, value in entries
            }
        except (
            ValueError,
            IndexError,
        ) as e:  # an IndexError is a number behind the end of its bytes
            raise ValueError(
                f"{path}: {'damaged' if isinstance(e, IndexError) else e}; download it again, or save plain variables"
            ) from e
        self.shapes: dict[str, tuple[int, ...]] = {
            name: place[0] for name, place in self._places.items()
        }
        self.dtypes: dict[str, torch.dtype] = {
            name: place[1] for name, place in self._places.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """One variable in memory of its own, compared with its crc32c."""
        if name not in self.shapes:
            raise ValueError(
                f"{self.prefix}.index: has no variable {name!r}; it is a checkpoint of another model"
            )
        shape, dtype, file, offset, size, crc = self._places[name]
        path = f"{self.prefix}.data-{file:05d}-of-{self.n_files:05d}"
        data = _read(path, offset, size)
        if len(data) < size or _stored_crc(data) != crc:
            raise ValueError(
                f"{path}: {name!r} differs from its crc32c; the file is damaged or cut short, download it again"
            )
        return (
            torch.from_numpy(data).view(dtype).reshape(shape)
            if size
            else torch.empty(shape, dtype=dtype)
        )


def find_prefix(folder) -> Path | None:
    """
    The prefix of the checkpoint in a folder: what the file `checkpoint` there names (without the folders it was saved in),
    otherwise that of the only *.index; None where there is neither.
    """
    folder = Path(folder)
    if os.path.isfile(folder / "checkpoint"):
        text = _read(str(folder / "checkpoint"), 0, INDEX_BYTES).tobytes().decode(errors="replace")
        named = re.search(
            r'^model_checkpoint_path: *"(?:.*[/\\])?([^/\\"\n]+)"', text, re.MULTILINE
        )
        if named and os.path.isfile(folder / f"{named[1]}.index"):
            return folder / named[1]
    found = list(folder.glob("*.index"))
    return found[0].with_suffix("") if len(found) == 1 else None
