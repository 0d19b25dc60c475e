"""
What a vocabulary costs: one training step of the laptop model with GPT-2's 50,257 ids and with a BPE of 4,096.

    python benchmarks/vocabulary.py

Steps of the two alternate after a warm-up; prints the median of each and their ratio. About a minute on two CPU cores.
"""

import statistics
import time

import torch

from gpt_train import GPT, GPTConfig, calc_loss_batch, pick_device
from pretraining_simple import CPU_DEFAULTS


def main() -> None:
    """Measure and print."""
    device, B, T = pick_device("auto"), CPU_DEFAULTS["batch_size"], CPU_DEFAULTS["context_length"]
    runs = {}
    for V in (50257, 4096):
        model = GPT(GPTConfig.of_size(CPU_DEFAULTS["model_size"], vocab_size=V, block_size=T)).to(
            device
        )
        runs[V] = (
            model,
            torch.optim.AdamW(model.parameters(), fused=device.type != "mps"),
            torch.randint(V, (B, T)),
            [],
        )
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
        print(
            f"{V:>6} ids: {s * 1000:7.1f} ms per step of {B} x {T} tokens, {B * T / s:,.0f} tokens/s"
        )
    print(
        f"ratio {medians[50257] / medians[4096]:.1f} ({device}, {torch.get_num_threads()} threads, torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
