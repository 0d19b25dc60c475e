"""pretraining_simple.py as a person starts it: a short real run, its files, and every mistake."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, one_error_line, run
from safetensors.torch import load_file

import pretraining_simple
from gpt_train import load_model
from parts.storage.run_folder import claimed
from pretraining_simple import (
    SimpleConfig,
    learning_rate_share,
    split_documents,
    train_batches,
    val_batches,
)

FINISHED = {"max_steps": 30, "eval_freq": 10, "print_sample_iter": 15, "lr": 0.01}


def words_of(flags: dict) -> list[str]:
    """{"lr": 0.01} as --lr 0.01."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def simple(cwd, env=None, **flags):
    """Run the script in the folder `cwd`, on a tiny model."""
    return run("pretraining_simple.py", *TINY, *words_of(flags), cwd=cwd, env=env)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """A run of 30 steps: (its folder, its output)."""
    folder = tmp_path_factory.mktemp("run")
    result = simple(folder, data_dir=texts, **FINISHED)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def metrics(folder, run_dir="runs/simple") -> list[dict]:
    """The records of metrics.jsonl."""
    lines = (folder / run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train_losses(folder, run_dir="runs/simple") -> list[float]:
    """The training loss of each step."""
    return [r["train_loss"] for r in metrics(folder, run_dir) if "train_loss" in r]


def test_a_run_learns_and_leaves_its_files(finished):
    folder, out = finished
    records = metrics(folder)
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 10, 20, 30]
    assert [r["step"] for r in records if "train_loss" in r] == list(range(1, 31))
    assert abs(evaluations[0]["val_loss"] - 5.549) < 0.3  # ln(257)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
    assert all(r["val_bits_per_byte"] > 0 and r["val_tokens"] > 100 for r in evaluations)
    assert "finished at step 30" in out

    run_dir = folder / "runs/simple"
    files = ["checkpoints", "loss.png", "metrics.jsonl", "run.json", "samples.txt"]
    assert sorted(p.name for p in run_dir.glob("[!.]*")) == files
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_000030"]
    samples = (run_dir / "samples.txt").read_text(encoding="utf-8")
    assert re.findall(r"--- step (\d+)", samples) == ["15", "30"]
    facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    assert facts["config"]["max_steps"] == 30


def test_the_command_it_prints_at_the_end_samples_from_the_result(finished):
    folder, out = finished
    command = re.search(r"sample from it: python (.*)", out)[1]
    words = [sys.executable, *shlex.split(command), "--max_new_tokens", "20"]
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "It was" in result.stdout, result.stderr
    assert "step 30" in result.stdout


def test_sampling_needs_the_checkpoint_alone_and_is_repeatable(finished, tmp_path):
    checkpoint = finished[0] / "runs/simple/checkpoints/step_000030"
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    words = ["--checkpoint", "ckpt", "--num_samples", "2", "--max_new_tokens", "40"]
    outputs = [run("gpt_train.py", *words, cwd=tmp_path).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("-" * 80) == 2


def test_the_same_seed_gives_the_same_run_and_the_earlier_one_is_kept(finished, texts):
    folder = finished[0]
    result = simple(folder, data_dir=texts, **FINISHED)
    assert "the earlier run is kept as runs/simple-1" in result.stdout
    new, earlier = folder / "runs/simple", folder / "runs/simple-1"
    for name in ("metrics.jsonl", "samples.txt", "checkpoints/step_000030/model.safetensors"):
        assert (new / name).read_bytes() == (earlier / name).read_bytes(), name
    other = simple(folder, data_dir=texts, max_steps=2, seed=7, output_dir="runs/other")
    assert other.returncode == 0
    assert train_losses(folder, "runs/other")[0] != train_losses(folder)[0]


def test_evaluating_more_often_does_not_change_training(finished, texts, tmp_path):
    often = {**FINISHED, "eval_freq": 3, "print_sample_iter": 2, "save_ckpt_freq": 4}
    simple(tmp_path, data_dir=texts, **often)
    assert train_losses(tmp_path) == train_losses(finished[0])


def test_a_run_inside_the_data_folder_is_not_read_as_text(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "t")
    for _ in range(2):
        result = simple(tmp_path, data_dir="t", max_steps=2, output_dir="t/run")
        assert result.returncode == 0
    assert metrics(tmp_path, "t/run") == metrics(tmp_path, "t/run-1")


def test_a_folder_in_use_is_refused_and_not_moved(texts, tmp_path):
    """Whichever trainer is running in it: they take the same lock."""
    runs = tmp_path / "runs"
    with claimed(runs / "simple"):
        (runs / "simple/run.json").write_text("{}", encoding="utf-8")
        advanced = ("--dataset_name", texts, "--val_share", "0.5", "--resume", "never")
        for script, data in (
            ("pretraining_simple.py", ("--data_dir", texts)),
            ("pretraining_advanced.py", (*advanced, "--cache_dir", tmp_path / "cache")),
        ):
            flags = (*data, *TINY, "--output_dir", "runs/simple")
            line = one_error_line(run(script, *flags, cwd=tmp_path), 2)
            assert "--output_dir: runs/simple is in use by another run" in line
            assert [p.name for p in runs.iterdir()] == ["simple"]
        assert not (runs / "simple/metrics.jsonl").exists()


def test_an_earlier_run_stays_where_it_is_if_the_next_does_not_start(finished, texts, tmp_path):
    run_dir = tmp_path / "runs/simple"
    shutil.copytree(finished[0] / "runs/simple", run_dir)
    before = sorted(p.name for p in run_dir.iterdir())  # the hidden .lock of that run, too
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("Too short.", encoding="utf-8")
    result = run("pretraining_simple.py", "--data_dir", "short", *TINY, cwd=tmp_path)
    one_error_line(result, 2)
    assert sorted(p.name for p in run_dir.iterdir()) == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["simple"]


def test_the_lock_of_a_run_that_is_moved_is_held_until_its_successor_ends(tmp_path):
    with claimed(tmp_path / "x") as begin_afresh:
        (tmp_path / "x/run.json").write_text("{}", encoding="utf-8")
        begin_afresh()
        for name in ("x", "x-1"):
            with pytest.raises(ValueError, match="in use by another run"), claimed(tmp_path / name):
                pass
    for name in ("x", "x-1"):
        with claimed(tmp_path / name):
            pass


def test_a_run_that_lost_its_run_json_is_kept_too(texts, tmp_path):
    assert simple(tmp_path, data_dir=texts, max_steps=5).returncode == 0
    (tmp_path / "runs/simple/run.json").unlink()
    assert simple(tmp_path, data_dir=texts, max_steps=2).returncode == 0
    assert (tmp_path / "runs/simple/checkpoints/step_000002").exists()
    assert (tmp_path / "runs/simple-1/checkpoints/step_000005").exists()


# With a sample after each step, sampling notices first.
@pytest.mark.parametrize(
    ("sample_iter", "message"), [(200, "start again with a lower --lr than 1e+30"), (1, "lower")]
)
def test_a_run_that_diverges_ends_with_an_error(texts, tmp_path, sample_iter, message):
    result = simple(tmp_path, data_dir=texts, max_steps=9, lr=1e30, print_sample_iter=sample_iter)
    assert message in one_error_line(result, 1)


@pytest.mark.parametrize(
    ("spoiled", "at", "message"),
    [
        ("loss", 3, "the loss is nan and its gradient"),
        ("loss", 1, "the loss is nan and its gradient"),
        ("gradient", 4, "and its gradient nan at step 4"),
        ("gradient", 6, "and its gradient nan at step 6"),
    ],
)
def test_a_run_that_diverges_saves_the_weights_before_that(
    texts, tmp_path, monkeypatch, capsys, spoiled, at, message
):
    """The same weights as those of a run that ends one step before."""
    monkeypatch.chdir(tmp_path)
    real, step = pretraining_simple.calc_loss_batch, itertools.count(1)

    def spoil(inputs, targets, model, device):
        loss = real(inputs, targets, model, device)
        if next(step) != at:
            return loss
        return loss * math.nan if spoiled == "loss" else loss + InfiniteGradient.apply(loss)

    def config(name, **more):
        settings = {"model_size": "nano", "context_length": 16, "batch_size": 4}
        settings |= {"tokenizer": "bytes", "data_dir": str(texts), "device": "cpu", **more}
        return SimpleConfig(output_dir=f"runs/{name}", max_steps=9, save_ckpt_freq=5, **settings)

    monkeypatch.setattr(pretraining_simple, "calc_loss_batch", spoil)
    with pytest.raises(RuntimeError, match=f"{message}.*; start again with a lower --lr than"):
        pretraining_simple.main(config("bad"))
    (folder,) = Path("runs/bad/checkpoints").iterdir()
    assert folder.name == f"step_{at - 1:06d}"
    saved = load_file(folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())

    def stop(inputs, targets, model, device):
        if next(step) == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(inputs, targets, model, device)

    if at > 1:
        step = itertools.count(1)
        monkeypatch.setattr(pretraining_simple, "calc_loss_batch", stop)
        assert pretraining_simple.main(config("good")) == 75
        good = load_file(Path("runs/good/checkpoints", folder.name, "model.safetensors"))
        assert all(torch.equal(saved[name], good[name]) for name in good)


class InfiniteGradient(torch.autograd.Function):
    """Zero, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({"max_steps": 3, "eval_freq": 1, "save_ckpt_freq": 4}, ["--save_ckpt_freq 4"]),
        ({"max_steps": 3, "eval_freq": 4, "save_ckpt_freq": 3}, ["--eval_freq 4"]),
        ({"max_steps": 2}, ["--eval_freq 200", "--save_ckpt_freq 1,000"]),
        ({"max_steps": 3, "eval_freq": 3, "save_ckpt_freq": 3}, []),
    ],
)
def test_settings_without_effect_in_a_short_run_are_named(texts, tmp_path, lengths, said):
    out = simple(tmp_path, data_dir=texts, **lengths).stdout
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(said)
    assert re.findall(r"--\w+ [\d,]*\d", "".join(notes)) == said


def test_a_console_without_unicode_does_not_stop_the_run(texts, tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    result = simple(tmp_path, env=ascii_only, data_dir=texts, max_steps=2)
    assert result.returncode == 0, result.stderr[-500:]


def test_epochs_set_the_length(texts, tmp_path):
    result = simple(tmp_path, data_dir=texts, n_epochs=1, batch_size=64, context_length=64)
    steps = int(re.search(r"finished at step (\d+)", result.stdout)[1])
    n_tokens = int(re.search(r"bytes: ([\d,]+) training", result.stdout)[1].replace(",", ""))
    assert steps == (n_tokens - 1) // 64 // 64


def test_a_loaded_model_is_the_trained_one(finished):
    model, tokenizer, state = load_model(finished[0] / "runs/simple", torch.device("cpu"))
    assert state["script"] == "pretraining_simple.py" and state["step"] == 30
    assert tokenizer.vocab_size == 257
    assert not any(p.is_meta for p in model.parameters()) and not model.training


# -------------------------------------------------------------------------------------------- data


def test_the_hash_of_a_passage_decides_about_validation():
    paragraph = "Paragraph {} of a longer story about nothing. "
    text = "".join(paragraph.format(i) * 5 + "\n\n" for i in range(400))
    train, val = split_documents([text])
    assert "".join(train).count("Paragraph") + "".join(val).count("Paragraph") == 2000
    assert 0.01 < len("".join(val)) / len(text) < 0.12
    assert "Paragraph" in "".join(val)
    assert split_documents([text]) == (train, val)


def test_two_copies_of_a_text_do_not_leak_from_one_side_to_the_other():
    text = "".join(
        f"Line {i} of the text that is there twice, word by word.\n\n" for i in range(3000)
    )
    train, val = split_documents([text, text])
    trained, held_out = (set(re.findall(r"Line \d+", "".join(part))) for part in (train, val))
    assert len(val) == 2 and not trained & held_out


def test_a_text_without_blank_lines_is_split_too():
    train, val = split_documents([" ".join(str(i * i) for i in range(5000))])
    assert train and val and len(train[0]) > len(val[0])


# 3 does not divide an epoch of 10 windows: its last batch reaches into the next epoch.
@pytest.mark.parametrize("batch_size", [2, 3, 10])
def test_every_window_comes_once_per_epoch_and_targets_are_the_next_tokens(batch_size):
    tokens = torch.arange(8 * 10 + 1, dtype=torch.int32)
    batches = train_batches(tokens, batch_size, 8, seed=1)
    rows = [next(batches) for _ in range(30 // batch_size)]
    inputs = torch.cat([x for x, _ in rows])
    targets = torch.cat([y for _, y in rows])
    assert torch.equal(targets, inputs + 1)
    epochs = [inputs[i : i + 10, 0].tolist() for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(0, 80, 8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 50])
def test_validation_predicts_every_token_but_the_first_exactly_once(n):
    batches = val_batches(torch.arange(n, dtype=torch.int32), 3, 8)
    targets = torch.cat([y[y != -100] for _, y in batches])
    assert targets.tolist() == list(range(1, n))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    shares = [learning_rate_share(s, 1000) for s in range(1001)]
    assert shares[0] == 0.01
    assert max(shares) == shares[100] == shares[99] == 1
    assert shares[1000] == pytest.approx(0.1)
    # no division by zero in a run of one step
    assert [learning_rate_share(s, 1) for s in (0, 1)] == pytest.approx([1, 0.1])


# --------------------------------------------------------------------------------------- bad input

MISTAKES = [  # the flags of a command, and what its error line says; TEXTS stands for good data
    ("--data_dir nowhere", "nowhere does not exist"),
    ("--data_dir no_text", "no_text has no .parquet"),
    ("--data_dir empty", "empty: holds no documents; its 2 files are empty"),
    ("--data_dir short", "too few for one batch"),
    ("--data_dir latin", "latin/a.txt: not UTF-8 text: byte 0xef"),
    ("--data_dir binary", "binary/a.txt: not text, it has NUL bytes"),
    ("--data_dir ''", "--data_dir: is empty"),
    ("--data_dir short --output_dir short", "--output_dir: short"),
    ("--data_dir TEXTS --output_dir .", "--output_dir: . is the current folder"),
    ("--data_dir TEXTS --output_dir latin/a.txt/run", "--output_dir: latin/a.txt"),
    ("--data_dir TEXTS --context_length 100000", "too few for one batch of 4 rows of 100000"),
    ("--data_dir TEXTS --batch_size 100000", "too few for one batch of 100000 rows"),
    ("--data_dir TEXTS --batch_size -3", "--batch_size: -3"),
    ("--data_dir TEXTS --batch_sise 3", "did you mean --batch_size"),
    ("--data_dir TEXTS --model_size huge", "nano, micro, mini, small, 124M, 355M, 774M, 1558M"),
    ("--data_dir TEXTS --seed 100000000000000", "--seed: 100000000000000 does not fit"),
    ("--data_dir TEXTS --lr nan", "--lr: nan"),
    ("--data_dir TEXTS --lr fast", "--lr: 'fast' is not a number"),
    ("--data_dir TEXTS --device meta", "--device meta: 'meta'"),
    ("--data_dir TEXTS --device cuda:77", "--device cuda:77: "),
    ("--data_dir TEXTS --tokenizer bpe:99999999999999999999999", "--tokenizer: bpe"),
    ("--data_dir TEXTS --tokenizer bytes:5", "--tokenizer: bytes:5"),
    ("--data_dir TEXTS --tokenizer nothing.json", "--tokenizer: nothing.json"),
    ("--data_dir nowhere --tokenizer nothing.json", "--tokenizer: nothing.json"),
    ("--data_dir nowhere --tokenizer bpe:7", "--tokenizer: bpe:7 is out of range"),
    ("--data_dir nowhere --tokenizer bpe:x", "--tokenizer: bpe:x"),
    ("--data_dir nowhere --output_dir latin/a.txt/run", "--output_dir: latin/a.txt"),
    ("--data_dir nowhere --output_dir /proc/run", "--output_dir: /proc/run"),
]
BAD_FILES = {
    "no_text/a.md": b"x",
    "empty/a.txt": b"",
    "empty/b.txt": b"\n\n",
    "short/a.txt": b"One line.",
    "binary/a.txt": b"a\0b" * 99,
    "latin/a.txt": b"na\xefve",
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, texts, flags, message):
    for name, data in BAD_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    words = [str(texts) if word == "TEXTS" else word for word in shlex.split(flags)]
    result = run("pretraining_simple.py", *TINY, *words, cwd=tmp_path)
    assert message in one_error_line(result, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_sampling_from_nothing_is_one_line(tmp_path):
    assert "runs/simple: no checkpoint here" in one_error_line(run("gpt_train.py", cwd=tmp_path), 2)


def test_debug_adds_the_traceback(tmp_path):
    words = ["--data_dir", "nowhere", "--debug"]
    result = run("pretraining_simple.py", *TINY, *words, cwd=tmp_path)
    assert result.returncode != 0
    assert "error: " in result.stderr and "Traceback" in result.stderr


# Writes fail from 60 kB on: the checkpoint does not fit, everything else does.
SMALL_FILES = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
os.execv(sys.executable, sys.argv[1:])
"""


def test_a_full_disk_is_a_warning_and_then_the_exit_code(tmp_path, texts):
    lengths = words_of({"max_steps": 4, "save_ckpt_freq": 2, "eval_freq": 2})
    script = [sys.executable, ROOT / "pretraining_simple.py", *TINY, "--data_dir", texts, *lengths]
    command = [str(word) for word in (sys.executable, "-c", SMALL_FILES, *script)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "could not be saved" in one_error_line(result, 1)
    assert "warning: step 2 is not saved" in result.stdout
    assert "finished at step 4" in result.stdout
    assert list((tmp_path / "runs/simple/checkpoints").iterdir()) == []


# ------------------------------------------------------------------------------------------ Ctrl-C


def started(cwd, **flags) -> subprocess.Popen:
    """The script as a running process."""
    script = ["-u", str(ROOT / "pretraining_simple.py"), *TINY, *words_of(flags)]
    return subprocess.Popen(
        [sys.executable, *script],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.8, 1.5, 2.2, 3.0])
def test_ctrl_c_at_any_time_leaves_no_traceback_and_nothing_half_written(tmp_path, texts, seconds):
    process = started(tmp_path, data_dir=texts, max_steps=100000)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # Until the first line of the script has run, Python itself answers the signal.
    python_answered = seconds < 0.5 and process.returncode in (1, -2)
    assert process.returncode == 130 or python_answered, (process.returncode, err[-1000:])
    if process.returncode == 130:
        assert "Traceback" not in out + err
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopping_a_run_saves_it_and_it_can_be_sampled(tmp_path, texts, number, code):
    process = started(tmp_path, data_dir=texts, max_steps=100000, eval_freq=100000)
    while "validation loss" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert load_model(tmp_path / "runs/simple", torch.device("cpu"))[2]["step"] == step > 0
    assert (tmp_path / "runs/simple/loss.png").exists()
