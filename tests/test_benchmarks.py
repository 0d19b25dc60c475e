"""The benchmarks run, here on the smallest model, so that no change of the project breaks them."""

import json
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


SMALLEST = "--size nano --batch_size 1 --context_length 16".split()


@pytest.mark.parametrize("size", ["nano", "llama-nano"])
def test_train_step_computes_the_same_loss_on_both_sides(size):
    pytest.importorskip("transformers")
    flags = ("--size", size, *SMALLEST[2:], "--steps", "2", "--eager", "--dtype", "fp32")
    out = run("train_step.py", *flags)
    losses = re.findall(r"first loss ([\d.]+)", out)
    assert len(losses) == 2 and abs(float(losses[0]) - float(losses[1])) < 2e-3
    assert re.search(rf"{size}: [\d.]+ times the tokens/s, [\d.]+ of the memory", out)


@pytest.mark.parametrize("padded", [False, True])
def test_lora_step_computes_the_same_loss_on_both_sides(padded):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    flags = "--turns 1 --batch_files 4 --context_length 64 --vocab_size 300 --way autocast".split()
    out = run("lora_step.py", *flags, "--activation_checkpointing", *["--padded"] * padded)
    losses = re.findall(r"first loss ([\d.]+)", out)
    assert len(losses) == 2
    assert abs(float(losses[0]) - float(losses[1])) < (0.1 if padded else 5e-3)
    kind = "padded" if padded else "packed"
    assert re.search(rf"{kind}: [\d.]+ times the tokens/s", out)


def test_the_first_line_of_the_ladder():
    rate, _, peak = json.loads(run("ladder.py", *SMALLEST, "--rung", "0").splitlines()[-1])
    assert rate > 0 and peak > 2**20


def test_checkpoint():
    out = run("checkpoint.py", "--size", "nano")
    assert re.search(r"verified\ntorch.save: .* ratio [\d.]+\nevery 10 minutes: [\d.]+%", out)


def test_every_script_finds_what_it_imports():
    scripts = sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py"))
    program = (
        "import runpy, sys\n"
        "sys.path.insert(0, 'benchmarks')\n"
        f"for script in {scripts!r}:\n"
        "    print(script, file=sys.stderr)\n"
        "    runpy.run_path(script)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
