"""The production trainer in trouble: bad input in one line, signals, limits, other programs."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, one_error_line, run
from training_cases import (
    command_line,
    environment,
    flags,
    home,  # noqa: F401  a fixture
    metrics,
    ranks_of,
    refusal,
    running,
    start,
    train,
)

from parts.storage.checkpoint import newest_checkpoint


def test_a_damaged_shard_met_in_training_fails_the_run_after_saving(home, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        (home / "data/train.jsonl").read_text(encoding="utf-8") * 15, encoding="utf-8"
    )  # eight blocks
    settings = {
        "dataset_name": tmp_path / "text.jsonl",
        "cache_dir": tmp_path / "cache",
        "eval_tokens": 1000,
    }
    train(home, "before_damage", max_steps=1, **settings)
    shard = next((tmp_path / "cache").glob("*/train_000000.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    line = one_error_line(start(home, "damage", max_steps=100_000, **settings), 1)
    assert "train_000000.bin" in line and "damaged" in line
    last = len(metrics(home / "runs/damage"))
    assert newest_checkpoint(home / "runs/damage").name == f"step_{last:06d}"
    index = next((tmp_path / "cache").glob("*/val_000000.bin"))
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    line = one_error_line(
        start(home, "damaged_val", max_steps=2, **{**settings, "eval_tokens": "None"}), 1
    )
    assert "val_000000.bin" in line, "met in an evaluation"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_before_torch_is_there_has_its_exit_code(home, name):
    with subprocess.Popen(
        command_line("early"), cwd=home, stderr=subprocess.PIPE, env=environment()
    ) as process:
        caught, wanted = 0, 1 << signal.SIGUSR1 - 1
        while not caught & wanted:  # the first thing that the script does
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
                caught = int(re.search(r"SigCgt:\s*(\w+)", status.read())[1], 16)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if name == "SIGINT" else 75) and b"Traceback" not in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_subset": "nope"}, "no folder 'nope'"),
        ({"text_field": "body"}, "its columns are text"),
        ({"model_size": "huge"}, "unknown size 'huge'"),
        ({"max_lr": -1}, "--max_lr: -1"),
        ({"parallel": "ddp"}, "torchrun --nproc_per_node 2"),
        ({"optimizer": "galore8bit"}, "needs CUDA"),
        ({"dtype": "fp16"}, "--dtype fp16: needs CUDA"),
        ({"device": "cuda:9"}, "--device"),
        ({"batch_size": 100_000, "max_steps": "None"}, "fewer than one step"),
        ({"keep_last": 1_000_000_000}, "the disk has"),
        ({"val_share": 0}, "--val_share"),
        ({"output_dir": "data/train.jsonl"}, "data/train.jsonl"),
        ({"output_dir": "/proc/nope"}, "/proc/nope"),
        ({"output_dir": "."}, "current folder"),
        ({"n_embd": 65}, "n_embd 65"),
        ({"run_name": ""}, "--run_name, --output_dir: a name is empty"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_no_run_folder(home, monkeypatch, settings, message):
    line = refusal(home, monkeypatch, "bad", **settings)
    assert message in line, line
    assert not (home / "runs/bad").exists()


def test_a_name_that_is_neither_here_nor_reachable_is_one_line(home):
    result = start(
        home, "bad", env={"https_proxy": "http://127.0.0.1:9"}, dataset_name="nobody/nothing"
    )
    assert "nobody/nothing" in one_error_line(result, 2) and not (home / "runs/bad").exists()


def test_a_bad_line_under_torchrun_is_told_once(home):
    result = start(home, "bad", world=2, optimizer="galore8bit")
    assert result.returncode == 1 and result.stderr.count("error: --optimizer galore8bit") == 1, (
        result.stderr
    )
    assert result.stderr.count("Traceback") == 1, "torchrun's own, and none of ours"
    result = start(home, "bad", world=2, batch_sise=1)
    assert result.stderr.count("did you mean") == 1


def test_a_checkpoint_of_the_simple_script_is_refused(home, texts):
    words = (
        "--data_dir",
        texts,
        "--output_dir",
        "runs/of_simple",
        "--max_steps",
        "2",
    )
    assert (
        run(
            "pretraining_simple.py",
            *words,
            *TINY,
            cwd=home,
        ).returncode
        == 0
    )
    assert "pretraining_simple.py" in one_error_line(start(home, "of_simple"), 2)


def test_a_second_run_in_the_same_folder_is_refused(home):
    with running(home, "busy", "step 3 loss", max_steps=100_000) as process:
        assert "is in use by another run" in one_error_line(start(home, "busy"), 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 75


def test_a_time_limit_stops_saves_and_goes_on(home):
    result = start(home, "minutes", max_steps=100_000, max_minutes=0.03)
    assert result.returncode == 75 and "the same command resumes from there" in result.stdout
    step = len(metrics(home / "runs/minutes"))
    again = start(home, "minutes", max_steps=100_000, max_minutes=0.03)
    assert (
        again.returncode == 75
        and f"resumed from step {step}" in again.stdout
        and len(metrics(home / "runs/minutes")) > step
    )


def test_a_time_between_checkpoints(home):
    folder = train(home, "often", max_steps=30, save_ckpt_minutes=1e-9, keep_last=100)
    assert len(list((folder / "checkpoints").iterdir())) == 30


def test_a_disk_that_refuses_costs_no_older_checkpoint(home):
    """No file may exceed 100 kB at the second checkpoint: exit 1; the same command resumes."""
    train(home, "full", max_steps=4, save_ckpt_freq=4, min_lr=1e-4, warmup_steps=1)
    (home / "runs/full/checkpoints/.step_000008.part").write_text("in the way", encoding="utf-8")
    settings = {"max_steps": 8, "min_lr": 1e-4, "warmup_steps": 1, "allow_change": "max_steps"}
    settings["save_retry_minutes"] = 0
    limited = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.argv = sys.argv[1:]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        limited,
        str(ROOT / "pretraining_advanced.py"),
        *flags("full", **settings),
    ]
    result = subprocess.run(
        command, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1 and "is not saved" in result.stdout, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and "could not be saved" in result.stderr
    assert [p.name for p in sorted((home / "runs/full/checkpoints").iterdir())] == ["step_000004"]
    assert start(home, "full", **settings).returncode == 0 and len(metrics(home / "runs/full")) == 8


def test_a_gradient_that_is_not_finite_is_left_out_and_told(home):
    result = start(home, "nan", max_lr=1e38, warmup_steps=0, max_grad_norm=0, max_steps=200)
    assert result.returncode == 1 and "the step is skipped" in result.stdout
    assert (
        "20 bad steps in a row" in result.stderr
        and "no checkpoint to roll back to" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_yaml_stands_under_the_line_and_is_converted_by_type(home):
    (home / "a.yaml").write_text(
        "max_lr: 3e-3\nmax_steps: 3\nrun_name: from_yaml\n", encoding="utf-8"
    )
    words = [w for w in flags("unused") if w not in ("--run_name", "unused", "--max_lr", "0.003")]
    i = words.index("--max_steps")
    result = run(
        "pretraining_advanced.py", "--config", "a.yaml", *words[:i], *words[i + 2 :], cwd=home
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((home / "runs/from_yaml/run.json").read_text(encoding="utf-8"))["config"]
    assert config["max_lr"] == 3e-3 and config["max_steps"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\nmax_lrr: 2\n", "did you mean max_lr"),
        ("max_lr: fast\n", "max_lr: 'fast' is not of type float"),
        ("max_lr: .nan\n", "max_lr: nan"),
        ("compile: no_idea\n", "compile"),
        ("schedule: cosin\n", "schedule: 'cosin'"),
        ("- 1\n- 2\n", "not a mapping"),
        ("!!python/object/apply:os.system ['touch canary']", "not readable as YAML"),
        ("max_lr:\t1\n\t- x: [\n", "not readable as YAML"),
        ("max_steps: 1" + "0" * 400, "max_steps: "),
        ("max_lr: 1 # " + "x" * 2_000_000, "longer than 1,048,576 characters"),
        ("a: &a [x,x,x]\nmax_lr: [*a,*a]\n", "the alias *a; write it out"),
    ],
)
def test_a_bad_yaml_file_is_named_with_every_problem(home, text, message):
    (home / "bad.yaml").write_text(text, encoding="utf-8")
    result = run("pretraining_advanced.py", "--config", "bad.yaml", cwd=home)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        result.returncode == 2 and message in result.stderr and all("bad.yaml" in e for e in errors)
    ), result.stderr
    assert "Traceback" not in result.stderr and not (home / "canary").exists()
    assert one_error_line(run("pretraining_advanced.py", "--config", "absent.yaml", cwd=home), 2)


def test_one_yaml_file_is_enough_and_an_empty_name_is_none(home):
    for name in ("a", "b"):
        (home / f"{name}.yaml").write_text("max_steps: 3\n", encoding="utf-8")
    words = ("--config", "a.yaml", "--config=b.yaml")
    assert "is given 2 times (a.yaml, b.yaml)" in one_error_line(
        run("pretraining_advanced.py", *words, cwd=home), 2
    )
    assert "--config: is empty" in one_error_line(
        run("pretraining_advanced.py", "--config", "", cwd=home), 2
    )


def test_a_dying_rank_ends_the_job_within_a_minute_and_is_named(home):
    with running(home, "dying", "step 3 loss", world=2, max_steps=100_000) as process:
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - started < 60
        assert re.search(r"rank +: 1 ", err), err[-2000:]


MEASURED = """
import runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("/proc/self/status", encoding="utf-8") as f:
        anonymous = next(line.split()[1] for line in f if line.startswith("RssAnon"))
    with open(report, "w", encoding="utf-8") as out:
        out.write(anonymous)
"""


def test_memory_of_a_rank_does_not_grow_with_the_text(home, tmp_path):
    figures = []
    for times in (1, 10):
        data = tmp_path / f"x{times}"
        data.mkdir()
        (data / "a.jsonl").write_text(
            (home / "data/train.jsonl").read_text(encoding="utf-8") * 20 * times, encoding="utf-8"
        )
        settings = {
            "dataset_name": data,
            "output_dir": tmp_path / f"run{times}",
            "cache_dir": tmp_path / "cache",
            "eval_tokens": 1000,
        }
        assert start(home, "unused", max_steps=1, **settings).returncode == 0  # builds the cache
        line = command_line(
            "unused", max_steps=30, allow_change="max_steps,warmup_steps", **settings
        )
        measured = [line[0], "-c", MEASURED, str(tmp_path / f"rss{times}"), *line[1:]]
        subprocess.run(
            measured,
            cwd=home,
            check=True,
            timeout=120,
            env=environment(MALLOC_ARENA_MAX="1"),
            capture_output=True,
        )
        figures.append(int((tmp_path / f"rss{times}").read_text(encoding="utf-8")))
    assert figures[1] < 1.05 * figures[0], figures


def cpu_seconds(call) -> float:
    before = os.times()
    assert call().returncode == 0
    after = os.times()
    return (
        after.children_user - before.children_user + after.children_system - before.children_system
    )


def test_the_first_step_costs_little_more_than_importing_torch(home):
    train(home, "cache")  # the token cache is there
    torch_alone = cpu_seconds(
        lambda: subprocess.run(
            [sys.executable, "-c", "import torch"], check=True, env=environment()
        )
    )
    seconds = cpu_seconds(
        lambda: start(home, "quick", fresh=True, max_steps=1, print_sample_iter=1000)
    )
    print(f"{seconds:.2f} s of CPU for a run of one step, {torch_alone:.2f} s to import torch")
    assert seconds < 4 * torch_alone  # evaluation, checkpoint and plot are in it too


def test_wandb_offline_gets_every_record_and_cannot_stop_the_run(home):
    folder = train(home, "wandb", use_wandb=True, max_steps=10)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    broken = home / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text("raise RuntimeError('no wandb today')", encoding="utf-8")
    result = start(home, "nowandb", env={"PYTHONPATH": str(broken)}, use_wandb=True, max_steps=10)
    assert result.returncode == 0 and "wandb is off: no wandb today" in result.stdout
    ours, theirs = (metrics(home / "runs" / name) for name in ("wandb", "nowandb"))
    assert ours == theirs and math.isfinite(ours[-1])


def test_ranks_that_see_other_text_are_refused(home, tmp_path):
    for rank in "01":
        shutil.copytree(home / "data", tmp_path / rank / "data")
    with open(tmp_path / "1/data/train.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps({"text": "One document more, on one machine only."}) + "\n")
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, runpy\n"
        "os.chdir(os.environ['RANK'])\n"
        f"runpy.run_path({str(ROOT / 'pretraining_advanced.py')!r}, run_name='__main__')\n"
    )
    line = [
        word if not word.endswith("pretraining_advanced.py") else str(script)
        for word in command_line("apart", 2)
    ]
    done = subprocess.run(
        line,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
        check=False,
    )
    told = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    assert (
        done.returncode == 1
        and len(told) == 1
        and "rank 1 has other data" in told[0]
        and "--cache_dir" in told[0]
    ), done.stderr
    assert not (tmp_path / "0/runs/apart/run.json").exists()
