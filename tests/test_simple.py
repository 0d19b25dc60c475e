"""pretraining_simple.py as a person starts it: a tiny real run, its files, and everything that can be typed wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, one_error_line, run

from gpt_train import load_model
from pretraining_simple import learning_rate_share, split_documents, train_batches, val_batches


def simple(cwd, *arguments, **options):
    return run("pretraining_simple.py", *TINY, *arguments, cwd=cwd, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """A run of 30 steps: (its folder, its output)."""
    folder = tmp_path_factory.mktemp("run")
    result = simple(
        folder,
        "--data_dir",
        texts,
        "--max_steps",
        "30",
        "--eval_freq",
        "10",
        "--print_sample_iter",
        "15",
        "--lr",
        "0.01",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def metrics(folder):
    return [
        json.loads(line)
        for line in (folder / "runs/simple/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_run_learns_and_leaves_what_it_says(finished):
    folder, out = finished
    events = metrics(folder)
    validation = {e["step"]: e["val_loss"] for e in events if "val_loss" in e}
    assert sorted(validation) == [0, 10, 20, 30]
    assert (
        abs(validation[0] - 5.549) < 0.3 and validation[30] < validation[0] - 0.5
    )  # ln(257), and falling
    assert [e["step"] for e in events if "train_loss" in e] == list(range(1, 31))
    assert all(
        e["val_bits_per_byte"] > 0 and e["val_tokens"] > 100 for e in events if "val_loss" in e
    )
    run_dir = folder / "runs/simple"
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "run.json",
        "samples.txt",
    ]
    assert re.findall(r"--- step (\d+)", (run_dir / "samples.txt").read_text(encoding="utf-8")) == [
        "15",
        "30",
    ]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_000030"]
    assert (
        "finished at step 30" in out
        and json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["config"]["max_steps"]
        == 30
    )


def test_the_line_it_prints_at_the_end_samples_from_the_result(finished):
    folder, out = finished
    command = re.search(r"sample from it: python (.*)", out)[1]
    words = [sys.executable, *shlex.split(command), "--max_new_tokens", "20"]
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "It was" in result.stdout, result.stderr
    assert "step 30" in result.stdout


def test_sampling_needs_the_checkpoint_alone_and_is_repeatable(finished, tmp_path):
    (finished[0] / "runs/simple/checkpoints/step_000030").rename(tmp_path / "ckpt")
    try:
        outputs = [
            run(
                "gpt_train.py",
                "--checkpoint",
                "ckpt",
                "--num_samples",
                "2",
                "--max_new_tokens",
                "40",
                cwd=tmp_path,
            ).stdout
            for _ in range(2)
        ]
    finally:
        (tmp_path / "ckpt").rename(finished[0] / "runs/simple/checkpoints/step_000030")
    assert outputs[0] == outputs[1] and outputs[0].count("-" * 80) == 2


def test_the_same_seed_gives_the_same_run_and_the_earlier_one_is_kept(finished, texts):
    folder = finished[0]
    result = simple(
        folder,
        "--data_dir",
        texts,
        "--max_steps",
        "30",
        "--eval_freq",
        "10",
        "--print_sample_iter",
        "15",
        "--lr",
        "0.01",
    )
    assert "the earlier run is kept as runs/simple-1" in result.stdout
    for name in ("metrics.jsonl", "samples.txt", "checkpoints/step_000030/model.safetensors"):
        assert (folder / "runs/simple" / name).read_bytes() == (
            folder / "runs/simple-1" / name
        ).read_bytes(), name
    other = simple(
        folder, "--data_dir", texts, "--max_steps", "2", "--seed", "7", "--output_dir", "runs/other"
    )
    assert other.returncode == 0
    losses = [
        json.loads(line).get("train_loss")
        for line in (folder / "runs/other/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert losses[1] != [e.get("train_loss") for e in metrics(folder)][1]


def test_looking_more_often_does_not_change_training(finished, texts, tmp_path):
    simple(
        tmp_path,
        "--data_dir",
        texts,
        "--max_steps",
        "30",
        "--eval_freq",
        "3",
        "--print_sample_iter",
        "2",
        "--save_ckpt_freq",
        "4",
        "--lr",
        "0.01",
    )
    pick = [
        [e["train_loss"] for e in metrics(folder) if "train_loss" in e]
        for folder in (tmp_path, finished[0])
    ]
    assert pick[0] == pick[1]


def test_a_run_inside_the_data_folder_is_not_read_as_text(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "t")
    for _ in range(2):
        assert (
            simple(
                tmp_path, "--data_dir", "t", "--max_steps", "2", "--output_dir", "t/run"
            ).returncode
            == 0
        )
    assert (tmp_path / "t/run/metrics.jsonl").read_bytes() == (
        tmp_path / "t/run-1/metrics.jsonl"
    ).read_bytes()


def test_a_run_that_lost_its_run_json_is_still_kept_apart(texts, tmp_path):
    assert simple(tmp_path, "--data_dir", texts, "--max_steps", "5").returncode == 0
    (tmp_path / "runs/simple/run.json").unlink()
    assert simple(tmp_path, "--data_dir", texts, "--max_steps", "2").returncode == 0
    assert (tmp_path / "runs/simple/checkpoints/step_000002").exists() and (
        tmp_path / "runs/simple-1/checkpoints/step_000005"
    ).exists()


def test_a_run_that_diverges_says_so(texts, tmp_path):
    result = simple(
        tmp_path,
        "--data_dir",
        texts,
        "--max_steps",
        "9",
        "--lr",
        "1e30",
        "--print_sample_iter",
        "1",
    )
    assert "lower" in one_error_line(result, 1)


def test_a_console_without_unicode_is_no_reason_to_fail(texts, tmp_path):
    result = simple(
        tmp_path, "--data_dir", texts, "--max_steps", "2", env={"PYTHONIOENCODING": "ascii"}
    )
    assert result.returncode == 0, result.stderr[-500:]


def test_epochs_set_the_length(texts, tmp_path):
    result = simple(
        tmp_path,
        "--data_dir",
        texts,
        "--n_epochs",
        "1",
        "--batch_size",
        "64",
        "--context_length",
        "64",
    )
    steps = int(re.search(r"finished at step (\d+)", result.stdout)[1])
    n_tokens = int(re.search(r"bytes: ([\d,]+) training", result.stdout)[1].replace(",", ""))
    assert steps == (n_tokens - 1) // 64 // 64


def test_a_loaded_model_is_the_trained_one(finished):
    model, tokenizer, state = load_model(finished[0] / "runs/simple", torch.device("cpu"))
    assert (
        state["script"] == "pretraining_simple.py"
        and state["step"] == 30
        and tokenizer.vocab_size == 257
    )
    assert not any(p.is_meta for p in model.parameters()) and not model.training


# --------------------------------------------------------------------------------------------------------- data


def test_validation_is_decided_by_the_hash_of_a_chunk_not_by_its_place():
    documents = [
        f"Paragraph {i} of a longer story about nothing. " * 5 + "\n\n" for i in range(400)
    ]
    train, val = split_documents(["".join(documents)])
    assert "".join(train).count("Paragraph") + "".join(val).count("Paragraph") == 2000
    share = len("".join(val)) / len("".join(documents))
    assert 0.01 < share < 0.12
    chunks = set(re.findall(r"Paragraph \d+", "".join(val)))
    assert chunks and split_documents(["".join(documents)]) == (train, val)


def test_two_copies_of_a_text_do_not_leak_from_one_side_to_the_other():
    text = "".join(
        f"Line {i} of the text that is there twice, word by word.\n\n" for i in range(3000)
    )
    train, val = split_documents([text, text])
    assert len(val) == 2 and not set(re.findall(r"Line \d+", train[0] + train[1])) & set(
        re.findall(r"Line \d+", val[0] + val[1])
    )


def test_a_text_without_blank_lines_is_split_too():
    train, val = split_documents([" ".join(str(i * i) for i in range(5000))])
    assert train and val and len(train[0]) > len(val[0])


def test_every_window_comes_once_per_epoch_and_targets_are_the_next_tokens():
    tokens = torch.arange(8 * 10 + 1, dtype=torch.int32)
    for batch_size in (
        2,
        3,
        10,
    ):  # also one that does not divide an epoch: its last batch reaches into the next
        batches = train_batches(tokens, batch_size, 8, seed=1)
        rows = [next(batches) for _ in range(30 // batch_size)]
        inputs, targets = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
        assert torch.equal(targets, inputs + 1)
        epochs = [inputs[i : i + 10, 0].tolist() for i in (0, 10, 20)]
        assert (
            all(sorted(epoch) == list(range(0, 80, 8)) for epoch in epochs)
            and epochs[0] != epochs[1] != epochs[2]
        )


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 50])
def test_validation_predicts_every_token_but_the_first_exactly_once(n):
    targets = torch.cat(
        [y[y != -100] for _, y in val_batches(torch.arange(n, dtype=torch.int32), 3, 8)]
    )
    assert targets.tolist() == list(range(1, n))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    shares = [learning_rate_share(s, 1000) for s in range(1001)]
    assert (
        shares[0] == 0.01
        and max(shares) == shares[100] == shares[99] == 1
        and shares[1000] == pytest.approx(0.1)
    )
    assert [learning_rate_share(s, 1) for s in (0, 1)] == pytest.approx(
        [1, 0.1]
    )  # no division by zero in a run of one step


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--data_dir", "nowhere"), "nowhere does not exist"),
        (("--data_dir", "no_text"), "no .txt files"),
        (("--data_dir", "empty"), "all 2 .txt files of empty are empty"),
        (("--data_dir", "short"), "too few for one batch"),
        (("--data_dir", "latin"), "latin/a.txt: byte 0xef"),
        (("--data_dir", "binary"), "binary/a.txt: a binary file"),
        (
            ("--data_dir", "TEXTS", "--context_length", "100000"),
            "too few for one batch of 4 rows of 100000",
        ),
        (("--data_dir", "TEXTS", "--seed", "100000000000000"), "--seed"),
        (("--data_dir", "TEXTS", "--device", "meta"), "--device meta: 'meta'"),
        (("--data_dir", "TEXTS", "--tokenizer", "bpe:99999999999999999999999"), "--tokenizer: bpe"),
        (("--data_dir", "TEXTS", "--tokenizer", "bytes:5"), "--tokenizer: bytes:5"),
        (("--data_dir", ""), "--data_dir: is empty"),
        (("--data_dir", "short", "--output_dir", "short"), "--output_dir: short"),
        (("--data_dir", "TEXTS", "--output_dir", "."), "--output_dir: . is the current folder"),
        (("--data_dir", "TEXTS", "--batch_size", "100000"), "too few for one batch of 100000 rows"),
        (
            ("--data_dir", "TEXTS", "--model_size", "huge"),
            "nano, micro, mini, small, 124M, 355M, 774M, 1558M",
        ),
        (("--data_dir", "TEXTS", "--batch_sise", "3"), "did you mean --batch_size"),
        (("--data_dir", "TEXTS", "--batch_size", "-3"), "--batch_size: -3"),
        (("--data_dir", "TEXTS", "--lr", "nan"), "--lr: nan"),
        (("--data_dir", "TEXTS", "--lr", "fast"), "--lr: 'fast' is not a number"),
        (("--data_dir", "TEXTS", "--device", "cuda:77"), "--device cuda:77: "),
        (("--data_dir", "TEXTS", "--tokenizer", "nothing.json"), "--tokenizer: nothing.json"),
        (("--data_dir", "TEXTS", "--output_dir", "latin/a.txt/run"), "--output_dir: latin/a.txt"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, texts, arguments, named):
    for name, data in {
        "no_text/a.md": b"x",
        "empty/a.txt": b"",
        "empty/b.txt": b"\n\n",
        "short/a.txt": b"One line.",
        "binary/a.txt": b"a\0b" * 99,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/a.txt").write_bytes(b"na\xefve")
    before = sorted(tmp_path.rglob("*"))
    result = simple(tmp_path, *[str(texts) if a == "TEXTS" else a for a in arguments])
    assert named in one_error_line(result, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_sampling_from_nothing_is_one_line(tmp_path):
    assert "runs/simple: no checkpoint here" in one_error_line(run("gpt_train.py", cwd=tmp_path), 2)


def test_debug_adds_the_traceback(tmp_path):
    result = simple(tmp_path, "--data_dir", "nowhere", "--debug")
    assert result.returncode != 0 and "error: " in result.stderr and "Traceback" in result.stderr


def test_a_full_disk_costs_a_warning_and_then_the_exit_code_but_no_older_checkpoint(
    tmp_path, texts
):
    """Writes fail from 60 kB on (RLIMIT_FSIZE): the checkpoint does not fit, everything else does."""
    limited = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); os.execv(sys.executable, sys.argv[1:])"
    )
    script = [sys.executable, ROOT / "pretraining_simple.py", *TINY, "--data_dir", texts]
    lengths = ["--max_steps", "4", "--save_ckpt_freq", "2", "--eval_freq", "2"]
    command = [str(word) for word in (sys.executable, "-c", limited, *script, *lengths)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "could not be saved" in one_error_line(result, 1)
    assert "warning: step 2 is not saved" in result.stdout and "finished at step 4" in result.stdout
    assert list((tmp_path / "runs/simple/checkpoints").iterdir()) == []


# ------------------------------------------------------------------------------------------------------- Ctrl-C


def started(cwd, *arguments):
    command = [
        sys.executable,
        "-u",
        str(ROOT / "pretraining_simple.py"),
        *TINY,
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.8, 1.5, 2.2, 3.0])
def test_ctrl_c_at_any_time_leaves_no_traceback_and_nothing_half_written(tmp_path, texts, seconds):
    process = started(tmp_path, "--data_dir", texts, "--max_steps", "100000")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # Before the first line of the script has run, Python itself answers the signal.
    assert process.returncode == 130 or (seconds < 0.5 and process.returncode in (1, -2)), (
        process.returncode,
        err[-1000:],
    )
    if process.returncode == 130:
        assert "Traceback" not in out + err
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopping_a_run_saves_it_and_it_can_be_sampled(tmp_path, texts, number, code):
    process = started(
        tmp_path, "--data_dir", texts, "--max_steps", "100000", "--eval_freq", "100000"
    )
    while "validation loss" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and "stopped at step" in out
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert load_model(tmp_path / "runs/simple", torch.device("cpu"))[2]["step"] == step > 0
    assert (tmp_path / "runs/simple/loss.png").exists()
