"""A Job without text, whose steps take a millisecond: for tests of Jobs and engines."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.data.batches import RowBatches
from pretraining_advanced import Job, RunConfig

V, T = 11, 6
SETTINGS = {
    "batch_size": 4,
    "max_steps": 12,
    "max_lr": 1e-2,
    "warmup_steps": 2,
    "eval_freq": 4,
    "print_sample_iter": 100,
    "save_ckpt_freq": 3,
    "keep_last": 9,
    "device": "cpu",
    "dtype": "fp32",
}


@dataclass
class SmallConfig(RunConfig):
    """RunConfig and nothing else, as a recipe has it."""


class Numbers(RowBatches):
    """Rows of T numbers that a formula makes; each is predicted from the one before it."""

    def __init__(self, seed=1, length=T):
        super().__init__(n_rows=64, tokens_per_row=length, seed=seed)

    def batch(self, first, n):
        rows = torch.from_numpy(self.row_numbers(first, n))[:, None]  # (n, 1)
        ids = (rows * 7 + torch.arange(self.tokens_per_row + 1) ** 2) % V
        return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


class Layer(nn.Module):
    """A linear layer and a bend."""

    def __init__(self, C):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """An embedding, two layers, and a head that is tied to the embedding."""

    def __init__(self, C=8):
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        self.layers = nn.ModuleList(Layer(C) for _ in range(2))
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class SpoiledGradient(torch.autograd.Function):
    """The loss as it is, with a gradient that is nan."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def loss_fn(model, batch):
    logits = model(batch["inputs"]).flatten(0, 1)
    return F.cross_entropy(logits, batch["targets"].flatten(), ignore_index=-100, reduction="sum")


def accuracy(model, batch):
    """Correct predictions, and predictions."""
    correct = (model(batch["inputs"]).argmax(-1) == batch["targets"]).sum().item()
    return {"val_accuracy": (correct, batch["targets"].numel())}


def small_job(config, building, **changes) -> Job:
    """The job of these tests, with some of its fields changed."""
    torch.manual_seed(config.seed)
    with building:
        model = Model()
    fields = {
        "family": "numbers",
        "model": model,
        "train_batches": Numbers(config.seed),
        "val_batches": lambda: (Numbers(2).batch(first, 4) for first in range(0, 20, 4)),
        "loss_fn": loss_fn,
        "blocks": (Layer,),
        "flops_per_token": 6,
        "tokens_per_row": T,
        "facts": {"model_config": {"C": 8}, "data": "a formula", "tokenizer": "numbers"},
    }
    return Job(**{**fields, **changes})


def config_of(name, **settings) -> SmallConfig:
    return SmallConfig(**{**SETTINGS, "run_name": name, **settings})


def records(name) -> list[dict]:
    """metrics.jsonl of a run in the current folder."""
    lines = Path("runs", name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def bits(name) -> tuple:
    """Everything that a resumed run must share with an uninterrupted one."""
    folder = max(Path("runs", name, "checkpoints").iterdir())
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    tensors = {file: e["sha256"] for file, e in manifest.items() if file.endswith(".safetensors")}
    kept = ("step", "train_loss", "val_loss", "val_accuracy", "lr", "grad_norm", "tokens")
    return tensors, [[record.get(key) for key in kept] for record in records(name)]
