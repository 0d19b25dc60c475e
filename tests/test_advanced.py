"""The production trainer: the same rows, in any arrangement, train the same model."""

import json
import re

import pytest
import torch
from conftest import one_error_line, run
from training_cases import (
    ARRANGEMENTS,
    OFTEN,
    WORDS,
    home,  # noqa: F401  a fixture
    metrics,
    refusal,
    start,
    state_of,
    stop,
    tensors,
    the_same_to_the_bit,
    train,
    train_here,
)

from parts.storage.checkpoint import load_tensors, newest_checkpoint, verify_checkpoint
from wt_load import weights_hash

GENTLE = {"max_grad_norm": 0, "max_lr": 1e-4, "save_ckpt_freq": 1, "keep_last": 99}
WAYS = [(1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 1, 2), (4, 2, 1)]


@pytest.fixture(scope="module")
def one_batch(home):
    """One big batch on one process: what every other arrangement must equal."""
    return train(home, "big", batch_size=8, **GENTLE)


@pytest.mark.parametrize(("world", "accumulation", "rows"), WAYS[1:])
def test_ranks_and_accumulation_are_one_big_batch(home, one_batch, world, accumulation, rows):
    folder = train(
        home,
        f"ways{world}{accumulation}{rows}",
        world,
        batch_size=rows,
        grad_accum_steps=accumulation,
        **GENTLE,
    )
    ours, theirs = (
        load_tensors(f / "checkpoints/step_000001/optimizer.safetensors")
        for f in (folder, one_batch)
    )
    for key in (
        key for key in theirs if key.endswith("|exp_avg")
    ):  # after one step a tenth of the gradient
        assert torch.allclose(10 * ours[key], 10 * theirs[key], atol=1e-6, rtol=1e-6), key
    for a, b in zip(metrics(folder), metrics(one_batch), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert metrics(folder, "val_tokens") == metrics(one_batch, "val_tokens")
    key_bias = slice(64, 128)  # its true gradient is zero, so AdamW scales rounding noise
    for key, weights in tensors(folder).items():
        a, b = weights.clone(), tensors(one_batch)[key].clone()
        if key.endswith("c_attn.bias"):
            a[key_bias] = b[key_bias] = 0
        assert torch.allclose(a, b, atol=1e-6), key


def test_validation_is_the_same_bits_on_any_number_of_ranks(home):
    settings = {
        "max_steps": 1,
        "eval_freq": 1,
        "batch_size": 2,
        "max_lr": 1e-20,
        "weight_decay": 0,
    }  # so that the weights stay the same
    figures = [
        metrics(train(home, f"val{world}", world, **settings), "val_loss") for world in (1, 2, 3)
    ]
    assert figures[0] == figures[1] == figures[2]


def test_the_same_losses_as_the_simple_script(home, tmp_path, monkeypatch):
    """Same data, order and seed, fp32, constant learning rate, no clipping: twenty equal losses."""
    import pretraining_simple as simple
    from parts.data.batches import TrainBatches
    from parts.data.shards import Shards, read_index
    from parts.data.tokenizers import byte_tokenizer
    from prep_dataset import TokenizeConfig, prepare_tokens

    settings = {
        "batch_size": 4,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "max_lr": 1e-3,
    }
    advanced = metrics(train(home, "like_simple", **settings))
    monkeypatch.chdir(home)
    folder = prepare_tokens(TokenizeConfig(dataset_name="data", tokenizer="bytes", val_share=0.05))

    def windows(_tokens, batch_size, T, seed):
        batches = TrainBatches(
            Shards(folder, "train", read_index(folder)), T, seed, byte_tokenizer().vocab_size
        )
        batches.share(0, 1, batch_size, batch_size)
        yield from ((b["inputs"], b["targets"]) for step in batches for b in step)

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(
        "\n\n".join(" ".join(WORDS) + str(i) for i in range(500)), encoding="utf-8"
    )
    monkeypatch.setattr(simple, "train_batches", windows)
    monkeypatch.setattr(simple, "learning_rate_share", lambda step, n_steps: 1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {"model_size": "nano", "context_length": 32, "batch_size": 4, "max_steps": 20}
    settings |= {"lr": 1e-3, "tokenizer": "bytes", "device": "cpu"}
    settings |= {"data_dir": str(tmp_path / "texts"), "output_dir": str(tmp_path / "run")}
    simple.main(simple.SimpleConfig(**settings))
    torch.set_num_threads(threads)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [r["train_loss"] for r in map(json.loads, lines) if "train_loss" in r]
    assert len(losses) == len(advanced) == 20
    assert losses == pytest.approx(advanced, rel=1e-6)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_resumed_equals_straight_to_the_bit(home, monkeypatch, name):
    """Stopped twice, with evaluations in between, in one process. (Several: tests/faults.)"""
    settings = {**OFTEN, **ARRANGEMENTS[name]}
    assert train_here(home, monkeypatch, f"{name}-straight", **settings) == 0
    codes = [
        train_here(home, monkeypatch, f"{name}-resumed", step, **settings)
        for step in (10, 25, None)
    ]
    assert codes == [75, 75, 0]
    assert the_same_to_the_bit(home / f"runs/{name}-resumed", home / f"runs/{name}-straight")


def test_four_ranks_resumed_equal_straight_to_the_bit(home):
    settings = {**OFTEN, "dropout": 0.1, "max_steps": 20}
    straight = train(home, "ranks-straight", 4, **settings)
    stop(home, "ranks-resumed", 9, 4, **settings)
    assert the_same_to_the_bit(train(home, "ranks-resumed", 4, **settings), straight)


def test_one_two_one_processes_see_the_same_rows(home):
    settings = {"max_steps": 50, "save_ckpt_freq": 20, "eval_freq": 50}
    straight = train(home, "121-straight", grad_accum_steps=2, **settings)
    for world, step in ((1, 10), (2, 30)):
        stop(home, "121", step, world, grad_accum_steps=2, **settings)
    folder = train(home, "121", grad_accum_steps=2, **settings)
    assert metrics(folder, "tokens") == metrics(straight, "tokens")
    for a, b in zip(metrics(folder), metrics(straight), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    line = one_error_line(start(home, "121", grad_accum_steps=2, batch_size=3, **settings), 2)
    assert "rows per step" in line


def test_a_finished_run_says_so_and_never_moves_it_aside(home):
    before = state_of(train(home, "twice"))
    result = start(home, "twice")
    assert result.returncode == 0 and "already finished at step 20" in result.stdout
    assert state_of(home / "runs/twice") == before
    result = start(home, "twice", resume="never", max_steps=2)
    assert result.returncode == 0 and (home / "runs/twice-1/checkpoints/step_000020").exists()
    longer = start(
        home,
        "twice-1",
        resume=home / "runs/twice-1",
        max_steps=25,
        allow_change="max_steps,warmup_steps",
    )
    assert longer.returncode == 0 and len(metrics(home / "runs/twice-1")) == 25


def test_the_run_folder_tells_how_to_go_on(home):
    folder = train(home, "told", tensorboard=True)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert {
        "config",
        "git_commit",
        "versions",
        "device",
        "data",
        "tokenizer",
        "launch",
        "resume",
    } <= set(facts)
    assert facts["config"]["max_lr"] == 3e-3 and "--run_name told" in facts["resume"]
    assert (folder / "loss.png").stat().st_size > 5000 and (folder / "samples.txt").read_text(
        encoding="utf-8"
    ).startswith("--- step 20")
    assert list((folder / "tensorboard").iterdir())
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert {
        "train_loss",
        "val_loss",
        "val_bits_per_byte",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "memory_gib",
    } <= set(last)
    assert last["mfu"] is None, "the peak of this CPU is not known"
    verify_checkpoint(newest_checkpoint(folder))
    result = run("wt_load.py", "verify", folder, cwd=home)
    assert result.stdout.splitlines()[-1] == weights_hash(tensors(folder))
    assert (
        run("gpt_train.py", "--checkpoint", folder, "--max_new_tokens", "5", cwd=home).returncode
        == 0
    )


def test_the_best_checkpoint_is_kept_besides_the_last(home):
    # a rate that ruins the model late: warmup over the whole run
    settings = {
        "max_lr": 1.0,
        "warmup_steps": 40,
        "max_steps": 40,
        "eval_freq": 4,
        "save_ckpt_freq": 4,
        "keep_last": 2,
        "max_grad_norm": 0,
    }
    folder = train(home, "best", **settings)
    losses = dict(zip(range(0, 41, 4), metrics(folder, "val_loss"), strict=True))
    best = min((step for step in losses if step), key=losses.get)
    kept = sorted(int(p.name[5:]) for p in (folder / "checkpoints").iterdir())
    assert kept == sorted({best, 36, 40}) and best < 36


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_lr": 1e-2}, "max_lr 0.003 then, 0.01 now.*--allow_change"),
        ({"seed": 5}, "seed"),
        ({"n_layer": 3}, "another model.*n_layer 2 then, 3 now"),
        ({"context_length": 16}, "another model"),
        ({"tokenizer": "bpe:300"}, "another model|another --tokenizer"),
        ({"max_documents": 300}, "max_documents"),
        ({"batch_size": 3}, "rows per step 1 then, 3 now"),
        ({"optimizer": "muon"}, "optimizer adamw then, muon now"),
        ({"dropout": 0.5}, "dropout 0.0 then, 0.5 now"),
        (
            {"max_steps": 2, "allow_change": "max_steps,warmup_steps"},
            "--max_steps: 2 is before step 4",
        ),
        ({"resume": "nowhere"}, "--resume: nowhere does not exist"),
        ({"resume": "data"}, "no checkpoint here"),
        ({"allow_change": "max_lrr"}, "max_lrr: no such setting"),
    ],
    ids=str,
)
def test_a_resume_that_does_not_fit_is_refused_and_nothing_is_touched(
    home, monkeypatch, settings, message
):
    folder = home / "runs/fits"
    if not folder.exists():
        train(home, "fits", max_steps=4)
    before = {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }
    line = refusal(home, monkeypatch, "fits", **{"max_steps": 4, **settings})
    assert re.search(message, line), line
    assert {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    } == before


def test_what_may_change_brings_along_what_was_derived_from_it(home):
    train(home, "changed", max_steps=4)
    result = start(home, "changed", max_steps=40, max_lr=1e-2, allow_change="max_lr,max_steps")
    assert result.returncode == 0 and "resumed from step 4" in result.stdout, result.stderr
    config = json.loads((home / "runs/changed/run.json").read_text(encoding="utf-8"))["config"]
    assert config["min_lr"] == pytest.approx(1e-3) and config["warmup_steps"] == 0, (
        "the warmup is behind the run already"
    )


@pytest.mark.parametrize(
    ("first", "then"), [("galore", "adamw"), ("muon", "adamw"), ("adamw", "galore")]
)
def test_another_optimizer_begins_anew_where_that_is_allowed(home, first, then):
    name = f"{first}_{then}"
    train(home, name, max_steps=4, optimizer=first, galore_rank=4)
    result = start(
        home, name, max_steps=8, optimizer=then, galore_rank=4, allow_change="optimizer,max_steps"
    )
    assert result.returncode == 0 and "starts anew" in result.stdout, result.stderr


def test_epochs_on_another_number_of_processes(home):
    """The number of steps that n_epochs gives belongs to the run, not to its number of ranks."""
    settings = {"max_steps": "None", "n_epochs": 0.02, "grad_accum_steps": 2}
    stop(home, "epochs", 3, **settings)
    folder = train(home, "epochs", world=2, **settings)
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    assert len(metrics(folder)) == config["max_steps"] > 10


def test_an_older_checkpoint_of_the_run_itself_does_not_undo_what_came_after_it(home):
    train(home, "older", max_steps=8, save_ckpt_freq=4)
    result = start(home, "older", max_steps=8, resume="runs/older/checkpoints/step_000004")
    assert (
        result.returncode == 0
        and "already finished" in result.stdout
        and "another --run_name" in result.stdout
    )


def test_files_of_the_user_in_the_output_folder_stay(home):
    folder = home / "runs/mine"
    (folder / "film.part").mkdir(parents=True)
    for name in ("thesis.part", "film.part/a", ".other.part"):
        (folder / name).write_text("x", encoding="utf-8")
    before = sorted(folder.rglob("*"))
    one_error_line(start(home, "mine", resume="nowhere"), 2)
    assert sorted(folder.rglob("*")) == before
    train(home, "mine", max_steps=2)
    assert set(before) <= set(folder.rglob("*"))


def test_of_an_attempt_without_a_checkpoint_nothing_is_taken_over(home):
    folder = home / "runs/stale"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 99.0}\n{"step": 1, "train_loss": 98.0}\n', encoding="utf-8"
    )
    (folder / "samples.txt").write_text("--- step 20\nof another model\n", encoding="utf-8")
    train(home, "stale")
    assert metrics(folder, "val_loss")[0] < 10 and "another model" not in (
        folder / "samples.txt"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["[1]", "null", "7", "{"])
def test_a_damaged_run_json_or_record_does_not_stop_the_run(home, damage):
    folder = home / "runs/damaged"
    if not folder.exists():
        train(home, "damaged", max_steps=4)
    (folder / "run.json").write_text(damage, encoding="utf-8")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 1, "train_loss": "abc", "tokens": "q"}\n')
    train(home, "damaged", max_steps=4)
