"""The production trainer on a small corpus: started, stopped, asked and compared."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, ranks, run

import pretraining_advanced
from parts.cli.launch import BAD_INPUT, error_line
from parts.storage.checkpoint import load_tensors, newest_checkpoint
from parts.training.optim import learning_rate
from pretraining_advanced import TrainConfig
from wt_load import weights_hash

WORDS = (
    "the old man and a small dog went down to the sea "
    "where ships of every kind lay still in the light"
).split()
SMALL = {"tokenizer": "bytes", "val_share": 0.05, "device": "cpu", "dtype": "fp32"}
SMALL |= {"model_size": "nano", "context_length": 32, "batch_size": 1, "max_steps": 20}
SMALL |= {"max_lr": 3e-3, "eval_freq": 10, "print_sample_iter": 100, "save_ckpt_freq": 100}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus in `data`; the first run builds its token cache, all share it."""
    folder = tmp_path_factory.mktemp("advanced")
    (folder / "data").mkdir()
    texts = [
        f"{n}. " + " ".join(WORDS[(n * 5 + i * (n % 7 + 2)) % len(WORDS)] for i in range(60))
        for n in range(400)
    ]
    (folder / "data/train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    return folder


def flags(name, **settings) -> list[str]:
    settings = {"dataset_name": "data", "run_name": name, **SMALL, **settings}
    words = []
    for key, value in settings.items():
        words += (
            [f"--{key}" if value else f"--no_{key}"]
            if isinstance(value, bool)
            else [f"--{key}", str(value)]
        )
    return words


def command_line(name, world=1, **settings) -> list[str]:
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return [
        sys.executable,
        *(torchrun if world > 1 else []),
        str(ROOT / "pretraining_advanced.py"),
        *flags(name, **settings),
    ]


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(home, name, world=1, env=None, fresh=False, **settings) -> subprocess.CompletedProcess:
    """The trainer, on `world` processes; more than one under torchrun."""
    if world == 1:
        return run(
            "pretraining_advanced.py",
            *flags(name, **settings),
            cwd=home,
            timeout=180,
            env=env,
            fresh=fresh,
        )
    line = command_line(name, world, **settings)
    return subprocess.run(
        line,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(**(env or {})),
        check=False,
    )


@contextlib.contextmanager
def running(home, name, until: str, world=1, **settings):
    """The trainer once it has printed a line with `until`; ended by the caller."""
    line = command_line(name, world, log_exact=True, **settings)
    with subprocess.Popen(
        line, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        if not any(until in line for line in process.stdout):
            raise AssertionError(process.stderr.read())
        yield process


def ranks_of(process) -> dict[int, int]:
    """rank -> process id, of the children of torchrun."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/stat") as stat,
            open(f"/proc/{pid}/environ", "rb") as environ,
        ):
            rank = re.search(rb"\0RANK=(\d+)\0", environ.read())
            if rank and int(stat.read().rsplit(")", 1)[1].split()[1]) == process.pid:
                found[int(rank[1])] = int(pid)
    return found


def stop(home, name, step, world=1, **settings) -> None:
    """Run it, and ask it politely to stop once it has done this step."""
    group = ranks(
        "pretraining_advanced.py", *flags(name, log_exact=True, **settings), world=world, cwd=home
    )
    try:
        ends = time.monotonic() + 120
        while f"step {step} loss" not in group.out[0].read_text(encoding="utf-8"):
            assert time.monotonic() < ends and os.path.exists(f"/proc/{group.pids[0]}"), group.err[
                0
            ].read_text(encoding="utf-8")
            time.sleep(0.005)
        group.kill(signal.SIGTERM)
    except BaseException:
        group.kill()
        raise
    finally:
        results = group.wait(60)
    assert [r.returncode for r in results] == [75] * world, [r.stderr[-2000:] for r in results]


def train(home, name, world=1, **settings):
    """The run folder of a training that has to succeed."""
    for result in ranks(
        "pretraining_advanced.py", *flags(name, **settings), world=world, cwd=home
    ).wait(180):
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return home / "runs" / name


def train_here(home, monkeypatch, name, stop_at=None, **settings) -> int:
    """
    The trainer in this process, asked to stop in step `stop_at`. Returns the exit code.

    Raises what `run_script` would print.
    """

    def rate(step, *args):
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *args)

    with monkeypatch.context() as patch, contextlib.chdir(home):
        patch.setattr(pretraining_advanced, "learning_rate", rate)
        return pretraining_advanced.run(
            TrainConfig(**{"dataset_name": "data", "run_name": name, **SMALL, **settings})
        )


def refusal(home, monkeypatch, name, **settings) -> str:
    """The line with which these settings are refused, as bad input."""
    settings = {
        key: None if value == "None" else str(value) if isinstance(value, os.PathLike) else value
        for key, value in settings.items()
    }
    with pytest.raises(BAD_INPUT) as e:
        train_here(home, monkeypatch, name, **settings)
    return error_line(e.value)


def metrics(folder, key="train_loss") -> list:
    records = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [r["step"] for r in records] == list(range(records[-1]["step"] + 1))
    return [r[key] for r in records if key in r]


def tensors(folder, file="model.safetensors") -> dict:
    return load_tensors(newest_checkpoint(folder) / file)


# (ranks, accumulation, rows per micro-batch): eight rows a step, in every way
def state_of(folder) -> tuple:
    folder_of = newest_checkpoint(folder)
    return weights_hash(load_tensors(folder_of / "model.safetensors")), weights_hash(
        load_tensors(folder_of / "optimizer.safetensors")
    )


ARRANGEMENTS = {
    "dropout": {"dropout": 0.1, "grad_accum_steps": 2},
    "compiled": {"compile": True, "eval_freq": 3, "batch_size": 4},
    "recomputed": {"activation_checkpointing": True, "dropout": 0.1},
    "bf16": {"dtype": "bf16"},
    "wsd": {"schedule": "wsd", "optimizer": "muon"},
}
OFTEN = {"save_ckpt_freq": 7, "eval_freq": 8, "max_steps": 40}


def the_same_to_the_bit(resumed, straight) -> bool:
    keys = ("train_loss", "val_loss", "grad_norm", "lr", "tokens")
    return state_of(resumed) == state_of(straight) and all(
        metrics(resumed, k) == metrics(straight, k) for k in keys
    )
