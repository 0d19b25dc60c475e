"""
Runs side by side: the figures are those of the runs, and only settings that differ are listed.

A folder that is not a run is refused in one line.
"""

import contextlib
import json
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import run

import gpt_train
import pretraining_advanced
import pretraining_simple
from gpt_train import SampleConfig
from parts.cli.config import parse
from parts.cli.launch import BAD_INPUT, error_line
from parts.report.compare import MOST_POINTS, Curve, Run, compare
from parts.report.plots import draw_runs
from parts.storage.checkpoint import load_tensors, newest_checkpoint
from parts.training import metrics
from parts.training.metrics import read_metrics

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory, texts):
    """A folder with two runs of each trainer."""
    folder = tmp_path_factory.mktemp("compare")
    small = {"model_size": "nano", "context_length": 16, "tokenizer": "bytes", "device": "cpu"}
    small |= {"eval_freq": 20}
    advanced = {**small, "dataset_name": str(texts), "val_share": 0.5, "eval_tokens": 300}
    advanced |= {"batch_size": 2, "max_steps": 70, "dtype": "fp32"}
    simple = {**small, "data_dir": str(texts), "batch_size": 4, "max_steps": 40}
    different = {"adamw": {"max_lr": 3e-3}}
    different |= {"muon": {"max_lr": 2e-3, "optimizer": "muon", "n_embd": 32}}
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/some/where/pretraining_advanced.py", "--as", "in a line"])
        for name, changes in different.items():
            config = pretraining_advanced.TrainConfig(run_name=name, **advanced, **changes)
            assert pretraining_advanced.run(config) == 0
        patch.setattr(sys, "argv", ["pretraining_simple.py"])
        for name, lr in {"simple": 1e-2, "slow": 1e-4}.items():
            config = pretraining_simple.SimpleConfig(output_dir=f"runs/{name}", lr=lr, **simple)
            assert pretraining_simple.main(config) == 0
    return folder


def compared(home, *names) -> tuple[dict, list]:
    """({first column: the others} of the table, the notes below it) of these runs."""
    with contextlib.chdir(home):
        text, _, _ = compare([f"runs/{name}" for name in names])
    table, _, notes = text.partition("\nhighest memory")
    rows = {}
    for line in ("highest memory" + notes).splitlines()[:1] + table.splitlines()[1:]:
        words = [word.strip() for word in line.split("  ") if word.strip()]  # columns
        if words:
            rows[words[0]] = words[1:]
    return rows, notes.splitlines()[2:]


def refusal(home, *folders) -> str:
    with contextlib.chdir(home), pytest.raises(BAD_INPUT) as e:
        gpt_train.main(SampleConfig(compare=folders))
    return error_line(e.value)


def test_the_command_prints_the_table_and_writes_the_picture(home, tmp_path):
    result = run("gpt_train.py", "--compare", home / "runs/adamw", home / "runs/muon", cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["adamw", "muon"]
    assert lines[-1] == "compare.png: their losses against tokens seen"
    assert [p.name for p in tmp_path.iterdir()] == ["compare.png"]
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)


def test_the_table_has_the_settings_that_differ_and_the_runs_own_figures(home):
    rows, notes = compared(home, "adamw", "muon")
    settings = {"max_lr": ["0.003", "0.002"], "min_lr": ["0.0003", "0.0002"]}
    settings |= {"optimizer": ["adamw", "muon"], "n_embd": ["64", "32"]}
    above = list(rows)[1 : list(rows).index("parameters")]
    assert {name: rows[name] for name in above} == settings and not notes
    for i, name in enumerate(("adamw", "muon")):
        records = list(read_metrics(home / "runs" / name))
        weights = load_tensors(newest_checkpoint(home / "runs" / name) / "model.safetensors")
        best = min((r for r in records if "val_loss" in r), key=lambda r: r["val_loss"])
        median = np.median([r["tokens_per_s"] for r in records if "tokens_per_s" in r])
        expected = {
            "parameters": f"{sum(t.numel() for t in weights.values()):,}",
            "steps": "70",
            "tokens": f"{70 * 2 * 16:,}",
            "best validation loss": f"{best['val_loss']:.4f}",
            "at step": str(best["step"]),
            "bits per byte": f"{best['val_bits_per_byte']:.4f}",
            "last training loss": f"{records[-1]['train_loss']:.4f}",
            "tokens/s (median)": f"{median:,.0f}",
            "highest memory, GiB": f"{max(r.get('memory_gib', 0) for r in records):.2f}",
        }
        assert {label: rows[label][i] for label in expected} == expected


def test_runs_of_the_two_trainers_are_compared_in_what_both_have(home):
    rows, notes = compared(home, "simple", "slow")
    assert list(rows)[1:3] == ["lr", "parameters"]
    assert rows["lr"] == ["0.01", "0.0001"]
    assert rows["time in training steps"] == ["-", "-"]
    assert notes == ["-: not in the records (pretraining_simple.py writes no speed and no memory)."]
    rows, notes = compared(home, "simple", "adamw")
    assert rows["script"] == ["pretraining_simple.py", "pretraining_advanced.py"]
    assert rows["max_lr"] == ["0.01", "0.003"]
    assert rows["batch_size"] == ["4", "2"]
    assert rows["parameters"][0] == rows["parameters"][1]
    assert rows["tokens"] == ["2,560", "2,240"]
    assert not {"lr", "schedule", "dataset_name", "context_length", "output_dir"} & set(rows)
    assert "The trainers differ" in notes[0]


def test_validation_in_a_record_of_its_own_is_drawn_at_the_tokens_of_its_step(home):
    with contextlib.chdir(home):
        _, curves, label = compare(["runs/simple", "runs/adamw"])
    assert label == "tokens seen" and [name for name, *_ in curves] == ["simple", "adamw"]
    (_, train, val), (_, _, other_val) = curves
    assert train[0] == [64 * step for step in range(1, 41)]
    assert val[0] == [0, 20 * 64, 40 * 64]
    assert other_val[0] == [0, 20 * 32, 40 * 32, 60 * 32, 70 * 32]
    records = read_metrics(home / "runs/adamw")
    assert other_val[1] == [r["val_loss"] for r in records if "val_loss" in r]


def test_with_a_run_without_tokens_all_are_drawn_over_steps(home, tmp_path):
    copied(home, tmp_path, "adamw", "old", lambda r: {k: v for k, v in r.items() if k != "tokens"})
    _, curves, label = compare([tmp_path / "old", home / "runs/simple"])
    assert label == "optimizer steps"
    assert curves[0][1][0] == list(range(1, 71))
    assert curves[1][1][0] == list(range(1, 41))


def copied(home, folder, name, new, change=lambda record: record):
    """The run `name` as folder/new, each record changed."""
    (folder / new).mkdir(parents=True)
    shutil.copy(home / "runs" / name / "run.json", folder / new)
    lines = [json.dumps(change(record)) + "\n" for record in read_metrics(home / "runs" / name)]
    (folder / new / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / new


@pytest.mark.parametrize("n_steps", [1, 49, 50, 51, 173])
def test_the_time_is_that_of_all_steps_though_each_rate_is_of_fifty(home, monkeypatch, n_steps):
    # the first step is slow, as if it compiled
    times = [20.0] + [0.5 + 0.01 * (i % 7) for i in range(1, n_steps)]
    clock = iter([t for seconds in times for t in (0.0, seconds)])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    speed, records = metrics.Speed(1, None), [{"step": 0}]
    for step in range(1, n_steps + 1):
        speed.start()
        records.append({"step": step, "tokens": step * 1000, **speed.stop(1000)})
    assert Run(home / "runs/adamw", records).seconds == pytest.approx(sum(times), rel=1e-3)


def test_a_long_run_is_kept_in_little_memory_and_its_means_are_right(home):
    n, same = 100_000, {"tokens_per_s": 100.0, "memory_gib": 1.5}
    records = (
        {"step": i, "tokens": i * 8, "train_loss": float(i % 10), **same} for i in range(1, n + 1)
    )
    tracemalloc.start()
    run = Run(home / "runs/adamw", records)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6, peak  # all of them would be 40 MB
    steps, tokens, losses = zip(*run.train.points, strict=True)
    assert MOST_POINTS <= len(steps) < 2 * MOST_POINTS
    assert list(steps) == sorted(steps) and tokens[-1] == 8 * steps[-1]
    assert np.mean(losses) == pytest.approx(4.5, abs=0.01)
    assert run.seconds == pytest.approx(8 * n / 100, rel=1e-6)


def test_a_short_curve_keeps_every_point():
    curve, n = Curve(), 2 * MOST_POINTS - 1
    for i in range(n):
        curve.add(i, None, i / 7)
    assert curve.points == [(i, None, i / 7) for i in range(n)]


def test_damaged_lines_and_half_a_line_are_left_out(home, tmp_path):
    whole = copied(home, tmp_path, "adamw", "whole")
    torn = copied(home, tmp_path, "adamw", "torn")
    text = (torn / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    odd = [
        '{"step": 9, "train_loss": "abc"}\n',
        "\0\xff[]\n",
        '{"step": 1' + "0" * 400 + "}\n",
        '{"step": 70, "train_loss": NaN, "memory_gib": "9"}\n',
    ]
    lines = [*text[:30], *odd[:3], *text[30:], odd[3], '{"step": 71, "tok']
    (torn / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    a, b = (Run(folder, read_metrics(folder)) for folder in (whole, torn))
    assert a.figures == b.figures
    assert a.train.points == b.train.points and a.val.points == b.val.points


def test_a_run_that_has_only_begun_is_compared(home, tmp_path):
    begun = copied(home, tmp_path, "simple", "begun")
    first = (begun / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (begun / "metrics.jsonl").write_text(first, encoding="utf-8")
    text, curves, label = compare([begun, home / "runs/simple"])
    assert label == "optimizer steps" and "steps" in text
    assert curves[0][1] == ([], []) and len(curves[0][2][0]) == 1
    assert draw_runs(curves, label).startswith(PNG)


def test_two_to_eight_runs_of_any_name_are_drawn(home, tmp_path):
    names = ["_a", "$x$ \\frac", "c" * 60, "d", "e", "f", "g", "h"]
    folders = [copied(home, tmp_path, "adamw", name) for name in names]
    text, curves, label = compare(folders)
    assert text.splitlines()[1].startswith("no setting differs")
    assert [name for name, *_ in curves] == names
    assert draw_runs(curves, label).startswith(PNG)
    (tmp_path / "more").mkdir()
    same_name = [folders[3], copied(home, tmp_path / "more", "adamw", "d")]
    assert [name for name, *_ in compare(same_name)[1]] == [str(folder) for folder in same_name]


def test_long_values_that_differ_in_their_middle_are_listed_without_control_characters(
    home, tmp_path
):
    folders = [copied(home, tmp_path, "adamw", name) for name in "ab"]
    for folder, letter in zip(folders, "AB", strict=True):
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        facts["config"] |= {"dataset_name": "x" * 100 + letter + "y" * 100}
        facts["config"] |= {"tokenizer": letter + "\x1b[31m"}
        facts["model_config"] = {"of": "a recipe"}
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    text, _, _ = compare(folders)
    assert "dataset_name" in text and "The tokenizers differ" in text
    assert "\x1b" not in text and "\\u001b[31m" in text
    assert ["parameters", "-", "-"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, f"{100 * 8 + 12 * 8 + (12 * 64 + 13 * 8) + 2 * 8:,}"),
        ({"tied": False}, f"{2 * 100 * 8 + 12 * 8 + (12 * 64 + 13 * 8) + 2 * 8:,}"),
        ({"n_kv_head": 1}, "-"),  # a Llama, which has fewer
        ({"n_embd": "8"}, "-"),
        ({"n_layer": None}, "-"),
        ({"vocab_size": 9 * 10**4299}, "-"),
    ],
)
def test_parameters_are_counted_for_gpts_only(home, tmp_path, change, expected):
    folder = copied(home, tmp_path, "simple", "a")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts["model"] = {"vocab_size": 100, "block_size": 12, "n_layer": 1, "n_head": 2, "n_embd": 8}
    facts["model"] |= change
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert Run(folder, read_metrics(folder)).figures["parameters"] == expected


def test_what_cannot_be_compared_is_one_line_and_nothing_is_written(home, tmp_path):
    a = "runs/adamw"
    for folders, message in {
        (): "0 given; give 2 to 8",
        (a,): "1 given; give 2 to 8",
        (a,) * 9: "9 given; give 2 to 8",
        (a, "runs/muon", "runs/../runs/adamw/"): "the same run",
        (a, "runs/nowhere"): "runs/nowhere: has no run.json",
        (a, f"{a}/checkpoints/step_000070"): "has no run.json",
        (a, f"{a}/run.json"): "has no run.json",
    }.items():
        assert message in refusal(home, *folders)
    for text, message in {
        "{": "not readable as JSON",
        "[" * 100_000: "not readable as JSON",
        "7": "holds no JSON object",
        '{"config": []}': "no conf",
    }.items():
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        bad = copied(home, tmp_path, "adamw", "bad")
        (bad / "run.json").write_text(text, encoding="utf-8")
        assert message in refusal(home, a, bad) and str(bad) in refusal(home, a, bad)
    for lines in ("", "no json\n", None):
        shutil.copy(home / a / "run.json", bad)
        if lines is None:
            (bad / "metrics.jsonl").unlink()
        else:
            (bad / "metrics.jsonl").write_text(lines, encoding="utf-8")
        assert "has no records" in refusal(home, a, bad)
    assert not (home / "compare.png").exists() and not list(home.glob("*.part"))


def test_the_folders_follow_one_flag(capsys):
    config = parse(SampleConfig, ["--compare", "a", "b", "c", "--seed", "1"])
    assert config.compare == ("a", "b", "c")
    assert parse(SampleConfig, []).compare is None
    assert parse(SampleConfig, ["--compare"]).compare == ()
