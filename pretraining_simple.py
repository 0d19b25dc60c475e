"""
Pretrain a GPT on books, from random weights, in one file that reads from top to bottom.

A GPT guesses the next token of a text (a word or a piece of one) from the tokens before it. Words
that are new to you are explained in docs/reading-guide.md.

    python pretraining_simple.py                                   # chooses all settings itself
    python pretraining_simple.py --data_dir my_texts --n_epochs 3  # your own folder of .txt files
    python pretraining_simple.py --help

Reads --data_dir, else ./gutenberg_preprocessed (made by prep_dataset.py), else a dozen classics
downloaded from Project Gutenberg, else, without a network, the documentation of Python. Writes to
runs/simple: loss.png, samples.txt, metrics.jsonl, run.json, checkpoints/. An earlier run is kept as
runs/simple-1. Ctrl-C saves a checkpoint and stops. Two CPU cores (AMD EPYC) take 4 minutes for 30
books, down to a validation loss of 4.61 nats, which is 1.90 bits per byte.
"""

# Before torch is imported, which takes seconds: Ctrl-C must not print a traceback.
if __name__ == "__main__":
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

import gpt_train
from gpt_train import GPT, GPTConfig, calc_loss_batch, evaluate_model, generate_and_print_sample
from parts.base.files import append_lines, write_file
from parts.base.machine import pick_device
from parts.base.text import passage_pattern
from parts.cli.config import parse
from parts.cli.launch import StopRequest, error_line, run_script
from parts.cli.progress_bar import tqdm
from parts.data.tokenizers import make_tokenizer, vocabulary_of
from parts.storage.checkpoint import save_checkpoint
from parts.storage.run_folder import claimed
from parts.training import plan
from prep_dataset import load_documents

# ---------------------------------------------------------------------------------- configuration


@dataclass
class SimpleConfig:
    """Pretrain a GPT on a folder of text. Where the default is None, it depends on the device."""

    data_dir: str | None = None  # file or folder of text; None: prepared books, else fetched ones
    output_dir: str = "runs/simple"  # run folder
    n_epochs: int | None = None  # passes over the training text; max_steps may end the run first
    max_steps: int | None = None  # optimizer steps (updates of the weights)
    batch_size: int | None = None  # rows per step, each of context_length tokens
    lr: float | None = None  # highest learning rate (size of a step), reached after the warmup
    eval_freq: int = 200  # steps between two evaluations of the whole validation text
    print_sample_iter: int = 200  # steps between two samples
    save_ckpt_freq: int = 1000  # steps between two checkpoints; the last step is always saved
    model_size: str | None = None  # nano, micro, mini, small, 124M, 355M, 774M or 1558M
    context_length: int | None = None  # tokens the model can see at once
    # auto (gpt2 on a GPU, else bpe), gpt2, bpe, bpe:8192 (vocabulary), bytes, or a tokenizer.json
    tokenizer: str = "auto"
    seed: int = 123  # same seed, same run (on a CPU)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    plan: bool = False  # print parameters, memory and time of this run, and exit; write nothing
    plan_memory_gb: float | None = None  # plan for a GPU with this many GB (10^9 bytes) instead
    debug: bool = False  # show the traceback of an error


# What None stands for, (on a CPU, on a GPU): four minutes on two CPU cores, more on a GPU.
DEFAULTS = {
    "model_size": ("micro", "mini"),
    "context_length": (128, 256),
    "batch_size": (16, 32),
    "max_steps": (1400, 3000),
    "lr": (4e-3, 1e-3),
}
CPU_DEFAULTS = {name: on_cpu for name, (on_cpu, _) in DEFAULTS.items()}
GPU_DEFAULTS = {name: on_gpu for name, (_, on_gpu) in DEFAULTS.items()}


def resolve(config: SimpleConfig, device) -> None:
    """Replace each None by its default and refuse impossible values. Raises ValueError."""
    if config.n_epochs is not None and config.max_steps is None:
        config.max_steps = sys.maxsize  # the epochs alone decide
    defaults = CPU_DEFAULTS if device.type == "cpu" else GPU_DEFAULTS
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    for name, value in asdict(config).items():
        if name != "seed" and type(value) in (int, float) and not 0 < value < math.inf:
            raise ValueError(f"--{name}: {value} is out of range; give a positive number")
    if abs(config.seed) >= 2**32:
        raise ValueError(f"--seed: {config.seed} does not fit into 32 bits; give a smaller number")
    GPTConfig.of_size(config.model_size)  # raises if there is no such size
    # An earlier run is renamed (see train), and that must not happen to these folders.
    folder = config.output_dir
    if Path(folder).resolve() in (Path.cwd(), Path(config.data_dir or "/").resolve()):
        raise ValueError(f"--output_dir: {folder} is the current folder or --data_dir; use another")


# -------------------------------------------------------------------------------------------- data


def split_documents(documents: list[str], share=0.05, most_chars=200_000) -> tuple[list, list]:
    """
    Training and validation texts: cut the documents into passages, and hold some of them out.

    The hash of a passage decides, not its position: a passage that occurs twice goes to one side.
    Validation gets about `share` of the characters, `most_chars` at most, at least one passage.
    """
    n_chars = sum(map(len, documents))
    pattern = passage_pattern(max(1, min(4000, n_chars // 100)))
    books = [pattern.findall(text) for text in documents]
    # 8 bytes of a hash are as good as a random number below 2^64.
    hash_of = {}
    for passage in itertools.chain(*books):
        hash_of[passage] = int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8], "big")
    limit = max(min(share, most_chars / n_chars) * 2**64, min(hash_of.values()))
    train = ["".join(p for p in passages if hash_of[p] > limit) for passages in books]
    val = ["".join(p for p in passages if hash_of[p] <= limit) for passages in books]
    return [text for text in train if text], [text for text in val if text]


def train_batches(tokens, batch_size: int, T: int, seed: int):
    """Endless batches (inputs, targets), (B, T) int64 each; an epoch has every window of T once."""
    n_windows = (len(tokens) - 1) // T
    left_over = torch.empty(0, dtype=torch.int64)  # windows of the epoch before
    for epoch in itertools.count():
        # The order depends on seed and epoch alone.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.cat([left_over, torch.randperm(n_windows, generator=generator)])
        *full, left_over = order.split(batch_size)  # (B,) each
        for windows in full:
            rows = tokens[windows[:, None] * T + torch.arange(T + 1)].long()  # (B, T + 1)
            yield rows[:, :-1], rows[:, 1:]  # the target of a position is the token after it


def val_batches(tokens, batch_size: int, T: int) -> list:
    """All batches (inputs, targets) of the text, in order; -100 stands for no target (padding)."""
    missing = -(len(tokens) - 1) % T
    inputs = F.pad(tokens[:-1].long(), (0, missing)).view(-1, T)  # (N, T)
    targets = F.pad(tokens[1:].long(), (0, missing), value=-100).view(-1, T)  # (N, T)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


# ----------------------------------------------------------------------------------------- helpers


def learning_rate_share(step: int, n_steps: int) -> float:
    """Share of the highest learning rate: a linear warmup, then half a cosine down to 0.1."""
    warmup = min(100, n_steps // 10)  # the first gradients are large and point in all directions
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1))


def start_run(run_dir: Path, facts: dict) -> None:
    """Write run.json, with which the run exists."""
    facts = {**facts, "torch": torch.__version__, "command": sys.argv}
    try:
        write_file(run_dir / "run.json", json.dumps(facts, indent=1).encode())
    except OSError as e:
        raise ValueError(f"--output_dir: {error_line(e)}; choose a writable folder") from e


# --------------------------------------------------------------------------------------- the story


def main(config: SimpleConfig) -> int:
    """Train one model. Returns the exit code: 0, or 130 or 75 if it was stopped early."""
    # Where to compute, and with which settings.
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 products: fast, with 10 bits of fraction
    resolve(config, device)
    V = vocabulary_of(config.tokenizer, device.type != "cpu")  # raises if there is no such one
    # --plan prints what a run would need, and ends here.
    if config.plan or config.plan_memory_gb:
        sizes = {"vocab_size": V, "block_size": config.context_length}
        planned = GPTConfig.of_size(config.model_size, **sizes)
        limits = (config.max_steps, config.plan_memory_gb)
        return plan.show_plan(planned, lambda: GPT(planned), config.batch_size, device, *limits)

    # The run folder is for this process alone. An earlier run in it is renamed later.
    with claimed(config.output_dir) as move_earlier_run:
        return train(config, device, move_earlier_run)


def train(config: SimpleConfig, device, move_earlier_run) -> int:
    """All of the training, from the text to the plot. Returns the exit code, as main does."""
    run_dir = Path(config.output_dir)
    B = config.batch_size  # letters as everywhere here: B rows of T tokens
    T = config.context_length

    # Text to tokens: read it, hold some of it out, and number its pieces.
    documents, source = load_documents(config.data_dir)
    train_texts, val_texts = split_documents(documents)
    tokenizer = make_tokenizer(config.tokenizer, train_texts, on_gpu=device.type != "cpu")
    train_tokens = torch.from_numpy(tokenizer.encode_documents(train_texts).astype("int32"))
    val_tokens = torch.from_numpy(tokenizer.encode_documents(val_texts).astype("int32"))
    sizes = f"{len(train_tokens):,} training, {len(val_tokens):,} validation tokens"
    print(f"{source}: {len(documents)} documents; {tokenizer.name}: {sizes}")

    # Tokens to batches: how many steps there are, and what is computed in each.
    n_windows = (len(train_tokens) - 1) // T
    if n_windows < B or len(val_tokens) < 2:
        what = f"{len(train_tokens):,} training tokens are too few for one batch of {B} rows of {T}"
        raise ValueError(f"{source}: {what}; add text, or lower --batch_size or --context_length")
    n_steps = min(config.max_steps, (config.n_epochs or sys.maxsize) * n_windows // B)
    batches = train_batches(train_tokens, B, T, config.seed)
    validation = val_batches(val_tokens, B, T)
    token_bytes = tokenizer.token_bytes()  # (V,) for the loss per byte of text, not per token

    # The model: random weights to begin with.
    torch.manual_seed(config.seed)
    V = tokenizer.vocab_size
    model_config = GPTConfig.of_size(config.model_size, vocab_size=V, block_size=T)
    model = GPT(model_config).to(device)
    print(f"{n_steps} steps of {B} x {T} tokens, {n_steps * B * T:,} tokens to go, on {device}")
    lines, _ = plan.plan_lines(model_config, plan.Setting(B, device=str(device)))
    print(*lines, *plan.wasted(config, n_steps), sep="\n")

    # The optimizer: AdamW. Weight decay pulls a weight towards 0 in each step, which helps for
    # matrices but not for biases and norms.
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")

    # What stays of the run: the run folder, and the losses of each step for the plot.
    facts = {"config": asdict(config), "model": asdict(model_config), "data": source}
    move_earlier_run()
    start_run(run_dir, {**facts, "tokenizer": tokenizer.name})
    train_losses = [None]  # one per step; step 0 is the model before training
    val_losses = [None]  # None where the step was not evaluated
    records = []  # for metrics.jsonl, not yet written

    def evaluate(step: int) -> None:
        """Measure how well the model predicts the text that was held out."""
        result = evaluate_model(model, validation, device, token_bytes)
        val_losses[step] = result["loss"]
        records.append({"step": step} | {f"val_{name}": value for name, value in result.items()})
        append_lines(run_dir / "metrics.jsonl", records)
        bits = f"{result['bits_per_byte']:.3f} bits per byte"
        tqdm.write(f"step {step}: validation loss {result['loss']:.3f}, {bits}")

    def sample(step: int) -> None:
        """Let the model write: it draws a next token, appends it, and starts over."""
        with tqdm.external_write_mode():
            text = generate_and_print_sample(model, tokenizer, device, "It was", temperature=0.7)
        append_lines(run_dir / "samples.txt", [f"--- step {step}\n{text}\n"])

    def save(step: int) -> bool:
        """Write a checkpoint and delete the one before it; False if the disk refused."""
        state = {"script": "pretraining_simple.py", "step": step, "tokens": step * B * T}
        state["model_config"] = asdict(model_config)
        weights = {"model.safetensors": model.state_dict()}
        files = {"tokenizer.json": tokenizer.to_json()}
        try:
            save_checkpoint(run_dir, step, weights, state, files, keep_last=1)
        except OSError as e:
            tqdm.write(f"warning: step {step} is not saved: {error_line(e)}; free some space")
            return False
        return True

    # Training: guess, measure the error, change the weights a little, repeat. Ctrl-C sets `stop`.
    seconds = 0.0  # of training alone, without evaluations, samples and checkpoints
    redraw_s = 0.5 if sys.stderr.isatty() else 30  # a log file needs few lines
    with StopRequest() as stop, tqdm(total=n_steps, unit="step", mininterval=redraw_s) as bar:
        evaluate(0)
        for step in range(1, n_steps + 1):
            started = time.perf_counter()
            lr = config.lr * learning_rate_share(step - 1, n_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            inputs, targets = next(batches)  # (B, T) each
            loss = calc_loss_batch(inputs, targets, model, device)  # how wrong the guesses are
            loss.backward()  # the gradient: for each weight, how the loss grows with it
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # limits the step's size
            train_loss = loss.item()
            if not math.isfinite(train_loss + norm):  # the weights are still those of the last step
                save(step - 1)
                what = f"the loss is {train_loss} and its gradient {norm:g} at step {step}"
                raise RuntimeError(f"{what}; start again with a lower --lr than {config.lr:g}")
            optimizer.step()  # moves each weight a little against its gradient
            optimizer.zero_grad()
            seconds += time.perf_counter() - started

            train_losses.append(train_loss)
            val_losses.append(None)
            n_tokens = step * B * T
            records.append({"step": step, "tokens": n_tokens, "train_loss": train_loss, "lr": lr})
            speed = f"{n_tokens / seconds:,.0f}"
            bar.set_postfix_str(f"loss {train_loss:.3f}, {speed} tokens/s", refresh=False)
            bar.update()

            last = stop or step == n_steps
            if step % config.eval_freq == 0 or last:
                evaluate(step)
            if step % config.save_ckpt_freq == 0 or last:
                saved = save(step)
            if step % config.print_sample_iter == 0 or last:
                sample(step)
            if last:
                break
        bar.close()

        # The end: the curve of both losses, and how to use the model.
        how = "stopped" if stop else "finished"
        print(f"{how} at step {step}: {n_tokens:,} tokens at {speed} per second")
        if not saved:
            raise OSError(f"{run_dir}: the last step could not be saved, see the warning above")
        steps = list(range(step + 1))
        curves = [steps, [n * B * T for n in steps], train_losses, val_losses]
        plot = gpt_train.plot_losses(*curves, run_dir / "loss.png", uniform_loss=math.log(V))
    picture = "loss.png, " if plot else ""
    print(f"{run_dir}: {picture}samples.txt, metrics.jsonl, checkpoints/step_{step:06d}")
    script = os.path.relpath(Path(__file__).parent / "gpt_train.py")
    print(f'sample from it: python {script} --checkpoint {run_dir} --prompt "It was"')
    return stop.exit_code or 0


# Left out, to keep this page short; pretraining_advanced.py has it:
# - resuming after a kill, bit-identical: --resume     - bf16, compilation: --dtype, --compile
# - several GPUs: --parallel                           - gradient accumulation: --grad_accum_steps
# - texts larger than memory: token shards             - other schedules: --schedule
# - other optimizers, GaLore and Muon: --optimizer     - skipping a step that is not finite

if __name__ == "__main__":
    notes = f"\n\nCPU: {CPU_DEFAULTS}\n\nGPU: {GPU_DEFAULTS}"
    run_script(lambda: main(parse(SimpleConfig, notes=notes)))
