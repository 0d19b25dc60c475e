"""The notebook: its functions, and its run from top to bottom without a page."""

import html
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from run_records import advanced, write_metrics
from test_gpt import tiny_model

from gpt_train import GPTConfig
from parts.base.files import append_lines
from parts.data.tokenizers import byte_tokenizer
from parts.report import interpret
from parts.storage.checkpoint import save_checkpoint
from parts.training.metrics import Journal
from parts.training.plan import flops_per_token


@pytest.fixture(scope="module")
def notebook():
    """notebook.py as a module, by its path: the name may be another module's, such as Jupyter's."""
    spec = importlib.util.spec_from_file_location("notebook_of_this_project", ROOT / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(shown) -> str:
    """The text of a page's object: markup inside JSON inside an attribute."""
    return html.unescape(html.unescape(shown.text))


# --------------------------------------------------------------------------------------------- runs


def test_runs_are_listed_newest_first_and_a_folder_without_any_is_a_sentence(notebook, tmp_path):
    for n, name in enumerate(("b", "a")):
        os.utime(write_metrics(tmp_path / name, advanced(1)) / "metrics.jsonl", (2e9 + n, 2e9 + n))
    (tmp_path / "no run").mkdir()
    assert notebook.runs_in(tmp_path) == ["a", "b"]
    for folder in (tmp_path / "no run", tmp_path / "missing", tmp_path / "a/metrics.jsonl"):
        shown = notebook.or_why_not(lambda folder=folder: notebook.runs_in(folder))
        assert "no run here" in text_of(shown)


def test_damaged_runs_are_told_and_the_others_drawn(notebook, tmp_path):
    write_metrics(tmp_path / "good", advanced(3))
    write_metrics(tmp_path / "simple", [{"step": 1, "tokens": 5, "train_loss": 2.0}])
    (tmp_path / "starting").mkdir()
    (tmp_path / "folder/metrics.jsonl").mkdir(parents=True)
    torn = b'{"step": 1, "train\xff\x00\n[3]\n'
    (write_metrics(tmp_path / "torn", []) / "metrics.jsonl").write_bytes(torn)
    bad = ["simple", "starting", "folder", "torn", "gone"]
    runs, problems = notebook.read_runs(tmp_path, ["good", *bad], "time")
    assert list(runs) == ["good"] and [line.split(":")[0] for line in problems] == bad
    assert "no tokens/s" in problems[0]
    assert all("no record" in problems[i] for i in (1, 3, 4))


def test_a_torn_last_line_of_a_run_that_is_being_written_is_left_out(notebook, tmp_path):
    path = write_metrics(tmp_path / "live", advanced(3)) / "metrics.jsonl"
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"step": 4, "trai')
    runs, problems = notebook.read_runs(tmp_path, ["live"], "steps")
    assert runs["live"]["step"].tolist() == [1, 2, 3] and not problems


def test_the_signature_changes_with_a_record_and_with_a_checkpoint(notebook, tmp_path):
    write_metrics(tmp_path / "a", advanced(1))
    first = notebook.signature(tmp_path)
    assert notebook.signature(tmp_path) == first
    write_metrics(tmp_path / "a", advanced(2))
    second = notebook.signature(tmp_path)
    (tmp_path / "a/checkpoints/step_000001").mkdir(parents=True)
    third = notebook.signature(tmp_path)
    assert second[0] == first[0] and second[1] != first[1] and third[0] != second[0]


def test_after_a_kill_and_a_resume_a_run_has_one_point_per_step(notebook, tmp_path):
    folder = write_metrics(tmp_path / "a", advanced(9))
    # the first attempt is killed at step 9, and its last checkpoint is of step 5
    for start, end in ((0, 9), (5, 12)):
        journal = Journal(folder, start, append_lines)
        for record in advanced(end - start, start + 1):
            journal.write(record)
        journal.close()
    runs, _ = notebook.read_runs(tmp_path, ["a"], "tokens")
    assert runs["a"]["step"].tolist() == list(range(1, 13))


def test_the_speed_of_a_run_is_that_of_its_records(notebook, tmp_path):
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32)
    write_metrics(tmp_path / "a", advanced(3))
    facts = json.dumps({"model_config": vars(config)})
    (tmp_path / "a/run.json").write_text(facts, encoding="utf-8")
    expected = 50 * flops_per_token(config)
    assert notebook.measured_flops(tmp_path, ["a"]) == pytest.approx(expected)
    write_metrics(tmp_path / "b", advanced(3))
    for names, why in ((["b"], "b: its speed is unknown"), ([], "no run is chosen")):
        with pytest.raises(ValueError, match=why):
            notebook.measured_flops(tmp_path, names)


# -------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_vocabulary_and_a_damaged_one_are_sentences(notebook, tmp_path):
    model, tokenizer = tiny_model(vocab_size=100), byte_tokenizer()  # 257 ids
    state = {"script": "x", "step": 1, "tokens": 1, "model_config": vars(model.config)}
    weights = {"model.safetensors": model.state_dict()}
    files = {"tokenizer.json": tokenizer.to_json()}
    path = save_checkpoint(tmp_path / "other", 1, weights, state, files, 1) / "model.safetensors"

    def message(folder, stamp):
        return text_of(notebook.or_why_not(lambda: notebook.load(str(folder), stamp)))

    other = message(tmp_path / "other", ())
    assert "its tokenizer has 257 ids, the model a vocabulary of 100" in other
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in message(tmp_path / "other", (1,))
    assert "no checkpoint here" in message(tmp_path / "gone", ())


def test_a_text_longer_than_the_context_is_cut_and_said():
    tokenizer = byte_tokenizer()
    ids, note = interpret.ids_of("abc", tokenizer, 4, last=True)
    assert ids.tolist() == [256, 97, 98, 99] and note == ""
    ids, note = interpret.ids_of("abcd", tokenizer, 4, last=True)
    assert ids.tolist() == [97, 98, 99, 100]
    assert note == "The text has 5 tokens and the model reads 4 at most: these are its last ones."
    ids, note = interpret.ids_of("abcd", tokenizer, 4, last=False)
    assert ids.tolist() == [256, 97, 98, 99] and "its first ones" in note


def test_tokens_are_shown_so_that_blanks_and_half_characters_can_be_seen():
    shown = [interpret.shown(byte_tokenizer(), i) for i in (32, 10, 0xC3, 256, 97)]
    assert shown == ["\u00b7", "\\n", "\\xc3", "<|endoftext|>", "a"]


# --------------------------------------------------------------------------------------- small runs


def test_settings_name_the_run_and_a_training_that_fails_tells_its_error_line(
    notebook, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "RUNS", Path("runs"))
    (tmp_path / "runs/notebook-text").mkdir(parents=True)
    (tmp_path / "runs/notebook-text/python.txt").write_text("too short", encoding="utf-8")
    run_dir, flags = notebook.small_run(max_lr=0.01, steps=5)
    assert run_dir.name == "notebook-lr0.01-warmup20-batch16-2x64-cosine-5"
    assert run_dir.name != notebook.small_run(steps=5)[0].name
    training = notebook.Training(run_dir, flags)
    training.process.wait(timeout=60)
    step, message = training.progress()
    assert step == 0 and message.startswith("error: ") and "\n" not in message
    training.stop()  # it has ended already


# ---------------------------------------------------------------------------------- the whole of it


def test_the_readme_names_the_commands_that_are_tested_here():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("marimo run notebook.py", "marimo edit notebook.py", "python notebook.py"):
        assert f"\n{command} " in readme


def test_marimo_finds_nothing_to_say_about_the_notebook():
    command = [sys.executable, "-m", "marimo", "check", "--strict", "notebook.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout + result.stderr == ""


def test_the_whole_notebook_runs_without_a_page_and_makes_a_run_where_there_is_none(tmp_path):
    env = {"PYTHONPATH": "", "PYTHONWARNINGS": "default"}
    result = run("notebook.py", cwd=tmp_path, timeout=300, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Warning" not in result.stderr and "rror" not in result.stderr, result.stderr[-2000:]
    assert list((tmp_path / "runs/notebook-first/checkpoints").glob("step_*"))
