"""recipes/q_lora as its document has it: each command on real Q code and a tiny Qwen2, offline."""

import json
import os
import re
import shlex

import pytest
import torch
from conftest import run, shared

from parts.data.tokenizers import byte_tokenizer
from parts.model.llama import Llama
from parts.storage import formats, hf_llama
from recipes.q_lora.bases import tiny_config

SCRIPT = "recipes/q_lora/run_pretraining.py"
# what makes the documented commands small; each ends with them
SMALL = (
    "--model_name qwen-tiny --max_seq_length 128 --max_steps 12 --warmup_steps 2 --save_steps 6 "
    "--eval_freq 6 --learning_rate 2e-2 --eval_tokens 4000 --device cpu --print_sample_iter 12"
)
COMMANDS = {
    "basic": "",
    "lora": "--training_method lora",
    "qlora": "--training_method qlora",
    "full": "--training_method full",
    "raw": "--data_type raw",
    "filtered": "--data_type filtered",
    "described": "--data_type described_filtered",
    "wandb": "--wandb --wandb_project q-pretraining --experiment_name tracked",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared data and a tiny Qwen2, where the commands run one after another."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "qwen-tiny").mkdir()
    torch.manual_seed(1)
    config = tiny_config(byte_tokenizer().vocab_size + 7, 256)
    tensors = Llama(config).state_dict()
    stored = {
        name: formats.Stored(tuple(t.shape), lambda _, t=t: t, str(t.dtype))
        for name, t in tensors.items()
    }
    formats.write_folder(folder / "qwen-tiny", stored, torch.float32)
    settings = json.dumps(hf_llama.settings_of_config(config))
    (folder / "qwen-tiny/config.json").write_text(settings, encoding="utf-8")
    (folder / "qwen-tiny/tokenizer.json").write_bytes(byte_tokenizer().to_json())
    path = shared("data/q_code/q_files.jsonl")
    result = run("recipes/q_lora/prepare_data.py", "--input", path, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_documented_commands_run_and_learn(home, name):
    words = shlex.split(f"{COMMANDS[name]} {SMALL}")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    result = run(SCRIPT, *words, cwd=home, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    # the basic command, and those that repeat it, find its run
    folder = {
        "qlora": "qwen-tiny-qlora-raw",
        "full": "qwen-tiny-full-raw",
        "filtered": "qwen-tiny-lora-filtered",
        "described": "qwen-tiny-lora-described_filtered",
        "wandb": "tracked",
    }.get(name, "qwen-tiny")
    out = home / "output" / folder
    names = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    expected = ("config.yaml", "logs/training_log.txt", "logs/eval_results.json")
    expected += ("results/loss.png", "results/samples.txt", "checkpoints/checkpoint-12")
    assert names.issuperset(expected)
    evaluations = json.loads((out / "logs/eval_results.json").read_text(encoding="utf-8"))
    first, last = evaluations[0], evaluations[-1]
    assert (first["step"], last["step"]) == (0, 12)
    assert last["val_perplexity"] < 0.9 * first["val_perplexity"]  # of held-out repositories
    metrics = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [loss for row in metrics if (loss := json.loads(row).get("train_loss"))]
    assert sum(losses[-3:]) < sum(losses[:3])
    if name in ("lora", "raw"):
        assert "already finished at step 12" in result.stdout
    said = re.search(r"has a run of \w+ on \w+; this one takes (\S+)", result.stdout)
    assert bool(said) == (name in ("qlora", "full", "filtered", "described"))
    assert said is None or said[1] == f"output/{folder}"
