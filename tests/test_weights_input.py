"""Wrong input to import, export, average and the rest: one clear line each, and nothing changed."""

import json
import os
import re
import shutil

import given_runs
import pytest
import torch
from conftest import one_error_line, run
from given_runs import contents, printed, refused, sample, weights, write_run

import pretraining_simple
import wt_load as W
from parts.cli.config import parse
from parts.data.tokenizers import train_bpe
from parts.storage.checkpoint import newest_checkpoint

home = given_runs.home
nothing_else_changes = given_runs.nothing_else_changes

# --------------------------------------------------------------------------- no weights to be found


def test_a_folder_that_is_no_checkpoint(home, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    assert "no checkpoint here; give a run folder" in refused(sample, "--checkpoint", tmp_path)
    no_weights = f"{tmp_path}: has neither model.safetensors nor pytorch_model.bin"
    assert no_weights in refused(weights, "info", tmp_path)
    assert no_weights in refused(weights, "verify", tmp_path)
    assert no_weights in refused(weights, "import", tmp_path, tmp_path / "run")
    assert no_weights in refused(weights, "diff", home / "a", tmp_path)
    assert "no checkpoints here; give a run folder" in refused(weights, "list", tmp_path)
    for line in (
        ("export", tmp_path, "--to", "hf", tmp_path / "out"),
        ("average", home / "a", tmp_path, "--out", tmp_path / "out"),
    ):
        assert f"{tmp_path}: no checkpoint here" in refused(weights, *line)
    for command in ("info", "verify", "list", "export"):
        more = ("--to", "hf", tmp_path / "out") if command == "export" else ()
        assert str(tmp_path / "nowhere") in refused(weights, command, tmp_path / "nowhere", *more)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_download_that_ended_early(home, tmp_path):
    folder, run_dir = shutil.copytree(home / "hf", tmp_path / "hf"), tmp_path / "run"
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size * 2 // 3)
    truncated = f"{path}: not a complete safetensors file"
    assert truncated in refused(weights, "import", folder, run_dir)
    path.rename(folder / "model.safetensors.incomplete")
    assert "has neither model.safetensors" in refused(weights, "import", folder, run_dir)
    places = {
        "wte.weight": "model-00001-of-00002.safetensors",
        "wpe.weight": "model-00002-of-00002.safetensors",
    }
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    missing = ", ".join(places.values()) + " are missing; download the folder again"
    assert missing in refused(weights, "import", folder, run_dir)
    weights("export", home / "a", "--to", "nanogpt", tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", 60_000)
    assert str(tmp_path / "x.pt") in refused(weights, "import", tmp_path / "x.pt", run_dir)
    assert not run_dir.exists()


def test_the_name_of_a_size_that_there_is_not(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 500, encoding="utf-8")
    line = ["--data_dir", tmp_path, "--output_dir", tmp_path / "runs", "--model_size", "125M"]
    line = [*map(str, line), "--device", "cpu", "--tokenizer", "bytes"]
    unknown = r"--model_size: unknown size '125M'; choose one of nano, micro, .*124M"
    with pytest.raises(ValueError, match=unknown):
        printed(pretraining_simple.main, parse(pretraining_simple.SimpleConfig, line))
    line = ("wt_load.py", "import", "hf:gpt2-huge", "run")
    result = run(*line, cwd=tmp_path, env={"HF_HOME": str(tmp_path / "hub")})
    assert "hf:gpt2-huge: not in the hub's cache, and not available" in one_error_line(result, 2)
    assert not (tmp_path / "run").exists()
    result = run("wt_load.py", "exprt", cwd=tmp_path)
    assert "'exprt': no such command; did you mean export?" in one_error_line(result, 2)


def test_a_vocabulary_that_is_not_the_tokenizers(home, tmp_path):
    bpe = train_bpe(["the old man and the sea " * 50], 270)
    (tmp_path / "bpe.json").write_bytes(bpe.to_json())
    line = ("import", home / "hf", tmp_path / "run", "--tokenizer")
    message = refused(weights, *line, tmp_path / "bpe.json")
    ids = f"the tokenizer has {bpe.vocab_size} ids, the model a vocabulary of 257"
    assert f"{ids}; give the tokenizer that the model was trained with" in message
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    line = ("import", folder, tmp_path / "run")
    none = "--tokenizer: the source has none for its vocabulary of 257"
    assert none in refused(weights, *line)
    assert "does not exist" in refused(weights, *line, "--tokenizer", tmp_path / "none.json")
    assert not (tmp_path / "run").exists()


def test_heads_that_cannot_be_or_that_nobody_says(home, tmp_path):
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    (folder / "config.json").unlink()
    unknown = "2 blocks of width 32 may have any number of attention heads"
    assert unknown in refused(weights, "info", folder)
    for n in (3, -1):
        assert str(folder) in refused(weights, "info", folder, "--n_head", n)
    assert "4 heads" in weights("info", folder, "--n_head", 4)


# ----------------------------------------------------------------------------- a target that exists


def test_a_run_folder_that_is_there_is_left_alone(home, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("mine", encoding="utf-8")
    file.write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    for place in (full, file):
        exists = f"{place}: exists already"
        assert exists in refused(weights, "import", home / "hf", place)
        assert exists in refused(weights, "average", home / "a", home / "b", "--out", place)
        for kind in ("hf", "gguf", "nanogpt"):
            message = refused(weights, "export", home / "a", "--to", kind, place)
            assert f"--to: {place} exists already" in message
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    weights("import", home / "hf", tmp_path / "empty")
    assert newest_checkpoint(tmp_path / "empty")


def test_force_writes_over_an_export_and_over_nothing_else(home, tmp_path):
    hf, nano = tmp_path / "hf", tmp_path / "x.pt"
    for kind, place in (("hf", hf), ("nanogpt", nano)):
        weights("export", home / "a", "--to", kind, place)
        weights("export", home / "b", "--to", kind, place, "--force")
        assert "0 differ" in weights("diff", home / "b", place)
    run_dir = shutil.copytree(home / "a", tmp_path / "run")
    (hf / "mine.txt").write_text("precious", encoding="utf-8")
    before = contents(tmp_path)
    deleted = "which would be deleted; name another place"
    for place, kind, message in (
        (run_dir, "hf", f"also holds checkpoints, {deleted}"),
        (run_dir / "checkpoints", "hf", "also holds step_000003, which"),
        (newest_checkpoint(run_dir), "hf", "also holds MANIFEST.json, which"),
        (hf, "hf", "also holds mine.txt, which"),
        (tmp_path, "hf", deleted),
        (nano, "hf", "x.pt is a file, hf writes a folder"),
        (hf, "nanogpt", "hf is a folder, nanogpt writes a file"),
    ):
        assert message in refused(weights, "export", run_dir, "--to", kind, place, "--force")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind, name", [("hf", "out"), ("nanogpt", "out.pt"), ("gguf", "out.gguf")])
def test_an_export_that_fails_leaves_the_one_before_and_no_part(
    home, tmp_path, monkeypatch, kind, name
):
    if kind == "gguf":
        pytest.importorskip("gguf")
    weights("export", home / "a", "--to", kind, tmp_path / name)
    before = contents(tmp_path)
    force = ("--to", kind, tmp_path / name, "--force")
    assert "fp16: " in refused(weights, "export", home / "large", *force, "--dtype", "fp16")
    assert str(tmp_path / "none") in refused(weights, "export", tmp_path / "none", *force)
    assert contents(tmp_path) == before
    real = {"hf": W._to_hf, "nanogpt": W._to_nanogpt, "gguf": W._to_gguf}[kind]

    def and_then_the_disk_is_full(part, *args):
        real(part, *args)
        raise OSError(28, "No space left on device", str(part))

    monkeypatch.setattr(W, f"_to_{kind}", and_then_the_disk_is_full)
    for target in (force, ("--to", kind, tmp_path / f"new-{name}")):
        with pytest.raises(OSError, match="No space left"):
            weights("export", home / "a", *target)
        assert contents(tmp_path) == before


# ------------------------------------------------------------------------ what a format cannot hold


def test_values_beyond_half_precision(home, tmp_path):
    line = ("export", home / "large", "--to", "hf", tmp_path / "out", "--dtype")
    message = refused(weights, *line, "fp16")
    beyond = r"--dtype fp16: \S+ has values beyond 65504, the largest of fp16; use bf16 or fp32"
    assert re.search(beyond, message)
    weights(*line, "bf16")
    assert not list(tmp_path.glob(".*"))


def test_a_head_of_its_own_does_not_fit_nanogpt(home, tmp_path):
    message = refused(weights, "export", home / "untied", "--to", "nanogpt", tmp_path / "x.pt")
    reason = "its output head is the embedding, this model has a separate one"
    assert message == f"--to nanogpt: {reason}; use --to hf"
    assert not list(tmp_path.iterdir())
    weights("export", home / "untied", "--to", "hf", tmp_path / "hf")
    assert "0 differ" in weights("diff", home / "untied", tmp_path / "hf")


# ------------------------------------------------------------------------------ several checkpoints


def test_an_average_of_what_cannot_be_averaged(home, tmp_path):
    out = ("--out", tmp_path / "out")
    for other in ("wider", "untied"):
        message = refused(weights, "average", home / "a", home / other, *out)
        assert "has another model or tokenizer than" in message
    assert "got fewer than two checkpoints; give two or more" in refused(
        weights, "average", home / "a", *out
    )
    damaged = shutil.copytree(home / "b", tmp_path / "b")
    os.truncate(newest_checkpoint(damaged) / "model.safetensors", 5000)
    assert "damaged" in refused(weights, "average", home / "a", damaged, *out)
    assert not (tmp_path / "out").exists()
    weights("average", home / "a", home / "b", *out)
    mean, a, b = (W.load_gpt(str(p)).wte.weight for p in (tmp_path / "out", home / "a", home / "b"))
    assert torch.equal(mean, ((a.double() + b.double()) / 2).float())


def test_a_list_names_the_damaged_ones_too(home, tmp_path):
    folder = shutil.copytree(home / "a", tmp_path / "a")
    write_run(folder, seed=2, step=9)
    (folder / "checkpoints/step_000009/trainer_state.json").write_text("{", encoding="utf-8")
    good, damaged = weights("list", folder).splitlines()
    assert "step 3, 7 tokens" in good and "step_000009: damaged" in damaged
    assert "no checkpoints here" in refused(weights, "list", newest_checkpoint(home / "a"))


def test_a_difference_of_two_shapes_is_told_not_refused(home, tmp_path):
    a, wider, untied = home / "a", home / "wider", home / "untied"
    out = weights("diff", a, wider)
    assert f"n_embd: 32 in {a}, 64 in {wider}" in out and "wte.weight: [257, 32] in" in out
    out = weights("diff", a, untied)
    assert f"lm_head.weight: only in {untied}" in out and f"tied: True in {a}" in out
    assert "relative difference" in weights("diff", a, home / "b")
    assert "28 tensors are equal, 0 differ" in weights("diff", a, home / "hf")


def test_on_the_command_line_too(home, tmp_path):
    sampling = ("gpt_train.py", "--checkpoint", home / "a", "--top_k", "258", "--device", "cpu")
    averaging = ("wt_load.py", "average", home / "a", home / "wider", "--out", "out")
    for message, line in (("--top_k: 258", sampling), ("another model", averaging)):
        assert message in one_error_line(run(*line, cwd=tmp_path), 2)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_promised_and_missing_is_refused(home, tmp_path):
    weights("export", home / "a", "--to", "hf", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    path.write_text(json.dumps(settings), encoding="utf-8")
    line = refused(weights, "import", tmp_path / "hf", tmp_path / "run")
    assert "the head is not the embedding, but lm_head.weight is missing" in line


def test_names_of_tokenizers_are_known_as_in_every_script(home, tmp_path):
    weights("export", home / "a", "--to", "nanogpt", tmp_path / "x.pt")
    out = weights("import", tmp_path / "x.pt", tmp_path / "run", "--tokenizer", "bytes")
    assert "tokenizer bytes" in out
