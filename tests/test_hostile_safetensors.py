"""Hostile safetensors files, written by hand: refused in one line, or read as what they hold."""

import json
import math
import shutil

import pytest
import torch
import weight_cases
from weight_cases import (
    ALL,
    DEEP,
    LONG,
    LOOK,
    act,
    raw_safetensors,
    refused,
    remanifest,
    same_bits,
)

import wt_load as W
from parts.storage.checkpoint import load_tensors

home = weight_cases.home
ours = weight_cases.ours
bounded = weight_cases.bounded


def with_length(n):
    return lambda tensors: raw_safetensors(tensors, length=n)


def with_header(text):
    return lambda tensors: raw_safetensors(tensors, text=text)


def of_header(change):
    return lambda tensors: raw_safetensors(tensors, change)


def of_entry(**entry):
    """Falsify what the header says of the final bias."""

    def change(header, _):
        next(e for name, e in header.items() if name.endswith("ln_f.bias")).update(entry)

    return of_header(change)


def of_tensors(change):
    """Other tensors; `p` is the prefix of their names."""

    def make(tensors):
        p = next(name for name in tensors if name.endswith("ln_f.bias")).removesuffix("ln_f.bias")
        found = {name: t.clone() for name, t in tensors.items()}
        return raw_safetensors(change(found, p) or found)

    return make


def put(name, value):
    return of_tensors(lambda t, p: t.update({p + name: value}))


def put_head(value):
    return of_tensors(lambda t, p: t.update({"lm_head.weight": value}))


def without(prefix):
    def change(tensors, p):
        return {name: t for name, t in tensors.items() if not name.startswith(p + prefix)}

    return of_tensors(change)


def header_of(tensors) -> str:
    return (raw_safetensors(tensors)[8:].split(b"}}")[0] + b"}}").decode()


def with_a_name_twice(tensors):
    """One name two times in the header, the second time for other bytes."""
    text = header_of(tensors)
    name = next(name for name in tensors if name.endswith("ln_f.bias"))
    other = next(name for name in tensors if name.endswith("ln_f.weight"))
    entry = json.dumps(json.loads(text)[other])
    return raw_safetensors(tensors, text=text[:-1] + f', "{name}": {entry}' + "}")


def with_many_blocks(tensors, p):
    names = [f"{p}h.{i}.{letter}" for i in range(2, 5_000) for letter in "ab"]
    tensors.update({name: torch.ones(1) for name in names})


LENGTHS = (1, 10**6, 2**31, 2**40, 2**63 - 1, 2**64 - 1)
HEADERS = (
    *("[]", "null", "{", "{}x", DEEP, '{"a":' * 9999, "\x00", LONG),
    *('{"a": 1}', '{"__metadata__": 3}', '{"__metadata__": {"a": {}}}'),
)
DTYPES = ("F33", "f32", "", "I32", "U32", "F8_E4M3", "C64", "BOOL", "os.system", 3, None)
SHAPES = (
    *([], [33], [31], [-32], [2**62, 2**62], [0], [16, 2], [1, 32]),
    *(["32"], 32, None, [32.0], [1] * 1000),
)
OFFSETS = (
    *([0, 128], [128, 0], [-128, 0], [2**63, 2**63 + 128], [0, 2**64 - 1]),
    *([5], [], [1.5, 3], None),
)
SAFETENSORS = {
    "nothing": lambda t: b"",
    "seven bytes": lambda t: bytes(7),
    "length 0": lambda t: bytes(8),
    "no tensors": lambda t: raw_safetensors({}),
    **{f"length {n}": with_length(n) for n in LENGTHS},
    **{f"header {text[:9]}": with_header(text) for text in HEADERS},
    **{f"dtype {dtype}": of_entry(dtype=dtype) for dtype in DTYPES},
    **{f"shape {shape}": of_entry(shape=shape) for shape in SHAPES},
    **{f"offsets {offsets}": of_entry(data_offsets=offsets) for offsets in OFFSETS},
    "entry list": of_header(lambda header, data: header.update(x=[])),
    "hole": of_header(lambda header, data: data.extend(bytes(100))),
    "short": lambda t: raw_safetensors(t)[:-1],
    "twice": with_a_name_twice,
    "final bias gone": without("ln_f.bias"),
    "tokens gone": without("wte.weight"),
    "positions gone": without("wpe.weight"),
    "block 0 gone": without("h.0."),
    "block 1 gone": without("h.1."),
    "one more": put("extra", torch.ones(3)),
    "block 9999": put("h.9999.x", torch.ones(1)),
    "block -1": put("h.-1.x", torch.ones(1)),
    "block 10**9": put("h.1000000000.x", torch.ones(1)),
    "five thousand blocks": of_tensors(with_many_blocks),
    "a name of a million": put("x" * 1_000_000, torch.ones(1)),
    "a name of lines": put("a\nerror: b\r\n", torch.ones(1)),
    "no name": of_tensors(lambda t, p: t.update({"": torch.ones(1)})),
    "tokens of width 0": put("wte.weight", torch.ones(257, 0)),
    "no tokens": put("wte.weight", torch.ones(0, 32)),
    "tokens a number": put("wte.weight", torch.tensor(1.0)),
    "tokens flat": put("wte.weight", torch.ones(257 * 32)),
    "positions 0": put("wpe.weight", torch.ones(0, 32)),
    "positions narrower": put("wpe.weight", torch.ones(32, 31)),
    "a number": put("h.0.ln_1.weight", torch.tensor(1.0)),
    "a linear number": put("h.0.mlp.c_fc.weight", torch.tensor(1.0)),
    "linear flat": put("h.0.mlp.c_fc.weight", torch.ones(128)),
    "two in one": put("h.0.attn.c_attn.weight", torch.ones(2, 32, 96)),
    "four dimensions": put("h.1.mlp.c_fc.weight", torch.ones(2, 1, 32, 128)),
    "linear of nothing": put("h.0.mlp.c_fc.weight", torch.ones(0, 0)),
    "integers": put("wpe.weight", torch.ones(32, 32, dtype=torch.int64)),
    "bytes": put("h.0.ln_1.bias", torch.ones(32, dtype=torch.uint8)),
    "truths": put("h.0.ln_1.bias", torch.ones(32, dtype=torch.bool)),
    "a head narrower": put_head(torch.ones(257, 31)),
    "a head of integers": put_head(torch.ones(257, 32, dtype=torch.int64)),
}
METADATA = {"__metadata__": {"format": "pt", "x": "<script>"}}
HARMLESS = {  # other bytes with the same content
    "padded header": lambda t: raw_safetensors(t, text=header_of(t) + " " * 4096),
    "metadata": of_header(lambda header, data: METADATA | header),
    "another order": of_tensors(lambda t, p: dict(reversed(t.items()))),
}


@pytest.mark.parametrize("case", SAFETENSORS)
@pytest.mark.parametrize("where", ["ours", "hf"])
def test_a_hostile_safetensors_file_is_refused(home, ours, tmp_path, where, case):
    folder = ours if where == "ours" else shutil.copytree(home / "hf", tmp_path / "hf")
    path = folder / "model.safetensors"
    path.write_bytes(SAFETENSORS[case](load_tensors(path)))
    if where == "ours":
        remanifest(ours)
    refused(folder, tmp_path, ALL if where == "ours" else LOOK, n_head=2)


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.parametrize("where", ["ours", "hf"])
def test_a_safetensors_file_written_otherwise_is_the_same(home, ours, tmp_path, where, case):
    folder = ours if where == "ours" else shutil.copytree(home / "hf", tmp_path / "hf")
    path = folder / "model.safetensors"
    path.write_bytes(HARMLESS[case](load_tensors(path)))
    remanifest(ours)
    same_bits(folder, tmp_path, home, ALL if where == "ours" else LOOK)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_found_by_verify_and_end_a_sample(home, ours, tmp_path, value):
    path = ours / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_tensors(path).items()}
    tensors["ln_f.weight"][5] = value
    path.write_bytes(raw_safetensors(tensors))
    remanifest(ours)
    refused(ours, tmp_path, ("verify",))
    with pytest.raises(RuntimeError, match="not finite"):
        act("sample", ours, tmp_path / "out")
    act("import", ours, tmp_path / "out")  # an import does not look at the values
    imported = W.open_weights(str(tmp_path / "out")).tensors
    read = {name: t.read() for name, t in imported.items()}
    assert W.weights_hash(read) == W.weights_hash(tensors)


def test_two_tensors_of_one_name_are_refused(home, tmp_path):
    tensors = load_tensors(home / "hf/model.safetensors") | {"wte.weight": torch.ones(257, 32)}
    (tmp_path / "hf.safetensors").write_bytes(raw_safetensors(tensors))
    refused(tmp_path / "hf.safetensors", tmp_path, n_head=2)
