"""
Is this machine ready to train? Looks, tries, and says what is missing and what to do about it.

    python test_smollm.py            # about a minute; needs no network
    python -m pytest test_smollm.py  # the same checks under pytest

Packages and versions, devices, compiler, tokenizer, network, disk; then a real training in a temporary folder: text to
token shards, a run killed with SIGKILL in the middle, the same line again, and the weights compared with those of a run
that was left alone. Exit code 0: ready (what was skipped is listed), 1: something failed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tiktoken",
    "tokenizers",
    "datasets",
    "pyarrow",
    "matplotlib",
    "tqdm",
    "tyro",
    "PyYAML",
    "filelock",
)
OPTIONAL = {
    "wandb": "--use_wandb",
    "tensorboard": "--tensorboard",
    "galore-torch": "--optimizer galore",
    "rarfile": ".rar archives",
}
NETWORK_TIMEOUT_S = 5
FREE_GB = 5  # less than this holds no checkpoint of a 124M model with its optimizer state


class Skipped(Exception):
    """This cannot be tried here, and training does without it; the message says what it would be for."""


# ------------------------------------------------------------------------------------------------------- the checks


def check_python_and_packages() -> str:
    """Python 3.11 or newer and every package that each run needs."""
    assert sys.version_info >= (3, 11), f"Python {platform.python_version()}; install 3.11 or newer"
    missing = [name for name in NEEDED if _version(name) is None]
    assert not missing, f"missing: {', '.join(missing)}; pip install -r requirements.txt"
    return f"Python {platform.python_version()}, " + ", ".join(
        f"{name} {_version(name)}" for name in NEEDED[:5]
    )


def check_optional_packages() -> str:
    """Packages that only some flags need."""
    missing = [f"{name} (for {flag})" for name, flag in OPTIONAL.items() if _version(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}; pip install -r requirements.txt")
    return ", ".join(f"{name} {_version(name)}" for name in OPTIONAL)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices() -> str:
    """What there is to compute on, and the arithmetic that --dtype auto takes there."""
    import torch

    from gpt_train import pick_device
    from parts.base.machine import choose_dtype

    device = pick_device("auto")
    dtype, why = choose_dtype("auto", device)
    n = torch.cuda.device_count()
    names = (
        ", ".join(torch.cuda.get_device_name(i) for i in range(n))
        or f"no GPU, {os.cpu_count()} CPU cores"
    )
    return f"{names}; --device auto is {device}, --dtype auto is {str(dtype).removeprefix('torch.')} ({why})"


def check_compiler() -> str:
    """torch.compile really compiles something."""
    from gpt_train import pick_device
    from parts.base.machine import why_no_compiler

    if why := why_no_compiler(pick_device("auto")):
        raise Skipped(f"--compile will be left off: {why}")
    return "torch.compile works here"


def check_tokenizer() -> str:
    """GPT-2's vocabulary from tiktoken's cache, or from the network."""
    from parts.data.tokenizers import gpt2_tokenizer

    try:
        tokenizer = gpt2_tokenizer(timeout_s=NETWORK_TIMEOUT_S)
    except OSError as e:
        raise Skipped(
            f"GPT-2's vocabulary is neither cached nor reachable ({e}); use --tokenizer bpe, or set TIKTOKEN_CACHE_DIR"
        ) from e
    assert tokenizer.encode("Hello world").tolist() == [15496, 995], (
        "GPT-2's vocabulary gives other ids than GPT-2's"
    )
    return f"GPT-2's {tokenizer.vocab_size:,} tokens"


def check_network() -> str:
    """The Hugging Face hub answers."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            f"{endpoint}/api/datasets/HuggingFaceTB/smollm-corpus", timeout=NETWORK_TIMEOUT_S
        ) as response:
            return f"{endpoint} answers ({response.status})"
    except OSError as e:
        raise Skipped(
            f"{endpoint} is out of reach ({e}); give --dataset_name a folder or file of your own"
        ) from e


def check_disk() -> str:
    """Room for checkpoints here."""
    free = shutil.disk_usage(".").free / 1e9
    if free < FREE_GB:
        raise Skipped(
            f"{free:.1f} GB free here, the checkpoints of a 124M run need {FREE_GB}; choose another --output_dir"
        )
    return f"{free:,.0f} GB free here"


# --------------------------------------------------------------------------------------------------- a real training

STEPS = 60
WORDS = "the old man and a small dog went down to the sea where ships of every kind lay still in the morning light".split()


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="test_smollm-"))
    texts = (
        f"{n}. " + " ".join(WORDS[(n * 5 + i * (n % 7 + 2)) % len(WORDS)] for i in range(80))
        for n in range(500)
    )
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    return folder


def _command(name: str) -> list[str]:
    words = f"--run_name {name} --dataset_name texts.jsonl --tokenizer bytes --val_share 0.05 --model_size nano --context_length 64"
    words += f" --batch_size 4 --max_steps {STEPS} --max_lr 3e-3 --eval_freq 30 --print_sample_iter 30 --save_ckpt_freq 10"
    words += " --device cpu --dtype fp32 --log_exact"
    return [sys.executable, str(HERE / "pretraining_advanced.py"), *words.split()]


def _run(command, folder) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, (
        f"{' '.join(command[1:3])} ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    )
    return done


def _losses(text: str) -> dict[int, float]:
    rows = [
        line.split()
        for line in text.splitlines()
        if line.startswith("step ") and line.split()[2:3] == ["loss"]
    ]
    return {int(row[1]): float.fromhex(row[3]) for row in rows}


def check_training_kill_and_resume() -> str:
    """Text to token shards, a training that learns, SIGKILL in the middle, and the same bits in the end."""
    folder = _folder()
    try:
        started = time.monotonic()
        straight = _losses(_run(_command("straight"), folder).stdout)
        assert len(straight) == STEPS and straight[STEPS] < straight[1] - 1, (
            f"it does not learn: loss {straight[1]:.2f} to {straight[STEPS]:.2f}"
        )
        assert (folder / "runs/straight/loss.png").exists() and (
            folder / "runs/straight/samples.txt"
        ).exists(), "no loss.png or samples.txt"
        shards = list(folder.glob("token_cache/*/index.json"))
        assert len(shards) == 1, "the token cache is not there"
        built = shards[0].stat().st_mtime_ns
        with subprocess.Popen(
            _command("killed"),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            for line in process.stdout:
                if line.startswith("step 25 loss"):
                    process.send_signal(
                        signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM
                    )
                    break
        again = _run(_command("killed"), folder).stdout
        assert "resumed from step " in again, (
            "it began anew instead of going on from its checkpoint"
        )
        assert shards[0].stat().st_mtime_ns == built, "the token cache was built again"
        for step, loss in _losses(again).items():
            assert loss == straight[step], (
                f"step {step}: the resumed run has loss {loss!r}, the straight one {straight[step]!r}"
            )
        verify = [sys.executable, str(HERE / "wt_load.py"), "verify"]
        hashes = [
            _run([*verify, f"runs/{name}"], folder).stdout.splitlines()[-1]
            for name in ("straight", "killed")
        ]
        assert hashes[0] == hashes[1], (
            "the weights of the resumed run differ from those of the straight one"
        )
        learned = f"loss {straight[1]:.2f} to {straight[STEPS]:.2f} in {STEPS} steps"
        return f"{learned}; killed and resumed to the same bits ({hashes[0][:12]}), {time.monotonic() - started:.0f} s"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def pytest_generate_tests(metafunc):
    """pytest collects each check as a test of its own."""
    metafunc.parametrize("check", CHECKS, ids=[c.__name__.removeprefix("check_") for c in CHECKS])


def test_machine(check):
    """The check passes, or is skipped with its reason."""
    import pytest

    try:
        print(check())
    except Skipped as e:
        pytest.skip(str(e))


def main() -> int:
    """Run every check, print a line for each and a summary; returns the exit code."""
    counts = {"ok": 0, "skipped": 0, "FAILED": 0}
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            word, text = "ok", check()
        except Skipped as e:
            word, text = "skipped", str(e)
        except Exception as e:  # noqa: BLE001  the summary must name every failure, whatever it is
            word, text = "FAILED", " ".join(str(e).split()) or repr(e)
        counts[word] += 1
        print(f"{word:8} {name}: {text}", flush=True)
    verdict = "not ready: see FAILED above" if counts["FAILED"] else "ready to train"
    print(f"{verdict}; {counts['ok']} ok, {counts['skipped']} skipped, {counts['FAILED']} failed")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
