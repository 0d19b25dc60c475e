"""Our ids are tiktoken's; what is written opens in Hugging Face's tokenizers with the same ids."""

import json
import socket

import numpy as np
import pytest
import tiktoken
from conftest import GPT2_CACHE, shared

from parts.data import tokenizers as T


@pytest.fixture
def gpt2(monkeypatch):
    shared("data/gpt2/tiktoken_cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    return T.gpt2_tokenizer()


FOX = "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.\n\n"
TRAINING_TEXTS = [FOX * 30, "naïve café"]


@pytest.fixture(scope="module")
def bpe():
    return T.train_bpe(TRAINING_TEXTS, 400)


def test_gpt2_ids_equal_tiktokens_on_tiny_shakespeare(gpt2):
    text = shared("data/reference/tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    assert len(gpt2.encode(text[:cut])) == 301_966  # nanoGPT's counts
    assert len(gpt2.encode(text[cut:])) == 36_059
    assert np.array_equal(gpt2.encode(text), tiktoken.get_encoding("gpt2").encode_ordinary(text))
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.eot == 50256 and gpt2.vocab_size == 50257


def test_gpt2s_own_files_load_as_a_local_tokenizer(gpt2):
    for path in ("data/gpt2/vocab.bpe", "data/gpt2/hf", "data/gpt2/hf/merges.txt"):
        assert T.Tokenizer.load(shared(path)).fingerprint == gpt2.fingerprint


TEXTS = [
    "مرحبا بالعالم",
    "Привет, мир!",
    "😀👩‍👩‍👧 zwj",
    "\x00\x7f\x80\xff",
    "a\r\n\tb   \n\n\n",
    "I'll we've 1234 <|endoftext|> x",
    "",
    "ﬀ\u0301",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", "bpe", "bytes"])
def test_every_text_comes_back(kind, text, request):
    tokenizer = T.byte_tokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eot not in ids.tolist()  # the separator written out is text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert ids.max(initial=0) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_lone_bytes_come_back_as_bytes_and_never_crash_as_text(kind, bpe):
    tokenizer = bpe if kind == "bpe" else T.byte_tokenizer()
    ids = [tokenizer.ranks[bytes([b])] for b in range(256)]
    assert tokenizer.decode_bytes(ids) == bytes(range(256))
    assert "\ufffd" in tokenizer.decode(ids)


def test_a_million_blanks_are_encoded_and_trained_on(bpe):
    text = "a" + " " * 1_500_000 + "\n" * 300_000 + "b"
    for tokenizer in (bpe, T.byte_tokenizer(), T.make_tokenizer("bpe:300", [text])):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_documents_end_with_end_of_text_exactly_once(bpe):
    ids = bpe.encode_documents(["one", "", "two <|endoftext|> two"]).tolist()
    assert ids.count(bpe.eot) == 3 and ids[-1] == bpe.eot
    assert bpe.encode_documents([]).shape == (0,)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_documents_encoded_together_are_documents_encoded_apart(kind, bpe):
    tokenizer = T.byte_tokenizer() if kind == "bytes" else bpe
    plain = [
        "one two  ",
        "\n\n three's",
        " ",
        "x" * 1000,
        "a lone \ud800 surrogate",
        "naïve «Ёлка» 🎄",
        "<|endo",
        "ftext|>",
        "",
    ]
    with_separator = [*plain, "text that says <|endoftext|> itself"]
    for documents in (plain, with_separator, [" " * 1_500_000, "after"], []):
        apart = []
        for text in documents:
            apart += [*tokenizer.encode(text).tolist(), tokenizer.eot]
        together = tokenizer.encode_documents(documents)
        assert together.tolist() == apart and together.dtype == np.uint32


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "bytes"])
def test_saved_tokenizer_loads_here_and_in_hugging_face_with_the_same_ids(kind, request, tmp_path):
    import tokenizers

    tokenizer = T.byte_tokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json())
    text = "The quick naïve fox: 12345 'tis we'll  \n\n jump 😀 Привет"
    again = T.Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.eot == tokenizer.eot
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == tokenizer.encode(text).tolist()


def test_training_a_bpe_is_repeatable_and_merges_what_is_frequent(bpe):
    assert T.train_bpe(TRAINING_TEXTS, 400).fingerprint == bpe.fingerprint
    assert len(bpe.encode(" fox")) == 1 and bpe.vocab_size <= 400
    assert T.train_bpe([""], 300).vocab_size == 257


def test_different_merges_have_different_fingerprints(bpe):
    other = T.train_bpe(["other text " * 50], 300)
    assert len({bpe.fingerprint, T.byte_tokenizer().fingerprint, other.fingerprint}) == 3


def test_auto_takes_the_small_vocabulary_on_a_cpu():
    assert T.make_tokenizer("auto", ["some text " * 100]).name.startswith("bpe:")
    assert T.make_tokenizer("bytes", []).vocab_size == 257
    assert T.make_tokenizer("bpe:280", ["some text, more text " * 100]).vocab_size <= 280


@pytest.mark.parametrize("spec", ["gpt2", "auto"])
def test_without_network_and_cache_a_bpe_is_trained_and_one_line_says_so(
    spec, monkeypatch, tmp_path, capsys
):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert T.make_tokenizer(spec, ["some text " * 100], on_gpu=True).name.startswith("bpe:")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "training a BPE" in out
    assert not list(tmp_path.iterdir())


def test_a_download_that_hangs_is_given_up_in_time(monkeypatch, tmp_path):
    listener = socket.socket()  # accepts, never answers
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with listener, pytest.raises(OSError, match=r"timed out|no answer within"):
        T._download(f"http://127.0.0.1:{listener.getsockname()[1]}/x", tmp_path / "x", 0.5)
    assert not (tmp_path / "x").exists()


UNKNOWN_SPECS = ["bpe:x", "bpe:12", "bpe:99999999999", "nonsense", "gpt3", "gpt2:3"]


@pytest.mark.parametrize("spec", UNKNOWN_SPECS)
def test_a_spec_that_names_nothing_is_refused(spec):
    with pytest.raises((ValueError, FileNotFoundError), match="--tokenizer"):
        T.make_tokenizer(spec, ["text"])


def test_a_tokenizer_file_that_would_lose_text_is_refused(tmp_path, bpe):
    good = json.loads(bpe.to_json())
    model = good["model"]
    without_two_bytes = {t: i for t, i in model["vocab"].items() if t not in "!#"}
    wrong = {
        "wordpiece": {"model": {"type": "WordPiece", "vocab": {}}},
        "no special": {"added_tokens": []},
        "no model": {"model": None},
        "no steps": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        "no pre-tokenizer": {"pre_tokenizer": None},
        "bytes missing": {"model": {**model, "vocab": without_two_bytes}},
    }
    for change in wrong.values():
        (tmp_path / "t.json").write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"t\.json"):
            T.Tokenizer.load(tmp_path / "t.json")
    for junk in (b"", b"not json", b"[]", b"\xff\xfe"):
        (tmp_path / "t.json").write_bytes(junk)
        with pytest.raises(ValueError, match=r"t\.json"):
            T.Tokenizer.load(tmp_path / "t.json")
