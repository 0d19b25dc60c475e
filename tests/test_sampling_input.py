"""Wrong input to sampling and scoring: one clear line each, and nothing changed."""

import io
import json
import os
import sys
from pathlib import Path

import given_runs
import numpy as np
import pytest
from conftest import ROOT
from given_runs import ARABIC, RUSSIAN, refused, sample

from parts.data import shard_writer, shards
from parts.data.tokenizers import byte_tokenizer, train_bpe

home = given_runs.home
nothing_else_changes = given_runs.nothing_else_changes

# ----------------------------------------------------------------------------------------- sampling

PROMPTS = ["", ARABIC, RUSSIAN, "\U0001f642", "a\0b", "\ud800", " " * 500, "x" * 5000]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_prompts_that_work(home, prompt):
    out = sample("--checkpoint", home / "a", "--prompt", prompt, "--max_new_tokens", 4)
    assert prompt in out
    assert ("the model reads the last 32" in out) == (len(prompt) > 31)


def test_greedy_is_the_same_whatever_the_seed(home):
    flags = ("--prompt", "Once", "--temperature", 0, "--max_new_tokens", 40)
    texts = [sample("--checkpoint", home / "a", *flags, "--seed", seed) for seed in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != sample("--checkpoint", home / "b", *flags)


ONE_OF_THEM = "--prompt, --prompt_file, --interactive: give one of them"
REFUSED = [
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
    (("--prompt", "a", "--prompt_file", "good.txt"), ONE_OF_THEM),
    (("--prompt", "a", "--interactive"), ONE_OF_THEM),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_sampling_refuses(home, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("caf\u00e9 na\u00efve".encode("latin-1"))
    Path("good.txt").write_text(RUSSIAN, encoding="utf-8")
    assert message in refused(sample, "--checkpoint", home / "a", *flags)


def test_a_prompt_of_a_file(home, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbf" + ARABIC.encode())
    out = sample("--checkpoint", home / "a", "--prompt_file", file, "--max_new_tokens", 5)
    assert out == sample("--checkpoint", home / "a", "--prompt", ARABIC, "--max_new_tokens", 5)
    file.write_bytes(b"")
    empty = sample("--checkpoint", home / "a", "--prompt_file", file)
    assert empty == sample("--checkpoint", home / "a")


@pytest.mark.parametrize("prompt", ["", "Once", RUSSIAN])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_stream_is_the_same_text(home, prompt, seed):
    line = ("--checkpoint", home / "a", "--prompt", prompt, "--seed", seed, "--max_new_tokens", 60)
    assert sample(*line, "--stream") == sample(*line)


def test_interactive_sampling_ends_with_its_input(home, monkeypatch):
    last_line = "x" + "y" * 100  # without a newline
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Once\n\n{ARABIC}\n{last_line}"))
    out = sample("--checkpoint", home / "a", "--interactive", "--max_new_tokens", 3)
    assert out.count("-" * 80) == 4 and ARABIC in out and "the model reads the last 32" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "-" * 80 not in sample("--checkpoint", home / "a", "--interactive")


# ------------------------------------------------------------------------------------------ scoring


def token_shards(folder, val=True, tokenizer=None) -> Path:
    """Shards as prep_dataset.py builds them."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = tokenizer.encode_documents(["the old man and a small dog went down to the sea"] * 20)
    source = iter([(None, None)])
    parts = {"train": (ids, 20, 900), "val": (ids, 20, 900) if val else (ids[:0], 0, 0)}

    def chunks(_):
        yield from source

    return shard_writer.build(folder, tokenizer, chunks, lambda _: parts, {"dataset_name": "x"}, 1)


def published(folder, ids, name="val") -> Path:
    """A shard without an index, as others publish them."""
    folder.mkdir()
    header = shards.header_of(len(ids), np.uint16)
    data = np.array(ids, np.uint16).tobytes()
    (folder / f"fineweb_{name}_000000.bin").write_bytes(header + data)
    return folder


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


def test_what_scoring_refuses(home, tmp_path):
    missing, broken, nothing = tmp_path / "missing", tmp_path / "broken", tmp_path / "nothing"
    latin = tmp_path / "texts/latin.txt"
    (tmp_path / "empty.txt").touch()
    nothing.mkdir()
    latin.parent.mkdir()
    latin.with_name("good.txt").write_text(RUSSIAN, encoding="utf-8")
    latin.write_bytes(b"caf\xe9 ")
    bpe = train_bpe(["the old man and the sea " * 50], 270)
    published(broken, range(200))
    os.truncate(broken / "fineweb_val_000000.bin", 1100)
    gpt2 = published(tmp_path / "gpt2", [5, 50256, 7])
    for given, message in {
        missing: f"--eval: {missing} does not exist; give token shards",
        tmp_path / "empty.txt": "empty.txt: holds no documents",
        nothing: "nothing has no .parquet",
        latin.parent: f"{latin}: not UTF-8 text",
        token_shards(tmp_path / "bpe", tokenizer=bpe): "was made with another tokenizer",
        token_shards(tmp_path / "no-val", val=False): "has no tokens for validation",
        gpt2: "ids that the checkpoint's tokenizer does not have",
        published(tmp_path / "train", [5, 6, 7], "train"): "has no tokens for validation",
        published(tmp_path / "one", [5]): "the text to score has 1 tokens",
        broken: f"{broken / 'fineweb_val_000000.bin'}: has 1,100 bytes",
    }.items():
        assert message in refused(sample, "--checkpoint", home / "a", "--eval", given), given
    line = ("--checkpoint", home / "a", "--eval", ROOT / "LICENSE")
    stride = "--stride: 33 is not between 1 and the context length, 32"
    assert stride in refused(sample, *line, "--stride", 33)
    assert stride.replace("33", "0") in refused(sample, *line, "--stride", 0)
    assert "--batch_size: 0 is out of range" in refused(sample, *line, "--batch_size", 0)
    good = published(tmp_path / "bytes", range(200))
    assert "tokens scored" in sample("--checkpoint", home / "a", "--eval", good)


ITEM = {
    "activity_label": "Sea",
    "ctx_a": "A man",
    "ctx_b": "he",
    "endings": ["swims.", "eats.", "flies.", "sings."],
    "label": 1,
}
LONG_ENDINGS = json.dumps(ITEM | {"endings": ["x" * 100] * 4})
QUESTIONS = [
    ("", "holds no items"),
    ("not json\n", "line 1 is not a HellaSwag item (not JSON)"),
    ("[" * 100_000, "(not JSON)"),
    ("{}\n", "it has to have activity_label"),
    (json.dumps(ITEM) + "\n" + json.dumps(ITEM)[:-9], "line 2 is not a HellaSwag item"),
    (json.dumps(ITEM | {"endings": ["a"]}), "4 endings"),
    (json.dumps(ITEM | {"label": ""}), "give the validation part"),
    (LONG_ENDINGS, "its longest ending has 101 tokens, this model reads 32"),
    ("\x1f\x8b\x08", "not JSON"),
]


@pytest.mark.parametrize("text, message", QUESTIONS)
def test_damaged_questions(home, tmp_path, text, message):
    path = tmp_path / "val.jsonl"
    line = ("--checkpoint", home / "a", "--eval")
    path.write_text(text, encoding="utf-8")
    assert message in refused(sample, *line, f"hellaswag:{path}")
    path.write_text(json.dumps(ITEM) + "\n", encoding="utf-8")
    assert "(1 items)" in sample(*line, f"hellaswag:{path}")
    assert "Is a directory" in refused(sample, *line, f"hellaswag:{tmp_path}")
