"""Hostile checkpoints of our own, with hashes that fit: refused before anything is built."""

import contextlib
import io
import json
import math
import os

import pytest
import weight_cases
from weight_cases import ALL, DEEP, LONG, MOST_CHARS, refused, remanifest, same_bits

import wt_load as W
from parts.cli.launch import BAD_INPUT, error_line
from parts.data.tokenizers import Tokenizer, byte_tokenizer

home = weight_cases.home
ours = weight_cases.ours
bounded = weight_cases.bounded

# ------------------------------------------------------------------------------------- the manifest


def files_of(entry) -> str:
    return json.dumps({"files": {"model.safetensors": entry}})


NAMES = (
    *("", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\0b"),
    *("a\nerror: b", "x" * 9000, "x" * 200, "/dev/zero", "\x1b[2J"),
)
MANIFESTS = {
    "deep": DEEP,
    "deep in it": '{"files": ' + '{"a":' * 50_000,
    "empty": "",
    "null": "null",
    "list": "[]",
    "object": "{}",
    "number": "1e999",
    "many digits": LONG,
    "files null": '{"files": null}',
    "files list": '{"files": [["model.safetensors"]]}',
    "no files": '{"files": {}}',
    "text": '{"files": "model.safetensors"}',
    "entry null": files_of(None),
    "entry list": files_of([1, 2]),
    "no hash": files_of({"bytes": 1}),
    "size text": files_of({"bytes": "1", "sha256": 1}),
    "size digits": files_of({"bytes": 0, "sha256": ""}).replace("0", LONG),
    "not utf-8": "\udcff",
    "surrogate": '{"files": {"\\ud800": {"bytes": 0, "sha256": ""}}}',
    **{
        f"name {name[:20]!r}": json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}})
        for name in NAMES
    },
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(ours, tmp_path, case):
    (ours / "MANIFEST.json").write_bytes(MANIFESTS[case].encode(errors="surrogateescape"))
    refused(ours, tmp_path, ALL)


def test_a_manifest_that_leaves_out_the_weights_is_refused(ours, tmp_path):
    files = json.loads((ours / "MANIFEST.json").read_text(encoding="utf-8"))
    for name in ("model.safetensors", "trainer_state.json", "tokenizer.json"):
        fewer = {"files": {k: v for k, v in files["files"].items() if k != name}}
        (ours / "MANIFEST.json").write_text(json.dumps(fewer), encoding="utf-8")
        refused(ours, tmp_path, ALL, named=ours / name)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_a_listed_file_that_never_ends_is_not_read(ours, tmp_path, name):
    (ours / "extra").symlink_to(name) if name != "pipe" else os.mkfifo(ours / "extra")
    files = json.loads((ours / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    files["extra"] = {"bytes": 0, "sha256": ""}
    (ours / "MANIFEST.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    refused(ours, tmp_path, ALL, named=ours / "extra")


def test_a_link_to_the_same_bytes_is_the_same(ours, tmp_path, home):
    (ours / "model.safetensors").rename(tmp_path / "elsewhere")
    (ours / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    same_bits(ours, tmp_path, home, ALL)


# ----------------------------------------------------------------------------- the state of the run

SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
WRONG_SIZES = (0, -1, 3, 10**9, 10**12, 10**30, "2", 2.5, math.nan, math.inf, None, [2], {}, True)
WRONG_CONFIGS = {
    **dict.fromkeys(SIZES, WRONG_SIZES),
    "dropout": (1, -1, "0", math.nan, None, []),
    "tied": (False, "yes", None, []),
}
INCOMPLETE = ({"step": "3", "val_loss": 1.0}, {"step": 3}, {"step": 3, "val_loss": "low"})
WRONG_STATES = {
    "model_config": (None, [], "x", 1),
    "step": (None, "3", 3.5, math.nan, []),
    "tokens": (None, "many", 7.5, math.inf, {}),
    "best": ([1], "x", 3, *INCOMPLETE),
    "config": (None, [], "x"),
}
STATES = {
    **{
        f"{name} {value!r}": {"model_config": {name: value}}
        for name, values in WRONG_CONFIGS.items()
        for value in values
    },
    "another setting": {"model_config": {"n_kv_head": 2}},
    "code": {"model_config": {"__class__": "os.system"}},
    **{
        f"{name} {value!r}": {name: value}
        for name, values in WRONG_STATES.items()
        for value in values
    },
}


def write_state(folder, state) -> None:
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    remanifest(folder)


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_lies_is_refused_before_anything_is_built(ours, tmp_path, case):
    state = json.loads((ours / "trainer_state.json").read_text(encoding="utf-8"))
    for name, value in STATES[case].items():
        nested = name == "model_config" and isinstance(value, dict)
        state[name] = state[name] | value if nested else value
    write_state(ours, state)
    refused(ours, tmp_path, ALL)


NO_STATES = [
    *(DEEP, "", "null", "[]", '"x"', "{}", "NaN", LONG, '{"step": 3}'),
    *('{"step":' + LONG + "}", "\udcff\udcfe", '{"step": 3, "model_config": {}}'),
]


@pytest.mark.parametrize("text", NO_STATES, ids=lambda t: t[:12])
def test_a_state_that_is_none_is_refused(ours, tmp_path, text):
    (ours / "trainer_state.json").write_bytes(text.encode(errors="surrogateescape"))
    remanifest(ours)
    refused(ours, tmp_path, ALL)


HARMLESS = [
    {"unknown": [1]},
    {"best": {}},
    {"script": None},
    {"data": [1]},
    {"tokenizer": 3},
    {"tokens": 10**40},
    {"step": 10**40},
    {"best": {"step": 1, "val_loss": math.nan}},
]


@pytest.mark.parametrize("more", HARMLESS, ids=str)
def test_what_is_odd_but_harmless_in_a_state_changes_nothing(ours, tmp_path, home, more):
    state = json.loads((ours / "trainer_state.json").read_text(encoding="utf-8"))
    write_state(ours, state | more)
    same_bits(ours, tmp_path, home, ALL)


# ------------------------------------------------------------------------------------ the tokenizer

BYTES = json.loads(byte_tokenizer().to_json())["model"]["vocab"]
A = next(piece for piece, i in BYTES.items() if i == 65)


def tokenizer_with(change) -> str:
    """The JSON of a byte tokenizer after change(spec)."""
    spec = json.loads(byte_tokenizer().to_json())
    change(spec)
    return json.dumps(spec)


def with_id(value) -> str:
    return tokenizer_with(lambda spec: spec["model"]["vocab"].update({A: value}))


def with_end(value) -> str:
    return tokenizer_with(lambda spec: spec["added_tokens"][0].update(id=value))


def with_pattern(value) -> str:
    def change(spec):
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=value)

    return tokenizer_with(change)


def with_piece(piece: str, **model) -> str:
    """One more piece than the model has ids for, and fields of "model"."""

    def change(spec):
        spec["model"]["vocab"][piece] = 257
        spec["model"].update(model)

    return tokenizer_with(change)


IDS = (-1, 66, 70_000, 2**32 - 1, 2**40, 10**30, "a", 1.5, None, [], math.nan)
ENDS = (-1, 5, 258, 2**32 - 1, 2**40, "a", None, [])
PATTERNS = ("(", 3, None, [])
ODD_PATTERNS = ("", "a*", "x|", "(?=a)", "(a{1000}){1000}")  # tiktoken would crash
SURROGATE = {"id": 257, "content": "\ud800"}
TOKENIZERS = {
    "deep": DEEP,
    "empty": "",
    "list": "[]",
    "null": "null",
    "no model": "{}",
    "digits": LONG,
    **{f"id {value!r}": with_id(value) for value in IDS},
    **{f"end {value!r}": with_end(value) for value in ENDS},
    **{f"pattern {value!r}": with_pattern(value) for value in PATTERNS},
    "no bytes": tokenizer_with(lambda spec: spec["model"]["vocab"].clear()),
    "no added": tokenizer_with(lambda spec: spec["added_tokens"].clear()),
    "added text": tokenizer_with(lambda spec: spec.update(added_tokens="x")),
    "surrogate": tokenizer_with(lambda spec: spec["added_tokens"].append(SURROGATE)),
    "merge of nothing": tokenizer_with(lambda spec: spec["model"].update(merges=[["zz", "yy"]])),
    "merge 3": tokenizer_with(lambda spec: spec["model"].update(merges=3)),
    "unreached": with_piece("abc"),
    "more than the model": with_piece("ab", merges=["a b"]),
    "unigram": tokenizer_with(lambda spec: spec["model"].update(type="Unigram")),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(ours, tmp_path, case):
    (ours / "tokenizer.json").write_text(TOKENIZERS[case], encoding="utf-8")
    remanifest(ours)
    refused(ours, tmp_path, ("sample",))
    with pytest.raises(BAD_INPUT) as e, contextlib.redirect_stdout(io.StringIO()):
        W.main(W.ImportConfig(str(ours), str(tmp_path / "out")))
    assert len(error_line(e.value)) < MOST_CHARS and not (tmp_path / "out").exists()


ODD = {f"pattern {value!r}": with_pattern(value) for value in ODD_PATTERNS}
ODD["lowercase"] = tokenizer_with(lambda spec: spec.update(normalizer={"type": "Lowercase"}))


@pytest.mark.parametrize("case", ODD)
def test_an_odd_tokenizer_gives_the_ids_of_its_own_library(tmp_path, case):
    """tiktoken would crash on these patterns, and has no normalizer."""
    import tokenizers

    path = tmp_path / "tokenizer.json"
    path.write_text(ODD[case], encoding="utf-8")
    tokenizer, library = Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))
    for text in ("Aaa aa x X\n a", "", "\u00e9 \u65e5"):
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == expected
        same = text.lower() if case == "lowercase" else text
        assert tokenizer.decode(expected) == same
