"""The benchmarks run, here on the smallest model: what they print must come from a measurement, not from a script that fell behind."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def run(script, *flags) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_step_computes_the_same_loss_on_both_sides():
    pytest.importorskip("transformers")
    out = run(
        "train_step.py",
        "--size",
        "nano",
        "--batch_size",
        "1",
        "--context_length",
        "16",
        "--steps",
        "2",
        "--eager",
        "--dtype",
        "fp32",
    )
    losses = re.findall(r"first loss ([\d.]+)", out)
    assert len(losses) == 2 and abs(float(losses[0]) - float(losses[1])) < 2e-3
    assert re.search(r"nano: [\d.]+ times the tokens/s, [\d.]+ of the memory", out)


def test_checkpoint():
    assert re.search(
        r"verified\ntorch.save: .* ratio [\d.]+\nevery 10 minutes: [\d.]+%",
        run("checkpoint.py", "--size", "nano"),
    )


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("*.py")))
def test_every_script_finds_what_it_imports(script):
    program = f"import runpy, sys; sys.path.insert(0, 'benchmarks'); runpy.run_path('benchmarks/{script}')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
