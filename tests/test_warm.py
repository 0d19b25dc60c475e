"""A script that is started from warm.py does what the same script does when python starts it."""

import os
import re
import signal
import subprocess

import pytest
from conftest import TINY, one_error_line, ranks, run


def test_a_training_has_the_same_bits_and_the_same_words(texts, tmp_path):
    results = []
    for fresh in (True, False):
        (tmp_path / str(fresh)).mkdir()
        words = (*TINY, "--data_dir", texts, "--max_steps", "5", "--eval_freq", "2")
        results.append(run("pretraining_simple.py", *words, cwd=tmp_path / str(fresh), fresh=fresh))
    first, second = (
        re.sub(r"[\d,]+ per second|the [\d.]+ GB of free memory", "", r.stdout) for r in results
    )
    assert first == second and [r.returncode for r in results] == [0, 0]
    for name in ("metrics.jsonl", "samples.txt", "checkpoints/step_000005/model.safetensors"):
        a, b = (
            (tmp_path / str(fresh) / "runs/simple" / name).read_bytes() for fresh in (True, False)
        )
        assert a == b, name


def test_errors_exit_codes_folder_and_environment_arrive(tmp_path):
    (tmp_path / "say.py").write_text(
        "import os, sys\n"
        "rank = os.environ.get('RANK')\n"
        "print(__name__, sys.argv[1:], os.getcwd(), rank, sys.stdin.read())\n"
        "if sys.argv[1] == 'fails':\n    raise KeyError('a bug')\n"
        "if sys.argv[1] == 'dies':\n    os.kill(os.getpid(), 9)\n"
        "sys.exit(int(sys.argv[1]))",
        encoding="utf-8",
    )
    results = ranks(tmp_path / "say.py", "7", world=2, cwd=tmp_path).wait(60)
    assert [r.returncode for r in results] == [7, 7]
    assert [r.stdout for r in results] == [f"__main__ ['7'] {tmp_path} {rank} \n" for rank in "01"]
    fails, dies = (
        ranks(tmp_path / "say.py", word, world=1, cwd=tmp_path).wait(60)[0]
        for word in ("fails", "dies")
    )
    assert (
        fails.returncode == 1
        and fails.stderr.strip().endswith("KeyError: 'a bug'")
        and dies.returncode == -signal.SIGKILL
    )
    assert "did you mean --prompt" in one_error_line(
        run("gpt_train.py", "--promt", "x", cwd=tmp_path), 2
    )
    assert "RANK" not in os.environ


def test_what_takes_too_long_is_ended(tmp_path):
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(60)", encoding="utf-8")
    with pytest.raises(subprocess.TimeoutExpired):
        ranks(tmp_path / "sleep.py", world=2, cwd=tmp_path).wait(0.3)
    assert run("gpt_train.py", "--help", cwd=tmp_path).returncode == 0, "and the next start works"
