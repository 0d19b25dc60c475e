"""
Pretrain a GPT on books, from random weights, in one file that reads from top to bottom. A GPT guesses the next token of a text
(a word or a piece of one) from those before it. Words that are new here are explained in docs/reading-guide.md.

    python pretraining_simple.py                                  # everything chosen for this machine
    python pretraining_simple.py --data_dir my_texts --n_epochs 3 # your own folder of .txt files
    python pretraining_simple.py --help

Text: --data_dir; else ./gutenberg_preprocessed if prep_dataset.py made it; else a dozen classics are fetched from Project
Gutenberg; else, without a network, the English that comes with Python. On disk, in runs/simple: loss.png, samples.txt,
metrics.jsonl, run.json, checkpoints/. An earlier run there is kept as runs/simple-1. Ctrl-C saves and stops.
On two CPU cores (AMD EPYC) 30 books take 4 minutes and end at a validation loss of 4.61 nats, 1.90 bits per byte.
"""

from __future__ import annotations

if (
    __name__ == "__main__"
):  # before torch is imported, so that Ctrl-C in those seconds leaves no traceback
    from parts.cli.launch import quiet_ctrl_c

    quiet_ctrl_c()

import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gpt_train import (
    GPT,
    GPTConfig,
    calc_loss_batch,
    evaluate_model,
    generate_and_print_sample,
    pick_device,
    plot_losses,
)
from parts.base.files import append_lines, write_file
from parts.base.text import passage_pattern
from parts.cli.config import parse
from parts.cli.launch import StopRequest, error_line, run_script
from parts.data.tokenizers import make_tokenizer, vocabulary_of
from parts.storage.checkpoint import save_checkpoint
from parts.storage.run_folder import move_aside
from parts.training import plan
from prep_dataset import load_documents

# ------------------------------------------------------------------------------------------------ configuration


@dataclass
class SimpleConfig:
    """Pretrain a GPT on a folder of text. Where the default is None, it depends on the device."""

    # folder of .txt files; None: prepared books, else fetched ones, else Python's own texts
    data_dir: str | None = None
    output_dir: str = "runs/simple"  # run folder
    # passes over the training text; the run ends here or at max_steps, whichever is first
    n_epochs: int | None = None
    max_steps: int | None = None  # optimizer steps
    batch_size: int | None = None  # rows per step, each of context_length tokens
    # highest learning rate (the size of a step), after the warmup in which it grows from 0
    lr: float | None = None
    eval_freq: int = 200  # steps between two evaluations of the whole validation text
    print_sample_iter: int = 200  # steps between two samples
    save_ckpt_freq: int = 1000  # steps between two checkpoints; the last step is always saved
    model_size: str | None = None  # nano, micro, mini, small, 124M, 355M, 774M or 1558M
    context_length: int | None = None  # tokens the model can see at once
    tokenizer: str = "auto"  # cuts text into tokens: auto, gpt2, bpe, bpe:8192, bytes, a tokenizer.json; auto: gpt2 on a GPU, else bpe
    seed: int = 123  # same seed, same run on one CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    plan: bool = False  # print parameters, memory and time of this run, and end; nothing is fetched or written
    # plan for a GPU with so many GB (10^9 bytes), not for this device
    plan_memory_gb: float | None = None
    debug: bool = False  # show the traceback of an error


# What None stands for: about four minutes on two CPU cores; on a GPU a model that is ten times larger.
CPU_DEFAULTS = {
    "model_size": "micro",
    "context_length": 128,
    "batch_size": 16,
    "max_steps": 1400,
    "lr": 4e-3,
}
GPU_DEFAULTS = {
    "model_size": "mini",
    "context_length": 256,
    "batch_size": 32,
    "max_steps": 3000,
    "lr": 1e-3,
}


def resolve(config: SimpleConfig, device) -> None:
    """Fill in what is None and refuse what cannot be. Raises ValueError."""
    if config.n_epochs is not None and config.max_steps is None:
        config.max_steps = sys.maxsize  # the epochs alone decide
    for name, value in (CPU_DEFAULTS if device.type == "cpu" else GPU_DEFAULTS).items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    for name, value in asdict(config).items():
        in_range = (
            abs(value) < 2**32
            if name == "seed"
            else type(value) not in (int, float) or 0 < value < math.inf
        )
        if not in_range:
            raise ValueError(f"--{name}: {value} is out of range; give a positive number")
    GPTConfig.of_size(config.model_size)


# --------------------------------------------------------------------------------------------------------- data


def split_documents(
    documents: list[str], share=0.05, most_chars=200_000
) -> tuple[list[str], list[str]]:
    """
    Training and validation texts: documents are cut at blank lines, and the hash of each chunk decides its side.

    A hash and not a position: a passage that stands twice goes to one side, and no book is cut into a first and a last part.
    Validation gets `share` of the characters, most_chars at most, and at least one chunk.
    """
    n_chars = sum(map(len, documents))
    length = max(1, min(4000, n_chars // 100))
    cut = passage_pattern(length)
    chunked = [cut.findall(text) for text in documents]
    ranks = {c: hashlib.sha256(c.encode()).digest()[:8] for chunks in chunked for c in chunks}
    limit = max(
        int(min(share, most_chars / n_chars) * 2**64).to_bytes(8, "big"), min(ranks.values())
    )
    train = ["".join(c for c in chunks if ranks[c] > limit) for chunks in chunked]
    val = ["".join(c for c in chunks if ranks[c] <= limit) for chunks in chunked]
    return [t for t in train if t], [t for t in val if t]


def train_batches(tokens, batch_size: int, T: int, seed: int):
    """Endless (inputs, targets), each (B, T) int64; every window once per epoch, in an order fixed by seed and epoch."""
    n_windows = (len(tokens) - 1) // T
    seeds = (torch.Generator().manual_seed(seed * 1_000_003 + epoch) for epoch in itertools.count())
    order = (
        window
        for generator in seeds
        for window in torch.randperm(n_windows, generator=generator).tolist()
    )
    while True:
        starts = torch.tensor(list(itertools.islice(order, batch_size))) * T  # (B,)
        window = tokens[starts[:, None] + torch.arange(T + 1)].long()  # (B, T + 1)
        yield (
            window[:, :-1],
            window[:, 1:],
        )  # the target of each position is the token that follows it


def val_batches(tokens, batch_size: int, T: int) -> list:
    """All (inputs, targets) of the validation text in order, the last row filled up with targets -100, which the loss leaves out."""
    missing = -(len(tokens) - 1) % T
    inputs = F.pad(tokens[:-1].long(), (0, missing)).view(-1, T)  # (N, T)
    targets = F.pad(tokens[1:].long(), (0, missing), value=-100).view(-1, T)  # (N, T)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


# -------------------------------------------------------------------------------------------------------- story


def main(config: SimpleConfig) -> int:
    """Train one model; returns the exit code."""
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 products: fast, with 10 bits of fraction
    resolve(config, device)
    torch.manual_seed(config.seed)
    B, T, run_dir = config.batch_size, config.context_length, Path(config.output_dir)
    if run_dir.resolve() in (Path.cwd(), Path(config.data_dir or "/").resolve()):
        raise ValueError(
            f"--output_dir: {run_dir} is the current folder or --data_dir; name another folder for the run"
        )

    if config.plan or config.plan_memory_gb:
        V = vocabulary_of(config.tokenizer, on_gpu=device.type != "cpu")
        planned = GPTConfig.of_size(config.model_size, vocab_size=V, block_size=T)
        return plan.show_plan(
            planned, lambda: GPT(planned), B, device, config.max_steps, config.plan_memory_gb
        )

    documents, source = load_documents(config.data_dir)
    train_texts, val_texts = split_documents(documents)
    tokenizer = make_tokenizer(config.tokenizer, train_texts, on_gpu=device.type != "cpu")
    train_tokens = torch.from_numpy(tokenizer.encode_documents(train_texts).astype("int32"))
    val_tokens = torch.from_numpy(tokenizer.encode_documents(val_texts).astype("int32"))
    n_windows = (len(train_tokens) - 1) // T
    if n_windows < B or len(val_tokens) < 2:
        what = f"{len(train_tokens):,} training tokens are too few for one batch of {B} rows of {T}"
        raise ValueError(
            f"{source}: {what}; give more text, or a smaller --batch_size or --context_length"
        )
    n_steps = min(config.max_steps, (config.n_epochs or sys.maxsize) * n_windows // B)
    validation, token_bytes = val_batches(val_tokens, B, T), tokenizer.token_bytes()

    model_config = GPTConfig.of_size(
        config.model_size, vocab_size=tokenizer.vocab_size, block_size=T
    )
    model = GPT(model_config).to(device)
    decayed = [
        p for p in model.parameters() if p.ndim >= 2
    ]  # matrices; decaying biases and norms does no good
    others = [p for p in model.parameters() if p.ndim < 2]  # weight decay draws a weight towards 0
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.95), fused=device.type != "mps"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, n_steps)
    )
    print(
        f"{source}: {len(documents)} documents; {tokenizer.name}: {len(train_tokens):,} training, {len(val_tokens):,} validation tokens"
    )
    print(*plan.plan_lines(model_config, plan.Setting(B, device=str(device)))[0], sep="\n")
    print(f"{n_steps} steps of {B} x {T} tokens, {n_steps * B * T:,} tokens to go, on {device}")

    start_run(
        run_dir,
        {
            "config": asdict(config),
            "model": asdict(model_config),
            "data": source,
            "tokenizer": tokenizer.name,
        },
    )
    losses, events = (
        {0: (None, None)},
        [],
    )  # step -> (training, validation loss or None); lines for metrics.jsonl, not yet on disk

    def look(step: int) -> None:  # what the model knows by now, and what it writes
        result = evaluate_model(model, validation, device, token_bytes)
        losses[step] = (losses[step][0], result["loss"])
        events.append({"step": step} | {f"val_{name}": value for name, value in result.items()})
        tqdm.write(
            f"step {step}: validation loss {result['loss']:.3f}, {result['bits_per_byte']:.3f} bits per byte"
        )
        append_lines(run_dir / "metrics.jsonl", events)

    def sample(step: int) -> None:
        with tqdm.external_write_mode():
            text = generate_and_print_sample(model, tokenizer, device, "It was", temperature=0.7)
        append_lines(run_dir / "samples.txt", [f"--- step {step}\n{text}\n"])

    def save(step: int) -> bool:
        state = {
            "script": "pretraining_simple.py",
            "step": step,
            "tokens": step * B * T,
            "model_config": asdict(model_config),
        }
        try:
            save_checkpoint(
                run_dir,
                step,
                {"model.safetensors": model.state_dict()},
                state,
                {"tokenizer.json": tokenizer.to_json()},
                1,
            )
        except OSError as e:  # a run is worth more than a checkpoint
            tqdm.write(
                f"warning: step {step} is not saved: {error_line(e)}; free some space or choose another --output_dir"
            )
            return False
        return True

    batches, seconds = train_batches(train_tokens, B, T, config.seed), 0.0
    with (
        StopRequest() as stop,
        tqdm(total=n_steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30) as bar,
    ):
        look(0)
        for step in range(1, n_steps + 1):
            started = time.perf_counter()
            inputs, targets = next(batches)  # (B, T) each
            loss = calc_loss_batch(inputs, targets, model, device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                model.parameters(), 1.0
            )  # one odd batch must not throw the weights far
            optimizer.step()
            optimizer.zero_grad()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            losses[step] = (loss.item(), None)
            seconds += (
                time.perf_counter() - started
            )  # of training alone: looking and sampling are not speed
            if not math.isfinite(losses[step][0]):
                raise RuntimeError(
                    f"the loss is {losses[step][0]} at step {step}; start again with a lower --lr than {config.lr:g}"
                )
            events.append(
                {"step": step, "tokens": step * B * T, "train_loss": losses[step][0], "lr": lr}
            )
            bar.set_postfix_str(
                f"loss {losses[step][0]:.3f}, {step * B * T / seconds:,.0f} tokens/s", refresh=False
            )
            bar.update()
            last = stop or step == n_steps
            if step % config.eval_freq == 0 or last:
                look(step)
            if step % config.save_ckpt_freq == 0 or last:
                saved = save(step)
            if step % config.print_sample_iter == 0 or last:
                sample(step)
            if last:
                break

        print(
            f"{'stopped' if stop else 'finished'} at step {step}: {step * B * T:,} tokens at {step * B * T / seconds:,.0f} per second"
        )
        if not saved:
            raise OSError(f"{run_dir}: the last step could not be saved, see the warning above")
        curves = zip(*[(s, s * B * T, *pair) for s, pair in losses.items()], strict=True)
        plot_losses(*curves, run_dir / "loss.png", uniform_loss=math.log(tokenizer.vocab_size))
    print(f"{run_dir}: loss.png, samples.txt, metrics.jsonl, checkpoints/step_{step:06d}")
    print(
        f'sample from it: python {os.path.relpath(Path(__file__).parent / "gpt_train.py")} --checkpoint {run_dir} --prompt "It was"'
    )
    return stop.exit_code or 0


def learning_rate_share(step: int, n_steps: int) -> float:
    """Share of the highest learning rate: a linear warmup over the first tenth (100 steps at most), then a cosine to 0.1."""
    warmup = min(100, n_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1))


def start_run(run_dir: Path, facts: dict) -> None:
    """Begin the run folder with run.json; a run that is there already is moved to the next free name, not lost."""
    try:
        if earlier := move_aside(run_dir):
            print(f"the earlier run is kept as {earlier}")
        write_file(
            run_dir / "run.json",
            json.dumps(
                {**facts, "torch": torch.__version__, "command": sys.argv}, indent=1
            ).encode(),
        )
    except OSError as e:
        raise ValueError(
            f"--output_dir: {error_line(e)}; choose a folder that can be written"
        ) from e


# Left out, so that the page stays short. It is the matter of pretraining_advanced.py:
# - going on after a kill with the same bits: --resume            - bf16, compile, gradient accumulation: --dtype, --compile
# - several GPUs: --parallel                                      - texts larger than memory, as token shards: --dataset_name
# - GaLore, Muon and other schedules: --optimizer, --schedule     - a step with a non-finite gradient is skipped, not fatal

if __name__ == "__main__":
    run_script(
        lambda: main(parse(SimpleConfig, notes=f"\n\nCPU: {CPU_DEFAULTS}\n\nGPU: {GPU_DEFAULTS}"))
    )
