"""What wt_load.py says of a trained run, makes of several, and how training and scoring go on."""

import json
import shlex
import subprocess

import pytest
import torch
from conftest import one_error_line, run, shared
from small_models import as_run, gpt, tensors_of
from test_gpt import as_transformers

from gpt_train import load_model, sample_text
from parts.training.metrics import read_metrics
from wt_load import (
    AverageConfig,
    DiffConfig,
    ImportConfig,
    InfoConfig,
    ListConfig,
    VerifyConfig,
    main,
    weights_hash,
)

WORDS = (
    "the old man and a small dog went down to the sea where ships of every kind lay still "
    "in the morning light"
).split()
OPTIONS = "--dataset_name data --val_share 0.05 --context_length 64 --batch_size 8 --device cpu"
OPTIONS += " --dtype fp32"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 50 steps of the production trainer, with a BPE of its own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    with open(folder / "data/train.jsonl", "w", encoding="utf-8") as f:
        for n in range(300):
            words = [WORDS[(n * 5 + i * (n % 7 + 1)) % len(WORDS)] for i in range(50)]
            f.write(json.dumps({"text": " ".join(words) + "."}) + "\n")
    options = "--tokenizer bpe:300 --model_size nano --max_steps 50 --max_lr 3e-3 --eval_freq 50"
    options = f"{OPTIONS} {options} --print_sample_iter 50 --run_name first"
    result = run("pretraining_advanced.py", *options.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_what_was_trained_here_writes_the_same_in_transformers(trained, tmp_path):
    import transformers

    result = run("wt_load.py", "export", trained / "runs/first", "--to", "hf", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model, tokenizer, _ = load_model(trained / "runs/first", "cpu")
    for text in ("the old man", " Ein  Satz\n\nmit naïve 😀 <|endoftext|>", ""):
        ids = tokenizer.encode(text).tolist()
        assert words(text, split_special_tokens=True)["input_ids"] == ids
        assert words.decode(ids) == text
    start = torch.tensor([[tokenizer.eot, *tokenizer.encode("the old").tolist()]])
    mask = torch.ones_like(start)
    ids = theirs.generate(start, attention_mask=mask, max_new_tokens=50, do_sample=False)
    ours = sample_text(model, tokenizer, "cpu", "the old", 1, 50, temperature=0)[0]
    assert words.decode(ids[0, start.shape[1] :], skip_special_tokens=True) == ours
    assert len(ours) > 50
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| steps | 50 |" in card and "| text | data |" in card and "validation loss" in card


# -------------------------------------------------------------------------------------- one of them


def test_info_says_what_it_is_and_the_line_that_goes_on_goes_on(trained, capsys):
    main(InfoConfig(str(trained / "runs/first"), tensors=True))
    out = capsys.readouterr().out
    for part in (
        "checkpoint of family gpt",
        "2 blocks, 2 heads, width 64, context 64",
        "step 50, 25,600 tokens",
        "best validation loss",
        "256 x 64",
        "h.1.mlp.c_fc.weight",
    ):
        assert part in out
    lines = dict(row.split(": ", 1) for row in out.splitlines() if ": " in row)
    command = shlex.split(lines["to resume"])
    done = subprocess.run(
        command, cwd=trained, capture_output=True, text=True, timeout=120, check=True
    )
    assert "already finished at step 50" in done.stdout
    command = shlex.split(lines["to sample"])[1:]
    assert run(*command, "--max_new_tokens", "5", cwd=trained).returncode == 0


def test_verify_reads_every_value(tmp_path, capsys):
    model = gpt()
    as_run(model, tmp_path / "good")
    main(VerifyConfig(str(tmp_path / "good")))
    assert capsys.readouterr().out.splitlines()[-1] == weights_hash(model.state_dict())
    with torch.no_grad():
        model.h[0].attn.c_proj.weight[0, 0] = float("nan")
    as_run(model, tmp_path / "bad")
    with pytest.raises(ValueError, match="h.0.attn.c_proj.weight: not all values are finite"):
        main(VerifyConfig(str(tmp_path / "bad")))


# ------------------------------------------------------------------------------------------ several


def test_list_names_every_checkpoint_and_the_damaged_one(tmp_path, capsys):
    for step in (1, 2, 3):
        as_run(gpt(seed=step), tmp_path / "run", step=step)
    (tmp_path / "run/checkpoints/step_000002/model.safetensors").write_bytes(b"")
    main(ListConfig(str(tmp_path / "run")))
    lines = capsys.readouterr().out.splitlines()
    assert ["damaged" in line for line in lines] == [False, True, False]
    assert ["the best" in line for line in lines] == [False, False, True]


def test_list_names_one_checkpoint_the_best(tmp_path, capsys):
    """Each checkpoint records the best so far; the newest knows which it is."""
    for step in (1, 2, 3):
        best = {"step": min(step, 2), "val_loss": 1.0}
        as_run(gpt(), tmp_path / "run", step=step, best=best)
    main(ListConfig(str(tmp_path / "run")))
    lines = capsys.readouterr().out.splitlines()
    assert ["the best" in line for line in lines] == [False, True, False]


def test_diff_names_what_differs_and_by_how_much(tmp_path, capsys):
    model = gpt()
    as_run(model, tmp_path / "a")
    as_transformers(model).save_pretrained(tmp_path / "same")
    main(DiffConfig(str(tmp_path / "a"), str(tmp_path / "same")))
    assert capsys.readouterr().out == "28 tensors are equal, 0 differ\n"
    with torch.no_grad():
        model.h[1].ln_2.bias[3] += 0.5
        model.wte.weight.mul_(1.1)
    as_run(model, tmp_path / "b")
    main(DiffConfig(str(tmp_path / "a"), str(tmp_path / "b")))
    bias, embedding, total = capsys.readouterr().out.splitlines()
    assert "h.1.ln_2.bias" in bias and "at most 5.000e-01" in bias
    assert "wte.weight: relative difference 1.000e-01" in embedding
    assert total == "26 tensors are equal, 2 differ"


def test_the_average_is_the_mean_of_each_number(tmp_path):
    folders = [tmp_path / str(seed) for seed in (1, 2, 3)]
    for seed, folder in zip((1, 2, 3), folders, strict=True):
        as_run(gpt(seed=seed), folder, step=seed)
    main(AverageConfig(tuple(map(str, folders)), str(tmp_path / "mean")))
    a, b, c = map(tensors_of, folders)
    for name, t in tensors_of(tmp_path / "mean").items():
        assert torch.equal(t, ((a[name].double() + b[name] + c[name]) / 3).float())
    assert load_model(tmp_path / "mean", "cpu")[2]["step"] == 3


# ----------------------------------------------------------------------------- training and scoring


def test_training_goes_on_from_imported_weights(trained, tmp_path):
    model, tokenizer, _ = load_model(trained / "runs/first", "cpu")
    as_transformers(model).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_bytes(tokenizer.to_json())
    main(ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "imported")))
    line = ("pretraining_advanced.py", *OPTIONS.split(), "--max_steps", "5", "--eval_freq", "5")
    line = (*line, "--init_from", str(tmp_path / "imported"))
    words = ("--tokenizer", str(tmp_path / "theirs/tokenizer.json"))
    for _ in range(2):  # the second time it has finished already
        result = run(*line, *words, "--run_name", "second", cwd=trained)
        assert result.returncode == 0, result.stderr
    first, second = (list(read_metrics(trained / "runs" / name)) for name in ("first", "second"))
    assert second[0]["val_loss"] == pytest.approx(first[-1]["val_loss"], rel=1e-6)
    for message, flags in (
        ("another tokenizer", ("--tokenizer", "bytes")),
        ("--n_layer: 5 is another shape than 2", (*words, "--n_layer", "5")),
        ("--context_length: 128 is more than the 64", (*words, "--context_length", "128")),
    ):
        result = run(*line, *flags, "--run_name", "third", cwd=trained)
        assert message in one_error_line(result, 2)


def test_score_is_the_same_for_any_batch_size(tmp_path):
    as_run(gpt(), tmp_path / "run")
    text = shared("data/reference/tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    line = ("gpt_train.py", "--checkpoint", "run", "--eval", "text.txt", "--stride", "16")
    losses = []
    for batch_size in (1, 8, 3):
        result = run(*line, "--batch_size", batch_size, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        losses.append(float(result.stdout.split("loss ")[1].split()[0]))
        assert f"({len(text.encode()) + 1:,} tokens scored)" in result.stdout
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
