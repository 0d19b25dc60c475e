"""The production trainer under every engine, DeepSpeed's too: started, stopped and killed."""

import os
import random
import signal
import time

import pytest
from conftest import ranks
from training_cases import flags, metrics, the_same_to_the_bit

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


def end_after(
    home, name, step, number=signal.SIGKILL, world=1, stage=0, delay=0.0, **settings
) -> None:
    """Start it, and send this signal to all ranks `delay` seconds after this step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZERO_STAGE", str(stage))
        group = ranks(SCRIPT, *flags(name, **LLAMA | settings), world=world, cwd=home)
    try:
        ends = time.monotonic() + 120
        while f"step {step} loss" not in group.out[0].read_text(encoding="utf-8"):
            error = group.err[0].read_text(encoding="utf-8")
            assert time.monotonic() < ends and os.path.exists(f"/proc/{group.pids[0]}"), error
            time.sleep(0.005)
        time.sleep(delay)
        group.kill(number)
    except BaseException:
        group.kill()
        raise
    finally:
        codes = [result.returncode for result in group.wait(60)]
    assert codes == [-9 if number == signal.SIGKILL else 75] * world


def killed_ten_times(home, parallel, stage=0) -> None:
    """On two ranks: a run that is killed ten times ends with the bits of one that is not."""
    settings = {"batch_size": 2, "grad_accum_steps": 2, "parallel": parallel, "dropout": 0.1}
    settings |= {"model_size": "nano", "save_ckpt_freq": 5, "eval_freq": 6, "max_steps": 60}
    settings |= {"print_sample_iter": 9}
    straight = train_under(home, f"straight-{parallel}{stage}", 2, stage, **settings)
    name, draw = f"killed-{parallel}{stage}", random.Random(stage)
    for step in (1, 5, 6, 10, 14, 20, 23, 29, 35, 44):  # some of them while a checkpoint is written
        end_after(home, name, step, world=2, stage=stage, delay=draw.random() / 20, **settings)
    killed = train_under(home, name, 2, stage, **settings)
    assert the_same_to_the_bit(killed, straight)


def same_training(folder, reference, rel=1e-5) -> None:
    """Losses, norms and validation losses equal those of the reference."""
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert metrics(folder, key) == pytest.approx(metrics(reference, key), rel=rel), key
