"""
One training step, ours against GPT2LMHeadModel or LlamaForCausalLM of transformers.

    python benchmarks/train_step.py                        # 30 million parameters, 8 x 256 tokens
    python benchmarks/train_step.py --size llama-mini      # 29 million
    python benchmarks/train_step.py --size 124M --batch_size 2 --context_length 512
    python benchmarks/train_step.py --eager --dtype fp32

Both sides: bf16 autocast, compiled, fused AdamW, clipping at 1.0, no dropout. Each side is a
process, so that memory is measured separately; they take turns step by step, and the one that waits
sleeps. Prints the median of the steps, tokens/s, the highest memory of training (after compiling),
and the two ratios. The weights are the same on both sides, and the losses of the first step are
compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SIDES = ("ours", "transformers")


def shape_of(args):
    """The shape of the model on both sides."""
    import gpt_train  # noqa: F401  which adds the GPT to the families
    from parts.model.families import shape_of_size

    return shape_of_size(args.size, {"vocab_size": 50257, "block_size": args.context_length})


def ours(args, device, dtype):
    """A function that does one step of the production trainer and returns its loss."""
    import torch

    from parts.model.families import FAMILIES
    from parts.model.losses import compile_softmax
    from parts.training.engine import Engine
    from parts.training.optim import Optimizer
    from parts.training.progress import Progress
    from parts.training.ranks import Ranks
    from pretraining_advanced import Job, TrainConfig, gpt_loss, gradients

    torch.manual_seed(0)
    shape = shape_of(args)
    family = FAMILIES[shape.family]
    model = family.model(shape)
    engine = Engine(Ranks(device, group=False), dtype)
    job = Job(
        shape.family, model, None, None, gpt_loss, (family.block,), 1, args.context_length, {}
    )
    config = TrainConfig(batch_size=args.batch_size)

    def make_optimizer(model):
        return Optimizer(model, job.blocks, "adamw", 0.1, device)

    compile_softmax(not args.eager and device.type == "cuda")
    engine.prepare(model, job.blocks, make_optimizer, compile_blocks=not args.eager)
    progress = Progress({}, args.batch_size)

    def step(ids):
        batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
        progress.step += 1
        n = batch["targets"].numel()
        total = gradients(job, engine, [batch], n, progress, config)
        loss = engine.read(total)
        engine.step(1e-4, 1.0)
        return loss / n

    return step


def transformers(args, device, dtype):
    """The same with transformers and torch.optim, as in their documentation."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from parts.model.families import FAMILIES
    from parts.storage.hf_llama import settings_of_config
    from wt_load import settings_of_gpt

    torch.manual_seed(0)
    shape = shape_of(args)
    weights = FAMILIES[shape.family].model(shape).named_parameters()
    is_gpt = shape.family == "gpt"
    settings = settings_of_gpt(shape) if is_gpt else settings_of_config(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False)
    model = AutoModelForCausalLM.from_config(config).float().to(device)
    with torch.no_grad():
        for name, p in weights:  # the names are the same; Conv1D stores its weights transposed
            linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            theirs = f"transformer.{name}" if is_gpt else name
            model.get_parameter(theirs).copy_(p.T if linear else p)
    model = model if args.eager else torch.compile(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(ids):
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def forget_peak(device) -> None:
    """Measure the highest memory from here on: not that of compiling."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")


def peak_bytes(device) -> int:
    """Highest memory since then: allocated on the GPU, or resident in this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(row.split()[1]) * 1024 for row in f if row.startswith("VmHWM"))


def work(args) -> None:
    """One side: for each line that it reads a step, of which it prints seconds, loss and memory."""
    import torch

    from gpt_train import pick_device
    from parts.base.machine import choose_dtype

    device = pick_device("auto")
    step = globals()[args.side](args, device, choose_dtype(args.dtype, device)[0])
    generator = torch.Generator().manual_seed(1)
    size = (args.batch_size, args.context_length + 1)
    for line in sys.stdin:
        ids = torch.randint(50257, size, generator=generator).to(device)
        if line.strip() == "measure":
            forget_peak(device)
        started = time.perf_counter()
        loss = step(ids)
        seconds = time.perf_counter() - started
        print(json.dumps([seconds, loss, peak_bytes(device)]), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", default="mini")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return work(args)
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    sides = {}
    for side in SIDES:
        command = [sys.executable, *sys.argv, "--side", side]
        sides[side] = subprocess.Popen(command, env=env, **pipes)
    seen = {side: [] for side in SIDES}
    for i in range(args.steps + 3):
        for side, process in sides.items():
            process.stdin.write("measure\n" if i == 3 else "step\n")
            process.stdin.flush()
            seen[side].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    for side, steps in seen.items():
        seconds = statistics.median(s for s, _, _ in steps[3:])
        rate = args.batch_size * args.context_length / seconds
        peak = steps[-1][2]
        first_loss = steps[0][1]
        print(
            f"{side:>12}: {seconds * 1000:7.1f} ms per step, {rate:,.0f} tokens/s, "
            f"{peak / 2**20:,.0f} MiB, first loss {first_loss:.4f}"
        )
        seen[side] = {"seconds": seconds, "peak": peak, "loss": first_loss}
    a, b = (seen[side] for side in SIDES)
    if abs(a["loss"] - b["loss"]) > 2e-3:
        raise SystemExit("the two sides do not compute the same loss")
    faster = b["seconds"] / a["seconds"]
    smaller = a["peak"] / b["peak"]
    print(f"{args.size}: {faster:.2f} times the tokens/s, {smaller:.2f} of the memory")


if __name__ == "__main__":
    main()
