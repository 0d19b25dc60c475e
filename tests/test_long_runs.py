"""A long run of one character, or a line without blanks, takes seconds and comes back whole."""

import base64
import json
import os
import random
import re
import time

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import GPT2_CACHE, shared

from parts.data import bpe_training
from parts.data import tokenizers as T

MOST_SECONDS = 20  # each takes less than 3; in quadratic time it would be a minute and more
draw = random.Random(0)
RUNS = {
    "letter": "a" * 300_000,
    "blanks": " " * 300_000,
    "base64": base64.b64encode(draw.randbytes(300_000)).decode(),
    "letters": "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=300_000)),
    "Chinese": "".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(150_000)),
    "digits": "12" * 150_000,
    "signs": "=-" * 150_000,
    "lines": "\n" * 300_000,
    "after a word": "see " + "b" * 300_000 + " end. " * 100,
}


@pytest.fixture(autouse=True)
def in_seconds(request):
    """Fails a test that takes quadratic time, without the loading of a tokenizer."""
    for name in {"gpt2", "of_hugging_face"} & set(request.fixturenames):
        request.getfixturevalue(name)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < MOST_SECONDS


def untouched(texts, vocab_size: int) -> dict:
    """{token: id} as the library trains it on these texts; only long white space is shortened."""
    texts = [re.sub(r"(\s{100})\s+", r"\1", text) for text in texts]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    vocab = model.get_vocab(with_added_tokens=False)
    return {T._from_printable(token): i for token, i in vocab.items()}


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", RUNS)
def test_a_vocabulary_is_trained_on_a_long_run_in_seconds(name):
    text = RUNS[name]
    tokenizer = T.make_tokenizer("bpe:1000", [text])
    longest = max(len(token.decode(errors="replace")) for token in tokenizer.ranks)
    assert longest <= bpe_training.MAX_RUN + 1, "a blank before it is a part of a word"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text and len(ids) < len(text.encode())


def test_a_run_in_a_text_costs_no_other_merge():
    words = "the old man and the sea and the ship on the sea " * 50
    plain = T.train_bpe([words], 300)
    with_run = T.train_bpe([f"{words}{'a' * 40_000} {words}"], 320)
    assert set(plain.ranks) - set(with_run.ranks) == set()
    assert max(map(len, with_run.ranks)) <= bpe_training.MAX_RUN


ORDINARY = {
    "reference/the-verdict.txt": 4096,
    "ru_en/ntrex128.ru": 2000,
    "gutenberg/34079_tajemnica_pl_utf8bom.txt": 1000,
    "q_code/q_files.jsonl": 3000,
}


@pytest.mark.parametrize("name", ORDINARY)
def test_a_vocabulary_of_ordinary_text_is_the_one_of_the_library(name):
    text = shared(f"data/{name}").read_text(encoding="utf-8")
    texts = [text]
    if name.endswith("jsonl"):
        texts = [json.loads(line)["text"] for line in text.splitlines()]
    assert T.make_tokenizer(f"bpe:{ORDINARY[name]}", texts).ranks == untouched(
        texts, ORDINARY[name]
    )


def test_runs_up_to_the_limit_and_lines_without_blanks_change_nothing():
    rows = [f"{sign * n}\n" for sign in "=-*a1\u4e2d" for n in (80, 300, bpe_training.MAX_RUN)]
    chinese = "".join(
        "".join(chr(0x4E00 + draw.randrange(50)) for _ in range(draw.randrange(3, 20))) + "\u3002"
        for _ in range(300)
    )
    links = "https://a.example/" + "/".join(f"part{n}?x={n}" for n in range(300))
    texts = ["".join(rows * 3), chinese, links, "word " * 2000, "", "a"]
    assert T.train_bpe(texts, 700).ranks == untouched(texts, 700)
    longer = ["=" * (bpe_training.MAX_RUN + 1) + "\n"] * 3
    assert T.train_bpe(longer, 700).ranks != untouched(longer, 700), "or nothing is tested here"


# ----------------------------------------------------------------------------------------- encoding


@pytest.fixture(scope="module")
def gpt2():
    shared("data/gpt2/tiktoken_cache")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    return T.gpt2_tokenizer()


@pytest.mark.parametrize("name", RUNS)
def test_gpt2s_ids_of_a_long_run_are_tiktokens_in_one_call_or_several(name, gpt2):
    text = RUNS[name]
    ids = gpt2.encode(text)
    assert np.array_equal(ids, tiktoken.get_encoding("gpt2").encode_ordinary(text))
    assert gpt2.decode(ids.tolist()) == text
    together = gpt2.encode_documents(["before", text, "after"]).tolist()
    apart = [gpt2.encode(t).tolist() for t in ("before", text, "after")]
    assert together == [i for part in apart for i in (*part, gpt2.eot)]


@pytest.fixture(scope="module", params=["qwen2.5", "modernbert-base"])
def of_hugging_face(request):
    return T.Tokenizer.load(shared(f"data/tokenizers/{request.param}"))


@pytest.mark.parametrize("name", RUNS)
def test_the_library_of_hugging_face_encodes_a_long_run_in_seconds(name, of_hugging_face):
    ids = of_hugging_face.encode(RUNS[name]).tolist()
    assert of_hugging_face.decode(ids) == RUNS[name]
    assert of_hugging_face.encode_documents([RUNS[name]]).tolist() == [*ids, of_hugging_face.eot]
