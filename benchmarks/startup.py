"""
CPU time of a training of one step: our trainer against a bare loop around transformers' GPT-2.

    python benchmarks/startup.py

Ours is pretraining_advanced.py with tests/faults/tiny.yaml: tokens, run folder, one step,
evaluation, checkpoint, plot. The peer imports torch and GPT2LMHeadModel, makes a model of the same
size and does one step of AdamW on random ids, nothing else. Also prints the import of torch alone,
which both pay, and --help. Five times each in turn; medians. A minute.
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
    python = sys.executable
    script = ROOT / "pretraining_advanced.py"
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([python, ROOT / "tests/faults/make_corpus.py", f"{tmp}/data"], check=True)
        run = [python, script, "--config", ROOT / "tests/faults/tiny.yaml", "--max_steps", "1"]
        run += ["--dataset_name", f"{tmp}/data", "--cache_dir", f"{tmp}/cache"]
        run += ["--resume", "never", "--output_dir", f"{tmp}/run"]
        commands = {
            "ours": run,
            "transformers": [python, "-c", PEER],
            "import torch": [python, "-c", "import torch"],
            "--help": [python, script, "--help"],
        }
        seen = {name: [] for name in commands}
        for _ in range(6):  # the first reads files into memory and builds the token cache
            for name, command in commands.items():
                seen[name].append(cpu_seconds(command))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in seen.items()}
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    ratio = medians["transformers"] / medians["ours"]
    print(f"ratio {ratio:.2f} (CPU time, transformers over ours)")


if __name__ == "__main__":
    main()
