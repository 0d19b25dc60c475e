"""
Pretrain a GPT on token shards (files of token ids), on a laptop or many GPUs; kill it at will, the same line goes on with the same bits.

    python pretraining_advanced.py --config configs/laptop.yaml                       # two CPU cores, minutes
    python pretraining_advanced.py --config configs/gpt2-124m.yaml                    # one GPU
    torchrun --nproc_per_node 8 pretraining_advanced.py --config configs/gpt2-124m.yaml [--parallel fsdp]
    python pretraining_advanced.py --config configs/laptop.yaml --max_lr 1e-3 --optimizer muon --run_name muon
    python pretraining_advanced.py --help

The text is tokenised on first use (see prep_dataset.py smollm) and kept in --cache_dir. On disk, in runs/RUN_NAME: run.json,
metrics.jsonl, loss.png, samples.txt, checkpoints/. SIGTERM, SIGUSR1 and --max_minutes save and exit with 75, Ctrl-C with 130;
the same line again goes on from there, also after kill -9. Under torchrun send signals to the ranks, or to torchrun with
TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1; torchrun itself then exits with 1.
"""

from __future__ import annotations

if (
    __name__ == "__main__"
):  # before torch is imported, so that Ctrl-C in those seconds leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import copy
import gc
import itertools
import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from gpt_train import (
    GPT,
    Block,
    GPTConfig,
    Setting,
    attends_in_products,
    continuations,
    flops_per_token,
    pick_device,
    plan_lines,
    plot_run,
)
from parts.base.dtypes import DTYPES
from parts.base.files import append_lines, write_file
from parts.base.machine import (
    attention_kernel,
    choose_dtype,
    out_of_memory,
    why_no_compiler,
)
from parts.base.units import format_bytes, format_duration
from parts.cli.config import parse
from parts.cli.launch import StopRequest, error_line, launch_facts, run_script
from parts.cli.progress_bar import tqdm
from parts.data.batches import Prefetch, TrainBatches, cut, stir, val_batches
from parts.data.shards import Shards, content_hash, read_index
from parts.data.tokenizers import Tokenizer, gpt2_tokenizer, vocabulary_of
from parts.model.losses import compile_softmax
from parts.storage import checkpoint, run_folder
from parts.storage.writer import Writer, enough_memory, offloaded_bytes
from parts.training.engine import Parallel
from parts.training.guard import Guard
from parts.training.metrics import Journal, Speed, memory_gib, peak_flops
from parts.training.optim import Optimizer, learning_rate, predicted_state_bytes, slice_like
from parts.training.plan import seconds_of
from parts.training.run_settings import DATA, must_agree, resolve_length
from prep_dataset import SmollmConfig, prepare_tokens

# ------------------------------------------------------------------------------------------------ configuration


@dataclass
class TrainConfig:
    """Pretrain a GPT on token shards; go on exactly where an earlier attempt ended."""

    config: str | None = None  # YAML file of these settings, which stand under those of the line
    # data
    dataset_name: str = "HuggingFaceTB/smollm-corpus"  # name on huggingface.co, path of a folder or file, or a folder of token shards
    # such as cosmopedia-v2:0.7,fineweb-edu-dedup:0.3; None: cosmopedia-v2 of smollm-corpus, else all
    dataset_subset: str | None = None
    text_field: str | None = None  # column with the text; None: text, else content
    tokenizer: str = "gpt2"  # gpt2, bpe, bpe:8192, bytes, or a tokenizer.json
    cache_dir: str = "token_cache"  # where token shards are kept
    max_documents: int | None = None  # stop after that many documents; None: all
    val_share: float = 0.01  # share of the documents that is held out for validation, by their hash
    # read from the hub as it goes; otherwise download the whole subset first
    streaming: bool = True
    # length and batches
    n_epochs: float | None = None  # passes over the text; None: 1, unless max_steps is given
    # optimizer steps; the run ends here or at n_epochs, whichever is first
    max_steps: int | None = None
    batch_size: int = 32  # rows per micro-batch (what goes through the model at once) on each rank (process of torchrun)
    grad_accum_steps: int = 1  # micro-batches per step on each rank
    # model
    model_size: str = "124M"  # nano, micro, mini, small, 124M, 355M, 774M or 1558M
    n_layer: int | None = None  # blocks; None: as the size has it
    n_head: int | None = None  # attention heads per block; None: as the size has it
    n_embd: int | None = None  # width; None: as the size has it
    context_length: int = 1024  # tokens the model can see at once
    dropout: float = 0.0  # share of activations zeroed while training
    # optimisation
    max_lr: float = 5e-4  # learning rate after the warmup
    min_lr: float | None = None  # learning rate at the end; None: a tenth of max_lr
    # steps until max_lr is reached; None: a tenth of the run, 2000 at most
    warmup_steps: int | None = None
    # from max_lr to min_lr; wsd: warmup, stable, decay
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0  # clip the global norm (the length) of the gradient; 0: do not
    # parts/training/optim.py; all but adamw: for the matrices of the blocks
    optimizer: Literal["adamw", "galore", "galore8bit", "muon"] = "adamw"
    galore_rank: int = 128  # rank of GaLore's subspace
    galore_update_gap: int = 200  # steps between two choices of the subspace
    galore_scale: float = 0.25  # GaLore's update is multiplied by this
    # how often
    eval_freq: int = 500  # steps between two evaluations of the whole validation text
    # evaluate on the first that many tokens of it, always the same; None: all
    eval_tokens: int | None = None
    print_sample_iter: int = 500  # steps between two samples
    save_ckpt_freq: int = 1000  # steps between two checkpoints
    save_ckpt_minutes: float = 10.0  # minutes between two checkpoints; whichever comes first
    keep_last: int = 3  # newest checkpoints to keep, besides the best
    max_minutes: float | None = None  # stop after that many minutes, save and exit with 75
    # when something breaks
    max_bad_steps: int = 20  # bad steps in a row (nothing is applied in them), after which the run goes back to a checkpoint
    spike_zscore: float = 0.0  # a loss so many standard deviations above the last ones is bad too; 0: only what is not finite
    spike_window: int = 128  # losses that this looks back on
    # going on
    init_from: str | None = None  # run or checkpoint whose weights and shape a new run begins with
    # auto: go on if the run folder has checkpoints; never: begin anew; or a path
    resume: str = "auto"
    # settings that may differ from the resumed run's, such as max_lr,max_steps
    allow_change: str = ""
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # auto: ddp where torchrun started several; fsdp: the model in slices
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    # of the numbers in matrix products; weights and sums are fp32 always
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile each block
    # recompute the blocks in the backward pass: less memory, a third more time
    activation_checkpointing: bool = False
    cpu_offload: bool = False  # under fsdp on GPUs: weights and optimizer state lie in the CPU's memory; slower, for models that fit no GPU
    # same bits in every run on a GPU too, at some cost; on a CPU they are anyway
    deterministic: bool = False
    # before the first step
    plan: bool = False  # print parameters, memory, disk and time of this run, and end; nothing is started or written
    # plan for a GPU with so many GB (10^9 bytes), not for this device
    plan_memory_gb: float | None = None
    # telling
    run_name: str = "advanced"  # name of the run
    output_dir: str | None = None  # run folder; None: runs/RUN_NAME
    log_exact: bool = False  # print each loss as an exact hexadecimal number
    use_wandb: bool = False  # mirror the metrics to wandb, offline where no key is at hand
    wandb_project: str = "pretraining"  # wandb's project
    tensorboard: bool = False  # mirror the metrics to TensorBoard
    seed: int = 123  # same seed, same run
    debug: bool = False  # show the traceback of an error


WRAPPING = ("activation_checkpointing", "compile", "cpu_offload")
MAY_BE_ZERO = (
    "min_lr",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "dropout",
    "seed",
    "spike_zscore",
)


@dataclass
class Job:
    """What to train: everything that `train` does not know by itself. A recipe hands over one of these."""

    model: torch.nn.Module  # plain, on the CPU; made in the context of parallel.building()
    train_batches: (
        TrainBatches  # endless micro-batches; share(), leave_out(), state_dict(), load_state_dict()
    )
    val_batches: Callable  # () -> a fresh pass over the same batches, on every rank alike
    loss_fn: Callable  # (model, batch) -> fp32 sum of the loss over the targets that are not -100
    blocks: tuple  # classes: units of compile and activation checkpointing, and whose matrices GaLore and Muon take
    flops_per_token: int  # forward and backward
    facts: (
        dict  # JSON values that a resumed run must share, {name: value}; "model_config" among them
    )
    files: dict = field(default_factory=dict)  # file name -> bytes, kept in each checkpoint
    token_bytes: object = None  # (V,) bytes of text behind each id, for bits per byte
    sample: Callable | None = None  # (model, device, should_stop) -> text


def check(config: TrainConfig) -> None:
    """Refuse values that cannot be. Raises ValueError."""
    for name, value in asdict(config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not (0 if name in MAY_BE_ZERO else 1e-300) <= value < math.inf or (
            name == "dropout" and value >= 1
        ):
            raise ValueError(f"--{name}: {value} is out of range; give a positive number")
    if config.run_name in ("", ".", "..") or config.output_dir == "":
        raise ValueError("--run_name, --output_dir: a name is empty; give the run one of its own")
    if config.seed >= 2**32:
        raise ValueError(f"--seed: {config.seed} does not fit into 32 bits")
    if config.cpu_offload and config.parallel != "fsdp":
        raise ValueError(
            f"--cpu_offload: goes with --parallel fsdp, this is {config.parallel}; start with torchrun, or leave it out"
        )
    names = [name for name in config.allow_change.split(",") if name]
    if wrong := [name for name in names if name not in TrainConfig.__dataclass_fields__]:
        raise ValueError(
            f"--allow_change: {', '.join(wrong)}: no such setting; write --allow_change max_lr,max_steps"
        )


def gpt_job(config: TrainConfig, building) -> Job:
    """
    A GPT, made in the context `building`, and the token shards that the configuration names, built if they are not there yet.

    Raises ValueError or FileNotFoundError for data or sizes that cannot be used.
    """
    GPTConfig.of_size(config.model_size)  # a wrong size is told before hours of tokenising
    folder = prepare_tokens(SmollmConfig(**tokens_asked_for(config)))
    index = read_index(folder)
    tokenizer = (
        Tokenizer.load(folder / "tokenizer.json")
        if index["tokenizer"]
        else _tokenizer_of_published(config)
    )
    train, val = Shards(folder, "train", index), Shards(folder, "val", index)
    if len(val) < 2:
        raise ValueError(
            f"{folder}: no document fell into the validation part; raise --val_share {config.val_share:g}, or give more documents"
        )
    T, V = config.context_length, tokenizer.vocab_size
    model_config = model_shape(config, V)
    weights = initial_weights(config, tokenizer) if config.init_from else None
    torch.manual_seed(config.seed)
    with building:  # nothing else: what reads the text makes tensors, too
        model = GPT(model_config)
    if weights and not model.wte.weight.is_meta:
        model.load_state_dict(weights)

    def sample(model, device, should_stop) -> str:
        options = {"temperature": 0.8, "top_k": 50, "seed": 0, "should_stop": should_stop}
        options |= {"stop_token": None}  # under fsdp every rank calls the model equally often
        return continuations(model, tokenizer, device, "", 1, 80, **options)[0]

    return Job(
        model=model,
        train_batches=TrainBatches(train, T, config.seed, V),
        val_batches=lambda: val_batches(val, T, config.batch_size, V, config.eval_tokens),
        loss_fn=gpt_loss,
        blocks=(Block,),
        flops_per_token=flops_per_token(model_config),
        facts={
            "model_config": asdict(model_config),
            "data": content_hash(index),
            "tokenizer": tokenizer.fingerprint,
        },
        files={"tokenizer.json": tokenizer.to_json()},
        token_bytes=tokenizer.token_bytes(),
        sample=sample,
    )


def tokens_asked_for(config: TrainConfig) -> dict:
    """The settings that decide which token shards a run reads."""
    return {name: getattr(config, name) for name in (*DATA, "cache_dir", "streaming")}


def gpt_loss(model, batch) -> torch.Tensor:
    """fp32 sum of the cross-entropy over the targets that are not -100."""
    return model(batch["inputs"], batch["targets"])


def model_shape(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The GPT that the flags ask for, or that of --init_from. Raises ValueError where they are two."""
    shape = {
        name: getattr(config, name)
        for name in ("n_layer", "n_head", "n_embd")
        if getattr(config, name)
    }
    if not config.init_from:
        sizes = {
            "vocab_size": vocab_size,
            "block_size": config.context_length,
            "dropout": config.dropout,
            **shape,
        }
        return GPTConfig.of_size(config.model_size, **sizes)
    folder = checkpoint.newest_checkpoint(config.init_from)
    there = checkpoint.read_state(folder).get("model_config", {}) | {"dropout": config.dropout}
    if wrong := [f"--{name} {value}" for name, value in shape.items() if value != there.get(name)]:
        raise ValueError(
            f"--init_from: {folder} has another shape than {' '.join(wrong)}; leave these flags out"
        )
    if config.context_length > there.get("block_size", 0):
        raise ValueError(
            f"--context_length: {config.context_length} is more than the {there.get('block_size')} of {folder}; give less"
        )
    return GPTConfig(**there)


def initial_weights(config: TrainConfig, tokenizer: Tokenizer) -> dict:
    """The weights of --init_from. Raises ValueError where they belong to another tokenizer."""
    folder = checkpoint.newest_checkpoint(config.init_from)
    weights, state = checkpoint.load_checkpoint(folder)
    if state.get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(
            f"--init_from: {folder} was trained with another tokenizer; give its tokenizer.json as --tokenizer"
        )
    return weights


def _tokenizer_of_published(config: TrainConfig) -> Tokenizer:
    """Published shards carry no tokenizer: GPT-2's, unless --tokenizer names a file."""
    try:
        return gpt2_tokenizer() if config.tokenizer == "gpt2" else Tokenizer.load(config.tokenizer)
    except OSError as e:
        raise ValueError(
            f"--tokenizer {config.tokenizer}: {error_line(e)}; give a tokenizer.json, or set TIKTOKEN_CACHE_DIR"
        ) from e


# --------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(job: Job, parallel: Parallel, stop=lambda: False) -> dict | None:
    """
    {"val_loss", "val_perplexity", "val_tokens", "val_bits_per_byte"} of the whole validation text, the same bits on any
    number of ranks: each batch is computed by one of them, and the sums are added in the order of the text.

    None where `stop` became true on any rank. Dropout is off, and the model is left as it was.
    """
    was_training, sums, n_targets, n_bytes, stopped, i, computed = (
        job.model.training,
        [],
        0,
        0,
        False,
        0,
        -1,
    )

    def loss_of(batch) -> float:
        with parallel.autocast():
            return job.loss_fn(
                job.model, {k: v.to(parallel.device) for k, v in batch.items()}
            ).item()

    job.model.eval()
    for i, batch in enumerate(job.val_batches()):
        targets = batch["targets"][batch["targets"] != -100]
        n_targets += len(targets)
        n_bytes += int(job.token_bytes[targets.numpy()].sum()) if job.token_bytes is not None else 0
        sums.append(0.0)
        if i % parallel.world == parallel.rank:
            sums[-1], computed = loss_of(batch), i
        if i % parallel.world == parallel.world - 1 and parallel.all_sum([float(bool(stop()))])[0]:
            stopped = True
            break
    if (
        parallel.lockstep and computed // parallel.world < i // parallel.world
    ):  # the last batches were fewer than the ranks
        loss_of(batch)
    job.model.train(was_training)
    if stopped:
        return None
    loss = sum(parallel.all_sum(sums)) / max(n_targets, 1)
    result = {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_tokens": n_targets,
    }
    if n_bytes:
        result["val_bits_per_byte"] = loss * n_targets / math.log(2) / n_bytes
    return result


# ------------------------------------------------------------------------------------------------------ the loop


def train(job: Job, config: TrainConfig, parallel: Parallel) -> int:
    """
    Train the job to its last step; returns the exit code: 0 finished, 75 or 130 stopped on request after saving.

    Raises ValueError where the run folder or the checkpoint does not fit (nothing was touched then), RuntimeError where
    the run failed.
    """
    began, run_dir, master = time.monotonic(), Path(config.output_dir), parallel.rank == 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        with parallel.agree():
            found = tensors = None
            if config.cpu_offload:
                n_weights = [p.numel() for p in job.model.parameters()]
                need = offloaded_bytes(n_weights, parallel.world, parallel.device.type == "cuda")
                need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
                enough_memory(
                    need,
                    "weights, gradients and two moments of this machine's ranks",
                    "--cpu_offload",
                )
            if master:
                run_folder.enough_disk(
                    run_dir,
                    checkpoint_bytes(job, config),
                    config.keep_last,
                    config.resume == "never",
                )
                stack.enter_context(run_folder.claimed(run_dir, afresh=config.resume == "never"))
                found = find_checkpoint(config, run_dir)
                state, tensors = read_checkpoint(found, config, job) if found else ({}, {})
        state = parallel.share(state if master else None)
        with parallel.agree():
            rows_per_step, accum = share_out(config, state, job, parallel)
            resolve_length(
                config, state.get("config", {}), job.train_batches.n_windows, rows_per_step
            )
            if state:
                must_agree(state, config, job.facts, rows_per_step)
            if master:
                run_folder.clear_leftovers(run_dir)
            max_steps = config.max_steps
            if config.compile and (why := why_no_compiler(parallel.device)):
                say(f"--compile is off: no compiler works here ({why})", parallel)
                config.compile = False
        compile_softmax(config.compile and parallel.device.type == "cuda")

        tell_what_runs(job, config, parallel, rows_per_step, accum, state.get("step", 0))

        def make_optimizer(model):
            galore = (config.galore_rank, config.galore_update_gap, config.galore_scale)
            return Optimizer(
                model, job.blocks, config.optimizer, config.weight_decay, parallel.device, *galore
            )

        with parallel.agree():
            model, optimizer = parallel.prepare(
                job.model, job.blocks, make_optimizer, *(getattr(config, name) for name in WRAPPING)
            )
            guard = Guard(config.max_bad_steps, config.spike_zscore, config.spike_window)
            if state:
                load(state, tensors, job, optimizer, guard, config, parallel)
        if state:
            say(f"resumed from step {state['step']} ({found})", parallel)
        fresh = {
            "step": 0,
            "tokens": 0,
            "data_cursor": job.train_batches.state_dict(),
            "best": None,
            "split": 1,
        }
        state = {name: state.get(name, value) for name, value in fresh.items()} | {
            "rows_per_step": rows_per_step
        }
        step = state["step"]

        journal = sampled = None
        if master:
            state["wandb_id"] = start_run(run_dir, job, config, parallel)
            if not (found and found.resolve().is_relative_to(run_dir.resolve())):
                for name in (
                    "metrics.jsonl",
                    "samples.txt",
                ):  # of an attempt that no checkpoint is left of
                    (run_dir / name).unlink(missing_ok=True)
            sampled = run_folder.trim_samples(run_dir / "samples.txt", step)
            wandb = {
                "project": config.wandb_project,
                "name": config.run_name,
                "run_id": state["wandb_id"],
                "config": asdict(config),
            }
            mirrors = {
                "tensorboard": config.tensorboard,
                "wandb": {**wandb, "folder": run_dir} if config.use_wandb else None,
            }
            journal = Journal(run_dir, step, **mirrors)
            stack.callback(journal.close)

        def not_saved(at: int, e: OSError) -> None:
            say(f"warning: step {at} is not saved: {error_line(e)}; free some space", parallel)

        writer = Writer(checkpoint.save_checkpoint, not_saved)
        stack.callback(writer.wait)
        if master:
            writer.reserve(checkpoint_bytes(job, config) + 2**20, parallel.device)
        record = dict(
            parallel.share(journal.last if master else None)
        )  # of the step that we stand at, perhaps not complete
        saved, saved_at, plotted_at = step, time.monotonic(), time.monotonic()
        stopping = save_now = failed = False
        unreadable = went_back_to = (
            None  # why there is no next batch; the step that bad ones sent the run back to
        )
        batches = stack.enter_context(Prefetch(job.train_batches, parallel.device))
        feed, speed = (
            iter(batches),
            Speed(job.flops_per_token, peak_flops(parallel.device, parallel.dtype), parallel.world),
        )
        quiet, tty = not master or config.log_exact, sys.stderr.isatty()
        bar = stack.enter_context(
            tqdm(
                total=max_steps,
                initial=step,
                unit="step",
                disable=quiet,
                mininterval=0.5 if tty else 30,
            )
        )
        if step == max_steps:
            say(f"{run_dir}: already finished at step {step}", parallel)

        while True:
            last = step == max_steps
            if not stopping and (step % config.eval_freq == 0 or last) and "val_loss" not in record:
                result = evaluate(job, parallel, lambda: stop)
                stopping = result is None
                record |= result or {}
                if result:
                    bits = (
                        f", {result['val_bits_per_byte']:.3f} bits per byte"
                        if "val_bits_per_byte" in result
                        else ""
                    )
                    say(f"step {step}: validation loss {result['val_loss']:.4f}{bits}", parallel)
            if (
                not stopping
                and job.sample
                and step
                and (step % config.print_sample_iter == 0 or last)
            ):
                if parallel.lockstep:
                    sampled, *_ = parallel.all_sum([float(sampled or -1) if master else 0.0])
                if (master or parallel.lockstep) and sampled != step:
                    sample(job, run_dir, step, parallel, stop)
                stopping = (
                    parallel.all_sum([float(bool(stop))])[0] > 0
                )  # here, so that a sample left out is made after the resume
            if master and not unreadable:
                journal.write(record)
            due = (
                last
                or stopping
                or (not guard.bad and (save_now or step % config.save_ckpt_freq == 0))
            )
            if (
                step
                and (due or saved == step)
                and math.isfinite(record.get("val_loss") or math.nan)
            ):
                best = min(state["best"] or record, record, key=lambda r: r["val_loss"])
                state["best"] = {name: best[name] for name in ("step", "val_loss")}
            if due and saved != step:
                if master:
                    journal.flush()
                now = {**state, "guard": guard.state_dict()}
                failed = not save(
                    job, optimizer, config, parallel, writer, now, at_once=last or stopping
                )
                saved, saved_at, save_now = step, time.monotonic(), False
            if master and (last or stopping or time.monotonic() - plotted_at > 600):
                journal.flush()
                plot_run(run_dir, job.facts["model_config"].get("vocab_size"))
                plotted_at = time.monotonic()
            if last or stopping:
                break

            # one step: the same rows whatever the number of ranks, one division by the targets of all of them
            speed.start()
            try:
                micro_batches = list(
                    itertools.islice(feed, accum)
                )  # [(batch, targets in it, place behind it)]
            except (ValueError, OSError) as e:  # damaged shards: save what there is, then end
                micro_batches, unreadable = [], error_line(e)
            n_targets, n_unreadable = parallel.all_sum(
                [sum(n for _, n, _ in micro_batches), float(unreadable is not None)]
            )
            if n_unreadable:
                stopping, unreadable = True, unreadable or "the text cannot be read on another rank"
                continue
            n_targets = max(1.0, n_targets)
            lr = learning_rate(
                step, config.schedule, config.max_lr, config.min_lr, config.warmup_steps, max_steps
            )
            optimizer.set_lr(lr)
            total = gradients(
                job,
                model,
                optimizer,
                [batch for batch, _, _ in micro_batches],
                n_targets,
                state,
                config,
                parallel,
            )
            if config.use_wandb and master and (step + 1) % config.eval_freq == 0:
                journal.histograms(step + 1, job.model)
            minutes = (time.monotonic() - began) / 60
            out_of_time = master and config.max_minutes is not None and minutes > config.max_minutes
            save_due = master and (time.monotonic() - saved_at) / 60 > config.save_ckpt_minutes
            local_loss, grad_norm = parallel.read(
                total, optimizer
            )  # under fsdp the ranks add up the norm
            splits = [
                state["split"] * (rank == parallel.rank) for rank in range(parallel.world)
            ]  # this rank's at its place
            loss, stopping, save_now, *splits = parallel.all_sum(
                [local_loss, bool(stop) or out_of_time, save_due, *splits]
            )
            loss, stopping, save_now, state["split"] = (
                loss / n_targets,
                stopping > 0,
                save_now > 0,
                int(max(splits)),
            )
            bad = guard.objection(loss)
            parallel.step(optimizer, grad_norm, config.max_grad_norm, apply=bad is None)
            if bad is None and not math.isfinite(grad_norm):
                bad = f"the gradient is {grad_norm}"
            consumed, cursor, step = state["data_cursor"]["windows"], micro_batches[-1][2], step + 1
            state |= {
                "step": step,
                "tokens": state["tokens"] + int(n_targets),
                "data_cursor": cursor,
            }
            figures = speed.stop(int(n_targets))
            record = {
                "step": step,
                "tokens": state["tokens"],
                "train_loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
            }
            record |= {**figures, "memory_gib": round(memory_gib(parallel.device), 3)}
            if config.log_exact:
                say(f"step {step} loss {loss.hex()}", parallel)
            if bad:
                record["left_out"] = bad
                say(f"warning: step {step}: {bad}; the step is left out", parallel)
            if not (bad and parallel.finding_scale) and guard.note(bad, loss, consumed):
                # back to where all was well, and past the windows of these steps
                left_out, where = (
                    [guard.first, cursor["windows"]],
                    f"{guard.bad} bad steps in a row, the last is step {step}",
                )
                batches.close()
                writer.wait()
                with parallel.agree():
                    good, tensors = last_good(run_dir, where, went_back_to, parallel)
                load(good, tensors, job, optimizer, guard, config, parallel)
                job.train_batches.leave_out(*left_out)
                state |= {name: good[name] for name in fresh} | {
                    "data_cursor": job.train_batches.state_dict()
                }
                went_back_to = saved = step = state["step"]
                say(
                    f"{where}: back to step {step}, without windows {left_out[0]} to {left_out[1] - 1}",
                    parallel,
                )
                if master:
                    journal.rewind(step)
                    sampled = run_folder.trim_samples(run_dir / "samples.txt", step)
                record = parallel.share(journal.last if master else None) | {
                    "left_out_windows": left_out
                }
                batches = stack.enter_context(Prefetch(job.train_batches, parallel.device))
                feed, bar.n = iter(batches), step
            mfu = f", MFU {figures['mfu']:.1%}" if figures["mfu"] else ""
            bar.set_postfix_str(
                f"loss {loss:.3f}, {figures['tokens_per_s']:,.0f} tokens/s{mfu}", refresh=False
            )
            bar.update()

    if failed:
        raise OSError(f"{run_dir}: the last step could not be saved, see the warning above")
    if unreadable:
        raise RuntimeError(unreadable)
    if stopping:
        say(f"stopped at step {step}; the same line goes on from there", parallel)
        return stop.exit_code or 75
    say(
        f"finished at step {step}: {run_dir} has loss.png, samples.txt, metrics.jsonl, checkpoints/step_{step:06d}",
        parallel,
    )
    return 0


def gradients(
    job,
    model,
    optimizer,
    micro_batches: list[dict],
    n_targets: float,
    state: dict,
    config,
    parallel,
) -> torch.Tensor:
    """
    Add the gradients of one step, each micro-batch in state["split"] parts; returns the summed loss, on the device.

    Where the memory does not suffice it is done again in twice as many parts: the same rows in the same order. Under ddp
    each rank may, until its part of the exchange has begun; under fsdp none, since the others wait inside the forward pass.
    """
    while True:
        step, split = state["step"], state["split"]
        total = torch.zeros((), device=parallel.device)
        pieces = [p for batch in micro_batches for p in cut(batch, split)]
        try:
            for j, piece in enumerate(pieces):
                torch.manual_seed(
                    stir(config.seed, step, j * parallel.world + parallel.rank)
                )  # dropout and masks
                with parallel.sync(model, last=j == len(pieces) - 1):
                    with parallel.autocast():
                        loss = job.loss_fn(model, piece)
                    parallel.backward(loss * (parallel.world / n_targets))
                total += loss.detach()
            return total
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            where = f"rank {parallel.rank}, " if parallel.world > 1 else ""
            what = f"{where}step {step + 1}: out of memory with micro-batches of {math.ceil(config.batch_size / split)} rows"
        # here, where what the failed pass held is free again
        optimizer.zero_grad()
        loss = piece = pieces = None
        gc.collect()  # the error's traceback and what it refers to
        if parallel.device.type == "cuda":
            torch.cuda.empty_cache()
        if parallel.exchanging or split >= config.batch_size:
            B, accum = max(1, config.batch_size // 2), 2 * config.grad_accum_steps
            raise RuntimeError(
                f"{what}; the same run goes on with --batch_size {B} --grad_accum_steps {accum}, or take a smaller model"
            )
        state["split"] *= 2
        say(f"{what}; each in {state['split']} parts from here on", parallel, every_rank=True)


def say(text: str, parallel: Parallel, every_rank: bool = False) -> None:
    """One line for people, from one of the processes."""
    if (parallel.rank == 0 or every_rank) and text:
        with tqdm.external_write_mode():
            print(text, flush=True)


def sample(job: Job, run_dir: Path, step: int, parallel: Parallel, stop) -> None:
    """A sample into samples.txt; left out where a stop was asked for meanwhile, so that the next attempt makes it."""
    eager = (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else contextlib.nullcontext()
    )

    def asked() -> bool:
        return parallel.all_sum([float(bool(stop))])[0] > 0 if parallel.lockstep else bool(stop)

    with eager:  # each length would be compiled anew
        text = job.sample(job.model, parallel.device, asked)
    if not asked() and parallel.rank == 0:
        say(text.strip(), parallel)
        append_lines(run_dir / "samples.txt", [f"--- step {step}\n{text}\n"])


# ---------------------------------------------------------------------------------------------- checkpoints, resuming


def save(
    job: Job,
    optimizer: Optimizer,
    config: TrainConfig,
    parallel: Parallel,
    writer: Writer,
    state: dict,
    at_once: bool,
) -> bool:
    """Write a checkpoint; a disk that refuses is told and costs neither the run nor an older one. False where it failed at once."""
    tensors, numbers = optimizer.state_dict()
    tensors = {"model.safetensors": job.model.state_dict(), "optimizer.safetensors": tensors}
    tensors = {file: parallel.gathered(named) for file, named in tensors.items()}
    if parallel.rank != 0:
        for pairs in tensors.values():
            list(pairs)  # this rank's part in gathering, in the same order
        return True
    more = {
        "optimizer_numbers": numbers,
        "loss_scale": parallel.loss_scale,
        "config": asdict(config),
        **job.facts,
    }
    state = copy.deepcopy({"script": "pretraining_advanced.py", **state, **more})
    keep = [state["best"]["step"]] if state["best"] else []
    run_dir = Path(config.output_dir)
    return writer.save(
        run_dir, state["step"], tensors, state, job.files, config.keep_last, keep, at_once=at_once
    )


def find_checkpoint(config: TrainConfig, run_dir: Path) -> Path | None:
    """The checkpoint folder to go on from, None to begin. Raises FileNotFoundError or ValueError."""
    own = checkpoint.newest_checkpoint(run_dir) if checkpoint.list_checkpoints(run_dir) else None
    if config.resume in ("auto", "never"):
        return own
    path = Path(config.resume)
    if not path.exists():
        raise FileNotFoundError(
            f"--resume: {path} does not exist; give a run folder or a checkpoint folder, or leave it out"
        )
    wanted = checkpoint.newest_checkpoint(path)
    if own and own.resolve() != wanted.resolve():  # so that the same line goes on after a stop
        print(
            f"{run_dir} has checkpoints of its own: going on from there, not from --resume {path}; that takes another --run_name",
            flush=True,
        )
    return own or wanted


def read_checkpoint(folder: Path, config: TrainConfig, job: Job) -> tuple[dict, dict]:
    """(state, tensors of model and optimizer) of a verified checkpoint of the same model. Raises ValueError where it is another."""
    weights, state = checkpoint.load_checkpoint(folder)
    if state.get("script") != "pretraining_advanced.py":
        raise ValueError(
            f"{folder}: written by {state.get('script', 'something else')}, which keeps no optimizer state; choose another --run_name"
        )
    if checkpoint.step_of(folder) != state["step"] and folder.name.startswith("step_"):
        raise ValueError(
            f"{folder}: holds step {state['step']}, its name says otherwise; it is damaged, use another checkpoint"
        )
    now = job.facts["model_config"]
    then = {name: default for name, default in asdict(GPTConfig()).items() if name in now} | state[
        "model_config"
    ]  # older ones say less
    if fixed := [
        f"{k} {then.get(k)} then, {now.get(k)} now"
        for k in sorted({*then, *now} - {"dropout"})
        if then.get(k) != now.get(k)
    ]:
        raise ValueError(
            f"{folder}: is of another model ({'; '.join(fixed)}); give the same model flags, or another --run_name"
        )
    if state["tokenizer"] != job.facts["tokenizer"]:
        raise ValueError(
            f"{folder}: was trained with another --tokenizer, whose ids mean other text; give the same one, or another --run_name"
        )
    return {**state, "folder": str(folder)}, {
        **weights,
        **checkpoint.load_tensors(folder / "optimizer.safetensors"),
    }


def load(
    state: dict,
    tensors: dict,
    job: Job,
    optimizer: Optimizer,
    guard: Guard,
    config: TrainConfig,
    parallel: Parallel,
) -> None:
    """Put everything that has a state where a checkpoint has it."""
    weights, same = (
        job.model.state_dict(),
        all(
            state["config"][name] == getattr(config, name) for name in ("optimizer", "galore_rank")
        ),
    )
    for name, tensor in parallel.shared(tensors):
        if name in weights:
            weights[name].copy_(slice_like(weights[name], tensor.to(parallel.device)))
        elif same:
            optimizer.load_state_dict({name: tensor})
    if same:
        optimizer.load_state_dict(state["optimizer_numbers"])
    else:
        say(
            "another --optimizer or --galore_rank than before: what the optimizer remembers begins anew",
            parallel,
        )
    job.train_batches.load_state_dict(state["data_cursor"])
    if "guard" in state:  # older checkpoints have none
        guard.load_state_dict(state["guard"])
    parallel.loss_scale = parallel.loss_scale and (state["loss_scale"] or parallel.loss_scale)
    if tensors:
        tensors.clear()  # as much memory as weights and optimizer state


def last_good(
    run_dir: Path, why: str, went_back_to: int | None, parallel: Parallel
) -> tuple[dict, dict]:
    """(state, tensors) of the newest checkpoint without a bad step before it. RuntimeError where there is none, or it was no help."""
    state, tensors = None, None
    if parallel.rank == 0:
        for folder in reversed(checkpoint.list_checkpoints(run_dir)):
            with contextlib.suppress(ValueError):
                checkpoint.verify_checkpoint(folder)
                weights, state = checkpoint.load_checkpoint(folder)
                if not state["guard"]["bad"]:
                    tensors = {
                        **weights,
                        **checkpoint.load_tensors(folder / "optimizer.safetensors"),
                    }
                    break
        if tensors is None:
            raise RuntimeError(
                f"{run_dir}: {why}, and no checkpoint to go back to; begin again with a lower --max_lr"
            )
        if state["step"] == went_back_to:
            raise RuntimeError(
                f"{run_dir}: {why}, once more since step {went_back_to}; go on from there with a lower --max_lr"
            )
    return parallel.share(state), tensors


def share_out(config: TrainConfig, state: dict, job: Job, parallel: Parallel) -> tuple[int, int]:
    """
    (rows per step, micro-batches per step on this rank), set in job and config; a resumed run keeps its rows per step on
    any number of processes. Raises ValueError where they cannot be dealt out evenly.
    """
    B, world = config.batch_size, parallel.world
    rows_per_step, allowed = B * config.grad_accum_steps * world, config.allow_change.split(",")
    same_flags = state and all(
        state["config"][name] == getattr(config, name)
        for name in ("batch_size", "grad_accum_steps")
    )
    if (
        same_flags
        and rows_per_step != state["rows_per_step"]
        and not {"batch_size", "grad_accum_steps"} & set(allowed)
    ):
        rows_per_step = state["rows_per_step"]
        if rows_per_step % (B * world):
            what = f"the resumed run has {rows_per_step} rows per step, which {world} processes with --batch_size {B} cannot share evenly"
            raise ValueError(
                f"{what}; use another number of processes, or a --batch_size that divides {rows_per_step / world:g}"
            )
        say(
            f"{rows_per_step} rows per step as before: {rows_per_step // (B * world)} micro-batches on each of {world} processes",
            parallel,
        )
    batches = job.train_batches
    batches.share(parallel.rank, world, B, rows_per_step)
    return rows_per_step, rows_per_step // (B * world)


def checkpoint_bytes(job: Job, config: TrainConfig) -> int:
    """Bytes of weights, optimizer state and the files beside them."""
    weights = sum(p.nbytes for p in job.model.state_dict().values()) + sum(
        map(len, job.files.values())
    )
    return weights + predicted_state_bytes(
        job.model, job.blocks, config.optimizer, config.galore_rank
    )


# ---------------------------------------------------------------------------------------------------- the run folder


def start_run(run_dir: Path, job: Job, config: TrainConfig, parallel: Parallel) -> str:
    """Write run.json; returns wandb's id of the run, which a resumed run keeps."""
    path, wandb_id = run_dir / "run.json", secrets.token_hex(4)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        wandb_id = str(json.loads(path.read_text(encoding="utf-8"))["wandb_id"])
    facts = {
        "config": asdict(config),
        **job.facts,
        **launch_facts(parallel.world, parallel.device),
        "wandb_id": wandb_id,
    }
    try:
        write_file(path, json.dumps(facts, indent=1).encode())
    except OSError as e:
        raise ValueError(
            f"--output_dir: {error_line(e)}; choose a folder that can be written"
        ) from e
    return wandb_id


def setting_of(config: TrainConfig, parallel: Parallel, accum: int) -> Setting:
    """What decides about the memory of this run's steps."""
    device = "cuda" if config.plan_memory_gb and config.device == "auto" else str(parallel.device)
    same = {
        name: getattr(config, name)
        for name in ("batch_size", "dtype", "optimizer", "activation_checkpointing", "cpu_offload")
    }
    copy = parallel.rank == 0
    return Setting(
        **same,
        grad_accum_steps=accum,
        device=device,
        parallel=parallel.kind,
        world=parallel.world,
        keeps_copy=copy,
    )


def tell_what_runs(
    job: Job, config: TrainConfig, parallel: Parallel, rows_per_step: int, accum: int, step: int
) -> bool:
    """A few lines about what was chosen, what it takes and what is still to do; returns whether the memory suffices."""
    c, T, fits = job.facts["model_config"], config.context_length, True
    one = checkpoint_bytes(job, config)
    lines = [
        f"disk: {format_bytes(one)} a checkpoint, {format_bytes(one * (config.keep_last + 2))} for those that are kept and the one being written"
    ]
    if isinstance(job.model, GPT):
        model_lines, fits = plan_lines(
            GPTConfig(**c),
            setting_of(config, parallel, accum),
            config.plan_memory_gb,
            config.galore_rank,
        )
        lines = model_lines + lines
    if config.optimizer != "adamw":
        mine, full = (
            predicted_state_bytes(job.model, job.blocks, kind, config.galore_rank)
            for kind in (config.optimizer, "adamw")
        )
        note = " (moments in 8 bits need less still)" if config.optimizer == "galore8bit" else ""
        lines.append(
            f"{config.optimizer}: {mine:,} bytes of optimizer state, {mine / full:.3f} of AdamW's {full:,}{note}"
        )
    if isinstance(job.model, GPT) and not config.plan_memory_gb:
        kernel = attention_kernel(
            c["n_head"],
            c["n_embd"] // c["n_head"],
            T,
            parallel.device,
            parallel.dtype,
            config.dropout,
        )
        if attends_in_products(parallel.device, parallel.dtype, T, config.dropout):
            kernel = "two products and a softmax, faster than torch's kernel here"
        lines.append(f"attention: {kernel}; compiled: {'each block' if config.compile else 'no'}")
    of = f"micro-batch{'es' if accum > 1 else ''} of {config.batch_size} rows"
    lines.append(f"step: {rows_per_step} x {T:,} tokens, {accum} {of} on each process")
    if config.max_steps:
        n, epoch = (
            config.max_steps - step,
            f"; {job.train_batches.n_windows:,} rows in an epoch" if job.train_batches else "",
        )
        lines.append(
            f"to go: {n:,} of {config.max_steps:,} steps, {n * rows_per_step * T:,} tokens{epoch}"
        )
    say("\n".join(lines), parallel)
    return fits


def show_plan(config: TrainConfig, parallel: Parallel) -> None:
    """Print what this run would take, its time from a few real steps on random tokens. Nothing is written, no text is tokenised."""
    B, T, accum, world = (
        config.batch_size,
        config.context_length,
        config.grad_accum_steps,
        parallel.world,
    )
    building = (
        torch.device("meta") if config.plan_memory_gb else parallel.building()
    )  # for another device: shapes without memory
    if (folder := prepare_tokens(SmollmConfig(**tokens_asked_for(config)), build=False)).exists():
        job = gpt_job(config, building)
        resolve_length(config, {}, job.train_batches.n_windows, B * accum * world)
    else:
        c = model_shape(config, vocabulary_of(config.tokenizer))
        with building:
            job = Job(
                GPT(c),
                None,
                None,
                gpt_loss,
                (Block,),
                flops_per_token(c),
                {"model_config": asdict(c)},
            )
        say(
            f"{folder}: not made yet; the length of an epoch is known when the text is tokenised",
            parallel,
        )
    done = checkpoint.list_checkpoints(config.output_dir) if config.resume == "auto" else []
    step = checkpoint.step_of(done[-1]) if done else 0
    fits = tell_what_runs(job, config, parallel, B * accum * world, accum, step)
    if config.plan_memory_gb or parallel.all_sum([float(fits)])[0] < world:
        return say(
            f"time: not measured, {'that is another device' if config.plan_memory_gb else 'it does not fit'}",
            parallel,
        )
    settings = (config.optimizer, config.weight_decay, parallel.device, config.galore_rank)
    wrapping = {
        "activation_checkpointing": config.activation_checkpointing,
        "cpu_offload": config.cpu_offload,
    }
    model, optimizer = parallel.prepare(
        job.model, job.blocks, lambda model: Optimizer(model, job.blocks, *settings), **wrapping
    )
    ids = torch.randint(job.facts["model_config"]["vocab_size"], (B, T), device=parallel.device)

    def one_step(n: int) -> None:
        batches = [{"inputs": ids, "targets": ids}] * n
        total = gradients(
            job,
            model,
            optimizer,
            batches,
            B * T * n * world,
            {"step": 0, "split": 1},
            config,
            parallel,
        )
        _, norm = parallel.read(total, optimizer)
        parallel.step(optimizer, norm, config.max_grad_norm)
        parallel.read(total, optimizer)  # waits until a GPU has done it

    def mean(s: float) -> float:
        return parallel.all_sum([s])[0] / world

    seconds = seconds_of(lambda: one_step(1), mean)
    seconds += (
        (accum - 1) * max(0.0, seconds_of(lambda: one_step(2), mean) - seconds) if accum > 1 else 0
    )
    left = (
        f"; {format_duration((config.max_steps - step) * seconds)} to the end, without evaluations"
        if config.max_steps
        else ""
    )
    how = "measured without --compile" if config.compile else "measured"
    say(
        f"time: {format_duration(seconds)} a step ({how}), {B * accum * world * T / seconds:,.0f} tokens/s{left}",
        parallel,
    )


def main(config: TrainConfig) -> int:
    """Train a GPT; returns the exit code."""
    warnings.filterwarnings(
        "ignore", message="`broadcast_buffers` is deprecated"
    )  # what stands in for it is missing before torch 2.13
    check(config)
    config.output_dir = config.output_dir or f"runs/{config.run_name}"
    device = pick_device(config.device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every number is written here
    if config.plan_memory_gb and config.device == "auto":  # another GPU may have what this lacks
        config.dtype = "bf16" if config.dtype == "auto" else config.dtype
        dtype, why = DTYPES[config.dtype], "planned for another GPU"
    else:
        dtype, why = choose_dtype(config.dtype, device)
        config.dtype = next(name for name, kind in DTYPES.items() if kind == dtype)
    with Parallel(config.parallel, device, dtype) as parallel:
        say(
            f"{device}, {parallel.world} process{'es' if parallel.world > 1 else ''}, {config.dtype}: {why}",
            parallel,
        )
        with parallel.agree():
            if config.plan or config.plan_memory_gb:
                show_plan(config, parallel)
                return 0
            job = gpt_job(config, parallel.building())
        with parallel.agree():
            parallel.same(
                job.facts,
                f"let all ranks see the same --dataset_name {config.dataset_name} and --cache_dir {config.cache_dir}",
            )
        return train(job, config, parallel)


if __name__ == "__main__":
    run_script(lambda: main(parse(TrainConfig)))
