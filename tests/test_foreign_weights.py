"""Weights of another project where a run is expected: what they are, and the command for them."""

import shlex
import shutil
from pathlib import Path

import given_runs
import pytest
import torch
from conftest import TINY, one_error_line, run
from given_runs import refused, sample, weights
from safetensors.torch import save_file

home = given_runs.home

HF = "it looks like a Hugging Face folder"
# name -> (what lies there, what the message calls it, what the command imports; None: nothing can)
THERE = {
    "hf": (["config.json", "model.safetensors"], HF, "hf"),
    "bin": (["config.json", "pytorch_model.bin"], HF, "bin"),
    "no settings": (["pytorch_model.bin"], HF, "no settings"),
    "shards": (["model.safetensors.index.json"], HF, "shards"),
    "nanogpt": (["ckpt.pt"], "but ckpt.pt, a torch file", "nanogpt/ckpt.pt"),
    "epochs": (["model_1.pth", "model_2.pth", "x.gguf"], "but model_1.pth,", "epochs/model_1.pth"),
    "a.safetensors": (None, "a safetensors file", "a.safetensors"),
    "b.PT": (None, "a torch file", "b.PT"),
    "it's one.pth": (None, "a torch file", "it's one.pth"),
    "pytorch_model.bin": (None, "a torch file", "pytorch_model.bin"),
    "c.gguf": (None, "a GGUF file, which is only written here", None),
    "quantized": (["c.gguf"], "but c.gguf, a GGUF file", None),
    "train_000.bin": (None, "it is a file; give a run folder", None),
    "notes": (["read.txt"], "; give a run folder such as", None),
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The current folder, with everything of THERE in it; the contents are never read."""
    monkeypatch.chdir(tmp_path)
    for name, (files, _, _) in THERE.items():
        for file in files or ():
            Path(name).mkdir(exist_ok=True)
            Path(name, file).write_bytes(b"x")
        if files is None:
            Path(name).write_bytes(b"x")
    return tmp_path


def commands_in(line: str) -> list[str]:
    """The words of the import command in a message, [] if it has none."""
    before, found, after = line.partition("python wt_load.py import ")
    return shlex.split(after.partition(", and give")[0]) if found else []


@pytest.mark.parametrize("name", THERE)
def test_each_command_for_a_run_says_what_is_there_and_how_to_import_it(name, there, home):
    _, what, source = THERE[name]
    lines = [
        refused(sample, "--checkpoint", name),
        refused(weights, "export", name, "--to", "hf", "out"),
        refused(weights, "average", home / "a", name, "--out", "out"),
        refused(weights, "list", name),
    ]
    for line in lines:
        assert name in line and what in line and "no checkpoint" in line
        assert commands_in(line) == ([source, "runs/NAME"] if source else [])


@pytest.mark.parametrize("flag", ["--init_from", "--resume"])
@pytest.mark.parametrize("name", ["hf", "nanogpt", "a.safetensors", "c.gguf"])
def test_the_trainer_says_so_too(flag, name, there, texts):
    _, what, source = THERE[name]
    arguments = ("--dataset_name", texts, "--val_share", "0.5", *TINY, flag, name)
    if flag == "--init_from":
        arguments = [a for a in arguments if a not in ("--model_size", "nano")]
    line = one_error_line(run("pretraining_advanced.py", *arguments, cwd=there), 2)
    assert what in line and commands_in(line) == ([source, "runs/NAME"] if source else [])
    assert not list(there.glob("runs/*/checkpoints"))


def test_the_command_in_the_message_reads_it_and_the_run_can_be_sampled(home, tmp_path):
    weights("export", home / "a", "--to", "nanogpt", tmp_path / "my gpt/ckpt.pt")
    model = torch.load(tmp_path / "my gpt/ckpt.pt", weights_only=True)["model"]
    save_file({n: t.clone() for n, t in model.items()}, tmp_path / "lone.safetensors")
    shutil.copytree(home / "hf", tmp_path / "hf")
    tokenizer = ("--tokenizer", home / "hf/tokenizer.json", "--n_head", "2")
    for name in ("my gpt", "lone.safetensors", "hf"):
        source, target = commands_in(refused(sample, "--checkpoint", tmp_path / name))
        weights("import", source, tmp_path / "runs" / name, *tokenizer)
        assert sample("--checkpoint", tmp_path / "runs" / name, "--max_new_tokens", "2")
        assert target == "runs/NAME"


def test_a_name_of_the_hub_and_a_file_inside_a_checkpoint_have_their_own_words(home, tmp_path):
    line = refused(sample, "--checkpoint", "hf:gpt2")
    assert "a name on the hub" in line and commands_in(line) == ["hf:gpt2", "runs/NAME"]
    folder = home / "a/checkpoints/step_000003"
    line = refused(sample, "--checkpoint", folder / "model.safetensors")
    assert f"give its folder, {folder}" in line and not commands_in(line)
    assert "give a run folder" in refused(weights, "list", folder)


def test_import_of_a_folder_with_a_torch_file_names_the_file(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    line = refused(weights, "import", tmp_path, tmp_path / "run")
    assert "has neither model.safetensors" in line and f"give {tmp_path / 'ckpt.pt'}" in line
