"""
Time to read batches of 8 x 256 tokens from a shard of 20 million: ours against nanoGPT's get_batch.

    python benchmarks/batches.py

Ours is a whole epoch in the order of the trainer, with the shuffle and the hash of every block.
get_batch makes as many batches; it draws places with replacement and checks nothing. Three times
each in turn; prints the medians and their ratio. Ten seconds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from parts.data import shard_writer, shards
from parts.data.batches import TrainBatches
from parts.data.tokenizers import byte_tokenizer

B, T, N = 8, 256, 20_000_000


def ours(folder, index) -> float:
    """Seconds per batch over an epoch, opening the folder included."""
    started = time.perf_counter()
    batches = TrainBatches(shards.Shards(folder, "train", index), T, 0, 50257)
    batches.share(0, 1, B, B)
    n = batches.n_rows // B
    for _, (batch,) in zip(range(n), batches, strict=False):
        assert batch["inputs"].shape == (B, T)
    return (time.perf_counter() - started) / n


def get_batch(path, n: int) -> float:
    """The same as nanoGPT does it: open the memmap, draw B places, cut and convert each, stack."""
    started = time.perf_counter()
    for _ in range(n):
        data = np.memmap(path, dtype=np.uint16, mode="r", offset=shards.HEADER_BYTES)
        places = torch.randint(len(data) - T, (B,))
        x = [torch.from_numpy(data[i : i + T].astype(np.int64)) for i in places]
        y = [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in places]
        assert torch.stack(x).shape == torch.stack(y).shape
    return (time.perf_counter() - started) / n


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        tokenizer = byte_tokenizer()
        ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, N, dtype=np.uint16)

        def chunks(_):
            yield [ids], None

        def tokenise(rows):
            return {"train": (rows[0], 1, N)}

        folder = shard_writer.build(Path(tmp) / "cache", tokenizer, chunks, tokenise, {}, 1)
        index = shards.read_index(folder)
        path = folder / next(s["name"] for s in index["shards"] if "train" in s["name"])
        runs = [(ours(folder, index), get_batch(path, N // T // B)) for _ in range(3)]
    mine, theirs = (statistics.median(seconds) * 1e6 for seconds in zip(*runs, strict=True))
    print(
        f"{B} x {T}: ours {mine:.1f} us per batch over an epoch, get_batch {theirs:.1f} us; "
        f"ratio {theirs / mine:.1f}"
    )


if __name__ == "__main__":
    main()
