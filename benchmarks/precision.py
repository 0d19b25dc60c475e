"""
What bf16 is worth on this device: one training step of a 10-million-parameter GPT in fp32 and under bf16 autocast.

    python benchmarks/precision.py

Steps of the two alternate after a warm-up; prints the median of each and their ratio. Half a minute on two CPU cores.
"""

import statistics
import time

import torch

from gpt_train import GPT, GPTConfig, pick_device
from parts.training.engine import Parallel
from parts.training.optim import Optimizer


def main() -> None:
    """Measure and print."""
    device, B, T, V = pick_device("auto"), 8, 256, 4096
    ids, runs = torch.randint(V, (B, T), device=device), {}
    for dtype in (torch.float32, torch.bfloat16):
        parallel = Parallel("none", device, dtype)
        model = GPT(GPTConfig.of_size("mini", vocab_size=V, block_size=T)).to(device)
        runs[dtype] = (parallel, model, Optimizer(model, (), "adamw", 0.1, device), [])
    for _ in range(8):
        for parallel, model, optimizer, seconds in runs.values():
            started = time.perf_counter()
            with parallel.autocast():
                loss = model(ids, ids) / ids.numel()
            parallel.backward(loss)
            _, norm = parallel.read(loss.detach(), optimizer)
            parallel.step(optimizer, norm, 1.0)
            seconds.append(time.perf_counter() - started)
    fp32, bf16 = (statistics.median(seconds[2:]) * 1000 for *_, seconds in runs.values())
    print(f"{device}: fp32 {fp32:.1f} ms per step, bf16 {bf16:.1f} ms; ratio {fp32 / bf16:.2f}")


if __name__ == "__main__":
    main()
