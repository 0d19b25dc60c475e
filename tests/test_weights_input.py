"""What people give by mistake to sampling, scoring, import, export and average: one clear line each, and nothing changed."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, one_error_line, run

import gpt_train
import pretraining_simple
import wt_load as W
from gpt_train import GPT, GPTConfig, SampleConfig
from parts.cli.config import parse
from parts.cli.launch import BAD_INPUT, error_line
from parts.data import shards
from parts.data.tokenizers import byte_tokenizer, train_bpe
from parts.storage.checkpoint import newest_checkpoint, save_checkpoint

SHAPE = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32)
ARABIC, RUSSIAN = "كان يا ما كان", "Жил-был у бабушки"
COMMANDS = {name: kind for name, (kind, _) in W.COMMANDS.items()}


def write_run(run_dir, seed=0, step=3, scale=1.0, **changes) -> Path:
    """A run of a small model that nobody has trained; returns its folder."""
    torch.manual_seed(seed)
    model, tokenizer = GPT(GPTConfig(**{**asdict(SHAPE), **changes})), byte_tokenizer()
    state = {
        "script": "x",
        "step": step,
        "tokens": 7,
        "model_config": asdict(model.config),
        "tokenizer": tokenizer.fingerprint,
    }
    tensors = {name: t * scale for name, t in model.state_dict().items()}
    save_checkpoint(
        run_dir,
        step,
        {"model.safetensors": tensors},
        state,
        {"tokenizer.json": tokenizer.to_json()},
        9,
    )
    return Path(run_dir)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Runs a and b of one model, `wider`, `untied` and `large` (values beyond fp16), and hf, an export of a. Nobody writes here."""
    folder = tmp_path_factory.mktemp("given")
    write_run(folder / "a", seed=0, step=3)
    write_run(folder / "b", seed=1, step=5)
    write_run(folder / "wider", n_embd=64)
    write_run(folder / "untied", tied=False)
    write_run(folder / "large", scale=1e7)
    with contextlib.redirect_stdout(io.StringIO()):
        W.main(W.ExportConfig(str(folder / "a"), ("hf", str(folder / "hf"))))
    return folder


def weights(*line) -> str:
    """What wt_load.py prints for a command line, in this process."""
    return printed(W.main, parse(COMMANDS, list(map(str, line))))


def sample(*line) -> str:
    """What gpt_train.py prints for a command line."""
    return printed(gpt_train.main, parse(SampleConfig, ["--device", "cpu", *map(str, line)]))


def printed(main, config) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(config)
    return out.getvalue()


def refused(start, *line) -> str:
    """The one line with which a command refuses its input."""
    with pytest.raises(BAD_INPUT) as e:
        start(*line)
    told = error_line(e.value)
    assert "\n" not in told and 10 < len(told) < 500, told
    return told


def contents(folder) -> dict:
    """Everything below a folder: names, and hashes of files."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else None
        for p in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture(autouse=True)
def nothing_else_changes(home):
    before = contents(home)
    yield
    assert contents(home) == before


# ------------------------------------------------------------------------------------------------- no weights there


def test_a_folder_that_is_no_checkpoint(home, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    assert "no checkpoint here; give a run folder" in refused(sample, "--checkpoint", tmp_path)
    for command in ("info", "verify"):
        assert f"{tmp_path}: neither model.safetensors nor pytorch_model.bin" in refused(
            weights, command, tmp_path
        )
    assert "neither model.safetensors" in refused(weights, "import", tmp_path, tmp_path / "run")
    assert "no checkpoints here; give a run folder" in refused(weights, "list", tmp_path)
    for line in (
        ("export", tmp_path, "--to", "hf", tmp_path / "out"),
        ("average", home / "a", tmp_path, "--out", tmp_path / "out"),
    ):
        assert f"{tmp_path}: no checkpoint here" in refused(weights, *line)
    assert "neither model.safetensors" in refused(weights, "diff", home / "a", tmp_path)
    for command in ("info", "verify", "list", "export"):
        more = ("--to", "hf", tmp_path / "out") if command == "export" else ()
        assert str(tmp_path / "nowhere") in refused(weights, command, tmp_path / "nowhere", *more)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_download_that_ended_early(home, tmp_path):
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert f"{path}: not a whole safetensors file" in refused(
        weights, "import", folder, tmp_path / "run"
    )
    path.rename(folder / "model.safetensors.incomplete")
    assert "neither model.safetensors" in refused(weights, "import", folder, tmp_path / "run")
    index = {
        "weight_map": {
            "wte.weight": "model-00001-of-00002.safetensors",
            "wpe.weight": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    told = refused(weights, "import", folder, tmp_path / "run")
    assert (
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are missing; download the folder again"
        in told
    )
    weights("export", home / "a", "--to", "nanogpt", tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", 60_000)
    assert str(tmp_path / "x.pt") in refused(weights, "import", tmp_path / "x.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_name_of_a_size_that_there_is_not(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 500, encoding="utf-8")
    line = [
        "--data_dir",
        str(tmp_path),
        "--model_size",
        "125M",
        "--output_dir",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
    ]
    with pytest.raises(
        ValueError, match=r"--model_size: unknown size '125M'; choose one of nano, micro, .*124M"
    ):
        printed(
            pretraining_simple.main,
            parse(pretraining_simple.SimpleConfig, [*line, "--tokenizer", "bytes"]),
        )
    told = one_error_line(
        run(
            "wt_load.py",
            "import",
            "hf:gpt2-huge",
            "run",
            cwd=tmp_path,
            env={"HF_HOME": str(tmp_path / "hub")},
        ),
        2,
    )
    assert "hf:gpt2-huge: not in the hub's cache here" in told and not (tmp_path / "run").exists()
    assert "'exprt': no such command; did you mean export?" in one_error_line(
        run("wt_load.py", "exprt", cwd=tmp_path), 2
    )


def test_a_vocabulary_that_is_not_the_tokenizers(home, tmp_path):
    bpe = train_bpe(["the old man and the sea " * 50], 270)
    (tmp_path / "bpe.json").write_bytes(bpe.to_json())
    told = refused(
        weights, "import", home / "hf", tmp_path / "run", "--tokenizer", tmp_path / "bpe.json"
    )
    assert (
        f"the tokenizer has {bpe.vocab_size} ids, the model a vocabulary of 257; give the tokenizer that it was trained with"
        in told
    )
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    assert "--tokenizer: the source has none for its vocabulary of 257" in refused(
        weights, "import", folder, tmp_path / "run"
    )
    assert "does not exist" in refused(
        weights, "import", folder, tmp_path / "run", "--tokenizer", tmp_path / "none.json"
    )
    assert not (tmp_path / "run").exists()


def test_heads_that_cannot_be_or_that_nobody_says(home, tmp_path):
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    (folder / "config.json").unlink()
    assert "2 blocks of width 32 may have any number of attention heads" in refused(
        weights, "info", folder
    )
    for n in (3, -1):
        assert str(folder) in refused(weights, "info", folder, "--n_head", n)
    assert "4 heads" in weights("info", folder, "--n_head", 4)


# --------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "prompt",
    ["", ARABIC, RUSSIAN, "\U0001f642", "a\0b", "\ud800", " " * 500, "x" * 5000],
    ids=ascii,
)
def test_prompts_that_work(home, prompt):
    out = sample("--checkpoint", home / "a", "--prompt", prompt, "--max_new_tokens", 4)
    assert prompt in out
    assert ("the model reads the last 32" in out) == (len(prompt) > 31)


def test_greedy_is_the_same_whatever_the_seed(home):
    texts = [
        sample(
            "--checkpoint",
            home / "a",
            "--prompt",
            "Once",
            "--temperature",
            0,
            "--max_new_tokens",
            40,
            "--seed",
            seed,
        )
        for seed in (0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != sample(
        "--checkpoint", home / "b", "--prompt", "Once", "--temperature", 0, "--max_new_tokens", 40
    )


@pytest.mark.parametrize("flags, told", [
    (("--top_k", 258), "--top_k: 258 is not between 1 and the 257 tokens of the vocabulary"),
    (("--top_k", 0), "--top_k: 0 is not between"),
    (("--top_p", 1.5), "--top_p: 1.5 is not in (0, 1]"),
    (("--temperature", -1), "--temperature: -1"),
    (("--temperature", "nan"), "--temperature: nan"),
    (("--seed", 2**63), "--seed: 9223372036854775808 does not fit"),
    (("--max_new_tokens", 0), "--max_new_tokens: 0 is out of range"),
    (("--num_samples", -1), "--num_samples: -1 is out of range"),
    (("--device", "tpu"), "--device tpu: 'tpu' cannot be used here"),
    (("--dtype", "fp16"), "--dtype fp16: needs CUDA"),
    (("--prompt_file", "missing.txt"), "missing.txt: No such file"),
    (("--prompt_file", "."), ".: Is a directory"),
    (("--prompt_file", "latin.txt"), "--prompt_file: latin.txt: not UTF-8 text"),
    (("--prompt", "a", "--prompt_file", "good.txt"), "--prompt, --prompt_file, --interactive: give one of them"),
    (("--prompt", "a", "--interactive"), "--prompt, --prompt_file, --interactive: give one of them"),
])  # fmt: skip
def test_what_sampling_refuses(home, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("caf\u00e9 na\u00efve".encode("latin-1"))
    Path("good.txt").write_text(RUSSIAN, encoding="utf-8")
    assert told in refused(sample, "--checkpoint", home / "a", *flags)


def test_a_prompt_of_a_file(home, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + ARABIC.encode())
    out = sample(
        "--checkpoint", home / "a", "--prompt_file", tmp_path / "p.txt", "--max_new_tokens", 5
    )
    assert out == sample("--checkpoint", home / "a", "--prompt", ARABIC, "--max_new_tokens", 5)
    (tmp_path / "p.txt").write_bytes(b"")
    assert sample("--checkpoint", home / "a", "--prompt_file", tmp_path / "p.txt") == sample(
        "--checkpoint", home / "a"
    )


@pytest.mark.parametrize("prompt", ["", "Once", RUSSIAN])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_stream_is_the_same_text(home, prompt, seed):
    line = ("--checkpoint", home / "a", "--prompt", prompt, "--seed", seed, "--max_new_tokens", 60)
    assert sample(*line, "--stream") == sample(*line)


def test_asking_goes_on_until_the_input_ends(home, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"Once\n\n{ARABIC}\nx{'y' * 100}")
    )  # the last line has no end
    out = sample("--checkpoint", home / "a", "--interactive", "--max_new_tokens", 3)
    assert out.count("-" * 80) == 4 and ARABIC in out and "the model reads the last 32" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "-" * 80 not in sample("--checkpoint", home / "a", "--interactive")


# ---------------------------------------------------------------------------------------------------------- scoring


def token_shards(folder, val=True, tokenizer=None) -> Path:
    """Shards as prep_dataset.py builds them."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = tokenizer.encode_documents(["the old man and a small dog went down to the sea"] * 20)
    source = iter([(None, None)])
    parts = {"train": (ids, 20, 900), "val": (ids, 20, 900) if val else (ids[:0], 0, 0)}

    def chunks(_):
        yield from source

    return shards.build(folder, tokenizer, chunks, lambda _: parts, {"dataset_name": "x"}, 1)


def test_shards_of_our_own_are_scored_like_their_text(home, tmp_path):
    folder = token_shards(tmp_path / "tokens")
    out = sample("--checkpoint", home / "a", "--eval", folder)
    n = len(shards.Shards(folder, "val", shards.read_index(folder)))
    assert f"({n - 1:,} tokens scored)" in out and "bits per byte" in out
    path = next(folder.glob("val*.bin"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"val_000000\.bin: block 0 differs from index\.json"):
        sample("--checkpoint", home / "a", "--eval", folder)


def published(folder, ids, name="val") -> Path:
    folder.mkdir()
    (folder / f"fineweb_{name}_000000.bin").write_bytes(
        shards._header(len(ids), np.uint16) + np.array(ids, np.uint16).tobytes()
    )
    return folder


def test_what_scoring_refuses(home, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/good.txt").write_text(RUSSIAN, encoding="utf-8")
    (tmp_path / "texts/latin.txt").write_bytes(b"caf\xe9 ")
    bpe = train_bpe(["the old man and the sea " * 50], 270)
    broken = published(tmp_path / "broken", range(200))
    os.truncate(broken / "fineweb_val_000000.bin", 1100)
    for given, told in {
        tmp_path / "missing": f"--eval: {tmp_path / 'missing'} does not exist; give token shards",
        tmp_path / "empty.txt": "empty.txt holds no text",
        tmp_path / "nothing": "nothing holds no text",
        tmp_path / "texts": f"--eval: {tmp_path / 'texts/latin.txt'}: not UTF-8 text",
        token_shards(tmp_path / "bpe", tokenizer=bpe): "was made with another tokenizer",
        token_shards(tmp_path / "no-val", val=False): "has no tokens for validation",
        published(
            tmp_path / "gpt2", [5, 50256, 7]
        ): "ids that the checkpoint's tokenizer does not have",
        published(tmp_path / "train", [5, 6, 7], "train"): "has no tokens for validation",
        published(tmp_path / "one", [5]): "the text to score has 1 tokens",
        broken: f"{broken / 'fineweb_val_000000.bin'}: has 1,100 bytes",
    }.items():
        assert told in refused(sample, "--checkpoint", home / "a", "--eval", given), given
    assert "--stride: 33 is not between 1 and the context length, 32" in refused(
        sample, "--checkpoint", home / "a", "--eval", ROOT / "LICENSE", "--stride", 33
    )
    assert "--batch_size: 0 is out of range" in refused(
        sample, "--checkpoint", home / "a", "--eval", ROOT / "LICENSE", "--batch_size", 0
    )
    assert "tokens scored" in sample(
        "--checkpoint", home / "a", "--eval", published(tmp_path / "bytes", range(200))
    )


ITEM = {
    "activity_label": "Sea",
    "ctx_a": "A man",
    "ctx_b": "he",
    "endings": ["swims.", "eats.", "flies.", "sings."],
    "label": 1,
}


@pytest.mark.parametrize("text, told", [
    ("", "holds no items"), ("not json\n", "line 1 is no item of HellaSwag (not JSON)"), ("[" * 100_000, "(not JSON)"), ("{}\n", "it has to have activity_label"),
    (json.dumps(ITEM) + "\n" + json.dumps(ITEM)[:-9], "line 2 is no item"), (json.dumps(ITEM | {"endings": ["a"]}), "4 endings"), (json.dumps(ITEM | {"label": ""}), "give the validation part"),
    (json.dumps(ITEM | {"endings": ["x" * 100] * 4}), "its longest ending has 101 tokens, this model reads 32"), ("\x1f\x8b\x08", "not JSON"),
])  # fmt: skip
def test_damaged_questions(home, tmp_path, text, told):
    path = tmp_path / "val.jsonl"
    path.write_text(text, encoding="utf-8")
    assert told in refused(sample, "--checkpoint", home / "a", "--eval", f"hellaswag:{path}")
    path.write_text(json.dumps(ITEM) + "\n", encoding="utf-8")
    assert "(1 items)" in sample("--checkpoint", home / "a", "--eval", f"hellaswag:{path}")
    assert "Is a directory" in refused(
        sample, "--checkpoint", home / "a", "--eval", f"hellaswag:{tmp_path}"
    )


# ------------------------------------------------------------------------------------------------- what is there already


def test_a_run_folder_that_is_there_is_left_alone(home, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("mine", encoding="utf-8")
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    for place in (taken, file):
        assert f"{place}: is there already" in refused(weights, "import", home / "hf", place)
        assert f"{place}: is there already" in refused(
            weights, "average", home / "a", home / "b", "--out", place
        )
    for kind in ("hf", "gguf", "nanogpt"):
        for place in (taken, file):
            assert f"--to: {place} is there already" in refused(
                weights, "export", home / "a", "--to", kind, place
            )
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    weights("import", home / "hf", tmp_path / "empty")
    assert newest_checkpoint(tmp_path / "empty")


def test_force_writes_over_an_export_and_over_nothing_else(home, tmp_path):
    weights("export", home / "a", "--to", "hf", tmp_path / "hf")
    weights("export", home / "b", "--to", "hf", tmp_path / "hf", "--force")
    assert "0 differ" in weights("diff", home / "b", tmp_path / "hf")
    weights("export", home / "a", "--to", "nanogpt", tmp_path / "x.pt")
    weights("export", home / "b", "--to", "nanogpt", tmp_path / "x.pt", "--force")
    assert "0 differ" in weights("diff", home / "b", tmp_path / "x.pt")
    run_dir = shutil.copytree(home / "a", tmp_path / "run")
    (tmp_path / "hf/mine.txt").write_text("precious", encoding="utf-8")
    before = contents(tmp_path)
    for place, kind, told in (
        (run_dir, "hf", "holds checkpoints, too, which would be deleted; name another place"),
        (run_dir / "checkpoints", "hf", "holds step_000003, too"),
        (newest_checkpoint(run_dir), "hf", "MANIFEST.json, too"),
        (tmp_path / "hf", "hf", "holds mine.txt, too"),
        (tmp_path, "hf", "too, which would be deleted"),
        (tmp_path / "x.pt", "hf", "x.pt is a file, hf writes a folder"),
        (tmp_path / "hf", "nanogpt", "hf is a folder, nanogpt writes a file"),
    ):
        assert told in refused(weights, "export", run_dir, "--to", kind, place, "--force")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind, name", [("hf", "out"), ("nanogpt", "out.pt"), ("gguf", "out.gguf")])
def test_an_export_that_fails_leaves_the_one_before_and_no_part(
    home, tmp_path, monkeypatch, kind, name
):
    if kind == "gguf":
        pytest.importorskip("gguf")
    weights("export", home / "a", "--to", kind, tmp_path / name)
    before = contents(tmp_path)
    assert "fp16: " in refused(
        weights,
        "export",
        home / "large",
        "--to",
        kind,
        tmp_path / name,
        "--force",
        "--dtype",
        "fp16",
    )
    assert str(tmp_path / "none") in refused(
        weights, "export", tmp_path / "none", "--to", kind, tmp_path / name, "--force"
    )
    assert contents(tmp_path) == before
    real = {"hf": W._to_hf, "nanogpt": W._to_nanogpt, "gguf": W._to_gguf}[kind]

    def and_then_the_disk_is_full(part, *args):
        real(part, *args)
        raise OSError(28, "No space left on device", str(part))

    monkeypatch.setattr(W, f"_to_{kind}", and_then_the_disk_is_full)
    for force, place in ((["--force"], name), ([], f"new-{name}")):
        with pytest.raises(OSError, match="No space left"):
            weights("export", home / "a", "--to", kind, tmp_path / place, *force)
        assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------- what a format cannot hold


def test_values_beyond_half_precision(home, tmp_path):
    told = refused(
        weights, "export", home / "large", "--to", "hf", tmp_path / "out", "--dtype", "fp16"
    )
    assert re.search(
        r"--dtype fp16: \S+ has values beyond 65504, the largest of fp16; use bf16 or fp32", told
    )
    weights("export", home / "large", "--to", "hf", tmp_path / "out", "--dtype", "bf16")
    assert not list(tmp_path.glob(".*"))


def test_a_head_of_its_own_does_not_fit_nanogpt(home, tmp_path):
    told = refused(weights, "export", home / "untied", "--to", "nanogpt", tmp_path / "x.pt")
    assert (
        told
        == "--to nanogpt: its output head is the embedding, this model has one of its own; use --to hf"
    )
    assert not list(tmp_path.iterdir())
    weights("export", home / "untied", "--to", "hf", tmp_path / "hf")
    assert "0 differ" in weights("diff", home / "untied", tmp_path / "hf")


# -------------------------------------------------------------------------------------------------- several checkpoints


def test_an_average_of_what_cannot_be_averaged(home, tmp_path):
    assert "is of another model or tokenizer than" in refused(
        weights, "average", home / "a", home / "wider", "--out", tmp_path / "out"
    )
    assert "is of another model or tokenizer than" in refused(
        weights, "average", home / "a", home / "untied", "--out", tmp_path / "out"
    )
    assert "give two or more checkpoints" in refused(
        weights, "average", home / "a", "--out", tmp_path / "out"
    )
    damaged = shutil.copytree(home / "b", tmp_path / "b")
    os.truncate(newest_checkpoint(damaged) / "model.safetensors", 5000)
    assert "damaged" in refused(weights, "average", home / "a", damaged, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    weights("average", home / "a", home / "b", "--out", tmp_path / "out")
    mean, a, b = (W.load_gpt(str(p)).wte.weight for p in (tmp_path / "out", home / "a", home / "b"))
    assert torch.equal(mean, ((a.double() + b.double()) / 2).float())


def test_a_list_names_the_damaged_ones_too(home, tmp_path):
    folder = shutil.copytree(home / "a", tmp_path / "a")
    write_run(folder, seed=2, step=9)
    (folder / "checkpoints/step_000009/trainer_state.json").write_text("{", encoding="utf-8")
    lines = weights("list", folder).splitlines()
    assert len(lines) == 2 and "step 3, 7 tokens" in lines[0] and "step_000009: damaged" in lines[1]
    assert "no checkpoints here" in refused(weights, "list", newest_checkpoint(home / "a"))


def test_a_difference_of_two_shapes_is_told_not_refused(home, tmp_path):
    out = weights("diff", home / "a", home / "wider")
    assert (
        f"n_embd: 32 in {home / 'a'}, 64 in {home / 'wider'}" in out
        and "wte.weight: [257, 32] in" in out
    )
    out = weights("diff", home / "a", home / "untied")
    assert (
        f"lm_head.weight: only in {home / 'untied'}" in out and f"tied: True in {home / 'a'}" in out
    )
    assert "relative difference" in weights("diff", home / "a", home / "b")
    assert "28 tensors are equal, 0 differ" in weights("diff", home / "a", home / "hf")


def test_on_the_command_line_too(home, tmp_path):
    for told, *line in (
        (
            "--top_k: 258",
            "gpt_train.py",
            "--checkpoint",
            home / "a",
            "--top_k",
            "258",
            "--device",
            "cpu",
        ),
        ("another model", "wt_load.py", "average", home / "a", home / "wider", "--out", "out"),
    ):
        assert told in one_error_line(run(*line, cwd=tmp_path), 2)
    assert not list(tmp_path.iterdir())
