"""Damaged weights of every format, and paths that hold none: refused in one line, or unchanged."""

import contextlib
import io
import json
import math
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import weight_cases
from conftest import one_error_line, run
from weight_cases import (
    ALL,
    DEEP,
    SHAPE,
    act,
    either,
    flip,
    instead,
    opcodes,
    raw_safetensors,
    refused,
    remanifest,
    same_bits,
    zipped,
)

import wt_load as W
from parts.cli.launch import BAD_INPUT
from parts.storage.checkpoint import load_tensors

home = weight_cases.home
bounded = weight_cases.bounded


def test_undamaged_they_are_all_one_model(home, tmp_path):
    same_bits(home / "run", tmp_path, home, ALL)
    for name in ("hf", "parts", "bin", "nano.pt", "tf"):
        same_bits(home / name, tmp_path, home)
    same_bits(home / "scratch.pth", tmp_path, home, n_head=2)


# ------------------------------------------------------------------------------- damage to any file


def zeros(at: float):
    """A damage that zeroes 64 bytes at this share of the file."""

    def damage(path):
        data = bytearray(path.read_bytes())
        i = int(at * len(data))
        data[i : i + 64] = bytes(len(data[i : i + 64]))
        path.write_bytes(data)

    return damage


def cut(at: float):
    """A damage that cuts the file at this share of its length."""

    def damage(path):
        n_bytes = path.stat().st_size
        os.truncate(path, min(int(at * n_bytes), n_bytes - 1))

    return damage


def swap_halves(path):
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[half:] + data[:half])


def huge_header(path):
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])


HTML = b"<!DOCTYPE html><html><body>Quota exceeded</body></html>\n"
DAMAGES = {
    **{f"flip at {at}": lambda path, at=at: flip(path, at) for at in (0, 0.01, 0.3, 0.6, 1)},
    **{f"zeros at {at}": zeros(at) for at in (0, 0.5, 0.9)},
    **{f"cut at {at}": cut(at) for at in (0, 0.001, 0.5, 1)},
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\x01\x02\x03"),
    "halves swapped": swap_halves,
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a page": lambda path: path.write_bytes(HTML),
    "length first": huge_header,
    "gone": os.unlink,
    "folder": instead(os.mkdir),
    "pipe": instead(os.mkfifo),
    "loop": instead(lambda path: path.symlink_to(path.name)),
    "link to nothing": instead(lambda path: path.symlink_to("nothing")),
    "endless": instead(lambda path: path.symlink_to("/dev/zero")),
}
# A safetensors file has no hash: nobody can notice a change of the values in it.
IN_VALUES = {"flip at 0.3", "flip at 0.6", "flip at 1", "zeros at 0.5", "zeros at 0.9"}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_refused_by_every_command(home, tmp_path, name, damage):
    folder = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")
    DAMAGES[damage](folder / name)
    refused(folder, tmp_path, ALL, named=folder / name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_or_changes_nothing(home, tmp_path, damage):
    folder = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")
    DAMAGES[damage](folder / "MANIFEST.json")
    either(folder, tmp_path, home, ALL, n_head=2)


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d not in IN_VALUES])
@pytest.mark.parametrize("name", ["model.safetensors", "model-0.safetensors"])
def test_a_damaged_safetensors_file_of_others_is_refused(home, tmp_path, name, damage):
    source = home / ("hf" if name == "model.safetensors" else "parts")
    folder = shutil.copytree(source, tmp_path / "hf")
    DAMAGES[damage](folder / name)
    refused(folder, tmp_path, named=folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["nano.pt", "scratch.pth", "pytorch_model.bin"])
def test_a_damaged_torch_file_is_refused_or_read_as_it_was(home, tmp_path, name, damage):
    path = tmp_path / name
    shutil.copy(home / "bin" / name if name.endswith("bin") else home / name, path)
    DAMAGES[damage](path)
    either(path, tmp_path, home, n_head=2)


DATA = "model.ckpt.data-00000-of-00001"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.ckpt.index", DATA, "checkpoint", "hparams.json"])
def test_a_damaged_tensorflow_file_is_refused_or_changes_nothing(home, tmp_path, name, damage):
    folder = shutil.copytree(home / "tf", tmp_path / "tf")
    DAMAGES[damage](folder / name)
    if name != DATA:
        either(folder, tmp_path, home, n_head=2)
        return
    act("info", folder, tmp_path / "out")  # reads the index only
    if damage == "longer":  # the index says what is read
        same_bits(folder, tmp_path, home, ("verify", "import"), n_head=2)
    else:
        refused(folder, tmp_path, ("verify", "import"), n_head=2)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_damaged_json_of_others_is_refused_or_changes_nothing(home, tmp_path, name, damage):
    folder = shutil.copytree(home / "parts", tmp_path / "parts")
    DAMAGES[damage](folder / name)
    either(folder, tmp_path, home, n_head=2)


# ---------------------------------------------------------------------------- paths without weights


def in_folder(make, name: str):
    """A folder with one thing in it."""

    def place(path):
        path.mkdir()
        make(path / name)

    return place


PLACES = {
    "nothing": lambda path: path,
    "empty folder": os.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "null": lambda path: path.symlink_to("/dev/null"),
    "empty file": lambda path: path.touch(),
    "folder of a folder": in_folder(os.mkdir, "checkpoints"),
    "empty checkpoint": lambda path: (path / "checkpoints/step_000001").mkdir(parents=True),
    "file for checkpoints": in_folder(lambda path: path.touch(), "checkpoints"),
    "text": lambda path: path.write_text("weights", encoding="utf-8"),
    "pipe for the index": in_folder(os.mkfifo, "x.index"),
    "folder for the weights": in_folder(os.mkdir, "model.safetensors"),
    "folder for the pickle": in_folder(os.mkdir, "pytorch_model.bin"),
    "pipe for the weights": in_folder(os.mkfifo, "model.safetensors"),
    "pipe for the pickle": in_folder(os.mkfifo, "pytorch_model.bin"),
    "pipe for the manifest": in_folder(os.mkfifo, "MANIFEST.json"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
def test_what_is_no_place_of_weights_is_refused(tmp_path, case, suffix):
    path = tmp_path / f"place{suffix}"
    PLACES[case](path)
    refused(path, tmp_path, ALL)


def test_a_pipe_beside_the_weights_is_not_waited_for(home, tmp_path):
    for file in (
        "hf/config.json",
        "hf/tokenizer.json",
        "parts/model.safetensors.index.json",
        "tf/hparams.json",
    ):
        folder, name = file.split("/")
        copy = shutil.copytree(home / folder, tmp_path / f"{folder}-{name}")
        instead(os.mkfifo)(copy / name)
        with pytest.raises(BAD_INPUT), contextlib.redirect_stdout(io.StringIO()):
            W.main(W.ImportConfig(str(copy), str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ on the command line


def test_the_scripts_tell_one_line_each(home, tmp_path):
    folder = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    state["model_config"] = asdict(SHAPE) | {"n_embd": 10**12}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    remanifest(folder)
    evil, marker = tmp_path / "evil.pt", tmp_path / "it-ran"
    zipped(evil, b"\x80\x02" + opcodes(marker)["os.system"])
    os.mkfifo(tmp_path / "pipe.pt")
    truncated = shutil.copytree(home / "hf", tmp_path / "cut")
    os.truncate(truncated / "model.safetensors", 70_000)
    for line in (
        ("wt_load.py", "info", folder),
        ("gpt_train.py", "--checkpoint", folder),
        ("wt_load.py", "import", evil, "out"),
        ("wt_load.py", "verify", tmp_path / "pipe.pt"),
        ("wt_load.py", "import", truncated, "out"),
    ):
        named = next(str(a) for a in line if isinstance(a, Path))
        assert named in one_error_line(run(*line, cwd=tmp_path, timeout=60), 2)
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_the_scripts_refuse_pickles_and_tokenizers_too(home, tmp_path):
    nan = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "nan")
    tensors = {name: t * math.nan for name, t in load_tensors(nan / "model.safetensors").items()}
    (nan / "model.safetensors").write_bytes(raw_safetensors(tensors))
    remanifest(nan)
    deep = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "deep")
    (deep / "tokenizer.json").write_text(DEEP, encoding="utf-8")
    remanifest(deep)
    family = shutil.copytree(home / "hf", tmp_path / "family")
    (family / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    flipped = shutil.copytree(home / "run", tmp_path / "flipped")
    flip(flipped / "checkpoints/step_000003/model.safetensors")
    for code, line in (
        (1, ("gpt_train.py", "--checkpoint", nan)),
        (2, ("gpt_train.py", "--checkpoint", deep)),
        (2, ("wt_load.py", "verify", family)),
        (2, ("wt_load.py", "info", flipped)),
        (2, ("wt_load.py", "import", "hf:../../nothing", "out")),
    ):
        named = next((str(a) for a in line if isinstance(a, Path)), "hf:../../nothing")
        error = one_error_line(run(*line, cwd=tmp_path, timeout=60), code)
        assert code == 1 or named in error, error
