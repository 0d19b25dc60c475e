"""Where the real data is, if it is here at all, and how to start a script as a person does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of torch, here and in every process started from here: two tests run at a time

ROOT = Path(__file__).resolve().parent.parent
# Real books, vocabularies and the fault harness; tests that need them skip by name where the folder is not beside us.
SHARED = ROOT.parent / "shared"
GPT2_CACHE = SHARED / "data/gpt2/tiktoken_cache"


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="thirty faults of each kind instead of two")


def shared(path: str) -> Path:
    """A file or folder of the test data; skips the test, naming it, where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs ../shared/{path}")
    return SHARED / path


def run(script: str, *arguments, cwd, timeout=120, env=None) -> subprocess.CompletedProcess:
    """Start a script of the project in the folder `cwd`, offline, one thread."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def one_error_line(result: subprocess.CompletedProcess, code: int) -> str:
    """The single `error:` line of a command that had to fail cleanly with this exit code."""
    assert result.returncode == code, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr + result.stdout, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-2000:]
    return errors[0]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with three small English texts."""
    folder = tmp_path_factory.mktemp("texts")
    words = "the old man and a small dog went down to the sea where ships of every kind lay still in the morning light".split()
    for n in range(3):
        lines = [" ".join(words[(i * (n + 2) + j * 7) % len(words)] for j in range(9)) + f" {i}." for i in range(400)]
        (folder / f"text_{n}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


TINY = ("--model_size", "nano", "--context_length", "16", "--batch_size", "4", "--device", "cpu", "--tokenizer", "bytes")
