"""Documents from every kind of file: whole, once, in the right mixture; bad sources are named."""

import gzip
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import one_error_line, run, shared
from corpus_cases import WORDS, document, documents, hub_folder, prepare, texts_in, write_jsonl

from parts.data import corpus, readers
from parts.data.python_docs import python_docs
from prep_dataset import read_documents


@pytest.fixture
def source(tmp_path):
    return hub_folder(tmp_path / "data")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_documents(kind, tmp_path):
    texts, folder = documents(60), tmp_path / "data"
    folder.mkdir()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    elif kind == "txt":
        (folder / "a.txt").write_text("\n<|endoftext|>\n".join(texts[:30]), encoding="utf-8")
        (folder / "b.txt").write_text("\n<|endoftext|>\n".join(texts[30:]), encoding="utf-8")
    else:
        (folder / f"a.{kind}").write_text(lines, encoding="utf-8")
    out = prepare(folder, tmp_path)
    assert sorted(texts_in(out, "train") + texts_in(out, "val")) == sorted(texts)
    single_file = prepare(min(folder.iterdir()), tmp_path)
    assert set(texts_in(single_file, "train")) <= set(texts)


def test_a_long_book_is_cut_for_validation_and_its_end_stands_once(tmp_path):
    paragraphs = [f"Paragraph {i}. " + " ".join(WORDS) * 5 for i in range(6000)]
    book = "\n\n".join(paragraphs)
    assert len(book) > 2 * readers.PIECE_CHARS
    (tmp_path / "data").mkdir()
    (tmp_path / "data/book.txt").write_text(book, encoding="utf-8")
    folder = prepare(tmp_path / "data", tmp_path, val_share=0.05)
    train, val = texts_in(folder, "train"), "".join(texts_in(folder, "val"))
    assert len(train) == 1 and 0.02 < len(val) / len(book) < 0.09
    assert len(train[0]) + len(val) == len(book)


def test_a_mixture_has_its_weights_and_no_document_twice(source, tmp_path):
    folder = prepare(source, tmp_path, dataset_subset="one:0.7,two:0.3")
    texts = texts_in(folder, "train") + texts_in(folder, "val")
    of_one = set(documents(400)[:200])
    assert len(texts) == len(set(texts))
    share = sum(text in of_one for text in texts) / len(texts)
    assert abs(share - 0.7) < 0.1  # three standard deviations


def long_texts(tmp_path):
    """A file with three documents of numbered lines, several pieces each, and these documents."""
    path = tmp_path / "long.txt"
    texts = []
    for letter in "abc":
        lines = [f"{letter} line {i}\n" + "\n" * (i % 50 == 0) for i in range(90_000)]
        texts.append("".join(lines))
    path.write_text("<|endoftext|>\n".join(texts), encoding="utf-8")
    return path, [t.strip("\n") for t in texts]


@pytest.fixture
def no_validation(monkeypatch):
    """Builds whose text is all for training."""
    monkeypatch.setattr(corpus, "divide", lambda rows, val_share: (0.0, corpus.PASSAGE))


def test_long_documents_stay_whole_when_machines_share_them(tmp_path, no_validation):
    path, texts = long_texts(tmp_path)
    parts = [prepare(path, tmp_path, num_shards=2, shard_index=i) for i in range(2)]
    assert [texts_in(part, "train") for part in parts] == [[texts[0], texts[2]], [texts[1]]]
    assert texts_in(prepare(path, tmp_path, max_documents=2), "train") == texts[:2]


def test_long_documents_stay_whole_in_a_mixture(tmp_path, no_validation):
    path, texts = long_texts(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"mix/{name}").mkdir(parents=True)
        shutil.copy(path, tmp_path / f"mix/{name}/a.txt")
    folder = prepare(tmp_path / "mix", tmp_path, dataset_subset="one:0.5,two:0.5")
    assert set(texts_in(folder, "train")) <= set(texts)


def test_files_that_runs_and_builds_wrote_are_not_read_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "book.jsonl", documents(50))
    first = prepare(".", tmp_path, cache_dir="token_cache")
    assert prepare(".", tmp_path, cache_dir="token_cache") == first
    (tmp_path / "runs/a/checkpoints/step_1").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "runs/a/checkpoints/step_1/MANIFEST.json").write_text("{}", encoding="utf-8")
    assert corpus.local_source(".", None).files == [Path("book.jsonl")]
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")  # above the folder that is read
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts/a.jsonl", documents(3))
    assert corpus.local_source("texts", None).files == [Path("texts/a.jsonl")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_subset": "three"}, "--dataset_subset.*'three'.*code, one, two"),
        ({"dataset_subset": "code"}, "blob_id, n; name the one with the text by --text_field"),
        ({"dataset_subset": "one", "text_field": "body"}, "no column 'body'.*text, n"),
        ({"dataset_subset": "one", "text_field": "n"}, "holds a number"),
        ({"dataset_subset": "one:x"}, "a weight is not a number"),
        ({"dataset_subset": "one:0.5,:0.5"}, "needs a name"),
        ({"dataset_subset": "one:1e308,two:1e308"}, "a weight above 0"),
        ({"dataset_subset": "one", "val_share": 0.0}, "--val_share: 0.0 must be above 0"),
        ({"dataset_subset": "one", "max_documents": 0}, "--max_documents: 0 must be positive"),
        (
            {"dataset_subset": "one", "num_shards": 2, "shard_index": 2},
            "--shard_index: 2 is not below",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_and_touch_nothing(source, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path, **settings)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": broken\n', "a.jsonl: line 2: not JSON"),
        ("b.txt", b"caf\xe9 " * 100, "b.txt: .*not UTF-8"),
        ("b.txt", b"a\0b" * 100, "b.txt: not text.* binary file"),
        ("c.txt", b" \n", "c.txt: holds no documents"),
        ("d.jsonl", b"", "holds no documents"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', "d.jsonl: line 2: not UTF-8"),
        (".hidden.jsonl", b'{"text": "a"}\n', "data has no .parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unreadable_files_are_named(tmp_path, name, data, message):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare(path.parent if name.startswith(".") else path, tmp_path)


def test_without_a_network_the_message_names_the_folder_to_fill(tmp_path):
    words = ("tokenize", "--dataset_name", "someone/else", "--tokenizer", "bytes")
    env = {"https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    line = one_error_line(run("prep_dataset.py", *words, cwd=tmp_path, env=env), 2)
    assert "someone/else" in line and "./someone/else/" in line
    assert not list(tmp_path.glob("token_cache/*"))


def test_a_hub_name_is_read_from_a_folder_of_that_name_if_there_is_one(tmp_path):
    folder = shared("data/smollm/HuggingFaceTB/smollm-corpus")
    words = ("--max_documents", 50, "--tokenizer", "bytes", "--cache_dir", tmp_path / "cache")
    command = ("prep_dataset.py", "tokenize", *words)
    result = run(*command, cwd=folder.parent.parent)
    assert result.returncode == 0, result.stderr
    counts = [int(n) for n in re.findall(r"(\d+) documents", result.stdout)]
    assert sum(counts) == 50
    started = time.monotonic()
    assert run(*command, cwd=folder.parent.parent).stdout == result.stdout
    assert time.monotonic() - started < 5
    words = ("--dataset_name", folder, "--dataset_subset", "python-edu", "--tokenizer", "bytes")
    line = one_error_line(run("prep_dataset.py", "tokenize", *words, cwd=tmp_path), 2)
    assert "blob_id" in line


def test_the_english_of_python_is_plenty_and_always_the_same():
    texts = python_docs()
    assert texts == python_docs() and sum(map(len, texts)) > 500_000


def test_a_separator_inside_a_line_is_noted(tmp_path, capsys):
    texts = documents(30)
    (tmp_path / "a.txt").write_text(" <|endoftext|> ".join(texts), encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [f"{text}<|endoftext|>" for text in texts])
    (tmp_path / "c.txt").write_text("\n <|endoftext|>\n".join(texts), encoding="utf-8")
    for name, n in (("a.txt", 1), ("b.jsonl", 30), ("c.txt", 1)):
        prepare(tmp_path / name, tmp_path)
        note = f"{name}: {n} texts have <|endoftext|> inside a line, where it is read as text"
        assert note in capsys.readouterr().out
        read_documents(tmp_path / name)
        assert note in capsys.readouterr().out


def test_web_pages_are_noted(tmp_path, capsys):
    page = "<!DOCTYPE html>\n<html><body><p>" + document(1) + "</p></body></html>"
    texts = [page, page.lower().split("\n")[1], document(2), f"He wrote <html> in {document(3)}"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    read_documents(tmp_path / "a.jsonl")
    assert "a.jsonl: 2 texts are HTML pages, read with their tags" in capsys.readouterr().out


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("val_share", [1e-6, 0.01, 0.99])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_small_corpus_has_text_on_both_sides_always_the_same(tmp_path, n, val_share, kind):
    texts = [text * 20 for text in documents(n)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    if kind == "txt":
        path = tmp_path / "a.txt"
        path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    folders = [
        prepare(path, tmp_path, val_share=val_share, cache_dir=str(tmp_path / name))
        for name in ("one", "two")
    ]
    train, val = texts_in(folders[0], "train"), texts_in(folders[0], "val")
    assert train and val and sorted(train + val) == sorted(texts)
    assert texts_in(folders[1], "val") == val


def test_one_short_text_file_is_divided_and_one_row_of_a_table_is_refused(tmp_path):
    text = "\n".join(f"Line {i} of a short text, as a beginner has it." for i in range(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    folder = prepare(tmp_path / "a.txt", tmp_path, val_share=0.01)
    train, val = "".join(texts_in(folder, "train")), "".join(texts_in(folder, "val"))
    assert val and len(train) > len(val) and len(train + val) == len(text)
    write_jsonl(tmp_path / "b.jsonl", [text])
    with pytest.raises(ValueError, match="there is one document, which cannot be both"):
        prepare(tmp_path / "b.jsonl", tmp_path)
