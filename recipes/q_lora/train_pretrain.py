"""
Continue the pretraining of a Llama or Qwen2 on code: the model, its data, its loss.

    python recipes/q_lora/train_pretrain.py merge CHECKPOINT OUT

merges the adapters of a checkpoint into the 16-bit weights that it was trained on, and writes a
Hugging Face folder. run_pretraining.py trains.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import yaml

from parts.base.dtypes import DTYPES
from parts.base.machine import pick_device
from parts.cli.config import parse
from parts.cli.launch import print_notes, run_script
from parts.model import lora
from parts.model.cpu_products import attends_in_products
from parts.model.nf4 import linears
from parts.training.plan import Setting
from pretraining_advanced import Job, RunConfig
from recipes.q_lora import memory
from recipes.q_lora.bases import TINY, Base, open_base
from recipes.q_lora.merging import CHECKPOINT_NAME, MergeConfig, merge, write_merged
from recipes.q_lora.packed_code import open_code
from recipes.q_lora.prepare_data import DATA_DIR
from wt_load import ADAPTERS

# floating-point operations of a micro-batch that --plan measures; more would take minutes
MEASURED_ON_CPU, MEASURED_ON_GPU = 3e12, 1e15


@dataclass
class QConfig(RunConfig):
    """Continue the pretraining of a Llama or Qwen2 on code; resume where an attempt ended."""

    MAY_CHANGE: ClassVar[tuple] = (
        *RunConfig.MAY_CHANGE,
        *("model_name", "data_dir", "cache_dir", "eval_tokens", "merge"),
    )
    IN_DATA: ClassVar[tuple] = ("data_type",)
    OTHER_NAMES: ClassVar[dict] = {
        "base_model": "model_name",
        "learning_rate": "max_lr",
        "gradient_accumulation_steps": "grad_accum_steps",
        "save_steps": "save_ckpt_freq",
        "wandb": "use_wandb",
        "experiment_name": "run_name",
    }
    SECTIONS: ClassVar[tuple] = ("model",)

    # Hugging Face folder, name in the hub's cache or on the hub, or: tiny (random, for trying)
    model_name: str = "Qwen/Qwen2.5-7B-Instruct"
    data_type: Literal["raw", "filtered", "described_filtered", "licensed"] = "raw"  # which files
    training_method: Literal["lora", "qlora", "full"] = "lora"  # what is trained
    max_seq_length: int = 2048  # tokens per row
    max_lr: float = 2e-5  # learning rate after the warmup
    batch_size: int = 1  # rows per micro-batch on each rank
    grad_accum_steps: int = 8  # micro-batches per step on each rank
    warmup_steps: int | None = 100  # steps up to max_lr
    max_steps: int | None = 1000  # optimizer steps
    save_ckpt_freq: int = 50  # steps between two checkpoints
    eval_freq: int = 50  # steps between two evaluations of the test files
    print_sample_iter: int = 200  # steps between two samples
    weight_decay: float = 0.0  # on matrices only
    activation_checkpointing: bool = True  # recompute blocks in the backward pass: less memory
    lora_rank: int = 16  # rank of the adapters
    lora_alpha: float = 32.0  # their factor is lora_alpha / lora_rank
    lora_dropout: float = 0.1  # of the adapters' inputs
    data_dir: str = DATA_DIR  # folder with DATA_TYPE_train.jsonl and DATA_TYPE_test.jsonl
    cache_dir: str = "token_cache"  # where token shards are kept
    eval_tokens: int | None = None  # evaluate on the first so many tokens; None: all test files
    merge: bool = False  # at the end, write base and adapters as one model: results/export
    run_name: str = ""  # name of the run; empty: the last part of model_name
    wandb_project: str = "q-pretraining"  # wandb's project


def resolve(config: QConfig) -> None:
    """
    Name the run and its folder after the model, if the configuration does not.

    A run of another method or on other data takes another folder, and that is said. Raises
    ValueError for settings of the adapters that cannot be right.
    """
    lora.check_lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
    if config.merge and config.training_method == "full":
        raise ValueError("--merge: a full training has no adapters to merge; leave it out")
    if config.merge and config.model_name == TINY:
        raise ValueError("--merge: the base of tiny is random, a merge would mean nothing")
    if config.training_method == "qlora" and config.parallel == "fsdp":
        what = "weights in 4 bits are not sharded, each rank holds them whole"
        raise ValueError(f"--training_method qlora: {what}; use --parallel ddp, or lora")
    model = Path(config.model_name.rstrip("/")).name
    named = config.run_name or config.output_dir
    config.run_name = config.run_name or model
    config.output_dir = config.output_dir or f"output/{config.run_name}"
    if named:
        return
    asked = (config.training_method, config.data_type)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no earlier run
        saved = json.loads(Path(config.output_dir, "run.json").read_text(encoding="utf-8"))
        then = (saved["config"]["training_method"], saved["config"]["data_type"])
        if then != asked:
            earlier = config.output_dir
            config.run_name = "-".join((model, *asked))
            config.output_dir = f"output/{config.run_name}"
            what = f"{earlier} has a run of {' on '.join(then)}"
            print_notes([f"{what}; this one takes {config.output_dir}"])


# ------------------------------------------------------------------------------------------- model


def make_model(config: QConfig, base: Base, building) -> tuple[torch.nn.Module, str]:
    """
    (model with what is trained, hash of its base).

    In a `building` context without memory, as on ranks that get their part later, only shapes.
    """
    with building:
        is_shell = torch.empty(0).is_meta
    if is_shell:
        model, of_base = base.shell(), base.hash(config.seed)
    else:
        quantise = config.training_method == "qlora"
        model, of_base = base.load(dtype_of_base(config), quantise, config.seed)
    return with_adapters(config, base, model), of_base


def dtype_of_base(config: QConfig) -> torch.dtype:
    """fp32 for what is trained; a frozen base is kept in the dtype of the products."""
    frozen = config.training_method != "full" and config.parallel != "fsdp"
    return DTYPES[config.dtype] if frozen else torch.float32


def with_adapters(config: QConfig, base: Base, model) -> torch.nn.Module:
    """The model, with adapters on its blocks unless all of it is trained."""
    if config.training_method == "full":
        return model
    if not linears(model, base.blocks, lora.KINDS):
        what = f"the blocks of {config.model_name} have no nn.Linear that could be adapted"
        raise ValueError(f"--training_method {config.training_method}: {what}; use full")
    numbers = (config.lora_rank, config.lora_alpha, config.lora_dropout)
    lora.add_lora(model, *numbers, within=base.blocks, seed=config.seed)
    return model


# --------------------------------------------------------------------------------------------- job


def code_job(config: QConfig, building) -> Job:
    """The job of a run. Raises ValueError or FileNotFoundError for what cannot be trained."""
    if config.plan or config.plan_memory_gb:
        return planned_job(config)
    base = open_base(config.model_name, config.max_seq_length)
    if config.parallel == "fsdp" and not isinstance(base, Base):
        what = f"{config.model_name} is computed by transformers, on each rank whole"
        raise ValueError(f"--parallel fsdp: {what}; use --parallel ddp")
    text = open_code(config, base.tokenizer)
    model, of_base = make_model(config, base, building)
    job = job_of(config, base, model, of_base)
    V = base.vocab_size
    token_bytes = np.zeros(V, dtype=np.int64)
    token_bytes[: base.tokenizer.vocab_size] = base.tokenizer.token_bytes()
    return replace(
        job,
        train_batches=text.training(config, V),
        val_batches=lambda: text.testing(config, V),
        facts=job.facts | {"data": text.data, "tokenizer": base.tokenizer.fingerprint},
        token_bytes=token_bytes,
        sample=base.sampler(),
        export=write_merged if config.merge else None,
    )


def job_of(config: QConfig, base: Base, model, of_base: str) -> Job:
    """What a job and its plan share: everything but the text."""
    T, trains_all = config.max_seq_length, config.training_method == "full"
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = base.flops_per_token(T)
    job = Job(
        family=base.family,
        model=model,
        train_batches=None,
        val_batches=None,
        loss_fn=base.loss,
        blocks=base.blocks,
        # without gradients of frozen weights the backward pass is half as much work
        flops_per_token=flops if trains_all else flops * 2 / 3,
        tokens_per_row=T,
        facts={
            "model_config": base.facts,
            "base": of_base,
            "trained": f"{config.training_method}, {n_trained:,} numbers",
        },
        files=base.files,
        checkpoint_name=CHECKPOINT_NAME,
        text_log="logs/training_log.txt",
        eval_log="logs/eval_results.json",
        results="results",
        run_files={"config.yaml": yaml.safe_dump(asdict(config), sort_keys=False).encode()},
        plan=memory_plan(config, base.shape) if isinstance(base, Base) else None,
    )
    if trains_all:
        return job
    settings = lora.adapter_config(model, config.model_name)
    files = {"adapter_config.json": json.dumps(settings, indent=2).encode()}
    return replace(
        job,
        weights=lora.adapter_tensors,
        weights_file=ADAPTERS,
        files=base.files | files,
    )


# -------------------------------------------------------------------------------------------- plan


def memory_plan(config: QConfig, shape):
    """Job.plan: (Setting, memory in GB or None) -> (lines, whether it fits)."""
    shape = replace(shape, block_size=config.max_seq_length)

    def plan(setting: Setting, memory_gb: float | None) -> tuple[list[str], bool]:
        device, dtype = torch.device(setting.device), DTYPES[setting.dtype]
        in_products = attends_in_products(device, dtype, config.max_seq_length, 0.0)
        setting = replace(setting, attends_in_products=in_products)
        numbers = (config.training_method, config.lora_rank, config.lora_dropout)
        lines, fits = memory.plan_lines(shape, setting, *numbers, memory_gb)
        if config.plan or memory_gb or not fits:
            lines += memory.tips(shape, setting, *numbers[1:])
        return lines, fits

    return plan


def planned_job(config: QConfig) -> Job:
    """
    The job of --plan. Of a Qwen2.5 on the hub the shape is known, so nothing is downloaded.

    Its model has random weights to measure a step with, or no memory if that would take minutes.
    """
    name, T = config.model_name, config.max_seq_length
    shape = None if os.path.lexists(name) else memory.published_shape(name)
    base = Base(name, shape, None, None, {}) if shape else open_base(name, T)
    n_flops = base.flops_per_token(T) * T * config.batch_size
    limit = MEASURED_ON_CPU if pick_device(config.device).type == "cpu" else MEASURED_ON_GPU
    measured = isinstance(base, Base) and n_flops < limit and not config.plan_memory_gb
    model = base.shell()
    if measured:
        model = base.random(dtype_of_base(config), config.training_method == "qlora")

    def dummy_batch(n_rows: int) -> dict:
        ids = torch.randint(base.vocab_size, (n_rows, T))
        return {"inputs": ids, "targets": ids, "documents": torch.zeros_like(ids)}

    job = job_of(config, base, with_adapters(config, base, model), "not read")
    return replace(job, dummy_batch=dummy_batch if measured else None)


def main(argv: list[str]) -> None:
    """Run the command line `merge CHECKPOINT OUT`."""
    if argv[:1] not in (["merge"], ["--help"], ["-h"]):
        raise ValueError("say what to do: merge CHECKPOINT OUT; run_pretraining.py trains")
    merge(parse(MergeConfig, argv[1:] if argv[0] == "merge" else argv))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
