"""
Batches of 8 x 256 tokens from a token shard of 20 million: ours, in the order of the trainer, against nanoGPT's get_batch.

    python benchmarks/batches.py

A whole epoch of ours, with the shuffle and the comparison of every block with its hash; as many of get_batch, which draws places
with repetition and compares nothing. Three times each in turn; prints the medians and their ratio. Ten seconds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from parts.data import shards
from parts.data.batches import TrainBatches
from parts.data.tokenizers import byte_tokenizer

B, T, N = 8, 256, 20_000_000


def ours(folder, index) -> float:
    """Seconds per batch over an epoch, from the opening of the folder on."""
    started = time.perf_counter()
    batches = TrainBatches(shards.Shards(folder, "train", index), T, 0, 50257)
    batches.share(0, 1, B, B)
    n = batches.n_rows // B
    for _, (batch,) in zip(range(n), batches, strict=False):
        assert batch["inputs"].shape == (B, T)
    return (time.perf_counter() - started) / n


def get_batch(path, n: int) -> float:
    """The same for nanoGPT's recipe: open the memmap, draw B places, cut and convert each, stack."""
    started = time.perf_counter()
    for _ in range(n):
        data = np.memmap(path, dtype=np.uint16, mode="r", offset=shards.HEADER_BYTES)
        places = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in places])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in places]
        )
        assert x.shape == y.shape
    return (time.perf_counter() - started) / n


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        tokenizer = byte_tokenizer()
        ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, N, dtype=np.uint16)

        def chunks(_):
            yield [ids], None

        folder = shards.build(
            Path(tmp) / "cache", tokenizer, chunks, lambda rows: {"train": (rows[0], 1, N)}, {}, 1
        )
        index = shards.read_index(folder)
        path = folder / next(s["name"] for s in index["shards"] if "train" in s["name"])
        runs = [(ours(folder, index), get_batch(path, N // T // B)) for _ in range(3)]
    mine, theirs = (statistics.median(seconds) * 1e6 for seconds in zip(*runs, strict=True))
    print(
        f"{B} x {T}: ours {mine:.1f} us a batch over an epoch, get_batch {theirs:.1f} us; ratio {theirs / mine:.1f}"
    )


if __name__ == "__main__":
    main()
