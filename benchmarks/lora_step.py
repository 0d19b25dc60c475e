"""
A LoRA training step, ours against transformers and peft: a Qwen2 of 4 layers, 512 wide.

    python benchmarks/lora_step.py                        # the same packed rows on both sides
    python benchmarks/lora_step.py --padded               # theirs: files padded to the longest
    python benchmarks/lora_step.py --padded --data q_files.jsonl --tokenizer qwen2.5
    python benchmarks/lora_step.py --activation_checkpointing --vocab_size 32000

Both sides read the same random weights from one Hugging Face folder and train adapters on all
linear layers of the blocks: bf16 products, fused AdamW, clipping at 1.0, the same dropout. Theirs
runs in the faster of its usual ways, which is measured first: `autocast` (weights in fp32),
`bf16` (weights in bf16), or `both`. Each side is a process; they take turns, and the one that waits
sleeps. Prints the median of the turns and the ratio; stops if the losses of the first step differ.

--data gives the lengths of files: {text} per line, in tokens of --tokenizer. Without it they are
drawn from a log-normal distribution like that of public Q code (median 370, mean 970). The ids are
random: they do not matter for the time. With --padded, a file longer than a row is truncated on
their side and counts as so many tokens; ours continues it in the next row. --busy measures the CPU
seconds of one thread instead of the clock, for a machine that has other work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("ours", "theirs")
WAYS = ("autocast", "bf16", "both")
LARGEST = 151_936  # vocabulary of Qwen2.5's small models
RANK, ALPHA = 16, 32.0
WARM_UP = 1  # turns that are not measured


# ------------------------------------------------------------------------------------------- files


def write_model(args, folder: Path) -> None:
    """A Qwen2 with random weights in bf16, and a tokenizer, as a Hugging Face folder."""
    import torch

    from parts.data.tokenizers import byte_tokenizer
    from parts.model.llama import Llama, LlamaConfig
    from parts.storage import formats, hf_llama

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size, block_size=args.context_length, n_layer=4, n_head=8,
        n_kv_head=2, n_embd=512, n_hidden=1408, head_dim=64, qkv_bias=True, tied=True,
    )  # fmt: skip
    stored = {}
    for name, tensor in Llama(config).state_dict().items():
        numbers = tensor.bfloat16()
        stored[name] = formats.Stored(tuple(tensor.shape), lambda _, t=numbers: t)
    formats.write_folder(folder, stored, torch.bfloat16)
    settings = hf_llama.settings_of_config(config)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_json())


def file_lengths(args) -> list[int]:
    """Tokens of each file, its end included, in a fixed random order."""
    import numpy as np

    rng = np.random.default_rng(1)
    if args.data is None:
        return [max(8, int(n)) for n in rng.lognormal(np.log(370), 1.4, 600).clip(max=14_500)]
    from parts.data.tokenizers import Tokenizer, byte_tokenizer

    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else byte_tokenizer()
    with open(args.data, encoding="utf-8") as lines:
        lengths = [len(tokenizer.encode(json.loads(line)["text"])) + 1 for line in lines]
    return [lengths[i] for i in rng.permutation(len(lengths))]


def turns(args, folder: Path):
    """
    Yield the micro-batches (inputs, targets, positions, mask) of one optimizer step after another.

    All are (B, T) int64. A turn takes the next --batch_files files on either side. positions begin
    anew with each file; targets are -100 where padding follows; mask is None in packed rows, else
    1 where there is no padding.
    """
    import numpy as np
    import torch

    B, T = args.batch_size, args.context_length
    lengths = json.loads((folder / "lengths.json").read_text(encoding="utf-8"))
    padded = args.padded and args.side == "theirs"
    for turn in range(WARM_UP + args.turns):
        rng = np.random.default_rng(turn)
        if args.padded:
            start = turn * args.batch_files % (len(lengths) - args.batch_files)
            sizes = lengths[start : start + args.batch_files]
        else:
            sizes = [lengths[i] for i in rng.permutation(len(lengths))]
            while sum(sizes) <= B * T:
                sizes = sizes * 2
        texts = [rng.integers(0, 256, n) for n in sizes]
        for text in texts:
            text[-1] = 256  # the end of the document
        if padded:
            cut = [torch.from_numpy(text[:T]) for text in texts]
            yield [_padded(cut[i : i + B]) for i in range(0, len(cut), B)]
            continue
        ids = torch.from_numpy(np.concatenate(texts))
        rows = (len(ids) - 1) // T if args.padded else B
        inputs, targets = ids[: rows * T].view(rows, T), ids[1 : rows * T + 1].view(rows, T)
        batches = zip(inputs.split(B), targets.split(B), strict=True)
        yield [(x, y, _positions(x), None) for x, y in batches]


def _padded(texts: list) -> tuple:
    """A batch of texts, padded at the end to the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    targets = ids.masked_fill(mask == 0, -100).roll(-1, dims=1)
    targets[:, -1] = -100
    return ids, targets, None, mask


def _positions(ids):
    """Positions (B, T) that begin anew after each end of a document."""
    import torch

    steps = torch.arange(ids.shape[1]).expand_as(ids)
    begins = torch.zeros_like(ids)
    begins[:, 1:] = (ids[:, :-1] == 256).long() * steps[:, 1:]
    return steps - begins.cummax(dim=1).values


# ------------------------------------------------------------------------------------------- sides


def ours(args, folder: Path):
    """A function that does one step as a run of recipes/q_lora does, and returns its loss."""
    import torch

    from parts.model.llama import LlamaBlock
    from parts.training.engine import Engine
    from parts.training.optim import Optimizer
    from parts.training.progress import Progress
    from parts.training.ranks import Ranks
    from pretraining_advanced import Job, gradients
    from recipes.q_lora.bases import open_base
    from recipes.q_lora.packed_code import documents_of
    from recipes.q_lora.train_pretrain import QConfig, make_model

    config = QConfig(
        model_name=str(folder), dtype="bf16", max_seq_length=args.context_length,
        batch_size=args.batch_size, lora_rank=RANK, lora_alpha=ALPHA,
        lora_dropout=args.lora_dropout,
    )  # fmt: skip
    engine = Engine(Ranks(torch.device("cpu"), group=False), torch.bfloat16)
    base = open_base(config.model_name, config.max_seq_length)
    model, _ = make_model(config, base, engine.building())
    blocks = (LlamaBlock,)
    job = Job("llama", model, None, None, base.loss, blocks, 1, args.context_length, {})
    engine.prepare(
        model,
        blocks,
        lambda model: Optimizer(model, blocks, "adamw", 0.0, engine.ranks.device),
        activation_checkpointing=args.activation_checkpointing,
    )
    model.train()
    progress = Progress({}, args.batch_size)

    def step(micro_batches):
        batches = [
            {"inputs": inputs, "targets": targets, "documents": documents_of(inputs, 256)}
            for inputs, targets, _, _ in micro_batches
        ]
        n = sum(int((batch["targets"] != -100).sum()) for batch in batches)
        progress.step += 1
        loss = engine.read(gradients(job, engine, batches, n, progress, config))
        engine.step(1e-4, 1.0)
        return loss / n

    return step


def theirs(args, folder: Path):
    """The same with transformers, peft and torch.optim, as in their documentation."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if args.way == "autocast" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=args.lora_dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(micro_batches):
        n = sum(int((targets != -100).sum()) for _, targets, _, _ in micro_batches)
        total = 0.0
        for inputs, targets, positions, mask in micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.way != "bf16"):
                loss = model(
                    input_ids=inputs,
                    position_ids=positions,
                    attention_mask=mask,
                    use_cache=False,
                    labels=inputs,
                    shift_labels=targets,
                    num_items_in_batch=n,
                ).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


# ----------------------------------------------------------------------------------------- measure


def work(args, folder: Path) -> None:
    """One side: for each line that it reads a turn, of which it prints seconds, loss and tokens."""
    clock = time.process_time if args.busy else time.perf_counter
    if args.busy:
        import torch

        torch.set_num_threads(1)
    step = globals()[args.side](args, folder)
    for micro_batches in turns(args, folder):
        if not sys.stdin.readline():
            return
        n_tokens = sum(x.numel() if m is None else int(m.sum()) for x, _, _, m in micro_batches)
        started = clock()
        loss = step(micro_batches)
        seconds = clock() - started
        print(json.dumps({"seconds": seconds, "loss": loss, "tokens": n_tokens}), flush=True)


class Side:
    """A process that does one turn for each call of `turn`."""

    def __init__(self, *words):
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *sys.argv, *words], env=env, **pipes)

    def turn(self) -> dict:
        """Seconds, loss and tokens of the next turn. Raises RuntimeError if the process ended."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)}: ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def fastest_way(folder: str) -> str:
    """The fastest of their ways in one turn each, after one that is not measured."""
    seconds = {}
    for way in WAYS:
        side = Side("--side", "theirs", "--way", way, "--folder", folder)
        side.turn()
        seconds[way] = side.turn()["seconds"]
        side.close()
    shown = ", ".join(f"{way} {s * 1000:,.0f} ms" for way, s in seconds.items())
    print(f"their ways: {shown}")
    return min(seconds, key=seconds.get)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--padded", action="store_true", help="theirs: files, padded to a batch")
    parser.add_argument("--batch_size", type=int, default=2, help="rows, or padded files")
    parser.add_argument("--batch_files", type=int, default=16, help="files of a turn, if --padded")
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=LARGEST)
    parser.add_argument("--lora_dropout", type=float, default=0.1)
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--data", help="jsonl of {text}, for the lengths of files")
    parser.add_argument("--tokenizer", help="tokenizer.json, or its folder, for them; else bytes")
    parser.add_argument("--busy", action="store_true", help="CPU seconds of one thread")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--way", choices=WAYS, help="of transformers; else the fastest")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return work(args, Path(args.folder))
    with tempfile.TemporaryDirectory() as folder:
        write_model(args, Path(folder))
        lengths = json.dumps(file_lengths(args))
        Path(folder, "lengths.json").write_text(lengths, encoding="utf-8")
        way = args.way or fastest_way(folder)
        words = ("--folder", folder, "--way", way)
        sides = {side: Side("--side", side, *words) for side in SIDES}
        seen = {side: [] for side in SIDES}
        for _ in range(WARM_UP + args.turns):
            for side, process in sides.items():
                seen[side].append(process.turn())
        for process in sides.values():
            process.close()
    rates = {}
    for side, measured in seen.items():
        rates[side] = statistics.median(t["tokens"] / t["seconds"] for t in measured[WARM_UP:])
        name = "ours" if side == "ours" else f"transformers and peft ({way})"
        loss = measured[0]["loss"]
        print(f"{name}: {rates[side]:,.0f} tokens/s, first loss {loss:.4f}")
    a, b = (seen[side][0]["loss"] for side in SIDES)
    # with --padded they differ in the tokens after a row is full, and in what follows an end
    if abs(a - b) > (0.1 if args.padded else 5e-3):
        raise SystemExit("the two sides do not compute the same loss")
    what = "padded" if args.padded else "packed"
    print(f"{what}: {rates['ours'] / rates['theirs']:.2f} times the tokens/s")


if __name__ == "__main__":
    main()
