"""Which files of a folder are text: kinds, splits, metadata, links, pipes; the rest is named."""

import json
import os
from pathlib import Path

import pytest
from conftest import TINY, one_error_line, run
from corpus_cases import documents, prepare, texts_in, write_jsonl

from parts.data import sources
from prep_dataset import read_documents

BOOK = "It was a dark and stormy night, and the rain fell in torrents.\n\n" * 120


def tree(root: Path, files: dict) -> Path:
    """Write {name: text} below root; returns root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def names(source: sources.Source) -> list[str]:
    """The files that are read, relative to the folder."""
    return [path.relative_to(source.root).as_posix() for path in source.files]


def lines_of(texts) -> str:
    """Texts as jsonl."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"metadata.json": '{"text": "a book of 28 bytes here"}'}, "1 metadata"),
        ({"dataset_info.json": '{"text": ""}', "README.txt": "read me"}, "2 metadata"),
        ({"info.json": '{"text": "a short description"}'}, "1 .json"),
        ({"notes.jsonl": '{"text": "a"}\n', "page.html": "<p>"}, "1 .html, 1 .jsonl"),
        ({".draft.txt": "x", ".git/a.txt": "y"}, "1 hidden, 1 hidden folder"),
        ({"run/run.json": "{}", "run/samples.txt": "x"}, "2 written by a run or build"),
    ],
    ids=str,
)
def test_books_are_read_and_what_lies_beside_them_is_counted(tmp_path, others, said):
    root = tree(tmp_path / "in", {"a.txt": BOOK, "deep/B.TXT": BOOK, **others})
    source = sources.find(root, "--dataset_name")
    assert names(source) == ["a.txt", "deep/B.TXT"]
    assert source.note == f"{root}: reading 2 .txt; left out: {said}"


def test_the_larger_of_two_kinds_is_read_and_the_other_is_counted(tmp_path):
    root = tree(tmp_path / "in", {"a.jsonl": lines_of(documents(50)), "b.txt": "short"})
    source = sources.find(root, "--dataset_name")
    assert (names(source), source.left_out) == (["a.jsonl"], {".txt": 1})
    (root / "b.txt").write_text(BOOK * 10, encoding="utf-8")
    source = sources.find(root, "--dataset_name")
    assert (names(source), source.left_out) == (["b.txt"], {".jsonl": 1})


def test_texts_beside_prepared_books_are_counted(tmp_path):
    files = {"combined_1.txt": BOOK, "report.json": "{}", "mine.txt": BOOK, "raw/pg11.txt": BOOK}
    source = sources.find(tree(tmp_path / "in", files), "--data_dir")
    assert names(source) == ["combined_1.txt"]
    assert "2 .txt beside the prepared combined_1.txt" in source.note


@pytest.mark.parametrize(
    ("files", "read", "said"),
    [
        (["S-train.txt", "S-valid.txt"], ["S-train.txt"], "1 of the split valid"),
        (
            ["train/a.txt", "validation/a.txt", "test/b.txt"],
            ["train/a.txt"],
            "1 of the split test, 1 of the split validation",
        ),
        (["train.jsonl", "dev.jsonl", "more.jsonl"], ["more.jsonl", "train.jsonl"], "split dev"),
        (
            ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
            ["train-00000-of-00001.jsonl"],
            "1 of the split test",
        ),
        (["my_TRAIN_1.txt", "my_VAL_1.txt"], ["my_TRAIN_1.txt"], "1 of the split val"),
        (["train/valid_0.txt", "train/0.txt"], ["train/0.txt"], "1 of the split valid"),
        (["train.txt", "medieval.txt", "latest.txt", "devil.txt"], None, None),
        (["book.txt", "valid.txt"], None, "no file is named train, so all are read"),
        (["trains.txt", "test.txt"], None, "also those of test"),
    ],
    ids=str,
)
def test_other_splits_are_left_out_if_there_is_one_for_training(tmp_path, files, read, said):
    root = tree(tmp_path / "in", {name: lines_of(documents(5)) for name in files})
    source = sources.find(root, "--dataset_name")
    assert names(source) == (read or sorted(files))
    assert said in source.note if said else source.note is None


def test_no_validation_story_is_trained_on(tmp_path):
    train, valid = documents(400)[:200], documents(400)[200:]
    files = {"Tiny-train.txt": "\n<|endoftext|>\n".join(train)}
    files["Tiny-valid.txt"] = "\n<|endoftext|>\n".join(valid)
    root = tree(tmp_path / "in", files)
    folder = prepare(root, tmp_path)
    assert sorted(texts_in(folder, "train") + texts_in(folder, "val")) == sorted(train)
    assert sorted(read_documents(root)) == sorted(train)
    named = prepare(root / "Tiny-valid.txt", tmp_path)  # a file named directly is what is asked for
    assert sorted(texts_in(named, "train") + texts_in(named, "val")) == sorted(valid)


def odd_folder(tmp_path) -> Path:
    """Two books, a third behind a link to a folder, and everything that is no file."""
    tree(tmp_path / "elsewhere", {"c.txt": "Linked. " + BOOK})
    root = tree(tmp_path / "in", {"A.TXT": "First. " + BOOK, "x.txt/b.txt": "Second. " + BOOK})
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "same.txt").symlink_to(root / "A.TXT")
    (root / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(root / "pipe.txt")
    return root


def test_links_are_followed_once_and_pipes_are_not_opened(tmp_path):
    source = sources.find(odd_folder(tmp_path), "--data_dir")
    assert len(source.files) == 3 and not any(path.is_fifo() for path in source.files)
    assert {path.name for path in source.files} == {"A.TXT", "b.txt", "c.txt"}
    assert source.left_out == {"broken link": 1, "named pipe": 1}


def test_a_link_upwards_reads_each_file_once(tmp_path):
    root = tree(tmp_path / "a/in", {"one.txt": BOOK})
    tree(tmp_path / "a", {"two.txt": BOOK, "three/4.txt": BOOK})
    (root / "up").symlink_to(tmp_path / "a")
    source = sources.find(root, "--data_dir")
    assert [path.name for path in source.files] == ["one.txt", "4.txt", "two.txt"]


def test_simple_tokenize_gutenberg_and_eval_agree_on_odd_folders(tmp_path):
    root = odd_folder(tmp_path)
    starts = ["First.", "Second.", "Linked."]
    assert sorted(t.split()[0] for t in read_documents(root)) == sorted(starts)
    folder = prepare(root, tmp_path, val_share=1e-3)
    text = "".join(texts_in(folder, "train") + texts_in(folder, "val"))
    assert all(start in text for start in starts)
    words = ("--data_dir", root, "--output_dir", "out", "--keep_duplicates")
    result = run("prep_dataset.py", "gutenberg", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    statuses = {row["file"].split("/")[-1]: row["status"] for row in report["files"]}
    assert statuses == {
        **dict.fromkeys(("A.TXT", "b.txt", "c.txt"), "kept"),
        "dangling.txt": "unreadable",
        "pipe.txt": "ignored",
    }
    trained = run(
        *("pretraining_simple.py", "--data_dir", root, "--max_steps", 2, *TINY), cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    assert "left out: 1 broken link, 1 named pipe" in trained.stdout
    words = ("--checkpoint", "runs/simple", "--eval", root)
    scored = run("gpt_train.py", *words, cwd=tmp_path)
    assert scored.returncode == 0 and "left out: 1 broken link" in scored.stdout, scored.stderr


def test_gutenberg_leaves_out_other_splits_too(tmp_path):
    tree(tmp_path / "in", {"x-train.txt": BOOK, "x-valid.txt": BOOK, "x-test.txt": BOOK})
    words = ("--data_dir", "in", "--keep_duplicates")
    assert run("prep_dataset.py", "gutenberg", *words, cwd=tmp_path).returncode == 0
    path = tmp_path / "gutenberg_preprocessed/report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["counts"] == {"kept": 1, "ignored": 2}
    assert {row["reason"] for row in report["files"][:2]} == {
        "of the split valid",
        "of the split test",
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.csv", "save the column with the text as .jsonl"),
        ("a.zip", "prep_dataset.py extract"),
        ("a.txt.gz", "unpack it first"),
        ("a.pdf", "convert it to .txt first"),
        ("weights.pt", "give text"),
        ("pipe", "named pipe"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_what_would_read_it(tmp_path, name, said):
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"abc\n" * 100)
    for flag, command in (
        ("--dataset_name", ("prep_dataset.py", "tokenize", "--tokenizer", "bytes")),
        ("--data_dir", ("pretraining_simple.py", *TINY)),
    ):
        line = one_error_line(run(*command, flag, name, cwd=tmp_path), 2)
        assert flag in line and name in line and said in line


def test_a_file_named_directly_is_text_whatever_its_name(tmp_path):
    tree(tmp_path, {"essay.md": BOOK, "metadata.json": lines_of(documents(30)), "noend": BOOK})
    assert read_documents(tmp_path / "essay.md") == read_documents(tmp_path / "noend")
    assert read_documents(tmp_path / "metadata.json") == documents(30)


def test_a_folder_without_text_says_what_it_has(tmp_path):
    root = tree(tmp_path / "in", {"a.csv": "x", "b.csv": "x", "metadata.json": "{}"})
    with pytest.raises(ValueError, match=r"has no .*\.txt file \(it has 2 \.csv, 1 metadata\)"):
        sources.find(root, "--dataset_name")
    write_jsonl(root / "c.jsonl", documents(3))
    assert names(sources.find(root, "--dataset_name")) == ["c.jsonl"]
