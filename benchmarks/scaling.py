"""
DDP on 1 and on 2 processes of one core each, the same global batch: what the second one brings, and what the exchange costs.

    python benchmarks/scaling.py            # 30 million parameters, 8 x 256 tokens; two minutes on two cores

The 2 processes also do steps without exchange, in turn with the others, and exchange the same bytes with nothing beside it. Prints the
medians, the efficiency (time of 1 over twice the time of 2), and how much of the exchange is hidden behind the backward pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SIZE, ROWS, T, V = "mini", 8, 256, 50257


def work() -> None:
    """One process, under torchrun: prints the medians of a step, of one without exchange, and of the exchange alone."""
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
            # without the exchange: as if another micro-batch followed
            total = engine.accumulate(lambda m, b: m(**b), batch, ROWS * T, last=exchange)
            engine.read(total)
            engine.step(0.0, 1.0)
            return time.perf_counter() - started

        def exchange() -> float:
            buffer = torch.zeros(sum(p.numel() for p in gpt.parameters()))
            started = time.perf_counter()
            dist.all_reduce(buffer)
            return time.perf_counter() - started

        rows = [
            (step(True), step(False), exchange() if ranks.world > 1 else 0.0) for _ in range(10)
        ][2:]
        if ranks.rank == 0:
            print(json.dumps([statistics.median(column) for column in zip(*rows, strict=True)]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().work:
        return work()
    seen = {}
    for n in (1, 2):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n),
            sys.argv[0],
            "--work",
        ]
        done = subprocess.run(
            launch,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seen[n] = json.loads(done.stdout.splitlines()[-1])
    one, (two, alone, exchange) = seen[1][0], seen[2]
    shown = max(0.0, two - alone)
    print(
        f"1 process {one * 1000:.0f} ms per step, 2 processes {two * 1000:.0f} ms: efficiency {one / two / 2:.2f}"
    )
    print(
        f"exchange alone {exchange * 1000:.0f} ms, {shown * 1000:.0f} of them seen in a step: {1 - shown / exchange:.0%} are hidden"
    )


if __name__ == "__main__":
    main()
