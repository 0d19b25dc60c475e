"""TensorFlow's checkpoints, written byte by byte as TensorFlow does, damaged, and made hostile."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from parts.storage.tf_bundle import Bundle, crc32c, find_prefix

CODES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.int32: 3,
    torch.int64: 9,
    torch.bfloat16: 14,
    torch.float16: 19,
}

# ----------------------------------------------------------------------------------------- a writer


def slow_crc32c(data):
    """Bit by bit, as the polynomial division is written in books."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data):
    crc = slow_crc32c(data)
    return ((crc >> 15 | crc << 17) % 2**32 + 0xA282EAD8) % 2**32


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n % 128 + 128]), n // 128
    return out + bytes([n])


def number(field, n):
    return varint(8 * field) + varint(n) if n else b""


def message(field, data):
    return varint(8 * field + 2) + varint(len(data)) + data


def header(n_files=1, endianness=0):
    return number(1, n_files) + number(2, endianness) + message(3, number(1, 1))


def entry(dtype=1, shape=(), file=0, offset=0, size=4, crc=0, more=b""):
    fields = [
        number(1, dtype),
        message(2, b"".join(message(2, number(1, d)) for d in shape)),
        number(3, file),
        number(4, offset),
        number(5, size),
        varint(8 * 6 + 5) + crc.to_bytes(4, "little"),
        more,
    ]
    return b"".join(fields)


def block(pairs, restart_every):
    """Keys share their beginning with the key before, except at restarts."""
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        rest = key[shared:]
        out += varint(shared) + varint(len(rest)) + varint(len(value)) + rest + value
        before = key
    restarts = restarts or [0]
    return out + b"".join(r.to_bytes(4, "little") for r in [*restarts, len(restarts)])


def table(pairs, per_block=4, restart_every=3, compression=0, change=lambda data: data):
    """The bytes of an .index; `change` may damage a block before its crc is computed."""
    out = b""

    def add(data):
        nonlocal out
        handle = varint(len(out)) + varint(len(data))
        kind = bytes([compression])
        out += data + kind + masked(data + kind).to_bytes(4, "little")
        return handle

    groups = [pairs[i : i + per_block] for i in range(0, len(pairs), per_block)]
    handles = []
    for group in groups:
        handles.append((group[-1][0] + b"\xff", add(change(block(group, restart_every)))))
    footer = add(block([], 1)) + add(block(handles, 1))
    return out + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


def raw(tensor):
    """The bytes of a tensor."""
    if not tensor.numel():
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(prefix, tensors, n_files=1, **kwargs):
    """Write tensors {name: tensor} over n_files data files; returns the prefix."""
    data, pairs = [b""] * n_files, [(b"", header(n_files))]
    for i, name in enumerate(sorted(tensors)):
        t, file = tensors[name], i % n_files
        bytes_, offset = raw(t), len(data[file])
        place = entry(CODES[t.dtype], t.shape, file, offset, len(bytes_), masked(bytes_))
        pairs.append((name.encode(), place))
        data[file] += bytes_
    for file, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{file:05d}-of-{n_files:05d}").write_bytes(content)
    prefix.with_name(prefix.name + ".index").write_bytes(table(pairs, **kwargs))
    return prefix


def example():
    """GPT-2's names, which share long beginnings; every type; odd shapes, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"global_step": torch.tensor(2**40), "none": torch.zeros(0, 3)}
    tensors["model/wte"] = torch.randn(50, 9, generator=generator)
    for i in range(12):
        for kind in "bw":
            t = torch.randn(1, i + 3, 5, generator=generator)
            tensors[f"model/h{i}/attn/c_attn/{kind}"] = t
    for dtype in CODES:
        tensors[f"of/{dtype}"] = (100 * torch.randn(7, 3, generator=generator)).to(dtype)
    return tensors


def assert_same(bundle, tensors):
    assert bundle.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, t in tensors.items():
        got = bundle.tensor(name)
        assert got.dtype == t.dtype and got.shape == t.shape and raw(got) == raw(t)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("n_files", [1, 2])
@pytest.mark.parametrize("per_block, restart_every", [(1, 1), (4, 3), (1000, 16)])
def test_every_type_comes_back_bit_for_bit(tmp_path, n_files, per_block, restart_every):
    tensors = example()
    blocks = {"per_block": per_block, "restart_every": restart_every}
    assert_same(Bundle(save(tmp_path / "model.ckpt", tensors, n_files, **blocks)), tensors)


def test_a_tensor_lives_in_memory_of_its_own(tmp_path):
    bundle = Bundle(save(tmp_path / "model.ckpt", {"w": torch.ones(3)}))
    bundle.tensor("w").zero_()
    (tmp_path / "model.ckpt.data-00000-of-00001").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "model.ckpt.data-00000-of-00001")
    assert bundle.tensor("w").tolist() == [1, 1, 1]


def test_opening_reads_the_index_only(tmp_path):
    prefix = save(tmp_path / "model.ckpt", {"w": torch.ones(3)})
    (tmp_path / "model.ckpt.data-00000-of-00001").unlink()
    bundle = Bundle(prefix)
    assert bundle.shapes == {"w": (3,)}
    with pytest.raises(FileNotFoundError, match="model.ckpt.data-00000-of-00001: missing"):
        bundle.tensor("w")


def test_crc32c_is_the_known_one_and_equals_a_slow_one():
    assert slow_crc32c(b"123456789") == crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4
    rng = np.random.default_rng(0)
    for size in [*range(70), 255, 256, 257, 65_535, 65_536, 65_541, 200_003]:
        data = rng.integers(0, 256, size, dtype=np.uint8)
        assert crc32c(data) == crc32c(data.tobytes()) == slow_crc32c(data.tolist()), size


NAMES_A = (
    'model_checkpoint_path: "a"',
    'model_checkpoint_path: "/x/y/a"',
    r'model_checkpoint_path: "C:\\x\\a"',
)
NAMES_NOTHING = (
    b"\xff\0\xfe",
    b'model_checkpoint_path: "\0"',
    b'model_checkpoint_path: ".."',
    b'model_checkpoint_path: "' + b"a" * 9999 + b'"',
)


def test_the_prefix_is_what_checkpoint_names_or_the_only_index(tmp_path):
    assert find_prefix(tmp_path) is None and find_prefix(tmp_path / "nowhere") is None
    text = 'model_checkpoint_path: "/home/alec/b"\nall_model_checkpoint_paths: "a"\n'
    (tmp_path / "checkpoint").write_text(text, encoding="utf-8")
    assert find_prefix(tmp_path) is None
    for name in ("a", "model.ckpt"):
        save(tmp_path / name, {"w": torch.ones(1)})
    assert find_prefix(tmp_path) is None  # two, and `checkpoint` names neither
    for text in NAMES_A:
        (tmp_path / "checkpoint").write_text(text, encoding="utf-8")
        assert find_prefix(tmp_path) == tmp_path / "a"
    for hostile in NAMES_NOTHING:
        (tmp_path / "checkpoint").write_bytes(hostile)
        assert find_prefix(tmp_path) is None
    (tmp_path / "a.index").unlink()
    assert find_prefix(tmp_path) == tmp_path / "model.ckpt"


# ------------------------------------------------------------------------------ damaged and hostile


def refused(prefix):
    """The message with which a bundle is refused, or None if all of it can be read."""
    try:
        bundle = Bundle(prefix)
        for name in bundle.shapes:
            bundle.tensor(name)
    except (ValueError, FileNotFoundError) as e:
        assert str(prefix) in str(e) and "\n" not in str(e)
        return str(e)
    return None


def test_any_flipped_byte_or_cut_is_refused_or_harmless(tmp_path):
    rng, tensors = random.Random(0), {name: t for name, t in example().items() if "h1" not in name}
    prefix = save(tmp_path / "model.ckpt", tensors, n_files=2)
    n_refused = 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for i in range(150 if path.suffix == ".index" else 75):
            at = rng.randrange(len(whole))
            bad = bytearray(whole)
            bad[at] ^= rng.randrange(1, 256)
            path.write_bytes(whole[:at] if i % 4 == 0 else bad)
            if refused(prefix):
                n_refused += 1
            else:
                assert_same(Bundle(prefix), tensors)
        path.write_bytes(whole)
    assert n_refused > 280
    assert_same(Bundle(prefix), tensors)


def test_an_index_that_was_changed_with_its_checksums_is_refused_or_read(tmp_path):
    """Here the crcs are right, so the parser itself has to hold."""
    rng = random.Random(0)

    def change(data):
        data = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)

    tensors = {f"model/h{i}/w": torch.ones(i, 2) for i in range(4)}
    outcomes = []
    for _ in range(500):
        outcomes.append(refused(save(tmp_path / "model.ckpt", tensors, per_block=5, change=change)))
    assert sum(o is not None for o in outcomes) > 250 and len(set(outcomes)) > 10


HUGE = 2**63
SLICED = message(7, message(1, number(1, 2)))
START = (b"", header())
HOSTILE = {
    "big-endian": [(b"", header(endianness=1))],
    "no header": [(b"w", entry())],
    "has no header": [(b"", header(n_files=0))],
    "impossible number of files": [(b"", header(n_files=10**18))],
    "has type 7 of": [START, (b"w", entry(dtype=7))],
    "'w' was saved in slices": [START, (b"w", entry(more=SLICED))],
    "data file 1 of 1": [START, (b"w", entry(file=1))],
    "crc32c; the file is damaged": [START, (b"w", entry(crc=1))],
    "or truncated": [START, (b"w", entry(offset=HUGE))],
    "is damaged or truncated": [START, (b"w", entry(shape=(2**40,), size=2**42))],
    r"cannot be \[3\] of torch.float32 in 4 bytes": [START, (b"w", entry(shape=(3,)))],
    r"cannot be \[18446744073709551612\]": [
        START,
        (b"w", entry(shape=(2**64 - 4,), size=2**64 - 16)),
    ],
    "in 0 bytes": [START, (b"w", entry(shape=(2**62, 2**62, 0), size=0))],
    r"cannot be \[1, 1": [START, (b"w", entry(shape=(1,) * 9999))],
    "cannot be": [START, (b"w", entry(shape=(HUGE,) * 9999))],
    "codec can't decode": [START, (b"\xff\xfe", entry())],
    "impossible entry": [START, (b"w" * 100_000, entry())],
    "field 1 has type 4": [START, (b"w", bytes([8 * 1 + 4]))],
    "damaged; download": [START, (b"w", b"\xff" * 30)],
}


@pytest.mark.parametrize("message_", HOSTILE)
def test_a_hostile_index_is_refused_without_filling_the_memory(tmp_path, message_):
    prefix = save(tmp_path / "model.ckpt", {"w": torch.ones(1)})
    (tmp_path / "model.ckpt.index").write_bytes(table(HOSTILE[message_]))
    tracemalloc.start()
    with pytest.raises((ValueError, FileNotFoundError), match=message_):
        for name in (bundle := Bundle(prefix)).shapes:
            bundle.tensor(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**20  # the crc's tables are 9 MiB of it
    assert refused(prefix)


def test_a_hostile_table_is_refused(tmp_path):
    path = tmp_path / "model.ckpt.index"
    save(tmp_path / "model.ckpt", {"w": torch.ones(1)}, compression=1)
    with pytest.raises(ValueError, match="a block is compressed"):
        Bundle(tmp_path / "model.ckpt")
    save(tmp_path / "model.ckpt", {"w": torch.ones(1)})
    whole, magic = path.read_bytes(), 0xDB4775248B80FB57.to_bytes(8, "little")
    beyond = varint(0) + varint(HUGE) + varint(5) * 2
    for footer in (b"\xff" * 40, varint(HUGE) * 4, beyond, bytes(40)):
        path.write_bytes(whole[:-48] + footer.ljust(40, b"\0") + magic)
        assert "model.ckpt.index: a block does not match" in refused(tmp_path / "model.ckpt")
    too_large = bytes(2 << 20) + whole
    for content in (b"", magic, bytes(9) + magic, b"text\n" * 30, whole[:-1], too_large):
        path.write_bytes(content)
        assert refused(tmp_path / "model.ckpt")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.ckpt.index: missing"):
        Bundle(tmp_path / "model.ckpt")


def test_a_block_that_is_named_twice_is_refused(tmp_path):
    once = table([(b"", header()), (b"w", entry())], per_block=1)
    first = block([(b"", header())], 3)
    data = once[: len(first) + 5]
    handle, parts = varint(0) + varint(len(first)), []
    for pairs in ([], [(b"a", handle), (b"b", handle)]):
        content = block(pairs, 1) + b"\0"
        parts.append(varint(len(data)) + varint(len(content) - 1))
        data += content + masked(content).to_bytes(4, "little")
    (tmp_path / "model.ckpt.index").write_bytes(data + b"".join(parts).ljust(40, b"\0") + once[-8:])
    assert "two blocks overlap" in refused(tmp_path / "model.ckpt")


def test_a_variable_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model.ckpt.index: has no variable 'v'"):
        Bundle(save(tmp_path / "model.ckpt", {"w": torch.ones(1)})).tensor("v")
