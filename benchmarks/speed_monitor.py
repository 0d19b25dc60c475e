"""
The cost of SpeedMonitor: an update and a compute after each step of the tiny Llama.

    python benchmarks/speed_monitor.py

Prints the medians and the share of the step. Ten seconds.
"""

import statistics
import time

import torch

from parts.model.llama import Llama, LlamaConfig
from recipes.orchestrator import SpeedMonitor

B, T, STEPS = 8, 128, 100
TINY = LlamaConfig(
    4096, T, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=176, head_dim=16, tied=True
)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Llama(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(TINY.vocab_size, (B, T))
    monitor = SpeedMonitor(window_size=50, time_unit="hours", flops_per_token=1e6)
    steps, updates = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        (model(ids, ids) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter()
        monitor.update(samples=B, tokens=B * T)
        monitor.compute()
        updates.append(time.perf_counter() - stepped)
        steps.append(stepped - started)
    step, update = statistics.median(steps), statistics.median(updates)
    print(
        f"a step of {B} x {T} tokens {step * 1e3:.1f} ms, update and compute {update * 1e6:.1f} us"
    )
    print(f"overhead {update / step:.4%}")


if __name__ == "__main__":
    main()
