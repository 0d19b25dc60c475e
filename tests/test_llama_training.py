"""A Llama in the production trainer: all arrangements train alike, and a killed run ends alike."""

import pytest
import torch
from conftest import run
from training_cases import (
    home,  # noqa: F401  a fixture
    metrics,
    refusal,
    start,
    stop,
    tensors,
    the_same_to_the_bit,
    train,
    train_here,
)

LLAMA = {"model_size": "llama-nano", "max_lr": 1e-3}
# arrangement -> settings besides; each is stopped in the middle, once or twice
ARRANGEMENTS = {
    "compiled": {"compile": True, "eval_freq": 3, "batch_size": 4},
    "recomputed": {"activation_checkpointing": True},
    "bf16": {"dtype": "bf16", "batch_size": 3},
    "muon": {"optimizer": "muon", "schedule": "wsd"},
}
OFTEN = {"save_ckpt_freq": 7, "eval_freq": 8, "max_steps": 24}


@pytest.fixture(scope="module")
def whole(home):  # noqa: F811
    """One big batch on one process."""
    return train(home, "whole", batch_size=8, **LLAMA)


@pytest.mark.parametrize(
    ("world", "parallel", "accumulation", "rows", "recomputed"),
    [(2, "ddp", 2, 2, False), (2, "fsdp", 2, 2, False), (4, "fsdp", 1, 2, True)],
)
def test_any_arrangement_trains_as_one_process(
    home,  # noqa: F811
    whole,
    world,
    parallel,
    accumulation,
    rows,
    recomputed,
):
    settings = {"batch_size": rows, "grad_accum_steps": accumulation, "parallel": parallel}
    name = f"{parallel}{world}"
    folder = train(home, name, world, activation_checkpointing=recomputed, **settings, **LLAMA)
    for key, rel in (("train_loss", 1e-4), ("grad_norm", 1e-4), ("val_loss", 1e-4)):
        assert metrics(folder, key) == pytest.approx(metrics(whole, key), rel=rel), key
    ours, theirs = tensors(folder), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(t, theirs[name], atol=1e-5) for name, t in ours.items())
    optimizer = "optimizer.safetensors"
    assert tensors(folder, optimizer).keys() == tensors(whole, optimizer).keys()


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_resumed_equals_straight_to_the_bit(home, monkeypatch, name):  # noqa: F811
    settings = {**LLAMA, **OFTEN, **ARRANGEMENTS[name]}
    assert train_here(home, monkeypatch, f"{name}-straight", **settings) == 0
    stops = (10, 20, None)
    codes = [train_here(home, monkeypatch, f"{name}-resumed", n, **settings) for n in stops]
    assert codes == [75, 75, 0]
    assert the_same_to_the_bit(home / f"runs/{name}-resumed", home / f"runs/{name}-straight")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_resumed_equal_straight_to_the_bit(home, parallel):  # noqa: F811
    settings = {**LLAMA, **OFTEN, "parallel": parallel, "batch_size": 2}
    straight = train(home, f"{parallel}-straight", 2, **settings)
    stop(home, f"{parallel}-resumed", 10, 2, **settings)
    assert the_same_to_the_bit(train(home, f"{parallel}-resumed", 2, **settings), straight)


def test_a_checkpoint_of_another_family_is_refused(home, monkeypatch, whole):  # noqa: F811
    line = refusal(home, monkeypatch, "whole", batch_size=8, max_lr=1e-3, model_size="nano")
    assert "family" in line and "llama" in line
    line = refusal(home, monkeypatch, "new", init_from=whole, n_layer=3)
    assert "--n_layer: 3 is another shape than 2 of the model" in line
    line = refusal(home, monkeypatch, "new", init_from=whole, dropout=0.1)
    assert "--dropout: a model of the family llama has none" in line


def test_flags_of_one_family_are_refused_by_the_other(home, monkeypatch):  # noqa: F811
    line = refusal(home, monkeypatch, "new", model_size="llama-nano", dropout=0.1)
    assert "--dropout: a model of the family llama has none; leave the flag out" in line
    line = refusal(home, monkeypatch, "new", model_size="nano", n_kv_head=1)
    assert "--n_kv_head: a model of the family gpt has none; leave the flag out" in line
    line = refusal(home, monkeypatch, "new", model_size="llama-nano", n_embd=66, n_head=4)
    assert "n_embd 66 is not a multiple of n_head 4" in line
    line = refusal(home, monkeypatch, "new", model_size="llama-huge")
    assert "unknown size 'llama-huge'; choose one of nano, micro," in line
    assert "llama-nano" in line


def test_a_run_starts_from_the_weights_of_another(home, monkeypatch, whole):  # noqa: F811
    settings = {"init_from": str(whole), "max_steps": 2, "max_lr": 1e-9, "warmup_steps": 0}
    assert train_here(home, monkeypatch, "further", **settings) == 0
    ours, theirs = tensors(home / "runs/further"), tensors(whole)
    assert all(torch.allclose(t, theirs[name], atol=1e-6) for name, t in ours.items())


def test_plan_sample_score_and_compare(home, whole):  # noqa: F811
    result = start(home, "planned", plan=True, **LLAMA)
    assert result.returncode == 0 and "parameters: 108,928 (token" in result.stdout, result.stderr
    flags = ("--checkpoint", whole, "--device", "cpu")
    for more in (("--prompt", "the", "--max_new_tokens", "5"), ("--eval", whole / "samples.txt")):
        result = run("gpt_train.py", *flags, *more, cwd=home)
        assert result.returncode == 0 and "108,928 parameters" in result.stdout, result.stderr
    train(home, "gpt", max_steps=4)
    result = run("gpt_train.py", "--compare", whole, home / "runs/gpt", cwd=home)
    assert result.returncode == 0, result.stderr
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert rows["parameters"][1] == "108,928" and rows["n_kv_head"][1:] == ["1", "None"]
