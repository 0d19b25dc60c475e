"""
From the start of the process to the end of its first step, in seconds of CPU: ours against a bare loop around transformers' GPT-2.

    python benchmarks/startup.py

Ours is pretraining_advanced.py with tests/faults/tiny.yaml: tokens, run folder, one step, evaluation, checkpoint, plot. The peer
imports torch and GPT2LMHeadModel, makes a model of the same size and does one step of AdamW on random ids, nothing else. Also
shown: the import of torch alone, which both pay, and --help. Five times each in turn; medians. A minute.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_layer=2, n_head=2, n_embd=64, n_positions=32))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(257, (2, 32))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
"""


def cpu_seconds(command: list) -> float:
    """CPU time of a command and its children, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    python, script = sys.executable, ROOT / "pretraining_advanced.py"
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([python, ROOT / "tests/faults/make_corpus.py", f"{tmp}/data"], check=True)
        run = [
            python,
            script,
            "--config",
            ROOT / "tests/faults/tiny.yaml",
            "--dataset_name",
            f"{tmp}/data",
            "--cache_dir",
            f"{tmp}/cache",
        ]
        commands = {
            "ours": [*run, "--max_steps", "1", "--resume", "never", "--output_dir", f"{tmp}/run"],
            "transformers": [python, "-c", PEER],
            "import torch": [python, "-c", "import torch"],
            "--help": [python, script, "--help"],
        }
        seen = {
            name: [cpu_seconds(command)] for name, command in commands.items()
        }  # files into memory, cache built
        for _ in range(5):
            for name, command in commands.items():
                seen[name].append(cpu_seconds(command))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in seen.items()}
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    print(
        f"ratio {medians['transformers'] / medians['ours']:.2f} (CPU time, transformers over ours)"
    )


if __name__ == "__main__":
    main()
