"""
Memory and disk as --plan predicts them, against real runs of pretraining_advanced.py.

    python benchmarks/memory.py                  # nine shapes, 5 GB for 124M; 3 minutes on 2 cores
    python benchmarks/memory.py --only tiny mini

Each run is a process, on random tokens. Measured is its highest resident memory while it trains,
less that of a model of 100,000 parameters, which is Python, torch, and what torch loads when it
first computes; predicted is the plan's peak. Prints both and their ratio, and the same for the
bytes of the checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import gpt_train  # noqa: F401  which adds the GPT to the families
from parts.base.dtypes import DTYPES
from parts.data.tokenizers import gpt2_tokenizer
from parts.model.cpu_products import attends_in_products
from parts.model.families import config_of
from parts.training.metrics import read_metrics
from parts.training.plan import Setting, count_parameters, memory_of

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # name -> model size, tokens of context, rows, more flags
    "tiny": ("nano", 64, 8),
    "mini": ("mini", 256, 8, "--dtype", "fp32"),
    "mini bf16": ("mini", 256, 8, "--dtype", "bf16"),
    "mini accumulated": ("mini", 256, 8, "--dtype", "fp32", "--grad_accum_steps", "2"),
    "mini checkpointed": ("mini", 256, 16, "--dtype", "fp32", "--activation_checkpointing"),
    "124M bf16": ("124M", 512, 2, "--dtype", "bf16"),
    "llama-mini": ("llama-mini", 256, 8, "--dtype", "fp32"),
    "llama-mini bf16": ("llama-mini", 256, 8, "--dtype", "bf16"),
    "llama-130m bf16": ("llama-130m", 512, 2, "--dtype", "bf16"),
}


def run(folder: Path, size: str, T: int, B: int, *flags: str) -> tuple[dict, float, int]:
    """(run.json, highest bytes resident in training, bytes of the checkpoint) of three steps."""
    data = folder / "tokens"
    out = folder / "-".join((size, *flags)).replace("--", "")
    if not data.exists():  # as published shards are
        data.mkdir()
        for name in ("train", "val"):
            header = np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, 60_000
            ids = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint16)
            (data / f"{name}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    settings = {"dataset_name": data, "output_dir": out, "device": "cpu", "max_steps": 3}
    settings |= {"model_size": size, "context_length": T, "batch_size": B}
    settings |= {"eval_tokens": 1000, "print_sample_iter": 1000}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "pretraining_advanced.py"), *words, *flags]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if result.returncode:
        raise SystemExit(result.stderr[-1000:])
    peak = max(record.get("memory_gib", 0) for record in read_metrics(out)) * 2**30
    n_bytes = sum(f.stat().st_size for f in out.glob("checkpoints/step_000003/*"))
    return json.loads((out / "run.json").read_text(encoding="utf-8")), peak, n_bytes


def planned(facts: dict) -> tuple[int, int]:
    """(peak, bytes of tensors in a checkpoint) as the plan has them."""
    model, config = config_of(facts), facts["config"]
    names = ("batch_size", "grad_accum_steps", "dtype", "optimizer", "activation_checkpointing")
    setting = Setting(**{name: config[name] for name in names}, keeps_copy=True)
    dtype = DTYPES[setting.dtype]
    in_products = attends_in_products(torch.device("cpu"), dtype, model.block_size, 0.0)
    parts = memory_of(model, replace(setting, attends_in_products=in_products))
    return parts["peak"], 4 * count_parameters(model) + parts["optimizer"]


def compare(folder: Path, shape: str) -> tuple[float, float, float, int]:
    """
    (peak planned, peak measured, bytes of a checkpoint planned, bytes of the real one) of a shape.

    The smallest run, whose memory is subtracted, is made once per folder.
    """
    smallest = folder / "smallest.json"
    if not smallest.exists():
        flags = "--n_layer 1 --n_embd 2 --n_head 1 --dtype fp32".split()
        facts, peak, _ = run(folder, "nano", 8, 1, *flags)
        smallest.write_text(json.dumps(peak - planned(facts)[0]), encoding="utf-8")
    facts, peak, n_bytes = run(folder, *SHAPES[shape])
    predicted, tensors = planned(facts)
    peak -= json.loads(smallest.read_text(encoding="utf-8"))
    return predicted, peak, tensors + len(gpt2_tokenizer().to_json()), n_bytes


def main() -> None:
    """Run the shapes and print a line for each."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    with tempfile.TemporaryDirectory() as name:
        for shape in parser.parse_args().only:
            predicted, measured, planned_bytes, n_bytes = compare(Path(name), shape)
            print(
                f"{shape}: planned {predicted / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB, "
                f"ratio {predicted / measured:.2f}; checkpoint: planned {planned_bytes / 1e6:,.1f} "
                f"MB, is {n_bytes / 1e6:,.1f} MB, ratio {planned_bytes / n_bytes:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
