"""A tiny Qwen2, rows of code, and the flags of a short run: for the tests of recipes/q_lora."""

import json
from pathlib import Path

import torch

from parts.data.tokenizers import byte_tokenizer
from parts.model.llama import Llama
from parts.storage import formats, hf_llama
from recipes.q_lora.bases import tiny_config

SCRIPT = "recipes/q_lora/run_pretraining.py"
FLAGS = (
    "--model_name model --max_seq_length 32 --batch_size 2 --gradient_accumulation_steps 2 "
    "--max_steps 6 --save_steps 3 --eval_freq 3 --warmup_steps 1 --learning_rate 1e-2 "
    "--lora_rank 2 --dtype fp32 --device cpu --print_sample_iter 6"
).split()


def write_model(folder: Path, block_size: int = 64, as_trained: bool = False) -> Path:
    """
    A random Qwen2 with a byte tokenizer, and more ids than that has, as a Hugging Face folder.

    as_trained: biases and norms are not all zero and one, so that one that is not used shows.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    config = tiny_config(300, block_size)
    tensors = Llama(config).state_dict()
    for name, t in tensors.items():
        if as_trained and name.endswith(("bias", "norm.weight")):
            t.add_(torch.randn_like(t) * 0.1)
    stored = {n: formats.Stored(tuple(t.shape), lambda _, t=t: t) for n, t in tensors.items()}
    formats.write_folder(folder, stored, torch.float32)
    settings = json.dumps(hf_llama.settings_of_config(config))
    (folder / "config.json").write_text(settings, encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    return folder


def write_rows(folder: Path, texts: list[str], n_test: int = 10) -> None:
    """raw and described_filtered files of these texts; the last n_test are for testing."""
    folder.mkdir(parents=True)
    for kind, rows in {
        "raw": [{"text": text} for text in texts],
        "described_filtered": [{"prompt": f"/ {t[:9]}\n", "completion": t[9:]} for t in texts],
    }.items():
        for side, chosen in (("train", rows[:-n_test]), ("test", rows[-n_test:])):
            lines = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{kind}_{side}.jsonl").write_text(lines, encoding="utf-8")
