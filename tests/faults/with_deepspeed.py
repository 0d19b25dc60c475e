"""
pretraining_advanced.py with DeepSpeed among its engines; ZERO_STAGE in the environment is its
stage. For tests.
"""

import os

from parts.cli.launch import run_script
from pretraining_advanced import TrainConfig, parse, run
from recipes.orchestrator.strategies import engines_of, read_deepspeed


def main() -> int:
    config = parse(TrainConfig)
    zero = {"stage": int(os.environ.get("ZERO_STAGE", 0))}
    if config.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    plan = read_deepspeed({"zero_optimization": zero}, 1, 1, 1)
    return run(config, engines=engines_of(plan))


if __name__ == "__main__":
    run_script(main)
