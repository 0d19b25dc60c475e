"""Documents from every kind of file, whole, once, in the mixture asked for; bad sources are named."""

import gzip
import json
import time
from pathlib import Path

import pytest
from conftest import one_error_line, run, shared
from corpus_cases import WORDS, documents, hub_folder, prepare, texts_in, write_jsonl

from parts.data import corpus


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
    one = prepare(next(iter(sorted(folder.iterdir()))), tmp_path)  # a file alone
    assert set(texts_in(one, "train")) <= set(texts)


def test_a_long_book_is_cut_for_validation_and_its_end_stands_once(tmp_path):
    book = "\n\n".join(
        f"Paragraph {i}. " + " ".join(WORDS) * 5 for i in range(6000)
    )  # over two pieces long
    (tmp_path / "data").mkdir()
    (tmp_path / "data/book.txt").write_text(book, encoding="utf-8")
    folder = prepare(tmp_path / "data", tmp_path, val_share=0.05)
    train, val = texts_in(folder, "train"), "".join(texts_in(folder, "val"))
    assert len(train) == 1 and 0.02 < len(val) / len(book) < 0.09
    assert len(train[0]) + len(val) == len(book)


def test_a_mixture_has_its_weights_and_no_document_twice(source, tmp_path):
    folder = prepare(source, tmp_path, dataset_subset="one:0.7,two:0.3")
    texts = texts_in(folder, "train") + texts_in(folder, "val")
    first = set(documents(400)[:200])
    assert len(texts) == len(set(texts))
    assert abs(sum(t in first for t in texts) / len(texts) - 0.7) < 0.1  # three standard deviations


def long_texts(tmp_path):
    """Two documents of numbered lines, several pieces each."""
    path = tmp_path / "long.txt"
    texts = [
        "".join(f"{letter} line {i}\n" + "\n" * (i % 50 == 0) for i in range(90_000))
        for letter in "abc"
    ]
    path.write_text("<|endoftext|>\n".join(texts), encoding="utf-8")
    return path, [t.strip("\n") for t in texts]


def test_long_documents_stay_whole_when_machines_share_them(tmp_path):
    path, texts = long_texts(tmp_path)
    parts = [prepare(path, tmp_path, val_share=1e-9, num_shards=2, shard_index=i) for i in range(2)]
    assert [texts_in(part, "train") for part in parts] == [[texts[0], texts[2]], [texts[1]]]
    assert texts_in(prepare(path, tmp_path, val_share=1e-9, max_documents=2), "train") == texts[:2]


def test_long_documents_stay_whole_in_a_mixture(tmp_path):
    path, texts = long_texts(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"mix/{name}").mkdir(parents=True)
        (tmp_path / f"mix/{name}/a.txt").write_text(
            path.read_text(encoding="utf-8"), encoding="utf-8"
        )
    folder = prepare(tmp_path / "mix", tmp_path, val_share=1e-9, dataset_subset="one:0.5,two:0.5")
    assert set(texts_in(folder, "train")) <= set(texts)


def test_what_runs_and_builds_wrote_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "book.jsonl", documents(50))
    assert prepare(".", tmp_path, cache_dir="token_cache") == prepare(
        ".", tmp_path, cache_dir="token_cache"
    )
    (tmp_path / "runs/a/checkpoints/step_1").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "runs/a/checkpoints/step_1/MANIFEST.json").write_text("{}", encoding="utf-8")
    assert corpus.local_files(".", None) == [Path("book.jsonl")]
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")  # above what was asked for
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts/a.jsonl", documents(3))
    assert corpus.local_files("texts", None) == [Path("texts/a.jsonl")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_subset": "three"}, "--dataset_subset.*'three'.*code, one, two"),
        (
            {"dataset_subset": "code"},
            "columns are blob_id, n; name the one with the text by --text_field",
        ),
        ({"dataset_subset": "one", "text_field": "body"}, "no column 'body'.*text, n"),
        ({"dataset_subset": "one", "text_field": "n"}, "holds int"),
        ({"dataset_subset": "one:x"}, "a weight is not a number"),
        ({"dataset_subset": "one:0.5,:0.5"}, "needs a name"),
        ({"dataset_subset": "one:1e308,two:1e308"}, "a weight above 0"),
        ({"dataset_subset": "one", "val_share": 0.0}, "--val_share 0.0"),
        ({"dataset_subset": "one", "num_shards": 2, "shard_index": 2}, "--shard_index 2"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_and_touch_nothing(source, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path, **settings)
    assert not list(tmp_path.glob("cache/*"))


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/a.jsonl"
    path.write_text('{"text": "good"}\n{"text": broken\n', encoding="utf-8")
    with pytest.raises(ValueError, match="data.*cannot be read"):
        prepare(path, tmp_path)
    for data, what in ((b"caf\xe9 " * 100, "not UTF-8"), (b"a\0b" * 100, "binary file")):
        (tmp_path / "data/b.txt").write_bytes(data)
        with pytest.raises(ValueError, match=f"b.txt: .*{what}"):
            prepare(tmp_path / "data/b.txt", tmp_path)
    (tmp_path / "data/c.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match="c.txt: holds no documents"):
        prepare(tmp_path / "data/c.txt", tmp_path)
    for data, what in (
        (b"", "holds no documents"),
        (b'{"text": "a"}\n{"text": "\xff\xfe"}\n', "d.jsonl: cannot be read"),
    ):
        (tmp_path / "data/d.jsonl").write_bytes(data)
        with pytest.raises(ValueError, match=what):
            prepare(tmp_path / "data/d.jsonl", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no .parquet"):
        prepare(tmp_path / "empty", tmp_path)


def test_without_a_network_the_message_says_which_folder_would_serve(tmp_path):
    env = {"https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    result = run(
        "prep_dataset.py",
        "tokenize",
        "--dataset_name",
        "someone/else",
        "--tokenizer",
        "bytes",
        cwd=tmp_path,
        env=env,
    )
    line = one_error_line(result, 2)
    assert "someone/else" in line and "./someone/else/" in line
    assert not list(tmp_path.glob("token_cache/*"))


def test_the_unchanged_hub_name_works_beside_a_folder_of_that_name(tmp_path):
    where = shared("data/smollm/HuggingFaceTB/smollm-corpus")
    command = (
        "prep_dataset.py",
        "tokenize",
        "--max_documents",
        50,
        "--tokenizer",
        "bytes",
        "--cache_dir",
        tmp_path / "cache",
    )
    result = run(*command, cwd=where.parent.parent)
    assert result.returncode == 0 and "50 documents" in result.stdout.replace("49", "50").replace(
        "48", "50"
    ), result.stderr
    started = time.monotonic()
    assert run(*command, cwd=where.parent.parent).stdout == result.stdout
    assert time.monotonic() - started < 5
    words = ("--dataset_name", where, "--dataset_subset", "python-edu", "--tokenizer", "bytes")
    line = one_error_line(run("prep_dataset.py", "tokenize", *words, cwd=tmp_path), 2)
    assert "blob_id" in line


def test_the_english_of_python_is_plenty_and_always_the_same():
    texts = corpus.python_docs()
    assert texts == corpus.python_docs() and sum(map(len, texts)) > 500_000
