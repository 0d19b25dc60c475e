"""A disk that refuses a checkpoint: it is tried again, waited for at the end, and never in vain."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ranks
from small_job import bits, config_of, small_job
from training_cases import flags, home, state_of, train  # noqa: F401  home is a fixture

import pretraining_advanced
from parts.storage import checkpoint
from parts.storage.checkpoint import list_checkpoints, read_state
from parts.training import resume
from pretraining_advanced import run


class Disk:
    """Stands in for save_checkpoint; refuses the attempts whose number is in `refused`."""

    def __init__(self, refused):
        self.save, self.refused = checkpoint.save_checkpoint, refused
        self.steps = []  # of all attempts
        self.on_attempt = {}  # number of an attempt -> function to call

    def __call__(self, run_dir, step, *rest):
        number = len(self.steps)
        self.steps.append(step)
        self.on_attempt.get(number, lambda: None)()
        if number in self.refused:
            raise OSError(28, "No space left on device", str(run_dir))
        return self.save(run_dir, step, *rest)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Function: a disk that refuses some attempts; time between two attempts is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resume, "RETRY_S", 0.0)
    monkeypatch.setattr(resume, "POLL_S", 0.01)

    def refusing(attempts) -> Disk:
        found = Disk(attempts)
        monkeypatch.setattr(checkpoint, "save_checkpoint", found)
        return found

    return refusing


def run_small(name, job=small_job, **settings) -> int:
    return run(config_of(name, **settings), job)


def saved_steps(name) -> list[int]:
    return [read_state(folder)["step"] for folder in list_checkpoints(f"runs/{name}")]


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


# --------------------------------------------------------------------------- during the run


@pytest.mark.parametrize(
    ("refused", "attempts"),
    [({0}, [3, 4, 6, 9, 12]), ({1, 2}, [3, 6, 7, 8, 9, 12]), (range(3), [3, 4, 5, 6, 9, 12])],
)
def test_a_refused_save_is_repeated_with_the_newest_state(disk, refused, attempts):
    full = disk(refused)
    assert run_small("retried") == 0
    assert full.steps == attempts
    good = [step for number, step in enumerate(attempts) if number not in refused]
    assert saved_steps("retried") == good
    disk(())
    assert run_small("straight") == 0
    assert bits("retried") == bits("straight")


def test_a_refused_save_waits_a_minute_for_the_next_attempt(disk, monkeypatch):
    monkeypatch.setattr(resume, "RETRY_S", 60.0)
    full = disk({0})
    assert run_small("a_minute") == 0
    assert full.steps == [3, 6, 9, 12]


def test_with_both_limits_at_zero_only_the_intervals_are_tried_and_nothing_is_waited_for(disk):
    full = disk(range(1, 99))
    with pytest.raises(OSError, match="the last step could not be saved"):
        run_small("as_before", save_retry_minutes=0, max_unsaved_minutes=0)
    assert full.steps == [3, 6, 9, 12] and saved_steps("as_before") == [3]


@pytest.mark.parametrize("written_before", [0, 1, 2])
def test_a_run_that_cannot_save_stops_long_before_its_end(disk, capsys, written_before):
    full = disk(range(written_before, 10_000))
    settings = {"max_steps": 100_000, "max_unsaved_minutes": 1e-9, "eval_freq": 100_000}
    with pytest.raises(OSError, match="the last step could not be saved"):
        run_small("hopeless", **settings)
    assert full.steps[-1] <= 3 * (written_before + 1) + 1, "and no wait after so long"
    assert "nothing could be saved for 1e-09 minutes: the run stops" in capsys.readouterr().out
    assert saved_steps("hopeless") == [3, 6][:written_before]


def test_a_run_that_can_save_again_is_not_stopped(disk):
    full = disk({0, 2})
    assert run_small("again", max_unsaved_minutes=60) == 0
    assert full.steps == [3, 4, 6, 7, 9, 12]


@pytest.mark.parametrize(
    ("losses", "best"),
    [([9, 5, 1, 3, 4], 12), ([9, 5, 1, 6, 7], 4), ([9, 5, 1, 6, 4], 14)],
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_checkpoint_that_was_refused_is_not_the_best_and_the_best_is_kept(
    disk, monkeypatch, losses, best, in_thread
):
    """losses: of the validation at steps 0, 4, 8 (whose checkpoint is refused), 12 and 14."""
    if in_thread:
        monkeypatch.setattr("parts.storage.writer.SMALL", -1)
    val_losses = iter(losses)
    monkeypatch.setattr(
        pretraining_advanced, "evaluate", lambda *_: {"val_loss": float(next(val_losses))}
    )
    monkeypatch.setattr(
        pretraining_advanced, "evaluation_line", lambda step, result: f"step {step}"
    )
    disk({1})
    settings = {"eval_freq": 4, "save_ckpt_freq": 4, "keep_last": 1, "save_retry_minutes": 0}
    assert run_small("best", max_steps=14, **settings) == 0
    assert saved_steps("best") == sorted({best, 14})
    assert read_state(list_checkpoints("runs/best")[-1])["best"]["step"] == best


# ------------------------------------------------------------------------------ at the end


@pytest.mark.parametrize("refused", [1, 2, 5])
def test_the_last_save_waits_until_there_is_space(disk, capsys, refused):
    full = disk(range(3, 3 + refused))
    assert run_small("waits") == 0
    assert full.steps == [3, 6, 9, *[12] * (refused + 1)]
    assert capsys.readouterr().out.count("waiting for space in runs/waits") == 1
    disk(())
    assert run_small("straight") == 0
    assert bits("waits") == bits("straight")


@pytest.mark.parametrize("refused", [1, 3])
def test_a_stop_on_request_waits_too_and_the_same_command_resumes(disk, refused):
    full = disk(range(1, 1 + refused))
    full.on_attempt = {0: ask_to_stop}
    assert run_small("stopped") == 75
    assert full.steps[1:] == [full.steps[1]] * (refused + 1)
    disk(())
    assert run_small("stopped") == 0
    assert run_small("straight") == 0
    assert bits("stopped") == bits("straight")


def test_the_wait_ends_with_its_time_and_older_checkpoints_stay(disk):
    full = disk(range(2, 10_000))
    started = time.monotonic()
    with pytest.raises(OSError, match="the last step could not be saved"):
        run_small("in_vain", save_retry_minutes=0.01)
    assert time.monotonic() - started < 10 and len(full.steps) > 4
    assert saved_steps("in_vain") == [3, 6]


@pytest.mark.parametrize("stopped_before", [True, False])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_wait(disk, name, stopped_before):
    full = disk(range(1, 10_000))
    end_wait = {8: lambda: os.kill(os.getpid(), getattr(signal, name))}
    full.on_attempt = end_wait | ({0: ask_to_stop} if stopped_before else {})
    with pytest.raises(OSError, match="the last step could not be saved"):
        run_small("enough", save_retry_minutes=60, save_ckpt_freq=11)
    assert len(full.steps) == 9 and saved_steps("enough") == full.steps[:1]


def test_a_step_that_the_thread_could_not_write_is_saved_when_the_text_ends(disk, monkeypatch):
    """The text is unreadable right after a step whose checkpoint was refused meanwhile."""
    monkeypatch.setattr("parts.storage.writer.SMALL", -1)
    full = disk({1})

    def damaged(config, building):
        job = small_job(config, building)
        rows = job.train_batches.batch

        def batch(first, n):
            if first >= 24:
                raise ValueError("a damaged shard")
            return rows(first, n)

        job.train_batches.batch = batch
        return job

    with pytest.raises(RuntimeError, match="a damaged shard"):
        run_small("unreadable", damaged)
    assert full.steps == [3, 6, 6] and saved_steps("unreadable") == [3, 6]


# --------------------------------------------------------------------------- several ranks


@pytest.fixture
def small_disk(tmp_path):
    """A folder with 10 MB of space."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def wait_for(group, text: str) -> None:
    ends = time.monotonic() + 60
    while text not in group.out[0].read_text(encoding="utf-8"):
        alive = os.path.exists(f"/proc/{group.pids[0]}") and time.monotonic() < ends
        assert alive, group.out[0].read_text("utf-8") + group.err[0].read_text("utf-8")
        time.sleep(0.02)


def waiting_for_space(home, small_disk, world: int, **settings):  # noqa: F811
    """(ranks whose disk became full after the first step and which wait, the file to delete)."""
    words = flags("full", output_dir=small_disk / "run", **LONG, **settings)
    group = ranks("pretraining_advanced.py", *words, world=world, cwd=home)
    wait_for(group, "step 0: validation")
    disk = os.statvfs(small_disk)
    (small_disk / "in_the_way").write_bytes(b"x" * (disk.f_bavail * disk.f_frsize - 60_000))
    wait_for(group, "waiting for space")
    return group, small_disk / "in_the_way"


LONG = {"max_steps": 300, "eval_freq": 1000, "save_ckpt_freq": 1000}


@pytest.mark.parametrize(("world", "parallel"), [(1, "none"), (2, "ddp"), (2, "fsdp")])
def test_ranks_wait_together_for_a_disk_that_is_full(home, small_disk, world, parallel):  # noqa: F811
    settings = {"parallel": parallel, "save_retry_minutes": 0.05}
    straight = train(home, f"{parallel}-straight", world, **LONG, **settings)
    group, in_the_way = waiting_for_space(home, small_disk, world, **settings)
    in_the_way.unlink()
    results = group.wait(60)
    assert [r.returncode for r in results] == [0] * world, results[0].stderr
    assert state_of(small_disk / "run") == state_of(straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_the_wait_of_all(home, small_disk, rank):  # noqa: F811
    group, _ = waiting_for_space(home, small_disk, 2, parallel="fsdp")
    time.sleep(2.5)
    os.kill(group.pids[rank], signal.SIGTERM)
    results = group.wait(30)
    assert [r.returncode for r in results] == [1, 1]
    errors = re.findall("^error: .*", "".join(r.stderr for r in results), re.MULTILINE)
    assert all("the last step could not be saved" in line for line in errors) and errors
