"""The order of windows is a permutation, cheap to resume, and the same for every world size."""

import itertools
import time

import numpy as np
import pytest
import torch

from parts.data.batches import Prefetch, TrainBatches, shuffled, stir


class FakeShards:
    """Two files of tokens that tell their own position."""

    folder = "fake"

    masks = ()

    def __init__(self, *lengths):
        starts = np.cumsum([0, *lengths])
        self.tokens = [np.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)]

    def __len__(self):
        return sum(map(len, self.tokens))

    def check(self, shard, starts, n):
        assert max(starts) + n <= len(self.tokens[shard])

    def read(self, shard, start, stop):
        return self.tokens[shard][start:stop].astype(np.int64)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_every_epoch_is_a_permutation_of_its_own(n):
    orders = [
        shuffled(np.arange(n), n, seed, epoch).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n > 10:
        assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != list(range(n))


def test_the_order_does_not_depend_on_numpy_or_the_machine():
    """Golden values: another order would make every checkpoint go on with other data."""
    assert shuffled(np.arange(10), 10, 123, 0).tolist() == [8, 1, 3, 2, 0, 9, 6, 7, 4, 5]
    assert stir(123, 4, 5) == stir(123, 4, 5) != stir(123, 5, 4)


def test_neighbours_are_scattered():
    x = shuffled(np.arange(100_000), 100_000, 7, 0)
    assert abs(np.corrcoef(np.arange(100_000), x)[0, 1]) < 0.02
    assert abs(np.abs(np.diff(x)).mean() / 100_000 - 1 / 3) < 0.01


def take(batches, n):
    """Inputs of the next n micro-batches, one below the other."""
    micro_batches = itertools.chain.from_iterable(batches)
    return torch.cat([batch["inputs"] for batch in itertools.islice(micro_batches, n)])


def test_every_window_comes_once_per_epoch_also_where_files_end():
    batches = TrainBatches(FakeShards(103, 57, 5), T=8, seed=1, vocab_size=1000)
    assert batches.n_rows == 12 + 7 + 0
    batches.share(0, 1, 1, 1)
    rows = take(batches, 19)
    starts = sorted(rows[:, 0].tolist())
    assert starts == [8 * i for i in range(12)] + [103 + 8 * i for i in range(7)]
    assert all((row.diff() == 1).all() for row in rows)  # no window goes over the end of a file


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("B", [1, 2])
def test_the_rows_of_a_step_do_not_depend_on_ranks_or_micro_batches(world, B):
    def steps(world, B):
        parts = []
        for rank in range(world):
            batches = TrainBatches(FakeShards(1000), T=8, seed=3, vocab_size=1000)
            batches.share(rank, world, B, 8)
            parts.append(take(batches, 40 // (B * world) * 8 // 8 * 1).view(5, -1, 8))
        return [sorted(torch.cat([p[s] for p in parts])[:, 0].tolist()) for s in range(5)]

    assert steps(world, B) == steps(1, 8)


def test_going_on_is_the_same_as_not_stopping():
    straight = TrainBatches(FakeShards(1000), T=8, seed=3, vocab_size=1000)
    straight.share(0, 1, 2, 4)
    rows = take(straight, 40)
    feed = iter(again := TrainBatches(FakeShards(1000), T=8, seed=3, vocab_size=1000))
    again.share(0, 1, 2, 4)
    assert len(next(feed)) == 2
    assert again.state_dict() == {"rows": 4, "skipped": [], "tokens_per_row": 8}
    later = TrainBatches(FakeShards(1000), T=8, seed=3, vocab_size=1000)
    later.share(0, 1, 2, 4)
    later.load_state_dict({"rows": 24, "skipped": [], "tokens_per_row": 8})
    assert torch.equal(take(later, 28)[:4], rows[24:28])
    later.load_state_dict({"windows": 24})  # as an earlier version wrote it
    assert torch.equal(take(later, 28), rows[24:])


def test_the_place_at_step_a_million_is_found_at_once(tmp_path):
    class Long(FakeShards):
        def __init__(self):
            self.tokens = [
                np.memmap(tmp_path / "x", np.uint16, "w+", shape=(100_000_000,))
            ] * 1000  # a hundred billion tokens

    def seconds(windows):
        started = time.perf_counter()
        batches = TrainBatches(Long(), T=1024, seed=1, vocab_size=1000)
        batches.share(0, 1, 32, 512)
        batches.load_state_dict({"rows": windows, "skipped": []})
        next(iter(batches))
        return time.perf_counter() - started

    at_zero, at_a_million = seconds(0), seconds(512 * 1_000_000)
    assert at_a_million < at_zero + 1
    print(f"step 0: {at_zero:.4f} s, step 1,000,000: {at_a_million:.4f} s")


def test_a_token_that_the_vocabulary_lacks_is_told():
    batches = TrainBatches(FakeShards(100), T=8, seed=1, vocab_size=50)
    with pytest.raises(ValueError, match="has token .* the tokenizer has 50"):
        for _ in zip(range(20), batches, strict=False):
            pass


def test_prefetching_gives_the_same_and_raises_what_the_thread_raised():
    def fresh():
        batches = TrainBatches(FakeShards(1000), T=8, seed=3, vocab_size=1000)
        batches.share(0, 1, 2, 4)
        return batches

    prefetch = Prefetch(fresh(), torch.device("cpu"))
    steps = []
    for _ in range(10):
        steps.append((*next(prefetch), prefetch.cursor))
    prefetch.close()
    assert not prefetch.thread.is_alive()
    inputs = [batch["inputs"] for batches, _, _ in steps for batch in batches]
    assert torch.equal(torch.cat(inputs), take(fresh(), 20))
    assert [cursor["rows"] for _, _, cursor in steps] == [4 * i for i in range(1, 11)]
    assert all(n == 32 for _, n, _ in steps)
    with pytest.raises(ValueError, match="less than one row"):
        next(
            iter(
                Prefetch(
                    TrainBatches(FakeShards(3), T=8, seed=3, vocab_size=1000), torch.device("cpu")
                )
            )
        )
