"""
A training step of a GPT of 10 million parameters on this device: fp32 against bf16 autocast.

    python benchmarks/precision.py

Steps of the two alternate after a warm-up; prints the median of each and their ratio. Half a minute
on two CPU cores.
"""

import statistics
import time

import torch

from gpt_train import GPT, GPTConfig, pick_device
from parts.training.engine import ENGINES
from parts.training.optim import Optimizer
from parts.training.ranks import Ranks


def main() -> None:
    """Measure and print."""
    device = pick_device("auto")
    B, T, V = 8, 256, 4096
    ids = torch.randint(V, (B, T), device=device)
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = ENGINES["none"](Ranks(device, group=False), dtype)
        model = GPT(GPTConfig.of_size("mini", vocab_size=V, block_size=T))
        engine.prepare(model, (), lambda model: Optimizer(model, (), "adamw", 0.1, device))
        runs[dtype] = (engine, [])
    for _ in range(8):
        for engine, seconds in runs.values():
            started = time.perf_counter()
            total = engine.accumulate(lambda model, ids: model(ids, ids), ids, ids.numel(), True)
            engine.read(total)
            engine.step(0.0, 1.0)
            seconds.append(time.perf_counter() - started)
    fp32, bf16 = (statistics.median(seconds[2:]) * 1000 for *_, seconds in runs.values())
    print(f"{device}: fp32 {fp32:.1f} ms per step, bf16 {bf16:.1f} ms; ratio {fp32 / bf16:.2f}")


if __name__ == "__main__":
    main()
