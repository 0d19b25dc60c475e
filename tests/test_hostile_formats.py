"""Hostile files of Hugging Face, nanoGPT, LLMs-from-scratch and OpenAI: refused in one line."""

import json
import math
import os
import shutil

import pytest
import torch
import weight_cases
from test_tf_bundle import save as save_tensorflow
from weight_cases import DEEP, LONG, openai_weights, refused, same_bits, small_model

home = weight_cases.home
bounded = weight_cases.bounded


def cases(wrong: dict, most_chars: int = 40) -> dict:
    """{"name value": {name: value}} of {name: values}, with names of at most that length."""
    return {
        f"{name} {value!r}"[:most_chars]: {name: value}
        for name, values in wrong.items()
        for value in values
    }


# ------------------------------------------------------------------------------------- Hugging Face

WRONG_SIZES = (1, 10**12, "2", -5, [32], math.nan)
CONFIGS = {
    **cases({"model_type": ("llama", "gpt_neox", "", 3, ["gpt2"], None, "x" * 10_000)}),
    **cases({"n_head": (-2, 3, 64, 10**12, 10**30, "2", 2.0, math.nan, [2])}),
    **cases({"n_head": ({"a": 1}, "x" * 10_000)}),
    **cases(dict.fromkeys(("n_layer", "n_embd", "vocab_size", "n_positions"), WRONG_SIZES)),
    **cases(
        {
            "activation_function": ("relu", ["gelu_new"]),
            "layer_norm_epsilon": (1e-6, "small", [[[[]]]], math.nan),
            "scale_attn_weights": (False,),
            "scale_attn_by_inverse_layer_idx": (True,),
            "add_cross_attention": (7,),
        },
        60,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_of_another_model_is_refused(home, tmp_path, case):
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | CONFIGS[case]
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    refused(folder, tmp_path)


NO_JSON = [DEEP, "", "[]", "null", "{", LONG, '"gpt2"', '{"a": ' * 5000]


@pytest.mark.parametrize("text", NO_JSON, ids=lambda t: t[:8])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "hparams.json"])
def test_json_that_is_none_is_refused(home, tmp_path, name, text):
    source = home / ("tf" if name == "hparams.json" else "parts")
    folder = shutil.copytree(source, tmp_path / "theirs")
    (folder / name).write_text(text, encoding="utf-8")
    refused(folder, tmp_path, n_head=2, named=folder / name)


FILES = (
    *("../hf/model.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "nothing", "config.json"),
    *("folder", "x" * 5000, "pipe", "endless", "model-0.safetensors/../x", "\x1b[31m"),
)
INDEXES = {
    "none": {},
    "null": {"weight_map": None},
    "list": {"weight_map": []},
    "no tensors": {"weight_map": {}},
    "number": {"weight_map": {"a": 3}},
    "null file": {"weight_map": {"a": None}},
    **{f"file {file[:24]!r}": {"weight_map": {"wte.weight": file}} for file in FILES},
    "a tensor of the other part": {"weight_map": {"transformer.wte.weight": "model-0.safetensors"}},
    "a million files": {"weight_map": {str(i): f"part-{i}" for i in range(3000)}},
    "a long name": {"weight_map": {"y" * 100_000: "model-0.safetensors"}},
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_points_elsewhere_is_refused(home, tmp_path, case):
    folder = shutil.copytree(home / "parts", tmp_path / "parts")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(INDEXES[case]), encoding="utf-8")
    refused(folder, tmp_path)


# ------------------------------------------------------------------------------------------ nanoGPT

ARGUMENTS = {
    **cases(
        dict.fromkeys(
            ("n_layer", "n_embd", "vocab_size", "block_size"), (1, 10**12, "2", math.nan)
        ),
        50,
    ),
    **cases({"n_head": (-1, 3, 5.0, "2", 10**30, math.nan)}, 50),
    "no bias, but the tensors": {"model_type": "gpt2-of-theirs"},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_nanogpt_settings_of_another_model_are_refused(home, tmp_path, case):
    found = torch.load(home / "nano.pt", weights_only=True)
    found["model_args"] |= ARGUMENTS[case]
    torch.save(found, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path)


NO_SETTINGS = [None, 3, [], "x", {}, {"n_head": torch.ones(3)}, {"n_head": [2]}, {1: 2}]


@pytest.mark.parametrize("value", NO_SETTINGS, ids=str)
def test_nanogpt_settings_that_are_none_leave_the_heads_to_be_said(home, tmp_path, value):
    found = torch.load(home / "nano.pt", weights_only=True) | {"model_args": value}
    torch.save(found, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path)
    same_bits(tmp_path / "x.pt", tmp_path, home, n_head=2)


def test_a_bias_that_is_there_is_not_replaced(home, tmp_path):
    found = torch.load(home / "nano.pt", weights_only=True)
    found["model_args"]["bias"] = False
    torch.save(found, tmp_path / "x.pt")
    same_bits(tmp_path / "x.pt", tmp_path, home)


# -------------------------------------------------------------------------------- LLMs-from-scratch


def gone(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def without_block_0(tensors):
    for name in [name for name in tensors if ".0." in name[:14]]:
        tensors.pop(name)


def all_numbers(tensors):
    for letter in ("query", "key", "value"):
        tensors[f"trf_blocks.0.att.W_{letter}.weight"] = torch.tensor(1.0)


def grouped_keys(tensors):
    for i in (0, 1):
        for letter in ("key", "value"):
            tensors[f"trf_blocks.{i}.att.W_{letter}.weight"] = torch.ones(16, 32)


INT32 = torch.ones(32, 32, dtype=torch.int32)
SCRATCH = {
    "no key": gone("trf_blocks.0.att.W_key.weight"),
    "no bias of the key": gone("trf_blocks.1.att.W_key.bias"),
    "no query": gone("trf_blocks.1.att.W_query.weight"),
    "no tokens": gone("tok_emb.weight"),
    "no positions": gone("pos_emb.weight"),
    "no block 0": without_block_0,
    "query a number": put("trf_blocks.0.att.W_query.weight", torch.tensor(1.0)),
    "all numbers": all_numbers,
    "value narrower": put("trf_blocks.0.att.W_value.weight", torch.ones(32, 31)),
    "value flat": put("trf_blocks.0.att.W_value.weight", torch.ones(1024)),
    "key of halves": put("trf_blocks.0.att.W_key.weight", INT32),
    "a block more": put("trf_blocks.7.att.W_query.weight", torch.ones(32, 32)),
    "a block of no number": put("trf_blocks.x.att.W_query.weight", torch.ones(32, 32)),
    "a query of another module": put("x.3.attn.query.weight", torch.ones(32, 32)),
    "grouped keys": grouped_keys,
    "norm of two": put("final_norm.scale", torch.ones(2)),
    "head of another width": put("out_head.weight", torch.ones(257, 16)),
}


@pytest.mark.parametrize("case", SCRATCH)
def test_a_broken_model_of_llms_from_scratch_is_refused(home, tmp_path, case):
    tensors = torch.load(home / "scratch.pth", weights_only=True)
    SCRATCH[case](tensors)
    torch.save(tensors, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", tmp_path, n_head=2)


# --------------------------------------------------------------------------------------- TensorFlow

CHANGES = [
    {"model/wte": torch.ones(257, 32, dtype=torch.int64)},
    {"model/h0/attn/c_attn/w": torch.ones(2, 32, 96)},
    {"model/h0/mlp/c_fc/w": torch.ones(4)},
    {"global_step": torch.tensor(3)},
    {"model/h9/x/w": torch.ones(3)},
    {"wte": torch.ones(257, 32)},
    {"model/ln_f/g": torch.ones(())},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: next(iter(c)))
def test_a_tensorflow_checkpoint_of_something_else_is_refused(home, tmp_path, change):
    folder = shutil.copytree(home / "tf", tmp_path / "tf")
    save_tensorflow(folder / "model.ckpt", openai_weights(small_model()) | change)
    refused(folder, tmp_path)


NEWEST = [
    'model_checkpoint_path: "../../x"',
    'model_checkpoint_path: "/etc/passwd"',
    "model_checkpoint_path: ",
    "\x00" * 1000,
    'model_checkpoint_path: "' + "x" * 100_000 + '"',
]


@pytest.mark.parametrize("text", NEWEST, ids=lambda t: t[:30])
def test_the_name_of_the_newest_tensorflow_checkpoint_leads_nowhere_else(home, tmp_path, text):
    folder = shutil.copytree(home / "tf", tmp_path / "tf")
    (folder / "checkpoint").write_text(text, encoding="utf-8")
    same_bits(folder, tmp_path, home)
