"""
Pretrain a GPT on token shards, on a laptop or many GPUs; kill it at will, and the same command
resumes it with bit-identical results.

    python pretraining_advanced.py --config configs/laptop.yaml          # two CPU cores, minutes
    python pretraining_advanced.py --config configs/gpt2-124m.yaml       # one GPU
    torchrun --nproc_per_node 8 pretraining_advanced.py --config configs/gpt2-124m.yaml
    python pretraining_advanced.py --config configs/laptop.yaml --optimizer muon --run_name muon
    python pretraining_advanced.py --help

The text is tokenised on first use (see prep_dataset.py tokenize) and kept in --cache_dir. The run
writes runs/RUN_NAME: run.json, metrics.jsonl, loss.png, samples.txt, checkpoints/. SIGTERM, SIGUSR1
and --max_minutes save and exit with 75, Ctrl-C with 130; the same command resumes from there, also
after kill -9. Under torchrun send signals to the ranks, or to torchrun with
TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1; torchrun itself then exits with 1.

To train something else: a recipe makes a Job and calls run() (docs/how-to-extend.md).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import contextlib
import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from gpt_train import plot_run, sampler
from parts.base.dtypes import DTYPES
from parts.base.machine import (
    attention_kernel,
    choose_dtype,
    out_of_memory,
    pick_device,
    why_no_compiler,
)
from parts.base.units import format_duration
from parts.cli.config import parse
from parts.cli.launch import error_line, run_script
from parts.data.batches import Prefetch, RowBatches, TrainBatches, cut, stir, val_batches
from parts.data.shards import Shards, content_hash, read_index
from parts.data.tokenizers import Tokenizer, byte_tokenizer, vocabulary_of
from parts.model.cpu_products import attends_in_products
from parts.model.families import FAMILIES, shell
from parts.model.losses import compile_softmax
from parts.storage import checkpoint
from parts.training.contract import check_job
from parts.training.engine import ENGINES, Engine, choose_engine
from parts.training.guard import Guard
from parts.training.messages import (
    evaluation_line,
    last_line,
    progress_bar,
    speed_line,
    tell_what_runs,
)
from parts.training.metrics import Speed, memory_gib, peak_flops
from parts.training.optim import Optimizer, learning_rate
from parts.training.outputs import Outputs
from parts.training.plan import Setting, flops_per_token, plan_lines, seconds_of
from parts.training.progress import Progress, Requests
from parts.training.ranks import Ranks
from parts.training.resume import Saves, is_inside, last_good, open_run, restore, unique_weights
from parts.training.run_settings import check_settings, divide_rows, resolve_length
from parts.training.start import (
    check_draft,
    check_origin,
    check_start,
    model_shape,
    published_tokenizer,
    ready_tokenizer,
)
from prep_dataset import TokenizeConfig, prepare_tokens

# ------------------------------------------------------------------------------------ configuration


@dataclass
class RunConfig:
    """The settings of every training; a recipe adds those of its model and data."""

    # settings that may differ when a run is resumed: they change neither data nor arithmetic.
    # batch_size and grad_accum_steps are compared as rows per step
    MAY_CHANGE: ClassVar[tuple] = tuple(
        """
        config batch_size grad_accum_steps n_epochs eval_freq print_sample_iter save_ckpt_freq
        validations_per_epoch save_ckpt_minutes save_retry_minutes max_unsaved_minutes keep_last
        max_minutes patience max_bad_steps resume allow_change device parallel reshard replicate
        compile activation_checkpointing cpu_offload deterministic plan plan_memory_gb run_name
        output_dir log_exact use_wandb wandb_project tensorboard debug
        """.split()
    )
    IN_DATA: ClassVar[tuple] = ()  # settings that are compared by the data they lead to
    OTHER_NAMES: ClassVar[dict] = {}  # another name of a setting -> its name

    config: str | None = None  # YAML file of these settings; the command line overrides it
    # length and batches
    n_epochs: float | None = None  # passes over the text; None: 1, unless max_steps is given
    max_steps: int | None = None  # optimizer steps; the run ends here or at n_epochs
    batch_size: int = 32  # rows per micro-batch (one forward pass) on each rank
    grad_accum_steps: int = 1  # micro-batches per step on each rank
    # optimisation
    max_lr: float = 5e-4  # learning rate after the warmup
    min_lr: float | None = None  # learning rate at the end; None: a tenth of max_lr
    warmup_steps: int | None = None  # steps up to max_lr; None: a tenth of the run, at most 2000
    warmup_ratio: float | None = None  # share of the steps, in place of warmup_steps
    # after the warmup; wsd: constant, with a decay at the end
    schedule: Literal["cosine", "cosine_with_restarts", "linear", "constant", "wsd"] = "cosine"
    lr_cycles: int = 1  # cosines in cosine_with_restarts, each from max_lr to min_lr
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0  # clip the global norm of the gradient; 0: do not clip
    optimizer: Literal["adamw", "galore", "galore8bit", "muon"] = "adamw"  # of the blocks' matrices
    galore_rank: int = 128  # rank of GaLore's subspace
    galore_update_gap: int = 200  # steps between two choices of the subspace
    galore_scale: float = 0.25  # factor of GaLore's update
    # how often
    eval_freq: int = 500  # steps between two evaluations of the validation text
    validations_per_epoch: float | None = None  # evaluations in an epoch, in place of eval_freq
    print_sample_iter: int = 500  # steps between two samples
    save_ckpt_freq: int = 1000  # steps between two checkpoints
    save_ckpt_minutes: float = 10.0  # minutes between two checkpoints; whichever comes first
    keep_last: int = 3  # newest checkpoints to keep, besides the best
    max_minutes: float | None = None  # stop after so many minutes, save and exit with 75
    patience: int | None = None  # stop after so many evaluations without a lower validation loss
    # when something breaks
    save_retry_minutes: float = 10.0  # minutes to wait at the end for a disk that is full
    max_unsaved_minutes: float = 120.0  # minutes without a save on a full disk, then stop; 0: never
    max_bad_steps: int = 20  # skipped steps in a row after which the run rolls back to a checkpoint
    spike_zscore: float = 0.0  # skip a loss this many standard deviations too high; 0: do not
    spike_window: int = 128  # losses that the standard deviation is taken from
    # resuming
    resume: str = "auto"  # auto: from the run folder if it has checkpoints; never; or a path
    allow_change: str = ""  # settings that may differ from the resumed run's: max_lr,max_steps
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    parallel: str = "auto"  # auto (ddp under torchrun with several processes), none, ddp, fsdp
    reshard: bool = True  # under fsdp: free a block's weights after its forward pass
    replicate: int = 1  # under fsdp: groups of ranks that each have the whole model
    cpu_offload: bool = False  # under fsdp: weights and optimizer state in CPU memory; slower
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of matrix products; the rest is fp32
    compile: bool = False  # torch.compile each block
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    deterministic: bool = False  # bit-identical runs on a GPU too, slower; a CPU always is
    # before the first step
    plan: bool = False  # print parameters, memory, disk and time of this run, and exit
    plan_memory_gb: float | None = None  # plan for a GPU with so many GB (10^9 bytes)
    # output
    run_name: str = "run"  # name of the run
    output_dir: str | None = None  # run folder; None: runs/RUN_NAME
    log_exact: bool = False  # print each loss as an exact hexadecimal number
    use_wandb: bool = False  # mirror the metrics to wandb, offline without a key
    wandb_project: str = "pretraining"  # wandb's project
    tensorboard: bool = False  # mirror the metrics to TensorBoard
    seed: int = 123  # same seed, same run
    debug: bool = False  # show the traceback of an error


@dataclass
class TrainConfig(RunConfig):
    """Pretrain a GPT on token shards; resume exactly where an earlier attempt ended."""

    MAY_CHANGE: ClassVar[tuple] = (
        *RunConfig.MAY_CHANGE,
        *("cache_dir", "streaming", "eval_tokens", "init_from", "model_size"),
    )
    IN_DATA: ClassVar[tuple] = (
        *("dataset_name", "dataset_subset", "text_field"),
        *("tokenizer", "max_documents", "val_share"),
    )

    run_name: str = "advanced"  # name of the run
    # data
    dataset_name: str = "HuggingFaceTB/smollm-corpus"  # hub name, folder, file, or token shards
    dataset_subset: str | None = None  # a:0.7,b:0.3; None: cosmopedia-v2 of smollm-corpus, else all
    text_field: str | None = None  # column with the text; None: text, else content
    tokenizer: str = "gpt2"  # gpt2, bpe, bpe:8192, bytes, or a tokenizer.json
    cache_dir: str = "token_cache"  # where token shards are kept
    max_documents: int | None = None  # use only so many documents; None: all
    val_share: float = 0.01  # share of the documents held out for validation, by their hash
    eval_tokens: int | None = None  # evaluate on the first so many tokens; None: all
    streaming: bool = True  # read from the hub on the fly; else download the whole subset first
    # model
    # GPT: nano micro mini small 124M 355M 774M 1558M; Llama: llama-nano llama-micro llama-mini
    # llama-small llama-130m llama-350m llama-1b
    model_size: str = "124M"
    n_layer: int | None = None  # blocks; None: as in model_size
    n_head: int | None = None  # attention heads per block; None: as in model_size
    n_kv_head: int | None = None  # key-value heads per block of a Llama; None: as in model_size
    n_embd: int | None = None  # width; None: as in model_size
    context_length: int = 1024  # tokens the model can see at once
    dropout: float = 0.0  # share of activations zeroed while training
    init_from: str | None = None  # run or checkpoint that gives a new run its weights and shape


# ---------------------------------------------------------------------------------------- the job


@dataclass
class Job:
    """
    What to train: everything that `train` does not know by itself. A recipe hands over one.

    docs/contract.md explains each field; `check_job` lists everything that is missing or wrong.
    """

    family: str  # kind of model; a checkpoint of another family is refused
    model: torch.nn.Module  # plain, on the CPU; made in the context `building`
    train_batches: RowBatches  # endless steps; None only in a job that is planned
    val_batches: Callable  # () -> a fresh pass over the same batches, the same on every rank
    loss_fn: Callable  # (model, batch) -> fp32 sum of the loss over the targets that are not -100
    blocks: tuple  # classes that are compiled, recomputed and sharded one by one
    flops_per_token: float  # forward and backward
    tokens_per_row: int
    facts: dict  # JSON values a resumed run must share: model_config, data, tokenizer and more
    files: dict = field(default_factory=dict)  # file name -> bytes, kept in each checkpoint
    weights: Callable = unique_weights  # (model) -> {name: tensor}: what a checkpoint holds
    weights_file: str = checkpoint.WEIGHTS_FILE
    checkpoint_name: str = checkpoint.DEFAULT_NAME
    make_optimizer: Callable | None = None  # (model, config, device) -> a parts.training Optimizer
    metrics: Callable | None = None  # (model, batch) -> {name: (sum, count)}, over the validation
    token_bytes: object = None  # (V,) bytes of text behind each id, for bits per byte
    sample: Callable | None = None  # (model, device, should_stop) -> text
    export: Callable | None = None  # (checkpoint folder, target folder): other formats, at the end
    plan: Callable | None = None  # (Setting, memory in GB or None) -> (lines, whether it fits)
    dummy_batch: Callable | None = None  # (n_rows) -> a batch like any other, to measure a step
    text_log: str | None = None  # file in the run folder that gets every printed message
    eval_log: str | None = None  # file in the run folder that gets all evaluations, as JSON
    results: str = "."  # folder in the run folder for loss.png, samples.txt and exports
    run_files: dict = field(default_factory=dict)  # file name -> bytes, kept in the run folder


@dataclass
class Text:
    """Token shards and their tokenizer, opened."""

    train: Shards
    val: Shards
    tokenizer: Tokenizer
    data: str  # hash of all tokens

    def validation(self, config: TrainConfig):
        """A fresh pass over the validation rows."""
        V = self.tokenizer.vocab_size
        B, T = config.batch_size, config.context_length
        return val_batches(self.val, T, B, V, config.eval_tokens)

    @property
    def facts(self) -> dict:
        """What a resumed run must share, for Job.facts."""
        return {"data": self.data, "tokenizer": self.tokenizer.fingerprint}

    @property
    def files(self) -> dict:
        """What goes into each checkpoint, for Job.files."""
        return {"tokenizer.json": self.tokenizer.to_json()}


def text_settings(config: TrainConfig) -> TokenizeConfig:
    """The settings of the text, as prep_dataset.py has them."""
    names = (*TrainConfig.IN_DATA, "cache_dir", "streaming")
    return TokenizeConfig(**{name: getattr(config, name) for name in names})


def open_text(config: TrainConfig, required: bool = True) -> Text | None:
    """
    The token shards that the configuration names, built if they do not exist yet.

    A plan builds nothing: if they do not exist then, this raises ValueError, or returns None if
    they are not `required`. Raises ValueError or FileNotFoundError for data that cannot be used.
    """
    planned = config.plan or config.plan_memory_gb
    folder = prepare_tokens(text_settings(config), build=not planned)
    if planned and not folder.exists():
        if required:
            raise ValueError("--plan: the text is not tokenised yet; run prep_dataset.py tokenize")
        return None
    index = read_index(folder)
    if index["tokenizer"]:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    else:
        tokenizer = published_tokenizer(config)
    train, val = Shards(folder, "train", index), Shards(folder, "val", index)
    if len(val) < 2:
        what = (
            "no document fell into the validation part; "
            f"raise --val_share {config.val_share:g}, or give more documents"
        )
        if not index["tokenizer"]:
            what = "these published shards have no validation file; add one with val in its name"
        raise ValueError(f"{folder}: {what}")
    return Text(train, val, tokenizer, content_hash(index))


def gpt_draft(config: TrainConfig) -> Job | None:
    """
    What is known of gpt_job before its text is tokenised (see check_draft); None if that is done.

    Raises ValueError or FileNotFoundError as gpt_job does.
    """
    shape = model_shape(config)
    if prepare_tokens(text_settings(config), build=False).exists():
        return None
    tokenizer, V = None, byte_tokenizer().vocab_size  # of a BPE, the smallest
    if config.tokenizer.partition(":")[0] != "bpe":
        with contextlib.suppress(OSError):  # reported when the text is to be tokenised
            tokenizer = ready_tokenizer(config.tokenizer)
            V = tokenizer.vocab_size
    if config.init_from and tokenizer:
        check_origin(config, tokenizer)
    if not config.init_from:
        shape = replace(shape, vocab_size=V)
    of_tokenizer = tokenizer.fingerprint if tokenizer else None
    facts = {"model_config": asdict(shape), "data": None, "tokenizer": of_tokenizer}
    sizes = {"flops_per_token": flops_per_token(shape), "tokens_per_row": config.context_length}
    blocks = (FAMILIES[shape.family].block,)
    return Job(shape.family, shell(shape), None, None, gpt_loss, blocks, facts=facts, **sizes)


def gpt_job(config: TrainConfig, building) -> Job:
    """
    A GPT or Llama, made in the context `building`, and the text that the configuration names.

    Raises ValueError or FileNotFoundError for data or sizes that cannot be used.
    """
    shape = model_shape(config)
    text = open_text(config, required=False)
    T = config.context_length
    V = text.tokenizer.vocab_size if text else vocabulary_of(config.tokenizer)
    if not config.init_from:
        shape = replace(shape, vocab_size=V)
    weights = None
    if config.init_from and text:
        weights, _ = checkpoint.load_checkpoint(check_origin(config, text.tokenizer))
    torch.manual_seed(config.seed)
    family = FAMILIES[shape.family]
    with building:  # only the model: reading text makes tensors, too
        model = family.model(shape)
    if weights and not next(model.parameters()).is_meta:
        model.load_state_dict(weights)

    def plan(setting: Setting, memory_gb: float | None) -> tuple[list[str], bool]:
        device, dtype = torch.device(setting.device), DTYPES[setting.dtype]
        in_products = attends_in_products(device, dtype, T, config.dropout)
        setting = replace(setting, attends_in_products=in_products)
        lines, fits = plan_lines(shape, setting, memory_gb, config.galore_rank)
        kernel = "two products and a softmax, faster than torch's kernel here"
        if not in_products and not memory_gb:
            heads = (shape.n_head, getattr(shape, "head_dim", shape.n_embd // shape.n_head))
            kernel = attention_kernel(*heads, T, device, dtype, config.dropout)
        return lines if memory_gb else [*lines, f"attention: {kernel}"], fits

    def dummy_batch(n_rows: int) -> dict:
        ids = torch.randint(V, (n_rows, T))
        return {"inputs": ids, "targets": ids}

    job = Job(
        family=shape.family,
        model=model,
        train_batches=None,
        val_batches=None,
        loss_fn=gpt_loss,
        blocks=(family.block,),
        flops_per_token=flops_per_token(shape),
        tokens_per_row=T,
        facts={"model_config": asdict(shape)},
        plan=plan,
        dummy_batch=dummy_batch,
    )
    if not text:
        return job

    return replace(
        job,
        train_batches=TrainBatches(text.train, T, config.seed, V),
        val_batches=lambda: text.validation(config),
        facts=job.facts | text.facts,
        files=text.files,
        token_bytes=text.tokenizer.token_bytes(),
        sample=sampler(text.tokenizer),
    )


def gpt_loss(model, batch) -> torch.Tensor:
    """fp32 sum of the cross-entropy over the targets that are not -100."""
    return model(batch["inputs"], batch["targets"])


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(job: Job, engine: Engine, stop=lambda: False) -> dict | None:
    """
    {"val_loss", "val_perplexity", "val_tokens", "val_bits_per_byte"} of the validation text, and
    the job's metrics.

    The same bits on any number of ranks: each batch is computed by one of them, and the sums are
    added in the order of the text. None if `stop` became true on any rank. Dropout is off; the
    model is left in the mode it was in.
    """
    ranks, world = engine.ranks, engine.ranks.world
    was_training = job.model.training
    found = {}  # number of a batch that this rank computed -> {name: (sum, count)}
    n_targets = n_bytes = 0
    stopped, i = False, -1

    def compute(batch, n: int) -> dict:
        batch = {name: tensor.to(ranks.device) for name, tensor in batch.items()}
        with engine.autocast():
            loss = {"loss": (job.loss_fn(job.model, batch).item(), n)}
            return loss | (job.metrics(job.model, batch) if job.metrics else {})

    job.model.eval()
    for i, batch in enumerate(job.val_batches()):
        targets = batch["targets"][batch["targets"] != -100]
        n_targets += len(targets)
        if job.token_bytes is not None:
            n_bytes += int(job.token_bytes[targets.numpy()].sum())
        if i % world == ranks.rank:
            found[i] = compute(batch, len(targets))
        if i % world == world - 1 and ranks.any(stop()):  # ranks exchange
            stopped = True
            break
    if engine.lockstep and max(found, default=-1) // world < i // world:  # fewer than the ranks
        compute(batch, len(targets))
    job.model.train(was_training)
    if stopped:
        return None
    means = _means(found, i + 1, ranks)
    loss = means.pop("loss", 0.0)
    result = {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_tokens": n_targets,
    }
    if n_bytes:
        result["val_bits_per_byte"] = loss * n_targets / math.log(2) / n_bytes
    return result | means


def _means(found: dict, n_batches: int, ranks: Ranks) -> dict:
    """
    {name: sum / count} over all batches and ranks, added in the order of the batches.

    found: see `evaluate`. Ranks exchange.
    """
    names = ranks.share(sorted(found.get(0, {})))  # rank 0 has computed the first batch
    means = {}
    for name in names:
        pairs = [found.get(i, {}).get(name, (0.0, 0.0)) for i in range(n_batches)]
        sums = ranks.all_sum([float(total) for total, _ in pairs])
        counts = ranks.all_sum([float(count) for _, count in pairs])
        means[name] = sum(sums) / max(sum(counts), 1)
    return means


# ----------------------------------------------------------------------------------------- the loop


def train(job: Job, config: RunConfig, engine: Engine, begin_afresh: Callable | None) -> int:
    """
    Train the job to its last step; returns the exit code: 0 finished, 75 or 130 stopped on request
    after saving. begin_afresh: as check_start returned it.

    Raises ValueError if the run folder or the checkpoint does not fit (nothing is changed then),
    RuntimeError if the run failed.
    """
    ranks, run_dir = engine.ranks, Path(config.output_dir)
    master = ranks.rank == 0
    with contextlib.ExitStack() as stack:
        # Set up: read the checkpoint, move everything to its device.
        requests = Requests(ranks, config.max_minutes)
        stack.enter_context(requests)
        state, tensors = open_run(job, config, ranks, begin_afresh)
        rows_per_step, accum = divide_rows(job, config, state, ranks)
        tell_what_runs(job, config, engine, rows_per_step, accum, state.get("step", 0))
        prepare(job, config, engine)
        guard = Guard(config.max_bad_steps, config.spike_zscore, config.spike_window)
        if state:
            restore(state, tensors, job, config, engine, guard)
            ranks.say(f"resumed from step {state['step']} ({state['folder']})")
        progress = Progress.of_checkpoint(state, job.train_batches.state_dict(), rows_per_step)
        resumed = "folder" in state and is_inside(state["folder"], run_dir)
        outputs = Outputs(job, config, ranks, progress.step, resumed)
        stack.callback(outputs.close)
        record = outputs.last_record()  # of the step the run is at, perhaps incomplete
        steps = stack.enter_context(Prefetch(job.train_batches, ranks.device))
        peak = peak_flops(ranks.device, engine.dtype)
        speed = Speed(job.flops_per_token, peak, ranks.world)
        bar = stack.enter_context(progress_bar(config, progress.step, master))
        saves = Saves(job, config, engine, outputs, progress)
        plotted_at, rolled_back_to = time.monotonic(), None
        if progress.step == config.max_steps:
            ranks.say(f"{run_dir}: already finished at step {progress.step}")

        while True:
            # Between two steps: evaluate, sample, write the record, save.
            step = progress.step
            last = step == config.max_steps or progress.out_of_patience(config.patience)
            due = step % config.eval_freq == 0 or last
            if due and "val_loss" not in record and not requests.stop:
                result = evaluate(job, engine, requests.signalled)  # ranks exchange
                requests.stop = result is None
                if result:
                    record |= result
                    progress.count_evaluation(result["val_loss"])
                    last = last or progress.out_of_patience(config.patience)
                    ranks.say(evaluation_line(step, result))
            due = step and (step % config.print_sample_iter == 0 or last)
            if due and job.sample and not requests.stop:
                sample(job, engine, outputs, step, requests)  # ranks exchange
            if not requests.unreadable:
                outputs.write(record)
            due = saves.due or step % config.save_ckpt_freq == 0
            due = last or requests.stop or (due and not guard.bad)
            if step and (due or saves.step == step):
                saves.save_step(progress, guard, record, requests, last)  # ranks gather shards
            if last or requests.stop or time.monotonic() - plotted_at > 600:
                outputs.flush()
                if master:
                    V = job.facts["model_config"].get("vocab_size")
                    plot_run(run_dir, V, run_dir / job.results)
                plotted_at = time.monotonic()
            if last or requests.stop:
                break

            # One step: the same rows on any number of ranks, divided once by all their targets.
            speed.start()
            micro_batches, n_targets = next_step(steps, progress, requests)  # ranks exchange
            if requests.unreadable:
                continue  # to save and end
            first_row = progress.data_cursor["rows"]
            total = gradients(job, engine, micro_batches, n_targets, progress, config)
            if config.use_wandb and (step + 1) % config.eval_freq == 0:
                outputs.histograms(step + 1)
            # The one exchange of a step besides gradients: loss, requests, size of micro-batches.
            mine = {"loss": engine.read(total), "split": progress.split}
            everyone = ranks.gather(mine | requests.pending() | saves.pending())
            requests.agree(everyone)
            saves.agree(everyone, requests)
            progress.split = int(max(rank["split"] for rank in everyone))
            loss = sum(rank["loss"] for rank in everyone) / n_targets
            bad = guard.objection(loss)
            rates = (config.max_lr, config.min_lr, config.warmup_steps, config.max_steps)
            lr = learning_rate(step, config.schedule, *rates, config.lr_cycles)
            norm, applied = engine.step(lr, config.max_grad_norm, veto=bad is not None)
            if bad is None and not math.isfinite(norm):
                bad = f"the gradient is {norm}"
            progress.advance(n_targets, steps.cursor)
            figures = speed.stop(int(n_targets))
            record = {"step": step + 1, "tokens": progress.tokens, "train_loss": loss, "lr": lr}
            record |= {"grad_norm": norm, **figures}
            record["memory_gib"] = round(memory_gib(ranks.device), 3)
            if config.log_exact:
                ranks.say(f"step {step + 1} loss {loss.hex()}")
            if bad:
                record["skipped"] = bad
                what = "its update made the weights useless" if applied else "the step is skipped"
                ranks.say(f"warning: step {step + 1}: {bad}; {what}")
            # An overflow while fp16 looks for its loss scale is not counted.
            roll_back_due = bad is not None and applied
            if not (bad and engine.finding_scale):
                roll_back_due |= guard.note(bad, loss, first_row)
            if roll_back_due:
                steps.close()
                progress, record = roll_back(
                    job, config, engine, guard, outputs, progress, rolled_back_to
                )
                rolled_back_to = progress.step
                saves = Saves(job, config, engine, outputs, progress)
                steps = stack.enter_context(Prefetch(job.train_batches, ranks.device))
                bar.n = progress.step
            bar.set_postfix_str(speed_line(loss, figures), refresh=False)
            bar.update()

        if saves.failed:
            raise OSError(f"{run_dir}: the last step could not be saved, see the warning above")
        if requests.unreadable:
            raise RuntimeError(requests.unreadable)
        if not last:
            ranks.say(f"stopped at step {step}; the same command resumes from there")
            return requests.exit_code
        with ranks.agree():
            outputs.export(step, progress.best and progress.best["step"])
        ranks.say(last_line(job, config, progress, run_dir))
        return 0


def prepare(job: Job, config: RunConfig, engine: Engine) -> None:
    """Model and optimizer ready to train. Ranks exchange."""
    device = engine.ranks.device
    if config.compile and (why := why_no_compiler(device)):
        engine.ranks.say(f"--compile is off: no compiler works here ({why})")
        config.compile = False
    compile_softmax(config.compile and device.type == "cuda")

    def make_optimizer(model) -> Optimizer:
        if job.make_optimizer:
            return job.make_optimizer(model, config, device)
        galore = (config.galore_rank, config.galore_update_gap, config.galore_scale)
        return Optimizer(model, job.blocks, config.optimizer, config.weight_decay, device, *galore)

    with engine.ranks.agree():
        engine.prepare(
            job.model,
            job.blocks,
            make_optimizer,
            activation_checkpointing=config.activation_checkpointing,
            compile_blocks=config.compile,
            cpu_offload=config.cpu_offload,
            reshard=config.reshard,
            replicate=config.replicate,
        )


def next_step(steps: Prefetch, progress: Progress, requests: Requests) -> tuple[list, float]:
    """
    (micro-batches of this rank, targets of all ranks) of the next step. Ranks exchange.

    If a rank cannot read its rows, `requests` says why; what is trained so far can be saved.
    """
    why = None
    try:
        micro_batches, n_targets = next(steps)
    except (ValueError, OSError) as e:  # damaged shards
        micro_batches, n_targets, why = [], 0, error_line(e)
    everyone = requests.ranks.gather({"targets": n_targets, "unreadable": why is not None})
    if any(rank["unreadable"] for rank in everyone):
        requests.stop_unreadable(why or "the text cannot be read on another rank")
    return micro_batches, max(1.0, sum(rank["targets"] for rank in everyone))


def gradients(job: Job, engine: Engine, micro_batches: list, n_targets: float, progress, config):
    """
    Accumulate the gradient of one step; returns the summed loss, on the device.

    Each micro-batch is cut into progress.split parts. If memory does not suffice, the step is done
    again in twice as many parts: the same rows in the same order. Each rank may do so by itself
    until its part of the exchange has begun; under fsdp none may, since the others wait inside the
    forward pass.
    """
    ranks = engine.ranks
    while True:
        step, split = progress.step, progress.split
        total = torch.zeros((), device=ranks.device)
        pieces = [piece for batch in micro_batches for piece in cut(batch, split)]
        try:
            for j, piece in enumerate(pieces):
                # dropout and masks: a function of seed, step and number of the micro-batch
                torch.manual_seed(stir(config.seed, step, j * ranks.world + ranks.rank))
                last = j == len(pieces) - 1
                total += engine.accumulate(job.loss_fn, piece, n_targets, last)
            return total
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        # outside of `except`, where what the failed pass held is free again
        engine.discard()
        piece = pieces = None
        gc.collect()  # the error's traceback and everything it refers to
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        rows = math.ceil(config.batch_size / split)
        rank = f"rank {ranks.rank}, " if ranks.world > 1 else ""
        what = f"{rank}step {step + 1}: out of memory with micro-batches of {rows} rows"
        if engine.exchanging or split >= config.batch_size:
            B, accum = max(1, config.batch_size // 2), 2 * config.grad_accum_steps
            raise RuntimeError(
                f"{what}; resume this run with --batch_size {B} --grad_accum_steps {accum}, "
                "or take a smaller model"
            )
        progress.split *= 2
        ranks.say(f"{what}; each in {progress.split} parts from here on", every_rank=True)


def roll_back(job, config, engine, guard, outputs, progress, rolled_back_to):
    """
    Return to the newest good checkpoint, and skip the rows of the bad steps.

    Returns (progress, record of its step). Raises RuntimeError if there is no such checkpoint, or
    rolling back to it has not helped before. Ranks exchange.
    """
    ranks, run_dir = engine.ranks, Path(config.output_dir)
    first, end = guard.first, progress.data_cursor["rows"]
    why = f"{guard.bad} bad steps in a row, the last is step {progress.step}"
    outputs.writer.wait()
    with ranks.agree():
        state, tensors = last_good(run_dir, job, why, rolled_back_to, ranks)
    state = ranks.share(state)
    restore(state, tensors, job, config, engine, guard)
    job.train_batches.skip(first, end)
    cursor = job.train_batches.state_dict()
    progress = Progress.of_checkpoint(state, cursor, progress.rows_per_step)
    ranks.say(f"{why}: rolled back to step {progress.step}, skipping rows {first} to {end - 1}")
    outputs.rewind(progress.step)
    return progress, outputs.last_record() | {"skipped_rows": [first, end]}


def sample(job: Job, engine: Engine, outputs: Outputs, step: int, requests: Requests) -> None:
    """
    Write a sample of this step, unless there is one; ranks exchange.

    If a stop is requested meanwhile, the sample is left for the attempt that resumes.
    """
    ranks = engine.ranks
    sampled = outputs.sampled
    if engine.lockstep:
        sampled = ranks.share(sampled)
    if (ranks.rank == 0 or engine.lockstep) and sampled != step:
        eager = contextlib.nullcontext()
        if "torch._dynamo" in sys.modules:  # each length would be compiled anew
            eager = torch.compiler.set_stance("force_eager")

        def should_stop() -> bool:
            stop = requests.signalled()
            return ranks.any(stop) if engine.lockstep else stop

        with eager:
            text = job.sample(job.model, ranks.device, should_stop)
        if not should_stop():
            outputs.add_sample(step, text)
    requests.stop = ranks.any(requests.signalled())


# --------------------------------------------------------------------------------------------- plan


def show_plan(job: Job, config: RunConfig, engine: Engine) -> None:
    """
    Print what this run would take; its time is that of a few real steps on a dummy batch.

    Nothing is written, no text is tokenised. Ranks exchange.
    """
    ranks, B, accum = engine.ranks, config.batch_size, config.grad_accum_steps
    rows_per_step = B * accum * ranks.world
    if job.train_batches:
        resolve_length(config, {}, job.train_batches, rows_per_step)
    else:
        ranks.say("text: not tokenised yet; the length of an epoch is known when it is")
    done = []
    if config.resume == "auto":
        done = checkpoint.list_checkpoints(config.output_dir, job.checkpoint_name)
    step = checkpoint.step_of(done[-1], job.checkpoint_name) if done else 0
    fits = tell_what_runs(job, config, engine, rows_per_step, accum, step)
    if config.plan_memory_gb:
        return ranks.say("time: not measured, that is another device")
    if ranks.any(not fits):
        return ranks.say("time: not measured, it does not fit")
    if not job.dummy_batch:
        return ranks.say("time: not measured, the job has no batch to measure it with")
    prepare(job, config, engine)
    batch = {name: tensor.to(ranks.device) for name, tensor in job.dummy_batch(B).items()}
    n_targets = int((batch["targets"] != -100).sum()) * ranks.world
    progress = Progress({}, rows_per_step)

    def one_step(n: int) -> None:
        total = gradients(job, engine, [batch] * n, n_targets * n, progress, config)
        engine.read(total)
        engine.step(0.0, config.max_grad_norm)
        engine.read(total)  # waits until a GPU has finished

    def mean(seconds: float) -> float:
        return ranks.all_sum([seconds])[0] / ranks.world

    seconds = seconds_of(lambda: one_step(1), mean)
    if accum > 1:
        more = seconds_of(lambda: one_step(2), mean) - seconds
        seconds += (accum - 1) * max(0.0, more)
    line = f"time: {format_duration(seconds)} a step (measured), "
    line += f"{rows_per_step * job.tokens_per_row / seconds:,.0f} tokens/s"
    if config.max_steps:
        left_s = (config.max_steps - step) * seconds
        line += f"; {format_duration(left_s)} to the end, without evaluations"
    ranks.say(line)


# -------------------------------------------------------------------------------------------- start


def run(config: RunConfig, make_job: Callable = gpt_job, engines: dict = ENGINES) -> int:
    """
    Start a training, or plan it with --plan; returns the exit code. The one way to start one.

    make_job(config, building) -> Job, with its model made in the context `building`. engines: what
    --parallel chooses from. Raises ValueError for settings or data that cannot be used.
    """
    # what replaces it is missing before torch 2.13
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    check_settings(config)
    config.output_dir = config.output_dir or f"runs/{config.run_name}"
    engine_class = choose_engine(config.parallel, engines)
    device = pick_device(config.device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # all memory is written here
    planned = config.plan or config.plan_memory_gb
    if config.plan_memory_gb and config.device == "auto":  # another GPU may have other formats
        config.dtype = "bf16" if config.dtype == "auto" else config.dtype
        dtype, why = DTYPES[config.dtype], "planned for another GPU"
    else:
        dtype, why = choose_dtype(config.dtype, device)
        config.dtype = next(name for name, kind in DTYPES.items() if kind == dtype)
    group = engine_class.needs_torchrun
    with Ranks(device, group) as ranks, contextlib.ExitStack() as stack:
        plural = "es" if ranks.world > 1 else ""
        ranks.say(f"{device}, {ranks.world} process{plural}, {config.dtype}: {why}")
        engine = engine_class(ranks, dtype)
        # planned for another device: shapes without memory
        building = torch.device("meta") if config.plan_memory_gb else engine.building()
        begin_afresh = None
        with ranks.agree():  # before any text is read, which may take hours
            if not planned:
                begin_afresh = check_start(config, engine, stack)
            if not planned and make_job is gpt_job and (draft := gpt_draft(config)):
                check_draft(draft, config, ranks)
        with ranks.agree():
            job = make_job(config, building)
            if not planned:
                check_job(job, config.batch_size)
        if planned:
            show_plan(job, config, engine)
            return 0
        with ranks.agree():
            what = "has other data or another tokenizer than rank 0"
            ranks.same(job.facts, what, "let all ranks see the same data and the same --cache_dir")
        return train(job, config, engine, begin_afresh)


def start(make_job: Callable = gpt_job, config_class=TrainConfig, engines: dict = ENGINES) -> None:
    """Run from the command line: flags, one-line errors and exit codes as every script has them."""
    run_script(lambda: run(parse(config_class), make_job, engines))


if __name__ == "__main__":
    start()
