"""The production trainer under every engine, DeepSpeed's too: started, stopped and killed."""

import os
import signal
import time

import pytest
from conftest import ranks
from training_cases import flags, metrics

SCRIPT = "tests/faults/with_deepspeed.py"
LLAMA = {
    "model_size": "llama-nano",
    "max_lr": 1e-4,
    "max_grad_norm": 0.5,
    "log_exact": True,
    "dropout": 0.0,
}


def train_under(home, name, world=1, stage=0, **settings):
    """The run folder of a training that has to succeed; stage: of ZeRO, for parallel=deepspeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZERO_STAGE", str(stage))
        group = ranks(SCRIPT, *flags(name, **LLAMA | settings), world=world, cwd=home)
    for result in group.wait(240):
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return home / "runs" / name


def end_after(home, name, step, number=signal.SIGKILL, world=1, stage=0, **settings) -> None:
    """Start it, and send this signal to all ranks once it has done this step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZERO_STAGE", str(stage))
        group = ranks(SCRIPT, *flags(name, **LLAMA | settings), world=world, cwd=home)
    try:
        ends = time.monotonic() + 120
        while f"step {step} loss" not in group.out[0].read_text(encoding="utf-8"):
            error = group.err[0].read_text(encoding="utf-8")
            assert time.monotonic() < ends and os.path.exists(f"/proc/{group.pids[0]}"), error
            time.sleep(0.005)
        group.kill(number)
    except BaseException:
        group.kill()
        raise
    finally:
        codes = [result.returncode for result in group.wait(60)]
    assert codes == [-9 if number == signal.SIGKILL else 75] * world


def same_training(folder, reference, rel=1e-5) -> None:
    """Losses, norms and validation losses equal those of the reference."""
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert metrics(folder, key) == pytest.approx(metrics(reference, key), rel=rel), key
