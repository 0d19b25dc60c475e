"""Texts of local files: only the text column is read, and bad rows are named by file and row."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, one_error_line, run
from corpus_cases import documents, prepare, texts_in

from parts.data.readers import FileRows
from prep_dataset import read_documents

TEXTS = documents(40)


def rows_as(kind: str, path, rows: list[dict]):
    """Write rows as a file of one kind; returns its path."""
    path = path.with_name(f"{path.name}.{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def all_texts(folder) -> list[str]:
    """The documents of a build, of both splits, sorted."""
    return sorted(texts_in(folder, "train") + texts_in(folder, "val"))


def with_column(values) -> list[dict]:
    """TEXTS with another column; a value of ... stands for no such column."""
    columns = ({} if value is ... else {"x": value} for value in values)
    return [{"text": text, **more} for text, more in zip(TEXTS, columns, strict=True)]


@pytest.mark.parametrize(
    "values",
    [
        [...] * 20 + [{"a": 1}] * 20,
        [None] * 39 + [{"deep": {"deeper": [1]}}],
        [1] * 39 + ["a string"],
        [1, "two", None, [3], {"four": 4}, 10**400, 1e308, True] * 5,
    ],
    ids=["absent, then there", "null, then a struct", "integer, then text", "anything"],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json"])
def test_columns_nobody_asked_for_may_hold_anything(tmp_path, kind, values):
    rows = with_column(values)
    rows_as(kind, tmp_path / "in/a", rows[:20])
    rows_as(kind, tmp_path / "in/b", rows[20:])
    assert all_texts(prepare(tmp_path / "in", tmp_path)) == sorted(TEXTS)


def test_parquet_files_may_differ_in_all_but_the_text(tmp_path):
    for name, values in (("a", [...] * 40), ("b", [None] * 40), ("c", [{"k": 1}] * 40)):
        rows = [row | {"text": f"{name} {row['text']}"} for row in with_column(values)]
        rows_as("parquet", tmp_path / f"in/{name}", rows)
    kinds = (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for kind in kinds:
        table = pyarrow.table({"text": pyarrow.array([f"{kind} {t}" for t in TEXTS]).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / f"in/{kind.num_fields}{kind.id}.parquet")
    assert len(set(all_texts(prepare(tmp_path / "in", tmp_path)))) == 200


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_null_and_blank_texts_are_counted_wherever_they_are(tmp_path, capsys, kind):
    texts = [None] * 10 + TEXTS[:20] + ["", "  \n"] + TEXTS[20:] + [None]
    rows_as(kind, tmp_path / "in/a", [{"text": text} for text in texts])
    assert all_texts(prepare(tmp_path / "in", tmp_path)) == sorted(TEXTS)
    assert "note: " in (out := capsys.readouterr().out) and "13 of 53 rows have no text" in out


def test_an_explicit_column_is_the_one_that_is_read(tmp_path):
    rows = [{"text": 5, "content": {"a": 1}, "body": text} for text in TEXTS]
    rows_as("jsonl", tmp_path / "in/a", rows)
    rows_as("jsonl", tmp_path / "in/b", [{"body": "Another. " + text} for text in TEXTS])
    assert len(all_texts(prepare(tmp_path / "in", tmp_path, text_field="body"))) == 80


GOOD = b'{"text": "good"}\n' * 30


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": broken\n', r"a\.jsonl: line 31: not JSON \(Expecting value"),
        ("a.jsonl", GOOD + b"\n\n" + b'{"text": 7}\n', "line 33: column 'text' holds a number"),
        ("a.jsonl", GOOD + b'{"text": ["a"]}\n', "line 31: column 'text' holds a list, not text"),
        ("a.jsonl", b'{"text": {"a": 1}}\n' + GOOD, "line 1: column 'text' holds an object"),
        ("a.jsonl", b'{"text": null}\n{"text": true}\n', "line 2: column 'text' holds true or"),
        ("a.jsonl", GOOD + b'"only a string"\n', "line 31: a string is not an object; write"),
        (
            "a.jsonl",
            GOOD + b'{"text": "caf\xe9"}\n',
            "line 31: not UTF-8 text: byte 0xe9 at column",
        ),
        ("a.jsonl", GOOD + b"[" * 100_000, "line 31: nested too deeply"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "it looks like UTF-16; convert it"),
        ("a.jsonl", GOOD.decode().encode("utf-16-le"), "it looks like UTF-16-LE; convert it"),
        ("a.json", b'[{"text": "a"}, {"text": 1}]', r"row 2: column 'text' holds a number"),
        ("a.json", b'[{"text": "a"}, 5]', "row 2: a number is not an object"),
        ("a.json", b'[{"text": "a"}, {"te', "not JSON, neither as one value nor line by line"),
        (
            "a.jsonl",
            b'{"body": "a", "n": 1}\n',
            "neither a column 'text' nor 'content'; its.*body, n",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_row(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        prepare(tmp_path / name, tmp_path)
    assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("cache/[!.]*"))


def test_a_file_without_the_column_is_named_before_anything_is_tokenised(tmp_path):
    rows_as("jsonl", tmp_path / "in/a", [{"text": text} for text in TEXTS])
    rows_as("jsonl", tmp_path / "in/b", [{"title": text} for text in TEXTS])
    with pytest.raises(ValueError, match=r"b\.jsonl: has no column 'text'; its columns are title"):
        prepare(tmp_path / "in", tmp_path)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_nulls_is_named_and_not_the_share(tmp_path, kind):
    schema = pyarrow.schema({"text": pyarrow.string()})
    rows = [{"text": None}] * 40
    if kind == "parquet":
        table = pyarrow.Table.from_pylist(rows, schema)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        rows_as(kind, tmp_path / "a", rows)
    with pytest.raises(ValueError, match="column 'text' has no text in any of 40 rows"):
        prepare(tmp_path / f"a.{kind}", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no block", "no gzip", "no checksum"])
def test_damaged_gzip_data_is_one_line_with_the_file(tmp_path, damage):
    said = "the gzip data is damaged after line"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(3000))
    data = bytearray(gzip.compress(lines.encode()))
    if damage == "flipped":
        for i in range(len(data) // 2, len(data) // 2 + 40):
            data[i] ^= 0xFF
        said = "line "  # what it decompresses to is no JSON, before the checksum is reached
    elif damage == "no block":
        data[10] |= 0b110  # a type of block that does not exist
    elif damage == "no gzip":
        data = lines.encode()
    else:
        data = data[: len(data) // 2] if damage == "cut" else data[:-4]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    words = ("tokenize", "--dataset_name", "a.jsonl.gz", "--tokenizer", "bytes")
    line = one_error_line(run("prep_dataset.py", *words, cwd=tmp_path), 2)
    assert f"a.jsonl.gz: {said}" in line
    assert not list(tmp_path.glob("token_cache/[!.]*"))


def test_files_without_rows_are_skipped_and_counted(tmp_path, capsys):
    rows_as("parquet", tmp_path / "in/a", [{"text": text} for text in TEXTS])
    empty = pyarrow.table({"other": pyarrow.array([], pyarrow.int64())})
    pyarrow.parquet.write_table(empty, tmp_path / "in/b.parquet")
    (tmp_path / "in/c.parquet").touch()
    assert all_texts(prepare(tmp_path / "in", tmp_path)) == sorted(TEXTS)
    assert "2 files have no rows" in capsys.readouterr().out
    pyarrow.parquet.write_table(empty, tmp_path / "only.parquet")
    with pytest.raises(ValueError, match=r"only\.parquet: holds no documents"):
        prepare(tmp_path / "only.parquet", tmp_path)


BAD_COLUMNS = {
    "list": pyarrow.list_(pyarrow.string()),
    "struct": pyarrow.struct({"a": pyarrow.string()}),
    "binary": pyarrow.binary(),
}
VALUES = {"list": ["a"], "struct": {"a": "b"}, "binary": b"abc"}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_a_parquet_column_of_another_type_exits_with_2_every_time(tmp_path, name):
    """Arrow's threads aborted the process in one of six tries: real exits of real processes."""
    column = pyarrow.array([VALUES[name]] * 20_000, BAD_COLUMNS[name])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    words = ["tokenize", "--dataset_name", "a.parquet", "--tokenizer", "bytes"]
    command = [sys.executable, str(ROOT / "prep_dataset.py"), *words]
    for _ in range(3):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        line = one_error_line(result, 2)
        assert "a.parquet: column 'text' holds " in line and "--text_field" in line


@pytest.mark.parametrize("where", ["footer", "page"])
def test_a_damaged_parquet_file_is_named(tmp_path, where):
    path = rows_as("parquet", tmp_path / "a", [{"text": text} for text in documents(5000)])
    data = bytearray(path.read_bytes())
    start = len(data) - 200 if where == "footer" else 1000
    data[start : start + 150] = bytes(150)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read"):
        prepare(path, tmp_path)


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    import datasets

    texts = documents(60)
    whole = datasets.Dataset.from_dict({"n": list(range(60)), "text": texts})
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert read_documents(tmp_path / "one") == texts
    assert all_texts(prepare(tmp_path / "one", tmp_path)) == sorted(texts)
    whole.train_test_split(20, shuffle=False).save_to_disk(tmp_path / "two")
    assert read_documents(tmp_path / "two") == texts[:40]
    assert sorted(read_documents(tmp_path / "two/test")) == sorted(texts[40:])


def test_an_arrow_file_of_either_format_is_read(tmp_path):
    table = pyarrow.table({"n": list(range(40)), "text": TEXTS})
    for name, open_writer in (("a", pyarrow.ipc.new_file), ("b", pyarrow.ipc.new_stream)):
        with open_writer(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        assert read_documents(tmp_path / f"{name}.arrow") == TEXTS
    (tmp_path / "c.arrow").write_bytes(b"ARROW1" + b"\xff" * 100)
    with pytest.raises(ValueError, match=r"c\.arrow: cannot be read"):
        read_documents(tmp_path / "c.arrow")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "text"])
@pytest.mark.parametrize("n", [0, 1, 19, 20, 21, 40])
def test_reading_resumes_at_any_row(tmp_path, kind, n):
    files = []
    for i in range(2):
        half = TEXTS[i * 20 : i * 20 + 20]
        if kind == "text":
            path = tmp_path / f"{i}.txt"
            path.write_text("\n<|endoftext|>\n".join(half), encoding="utf-8")
        else:
            path = rows_as(kind, tmp_path / str(i), [{"text": text} for text in half])
        files.append(path)
    kind = "json" if kind.startswith("json") else kind
    rows = FileRows("name", files, kind)
    reading = iter(rows)
    texts = [next(reading)["text"] for _ in range(n)]
    again = FileRows("name", files, kind)
    again.load_state_dict(json.loads(json.dumps(rows.state_dict())))
    assert texts + [row["text"] for row in again] == TEXTS


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        ("Grüße an alle.\n".encode("utf-16"), "UTF-16; convert it (iconv -f utf-16 -t utf-8)"),
        ("Plain text in two bytes each.\n".encode("utf-16-le"), "UTF-16-LE"),
        ("Русский текст, и пробелы есть.\n".encode("utf-16-be"), "UTF-16-BE"),
        ("Four bytes each.\n".encode("utf-32-le"), "UTF-32-LE"),
        (b"%PDF-1.7\n\0\xff", "a PDF"),
        (gzip.compress(b"text"), "gzip data"),
        (b"PAR1\0\0\xff", "a parquet file"),
        (b"a\0b" * 100, "a binary file; move it out of the folder"),
        (
            b"caf\xe9 and more",
            "byte 0xe9 at offset 3; convert it, or let prep_dataset.py gutenberg",
        ),
        (b"x" * 3_000_000 + b"\xff", "byte 0xff at offset 3,000,000"),
        ("\u20ac".encode()[:2], "byte 0xe2 at offset 0"),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_what_is_no_utf8_text_is_described_and_never_to_be_deleted(tmp_path, data, looks):
    (tmp_path / "a.txt").write_bytes(data)
    for read in (read_documents, lambda path: prepare(path, tmp_path)):
        with pytest.raises(ValueError, match=r"a\.txt: not ") as e:
            read(tmp_path / "a.txt")
        assert looks in str(e.value) and "remove" not in str(e.value)
