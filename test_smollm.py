"""
Is this machine ready to train? Checks what is needed, and says what is missing and what to do.

    python test_smollm.py            # about a minute; needs no network
    python -m pytest test_smollm.py  # the same checks under pytest

Checks packages, devices, compiler, tokenizer, network and disk. Then it trains in a temporary
folder: text to token shards, a run that is killed with SIGKILL and resumed with the same command,
and a comparison of its weights with those of an uninterrupted run. Exit code 0: ready (skipped
checks are listed), 1: a check failed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
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
# what the scripts import of a package, where it has another name
MODULES = {
    "safetensors": "safetensors.torch",
    "pyarrow": "pyarrow.parquet",
    "matplotlib": "matplotlib.figure",
    "PyYAML": "yaml",
    "galore-torch": "galore_torch",
    "tensorboard": "torch.utils.tensorboard",
}
NETWORK_TIMEOUT_S = 5
FREE_GB = 5  # for checkpoints of a 124M model with its optimizer state


class Skipped(Exception):
    """A check that cannot be done here, and that training does without; the message says why."""


# -------------------------------------------------------------------------------------- the checks


def check_python_and_packages() -> str:
    """Python 3.11 or newer, and every package that each run needs."""
    python = f"Python {platform.python_version()}"
    assert sys.version_info >= (3, 11), f"{python} is too old; install 3.11 or newer"
    faults = [fault for name in NEEDED if (fault := _fault_of(name))]
    assert not faults, f"{', '.join(faults)}; pip install -r requirements.txt"
    return ", ".join([python, *(f"{name} {_version(name)}" for name in NEEDED[:5])])


def check_optional_packages() -> str:
    """Packages that only some flags need."""
    faults = [
        f"{fault} (for {flag})" for name, flag in OPTIONAL.items() if (fault := _fault_of(name))
    ]
    if faults:
        raise Skipped(f"{', '.join(faults)}; pip install -r requirements.txt")
    return ", ".join(f"{name} {_version(name)}" for name in OPTIONAL)


def _fault_of(name: str) -> str | None:
    """What is wrong with a package, None if it can be imported."""
    try:
        importlib.import_module(MODULES.get(name, name))
    except Exception as e:  # noqa: BLE001  a broken package may raise anything
        if _version(name) is None:
            return f"{name} is not installed"
        reason = " ".join(str(e).split())[:200] or repr(e)
        return f"{name} is broken and must be installed again ({type(e).__name__}: {reason})"
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices() -> str:
    """The devices, and what --device auto and --dtype auto choose."""
    import torch

    from parts.base.machine import choose_dtype, pick_device

    device = pick_device("auto")
    dtype, why = choose_dtype("auto", device)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(gpus) or f"no GPU, {os.cpu_count()} CPU cores"
    name = str(dtype).removeprefix("torch.")
    return f"{found}; --device auto is {device}, --dtype auto is {name} ({why})"


def check_compiler() -> str:
    """torch.compile compiles a function."""
    from parts.base.machine import pick_device, why_no_compiler

    if why := why_no_compiler(pick_device("auto")):
        raise Skipped(f"--compile will be off: {why}")
    return "torch.compile works here"


def check_tokenizer() -> str:
    """GPT-2's vocabulary from tiktoken's cache or the network."""
    from parts.data.tokenizers import gpt2_tokenizer

    try:
        tokenizer = gpt2_tokenizer(timeout_s=NETWORK_TIMEOUT_S)
    except OSError as e:
        raise Skipped(
            f"GPT-2's vocabulary is neither cached nor reachable ({e}); "
            "use --tokenizer bpe, or set TIKTOKEN_CACHE_DIR"
        ) from e
    ids = tokenizer.encode("Hello world").tolist()
    assert ids == [15496, 995], f"GPT-2's vocabulary is wrong: 'Hello world' has ids {ids}"
    return f"GPT-2's {tokenizer.vocab_size:,} tokens"


def check_network() -> str:
    """The Hugging Face hub answers."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{endpoint}/api/datasets/HuggingFaceTB/smollm-corpus"
    try:
        with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT_S) as response:
            return f"{endpoint} answers ({response.status})"
    except OSError as e:
        raise Skipped(
            f"{endpoint} is not reachable ({e}); give --dataset_name a folder or file of your own"
        ) from e


def check_disk() -> str:
    """Room for checkpoints in the current folder."""
    free = shutil.disk_usage(".").free / 1e9
    if free < FREE_GB:
        need = f"the checkpoints of a 124M run need {FREE_GB}"
        raise Skipped(f"{free:.1f} GB free here, {need}; choose another --output_dir")
    return f"{free:,.0f} GB free here"


# --------------------------------------------------------------------------------- a real training

STEPS = 60
WORDS = (
    "the old man and a small dog went down to the sea where ships of every kind lay still "
    "in the morning light"
).split()
FLAGS = (
    "--dataset_name texts.jsonl --tokenizer bytes --val_share 0.05 --model_size nano "
    f"--context_length 64 --batch_size 4 --max_steps {STEPS} --max_lr 3e-3 --eval_freq 30 "
    "--print_sample_iter 30 --save_ckpt_freq 10 --device cpu --dtype fp32 --log_exact"
)


def _write_texts(path: Path) -> None:
    with open(path, "w", encoding="utf-8") as f:
        for n in range(500):
            words = [WORDS[(n * 5 + i * (n % 7 + 2)) % len(WORDS)] for i in range(80)]
            f.write(json.dumps({"text": f"{n}. {' '.join(words)}"}) + "\n")


def _training(name: str) -> list[str]:
    trainer = str(HERE / "pretraining_advanced.py")
    return [sys.executable, trainer, "--run_name", name, *FLAGS.split()]


def _run(command: list[str], folder: Path) -> str:
    """What a command prints, which must succeed."""
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=170, check=False
    )
    failure = f"{' '.join(command[1:3])} failed with exit code {result.returncode}"
    assert result.returncode == 0, f"{failure}: {result.stderr.strip()[-300:]}"
    return result.stdout


def _kill_at_step(command: list[str], folder: Path, step: int) -> None:
    """Start a training and kill it when it prints the loss of this step."""
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith(f"step {step} loss"):
                process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                break


def _losses(output: str) -> dict[int, float]:
    """{step: loss} of the lines `step N loss X` that a training prints."""
    rows = [line.split() for line in output.splitlines() if line.startswith("step ")]
    return {int(row[1]): float.fromhex(row[3]) for row in rows if row[2:3] == ["loss"]}


def _weights_hash(name: str, folder: Path) -> str:
    verify = [sys.executable, str(HERE / "wt_load.py"), "verify", f"runs/{name}"]
    return _run(verify, folder).splitlines()[-1]


def check_training_kill_and_resume() -> str:
    """A training learns; killed with SIGKILL and resumed, it ends with bit-identical weights."""
    with tempfile.TemporaryDirectory(prefix="test_smollm-", ignore_cleanup_errors=True) as name:
        return _train_kill_and_resume(Path(name))


def _train_kill_and_resume(folder: Path) -> str:
    started = time.monotonic()
    _write_texts(folder / "texts.jsonl")
    straight = _losses(_run(_training("straight"), folder))
    assert len(straight) == STEPS, f"{len(straight)} of {STEPS} losses were logged"
    learned = f"loss {straight[1]:.2f} to {straight[STEPS]:.2f} in {STEPS} steps"
    assert straight[STEPS] < straight[1] - 1, f"the training does not learn: {learned}"
    for file in ("loss.png", "samples.txt"):
        assert (folder / "runs/straight" / file).exists(), f"the run wrote no {file}"
    caches = list(folder.glob("token_cache/*/index.json"))
    assert len(caches) == 1, f"the run wrote {len(caches)} token caches instead of one"
    built = caches[0].stat().st_mtime_ns

    _kill_at_step(_training("killed"), folder, 25)
    output = _run(_training("killed"), folder)
    assert "resumed from step " in output, "it started again instead of resuming its checkpoint"
    assert caches[0].stat().st_mtime_ns == built, "the token cache was built again"
    for step, loss in _losses(output).items():
        difference = f"loss {loss!r} after the resume, {straight[step]!r} without a kill"
        assert loss == straight[step], f"step {step}: {difference}"
    weights = _weights_hash("straight", folder)
    assert _weights_hash("killed", folder) == weights, (
        "the weights of the resumed run differ from those of the uninterrupted one"
    )
    elapsed_s = time.monotonic() - started
    return f"{learned}; killed and resumed bit-identically ({weights[:12]}), {elapsed_s:.0f} s"


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

# ------------------------------------------------------------------------------- pytest and script


def pytest_generate_tests(metafunc):
    """Make each check a test of its own."""
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
            result, text = "ok", check()
        except Skipped as e:
            result, text = "skipped", str(e)
        except Exception as e:  # noqa: BLE001  any failure of a check is one line of the summary
            result, text = "FAILED", " ".join(str(e).split()) or repr(e)
        counts[result] += 1
        print(f"{result:8} {name}: {text}", flush=True)
    verdict = "not ready: see FAILED above" if counts["FAILED"] else "ready to train"
    print(f"{verdict}; {counts['ok']} ok, {counts['skipped']} skipped, {counts['FAILED']} failed")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    if sys.argv[1:]:
        if sys.argv[1:] in (["--help"], ["-h"]):
            sys.exit(print(__doc__.strip()))
        print(f"error: {sys.argv[1]}: this script has no flags but --help", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
