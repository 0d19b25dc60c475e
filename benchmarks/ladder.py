"""
What each optimisation is worth here: a training step of a GPT, with one more of them on each line.

    python benchmarks/ladder.py                            # 30 million parameters, 8 x 256 tokens
    python benchmarks/ladder.py --size 124M --batch_size 8 --context_length 1024

Each line is measured in its own process: three steps to warm up, then the median of eight. MFU is
printed if the peak of the device is known.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from train_step import forget_peak, ours, peak_bytes

import gpt_train
import parts.training.engine
import parts.training.optim
from parts.model import cpu_products
from parts.training.metrics import peak_flops
from parts.training.plan import flops_per_token

CUDA = torch.cuda.is_available()
RUNGS = [
    "fp32, nothing else",
    "SDPA",
    *(["TF32"] if CUDA else []),
    "bf16",
    "compile",
    "fused AdamW",
    "loss in blocks",
]
RUNGS += [] if CUDA else ["attention as products", "freed memory kept"]


def whole_logits(hidden, weight, targets):
    """The loss as in its definition, from all logits at once."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def climb(args) -> None:
    """Measure one line: everything up to it is on, the rest is removed from our modules."""
    on = RUNGS[: args.rung + 1]
    device = gpt_train.pick_device("auto")
    if "SDPA" not in on:
        kernel = F.scaled_dot_product_attention

        def in_plain_operations(*inputs, **options):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return kernel(*inputs, **options)

        F.scaled_dot_product_attention = in_plain_operations
    if "TF32" in on:
        torch.set_float32_matmul_precision("high")
    if "attention as products" not in on:
        cpu_products.attends_in_products = lambda *_: False
    if "loss in blocks" not in on:
        gpt_train.cross_entropy_of_head = whole_logits
    if "fused AdamW" not in on:
        fused = parts.training.optim.AdamW

        class Unfused(fused):
            """AdamW as separate operations."""

            def __init__(self, groups, **_):
                super().__init__(groups, fused=False)

        parts.training.optim.AdamW = Unfused
    if "freed memory kept" not in on:
        parts.training.engine.keep_freed_memory = lambda *_: None
    args.eager = "compile" not in on
    step = ours(args, device, torch.bfloat16 if "bf16" in on else torch.float32)
    seconds = []
    ids = torch.randint(50257, (args.batch_size, args.context_length + 1)).to(device)
    for i in range(11):
        if i == 3:
            forget_peak(device)
        started = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - started)
    shape = gpt_train.GPTConfig.of_size(args.size, vocab_size=50257, block_size=args.context_length)
    rate = args.batch_size * args.context_length / statistics.median(seconds[3:])
    peak = peak_flops(device, torch.bfloat16)
    mfu = rate * flops_per_token(shape) / peak if peak else None
    print(json.dumps([rate, mfu, peak_bytes(device)]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", default="mini")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--rung", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rung is not None:
        return climb(args)
    first = None
    for i, name in enumerate(RUNGS):
        sign = "+" if i else " "
        command = [sys.executable, *sys.argv, "--rung", str(i)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["failed"])[-1]
            print(f"{sign} {name}: {error}", flush=True)
            continue
        rate, mfu, peak = json.loads(done.stdout.splitlines()[-1])
        first = first or rate
        shown_mfu = f", MFU {mfu:.1%}" if mfu else ""
        print(
            f"{sign} {name:<22} {rate:9,.0f} tokens/s{shown_mfu}, {peak / 2**20:6,.0f} MiB, "
            f"{rate / first:.2f} times the first",
            flush=True,
        )


if __name__ == "__main__":
    main()
