"""A small GPT whose every tensor matters, as a model and as a run."""

from dataclasses import asdict

import torch

from gpt_train import GPT, GPTConfig
from parts.data.tokenizers import byte_tokenizer
from parts.storage.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

TINY = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)
UNTIED = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32, tied=False)


def far_from_default(model):
    """The model with biases and norms away from 0 and 1, so that a mix-up of them shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def gpt(config=TINY, seed=0) -> GPT:
    """An untrained model."""
    torch.manual_seed(seed)
    return far_from_default(GPT(config))


def as_run(model, folder, tokenizer=None, step=7, **more):
    """A run folder as the trainers leave it, with one checkpoint."""
    tokenizer = tokenizer or byte_tokenizer()
    state = {
        "script": "pretraining_advanced.py",
        "step": step,
        "tokens": 100,
        "model_config": asdict(model.config),
        "tokenizer": tokenizer.fingerprint,
        "best": {"step": step, "val_loss": 1.5},
        **more,
    }
    weights = {"model.safetensors": model.state_dict()}
    save_checkpoint(folder, step, weights, state, {"tokenizer.json": tokenizer.to_json()}, 3)
    return folder


def tensors_of(folder) -> dict:
    """The weights in the newest checkpoint of a run."""
    return load_checkpoint(newest_checkpoint(folder))[0]


def same_bits(a: dict, b: dict) -> bool:
    """Whether two dicts have the same fp32 tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a
    )
