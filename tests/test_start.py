"""A mistake is refused before any text is tokenised: in one line, and nothing is left behind."""

import dataclasses
import os

import pytest
from conftest import one_error_line, ranks, run
from training_cases import flags, home, refusal, start, train  # noqa: F401  home is a fixture

import prep_dataset
import pretraining_advanced
from parts.storage.run_folder import claimed
from parts.training.run_settings import check_resumed
from prep_dataset import TokenizeConfig, prepare_tokens

MISTAKES = [  # settings, and what the error line says
    ({"init_from": "nowhere"}, "nowhere: no checkpoint here"),
    ({"init_from": "runs/of_bytes", "tokenizer": "WORDS"}, "trained with another tokenizer"),
    ({"init_from": "runs/of_bytes", "context_length": 64}, "--context_length: 64 is more than"),
    ({"init_from": "runs/of_bytes", "n_layer": 7}, "--n_layer: 7 is another shape"),
    ({"resume": "nowhere"}, "--resume: nowhere does not exist"),
    ({"resume": "data"}, "data: no checkpoint here"),
    ({"resume": "runs/of_bytes", "tokenizer": "bpe:300", "n_embd": 32}, "is of another model"),
    ({"resume": "runs/of_bytes", "tokenizer": "WORDS"}, "is of another model (vocab_size"),
    ({"resume": "runs/of_bytes", "max_lr": 1e-2}, "max_lr 0.003 then, 0.01 now"),
    ({"resume": "runs/of_bytes", "max_steps": 2}, "max_steps 4 then, 2 now"),
    ({"resume": "runs/of_bytes", "batch_size": 2}, "rows per step"),
    ({"resume": "runs/of_simple"}, "keeps no optimizer state"),
    ({"run_name": "of_bytes", "optimizer": "muon"}, "optimizer adamw then, muon now"),
    ({"n_head": 3}, "n_embd 64 is not a multiple of n_head 3"),
    ({"n_embd": 65}, "n_embd 65"),
    ({"model_size": "huge"}, "unknown size 'huge'"),
    ({"model_size": "llama-nano", "n_kv_head": 3}, "n_kv_head"),
    ({"output_dir": "data/train.jsonl"}, "--output_dir: data/train.jsonl"),
    ({"output_dir": "data/train.jsonl/run"}, "--output_dir: data/train.jsonl"),
    ({"output_dir": "/proc/nope"}, "--output_dir: /proc/nope"),
    ({"output_dir": "."}, "--output_dir: . is the current folder"),
    ({"output_dir": "runs/busy"}, "--output_dir: runs/busy is in use by another run"),
    ({"keep_last": 1_000_000_000}, "the disk has"),
    ({"optimizer": "galore8bit"}, "--optimizer galore8bit: needs CUDA"),
    ({"cpu_offload": True}, "--cpu_offload: needs --parallel fsdp"),
    ({"replicate": 2}, "--replicate: needs --parallel fsdp"),
    ({"reshard": False}, "--reshard: needs --parallel fsdp"),
    ({"parallel": "fsdp"}, "--parallel fsdp: is for several processes"),
    ({"device": "cuda:9"}, "--device"),
    ({"dtype": "fp16"}, "--dtype fp16: needs CUDA"),
    ({"tokenizer": "nothing.json"}, "--tokenizer: nothing.json does not exist"),
    ({"tokenizer": "bpe:5"}, "--tokenizer: bpe:5 is out of range"),
    ({"tokenizer": "bpe:many"}, "--tokenizer"),
    ({"dataset_subset": "nope"}, "no folder 'nope'"),
    ({"val_share": 2.0}, "--val_share: 2.0"),
    ({"allow_change": "max_lrr"}, "--allow_change: max_lrr: no such setting"),
]


@pytest.fixture(scope="module")
def earlier(home):  # noqa: F811
    """The folder with runs that the mistakes are about."""
    train(home, "of_bytes", max_steps=4)
    train(home, "of_words", max_steps=1, tokenizer="bpe:300")
    words = ("--data_dir", "prose", "--output_dir", "runs/of_simple", "--max_steps", 2)
    (home / "prose").mkdir()
    (home / "prose/a.txt").write_text("\n\n".join(f"{n} and {n + 1}." for n in range(999)), "utf-8")
    sizes = ("--model_size", "nano", "--context_length", 16, "--tokenizer", "bytes")
    assert run("pretraining_simple.py", *words, *sizes, "--device", "cpu", cwd=home).returncode == 0
    return home


@pytest.fixture
def unread(monkeypatch):
    """No document of any text may be read."""

    def chunks(*_):
        pytest.fail("the text is read")
        yield

    monkeypatch.setattr(prep_dataset.corpus.Corpus, "chunks", chunks)


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=str)
def test_a_mistake_is_refused_before_any_text_is_read(
    earlier, unread, monkeypatch, tmp_path, settings, message
):
    words = earlier / "runs/of_words/checkpoints/step_000001/tokenizer.json"
    settings = {key: str(words) if v == "WORDS" else v for key, v in settings.items()}
    before = sorted(earlier.rglob("*"))
    name = settings.pop("run_name", "bad")
    with claimed(earlier / "runs/busy"):
        line = refusal(
            earlier, monkeypatch, name, **{"max_steps": 4, "cache_dir": tmp_path / "c", **settings}
        )
    assert message in line and "\n" not in line
    assert not (tmp_path / "c").exists() and sorted(earlier.rglob("*")) == before


def test_a_setting_that_depends_on_the_text_is_left_for_later(earlier, monkeypatch, tmp_path):
    """Without a length, and of the same run, everything fits; the text is read then."""

    def chunks(*_):
        raise ValueError("the text is read")

    monkeypatch.setattr(prep_dataset.corpus.Corpus, "chunks", chunks)
    for more in ({}, {"max_steps": None}, {"n_epochs": 1.0}):
        settings = {"max_steps": 4, "cache_dir": tmp_path / "c", **more}
        assert refusal(earlier, monkeypatch, "of_bytes", **settings) == "the text is read", more
    settings = {"max_steps": 4, "cache_dir": tmp_path / "c", "init_from": "runs/of_bytes"}
    assert refusal(earlier, monkeypatch, "new", **settings) == "the text is read"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muon", "parallel": "fsdp"}, "needs whole matrices"),
        ({"optimizer": "galore", "parallel": "fsdp"}, "needs whole matrices"),
        ({"replicate": 3, "parallel": "fsdp"}, "--replicate 3: does not divide the 2 processes"),
        ({"keep_last": 1_000_000_000}, "the disk has"),
        ({"resume": "nowhere"}, "--resume: nowhere does not exist"),
    ],
    ids=str,
)
def test_all_ranks_refuse_before_any_text_is_read(home, settings, message):  # noqa: F811
    words = flags("bad", cache_dir="new_cache", **settings)
    results = ranks("pretraining_advanced.py", *words, world=2, cwd=home).wait(60)
    errors = [line for r in results for line in r.stderr.splitlines() if "error: " in line]
    assert [r.returncode for r in results] == [2, 2] and len(errors) == 1
    assert message in errors[0]
    assert not (home / "new_cache").exists() and not (home / "runs/bad").exists()


def test_the_run_folder_is_held_while_the_text_is_tokenised(home, monkeypatch, tmp_path):  # noqa: F811
    def tokenise(settings, build=True):
        if not build:
            return tmp_path / "absent"
        with claimed(home / "runs/held"):
            pytest.fail("the folder is free")

    monkeypatch.setattr(pretraining_advanced, "prepare_tokens", tokenise)
    assert "is in use by another run" in refusal(home, monkeypatch, "held")
    assert not (home / "runs/held").exists()


def test_an_earlier_run_stays_where_it_is_if_the_text_of_the_next_is_bad(earlier, tmp_path):
    settings = {"resume": "never", "cache_dir": tmp_path / "c", "text_field": "nope"}
    assert "its columns are text" in one_error_line(start(earlier, "of_bytes", **settings), 2)
    assert (earlier / "runs/of_bytes/checkpoints/step_000004").is_dir()
    assert not (earlier / "runs/of_bytes-1").exists()


def test_a_draft_compares_everything_but_text_and_length():
    config = pretraining_advanced.TrainConfig(max_steps=None)
    saved = dataclasses.asdict(config) | {"max_steps": 9, "min_lr": 1e-5, "warmup_steps": 1}
    state = {"config": saved, "data": "a", "rows_per_step": 4, "step": 9, "folder": "f"}
    facts = {"model_config": {}, "data": None}
    check_resumed(state, config, facts, 4)
    for name, value in {"max_lr": 1.0, "seed": 9, "weight_decay": 0.5, "max_steps": 10}.items():
        with pytest.raises(ValueError, match=name):
            check_resumed(state, dataclasses.replace(config, **{name: value}), facts, 4)


# ------------------------------------------------------------------------------ prep_dataset.py


@pytest.mark.parametrize("folder", ["/proc/nope", "data/train.jsonl", "data/train.jsonl/cache"])
@pytest.mark.parametrize("tokenizer", ["bpe:300", "bytes"])
def test_a_cache_that_cannot_be_written_is_refused_before_the_text_is_read(
    home,  # noqa: F811
    unread,
    monkeypatch,
    folder,
    tokenizer,
):
    monkeypatch.chdir(home)
    before = sorted(home.rglob("*"))
    with pytest.raises(ValueError, match=f"^--cache_dir: {folder}: .*; choose a writable folder"):
        prepare_tokens(TokenizeConfig("data", tokenizer=tokenizer, cache_dir=folder))
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("tokenizer", ["nothing.json", "bpe:7", "bpe:x", "bytes:5"])
def test_a_tokenizer_that_does_not_exist_is_refused_before_the_text_is_read(
    home,  # noqa: F811
    unread,
    monkeypatch,
    tokenizer,
):
    monkeypatch.chdir(home)
    with pytest.raises((ValueError, OSError), match="--tokenizer"):
        prepare_tokens(TokenizeConfig("data", tokenizer=tokenizer, cache_dir="new"))
    assert not os.path.exists("new")
