"""Tokenizers that tiktoken cannot run give transformers' ids and keep every byte of a text."""

import base64
import json
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import one_error_line, run, shared

from parts.data.huggingface_tokenizer import HuggingFaceTokenizer, agree
from parts.data.tokenizers import (
    Tokenizer,
    content_key,
    make_tokenizer,
    train_bpe,
    vocabulary_of,
)

REAL = ["modernbert-base", "qwen2.5", "mistral-v1"]
ODD = [
    "",
    " lead and trail  ",
    "\t\t code\n\n\n  def f():\r\n",
    "\U0001f600 \U0001f469\u200d\U0001f467 e\u0301 \ufb01 \ufeff \u65e5\u672c",
    "<|endoftext|> [MASK] </s><s> <unk> <|im_end|>[SEP]",
    " " * 500 + "a" * 3000,
    "\x00\x01\x7f \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
]


def real(name: str) -> Tokenizer:
    """A tokenizer of the shared data; skips without it, or without what its file needs."""
    folder = shared(f"data/tokenizers/{name}")
    if name == "mistral-v1":
        pytest.importorskip("sentencepiece")
    return Tokenizer.load(folder)


def real_texts() -> list[str]:
    """English, Russian, Arabic and Q."""
    names = ("gutenberg/00011_alice_2018_utf8bom.txt", "ru_en/ntrex128.ru", "ru_en/ntrex128.en")
    texts = [shared(f"data/{name}").read_text(encoding="utf-8")[:100_000] for name in names]
    arabic = sorted(path for path in shared("data/arabic/txt").rglob("*") if path.is_file())
    texts += [path.read_text(encoding="utf-8", errors="replace")[:50_000] for path in arabic[:3]]
    lines = shared("data/q_code/q_files.jsonl").read_text(encoding="utf-8").splitlines()
    return texts + [json.loads(line)["text"][:20_000] for line in lines[:40]]


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    tokenizer = real(name)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    reference = transformers.AutoTokenizer.from_pretrained(shared(f"data/tokenizers/{name}"))
    assert tokenizer.vocab_size == len(reference)
    for text in [*ODD, *real_texts()]:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, allowed=tokenizer.special).tolist() == expected, text[:50]


@pytest.mark.parametrize("name", REAL)
def test_every_text_comes_back_and_cannot_write_a_special_token(name):
    tokenizer = real(name)
    special = set(tokenizer.special.values())
    for text in [*ODD, *real_texts()]:
        ids = tokenizer.encode(text).tolist()
        assert not special & set(ids), text[:50]
        back = tokenizer.decode(ids)
        if name == "mistral-v1":  # puts a blank in front
            assert back == (" " + text if text else "")
        else:
            assert back == unicodedata.normalize("NFC", text)
        assert tokenizer.token_bytes()[ids].sum() == len(back.encode())


@pytest.mark.parametrize("name", REAL)
def test_documents_together_are_documents_apart(name):
    tokenizer = real(name)
    documents = [*ODD, "plain", "\ud800 lone"]
    apart = [part for text in documents for part in (tokenizer.encode(text), [tokenizer.eot])]
    assert np.array_equal(tokenizer.encode_documents(documents), np.concatenate(apart))
    assert len(tokenizer.encode_documents([])) == 0


@pytest.mark.parametrize("name", REAL)
def test_the_json_gives_the_same_tokenizer(name, tmp_path):
    tokenizer = real(name)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.fingerprint == tokenizer.fingerprint and again.name == tokenizer.name
        assert np.array_equal(again.encode(ODD[3]), tokenizer.encode(ODD[3]))
    assert vocabulary_of(str(tmp_path)) == tokenizer.vocab_size


def test_what_ends_and_begins_a_document():
    found = {}
    for name in ("modernbert-base", "qwen2.5"):
        tokenizer = real(name)
        found[name] = (tokenizer.eot_text, tokenizer.eot, tokenizer.bos)
    assert found["modernbert-base"] == ("[SEP]", 50282, 50281)
    assert found["qwen2.5"] == ("<|endoftext|>", 151643, 151643)


def byte_fallback(tmp_path):
    """A tiny tokenizer.json in the manner of Llama's: pieces with blanks, and byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", "a", "b", "ab", "\u2581ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": pieces[i], "special": True, **flags} for i in range(3)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["a", "b"], ["\u2581", "ab"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path, spec


def test_byte_fallback_by_hand(tmp_path):
    path, spec = byte_fallback(tmp_path)
    tokenizer = Tokenizer.load(path)
    ids = spec["model"]["vocab"]
    assert tokenizer.encode("ab ab").tolist() == [ids["ab"], ids["\u2581ab"]]
    assert tokenizer.encode("\u00e9").tolist() == [ids["<0xC3>"], ids["<0xA9>"]]
    assert tokenizer.decode_bytes([ids["<0xC3>"]]) == b"\xc3"
    assert tokenizer.decode([ids["<0xC3>"]]) == "\ufffd"
    assert (tokenizer.eot, tokenizer.bos, tokenizer.vocab_size) == (2, 1, 264)
    assert tokenizer.token_bytes()[[2, ids["<0xC3>"], ids["\u2581ab"]]].tolist() == [0, 1, 3]
    text = "ab</s>a<s>b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 2 not in tokenizer.encode(text)
    allowed = tokenizer.encode(text, allowed={"</s>"}).tolist()
    assert allowed.count(2) == 1 and 1 not in allowed and tokenizer.decode(allowed) == text


def with_word(spec):
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "small cat"})
    spec["added_tokens"][-1]["special"] = False


def with_unreached(spec):
    vocab = spec["model"]["vocab"]
    spec["added_tokens"][0]["id"] = len(vocab) + 1
    vocab["zqx"] = len(vocab)


ONLY_IN_THE_LIBRARY = {
    "an added word": with_word,
    "a token that no merge reaches": with_unreached,
    "dropout": lambda spec: spec["model"].update(dropout=0.5),
    "ignore_merges": lambda spec: spec["model"].update(ignore_merges=True),
    "truncation": lambda spec: spec.update(
        truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        normalizer={"type": "NFC"},
    ),
    "lstrip": lambda spec: spec["added_tokens"][0].update(lstrip=True),
}


@pytest.mark.parametrize("case", ONLY_IN_THE_LIBRARY)
def test_what_tiktoken_does_not_do_is_left_to_the_library(case, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    spec = json.loads(train_bpe(["a small text about a small cat"] * 9, 300).to_json())
    n = len(spec["model"]["vocab"])
    ONLY_IN_THE_LIBRARY[case](spec)
    for token in spec["added_tokens"]:
        token["id"] = token["id"] if token["id"] != 300 else n + 1
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    spec["model"]["dropout"] = spec["truncation"] = None
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in ("a small cat zqx", " about  a text" * 5):
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == expected


def test_a_file_is_compared_with_its_library_before_it_is_trusted():
    tokenizer = train_bpe(["a small text about a small cat"] * 9, 300)
    library = HuggingFaceTokenizer(tokenizer.to_json())
    assert agree(tokenizer, library)
    other = HuggingFaceTokenizer(train_bpe(["another text, of dogs"] * 9, 300).to_json())
    assert not agree(tokenizer, other)


def test_allowed_special_tokens_of_the_other_class_too():
    tokenizer = train_bpe(["a small text about a small cat"] * 9, 280)
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")
    allowed = tokenizer.encode("a<|endoftext|>b", allowed={"<|endoftext|>"})
    assert allowed.tolist().count(tokenizer.eot) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"byte_fallback": False}}, "neither byte-level nor has it byte fallback"),
        ({"added_tokens": []}, "no end-of-text token among its special tokens"),
        ({"model": {"type": "WordLevel"}}, "t.json: cannot be used as a tokenizer"),
    ],
)
def test_a_vocabulary_that_loses_text_is_refused(tmp_path, change, message):
    path, spec = byte_fallback(tmp_path)
    for name, value in change.items():
        spec[name] = {**spec[name], **value} if isinstance(value, dict) else value
    path = tmp_path / "t.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer.load(path)
    assert "\n" not in str(e.value)


def test_a_folder_is_identified_by_all_its_files(tmp_path):
    folder = tmp_path / "qwen"
    shutil.copytree(shared("data/tokenizers/qwen2.5"), folder)
    before = content_key(str(folder))
    assert len(before) == 64 and before == content_key(str(shared("data/tokenizers/qwen2.5")))
    (folder / "added_tokens.json").chmod(0o644)
    (folder / "added_tokens.json").write_text("{}", encoding="utf-8")
    assert content_key(str(folder)) != before


def test_a_folder_that_transformers_cannot_read_is_one_line(tmp_path):
    (tmp_path / "vocab.json").write_text("not json", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b", encoding="utf-8")
    flags = ("--dataset_name", "nowhere", "--tokenizer", tmp_path)
    line = one_error_line(run("prep_dataset.py", "tokenize", *flags, cwd=tmp_path), 2)
    assert "transformers cannot read its tokenizer" in line and str(tmp_path) in line


@pytest.mark.parametrize("script", ["pretraining_simple.py", "pretraining_advanced.py"])
def test_both_trainers_take_one_and_sample_with_it(script, texts, tmp_path):
    path, _ = byte_fallback(tmp_path)
    flags = ["--model_size", "nano", "--context_length", "16", "--tokenizer", path]
    flags += ["--max_steps", "3", "--device", "cpu", "--batch_size", "2"]
    data = ["--data_dir", texts]
    if "advanced" in script:
        data = ["--dataset_name", texts, "--val_share", "0.2"]
    result = run(script, *flags, *data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "bits per byte" in result.stdout
    sampled = ("--checkpoint", run_dir, "--prompt", "ab", "--max_new_tokens", "5")
    result = run("gpt_train.py", *sampled, "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0 and "tokenizer bpe:264" in result.stdout, result.stderr
    result = run("gpt_train.py", "--checkpoint", run_dir, "--eval", texts, cwd=tmp_path)
    assert result.returncode == 0 and "bits per byte" in result.stdout, result.stderr


# ------------------------------------------------------------------------------- parts of one alone

PARTS = {  # file of the shared data -> what it holds
    "tokenizers/qwen2.5/merges.txt": "merges without their vocabulary",
    "tokenizers/qwen2.5/vocab.json": "a vocabulary without merges",
    "tokenizers/qwen2.5/tokenizer_config.json": "the settings of a tokenizer",
    "tokenizers/qwen2.5/added_tokens.json": "tokens added to a vocabulary",
    "tokenizers/qwen2.5/special_tokens_map.json": "the special tokens of a tokenizer",
    "tokenizers/mistral-v1/tokenizer.model": "a vocabulary of SentencePiece",
    "tokenizers/modernbert-base/tokenizer_config.json": "the settings of a tokenizer",
    "gpt2/hf/vocab.json": "a vocabulary without merges",
    "gpt2/encoder.json": "a vocabulary without merges",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_file_that_is_a_part_of_a_tokenizer_is_named_with_what_to_give(name, tmp_path):
    path, what = shared(f"data/{name}"), PARTS[name]
    folder = path.parent
    with pytest.raises(ValueError) as e:
        make_tokenizer(str(path), [])
    whole = {"modernbert-base": folder / "tokenizer.json"}.get(folder.name, f"its folder, {folder}")
    if folder.name == "gpt2":  # its merges have another name
        whole = "the folder with vocab.json and merges.txt, or a tokenizer.json"
    assert str(e.value) == f"--tokenizer: {path} holds {what}; give {whole}"
    # alone and under another name it is what it was
    renamed = shutil.copy(path, tmp_path / "t.json")
    with pytest.raises(ValueError, match=what) as e:
        make_tokenizer(str(renamed), [])
    assert str(e.value).endswith(
        "; give the folder with vocab.json and merges.txt, or a tokenizer.json"
    )


def test_parts_of_other_kinds_are_named_too_and_a_text_is_not_taken_for_one(tmp_path):
    ranks = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    wordpiece = "\n".join(["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "a"])
    bare = "\n".join(f"a{i} b{i}" for i in range(300))
    for contents, what in (
        (ranks, "a vocabulary of tiktoken"),
        (wordpiece, "a vocabulary of WordPiece"),
        (bare, "merges without their vocabulary"),
        ('{"model_type": "llama", "vocab_size": 32000}', "the settings of a model"),
        ("It was the best of times.\nIt was the worst of times.\n" * 99, "cannot be used"),
        ("not json", "cannot be used"),
        ("", "cannot be used"),
    ):
        (tmp_path / "t").write_text(contents, encoding="utf-8")
        with pytest.raises(ValueError, match=what) as e:
            Tokenizer.load(tmp_path / "t")
        assert str(tmp_path / "t") in str(e.value)
