"""
What a vocabulary costs: a training step of the laptop model with 50,257 ids and with 4,096.

    python benchmarks/vocabulary.py

The first is GPT-2's vocabulary. Steps of the two alternate after a warm-up; prints the median of
each and their ratio. About a minute on two CPU cores.
"""

import statistics
import time

import torch

from gpt_train import GPT, GPTConfig, calc_loss_batch, pick_device
from pretraining_simple import CPU_DEFAULTS


def main() -> None:
    """Measure and print."""
    device = pick_device("auto")
    size, B, T = (CPU_DEFAULTS[name] for name in ("model_size", "batch_size", "context_length"))
    runs = {}
    for V in (50257, 4096):
        model = GPT(GPTConfig.of_size(size, vocab_size=V, block_size=T)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type != "mps")
        runs[V] = (model, optimizer, torch.randint(V, (B, T)), [])
    for _ in range(12):
        for model, optimizer, ids, seconds in runs.values():
            started = time.perf_counter()
            loss = calc_loss_batch(ids, ids, model, device)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seconds.append(time.perf_counter() - started)
    medians = {V: statistics.median(seconds[2:]) for V, (*_, seconds) in runs.items()}
    for V, s in medians.items():
        step = f"{s * 1000:7.1f} ms per step of {B} x {T} tokens"
        print(f"{V:>6} ids: {step}, {B * T / s:,.0f} tokens/s")
    machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"ratio {medians[50257] / medians[4096]:.1f} ({machine})")


if __name__ == "__main__":
    main()
