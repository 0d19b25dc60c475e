"""
DDP on 1 and 2 processes of one core each, with the same global batch: efficiency and exchange.

    python benchmarks/scaling.py      # 30 million parameters, 8 x 256 tokens; 2 minutes on 2 cores

The 2 processes also make steps without an exchange, in turn with the others, and exchange the same
bytes without a step. Prints the medians, the efficiency (time of 1 over twice the time of 2), and
how much of the exchange overlaps with the backward pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SIZE = "mini"
ROWS, T, V = 8, 256, 50257


def work() -> None:
    """
    One process under torchrun.

    Prints the median seconds of a step, of a step without exchange, and of the exchange alone.
    """
    import torch
    import torch.distributed as dist

    from gpt_train import GPT, Block, GPTConfig
    from parts.base.machine import choose_dtype
    from parts.training.engine import ENGINES, choose_engine
    from parts.training.optim import Optimizer
    from parts.training.ranks import Ranks

    device = torch.device("cpu")
    kind = choose_engine("ddp", ENGINES)
    with Ranks(device, group=kind.needs_torchrun) as ranks:
        engine = kind(ranks, choose_dtype("auto", device)[0])
        torch.manual_seed(0)
        gpt = GPT(GPTConfig.of_size(SIZE, vocab_size=V, block_size=T, dropout=0.0))
        engine.prepare(gpt, (Block,), lambda m: Optimizer(m, (Block,), "adamw", 0.1, device))
        ids = torch.randint(V, (ROWS // ranks.world, T + 1))

        def step(exchange: bool) -> float:
            started = time.perf_counter()
            batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
            # not the last: as if another micro-batch followed, so nothing is exchanged
            total = engine.accumulate(lambda m, b: m(**b), batch, ROWS * T, last=exchange)
            engine.read(total)
            engine.step(0.0, 1.0)
            return time.perf_counter() - started

        def exchange() -> float:
            buffer = torch.zeros(sum(p.numel() for p in gpt.parameters()))
            started = time.perf_counter()
            dist.all_reduce(buffer)
            return time.perf_counter() - started

        rows = []
        for _ in range(10):
            rows.append((step(True), step(False), exchange() if ranks.world > 1 else 0.0))
        medians = [statistics.median(column) for column in zip(*rows[2:], strict=True)]
        if ranks.rank == 0:
            print(json.dumps(medians))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().work:
        return work()
    medians = {}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for n in (1, 2):
        command = [*launcher, str(n), sys.argv[0], "--work"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        medians[n] = json.loads(done.stdout.splitlines()[-1])
    one = medians[1][0]
    two, without_exchange, exchange = medians[2]
    shown = max(0.0, two - without_exchange)
    print(
        f"1 process {one * 1000:.0f} ms per step, 2 processes {two * 1000:.0f} ms: "
        f"efficiency {one / two / 2:.2f}"
    )
    print(
        f"exchange alone {exchange * 1000:.0f} ms, a step is {shown * 1000:.0f} ms longer with it: "
        f"{1 - shown / exchange:.0%} overlaps"
    )


if __name__ == "__main__":
    main()
