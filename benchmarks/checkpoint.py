"""
How long training waits for a checkpoint of a GPT with AdamW's state: ours against torch.save.

    python benchmarks/checkpoint.py                # 124M, 1.5 GB; 7 GB of memory and 5 GB of disk
    python benchmarks/checkpoint.py --size mini

Both write the same tensors and fsync them, in turn, three times each, in the folder for temporary
files (TMPDIR). Prints the medians of how long the caller waited and of how long the writing took,
the bytes, and the cost of a checkpoint every 10 minutes: the wait and all CPU time of the writing,
as if none of it ran in parallel. Ours is verified by its hashes when it is read again.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gpt_train import GPT, Block, GPTConfig
from parts.storage.checkpoint import load_tensors, save_checkpoint, verify_checkpoint
from parts.storage.writer import Writer
from parts.training.engine import Engine
from parts.training.guard import Guard
from parts.training.optim import Optimizer
from parts.training.progress import Progress
from parts.training.ranks import Ranks
from parts.training.resume import checkpoint_bytes, save
from pretraining_advanced import Job, TrainConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", default="124M")
    args = parser.parse_args()
    device = torch.device("cpu")
    engine = Engine(Ranks(device, group=False), torch.float32)
    guard = Guard(1, 0.0, 1)
    model = GPT(GPTConfig.of_size(args.size))
    optimizer = engine.optimizer = Optimizer(model, (Block,), "adamw", 0.1, device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    job = Job("gpt", model, None, None, None, (Block,), 1, 1024, {})
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        config = TrainConfig(output_dir=tmp, keep_last=1)

        def not_saved(step, e):
            raise SystemExit(f"step {step}: {e}")

        writer = Writer(save_checkpoint, not_saved)
        writer.reserve(checkpoint_bytes(job, config) + 2**20, device=device)
        writer.wait()
        for step in range(1, 4):
            started = time.perf_counter()
            cpu = time.process_time()
            save(job, config, engine, writer, Progress({}, 1, step), guard, {}, at_once=False)
            waited = time.perf_counter() - started
            writer.wait()
            ours = [waited, time.perf_counter() - started, time.process_time() - cpu]
            path = Path(tmp) / "peer.pt"
            started = time.perf_counter()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()[0]}, path)
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            rows.append([*ours, time.perf_counter() - started])
            n_bytes = path.stat().st_size
            path.unlink()
        folder = Path(tmp) / "checkpoints/step_000003"
        verify_checkpoint(folder)
        read = load_tensors(folder / "model.safetensors")
        assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())
        size = sum(f.stat().st_size for f in folder.iterdir())
    waited, written, cpu, peer = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"ours:       training waits {waited:.3f} s, written after {written:.2f} s, "
        f"{size / 1e9:.3f} GB, verified"
    )
    print(
        f"torch.save: training waits {peer:.3f} s, {n_bytes / 1e9:.3f} GB; "
        f"ratio {peer / waited:.1f}"
    )
    print(
        f"every 10 minutes: {(waited + cpu) / 600:.2%} of the time of one core, "
        f"{waited / 600:.3%} of it waiting"
    )


if __name__ == "__main__":
    main()
