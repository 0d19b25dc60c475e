"""Documents become token shards: the same tokens as the tokenizer's, in any split of the work, after any kill; and damage is named."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_error_line, run, shared

from parts.data import corpus, shards
from parts.data.batches import TrainBatches, val_batches
from parts.data.shards import Shards, read_index
from parts.data.tokenizers import byte_tokenizer, make_tokenizer
from prep_dataset import TokenizeConfig, prepare_tokens

WORDS = "the old man and a small dog went down to the sea where ships of every kind lay still in the light".split()


def documents(n: int) -> list[str]:
    return [
        f"{i}. "
        + " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(20 + i % 30))
        for i in range(n)
    ]


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({field: t, "n": i}) + "\n" for i, t in enumerate(texts)),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def source(tmp_path):
    """A folder in the hub's layout: four files of subset `one`, two of subset `two`, one subset without text."""
    texts = documents(400)
    for i in range(4):
        write_jsonl(tmp_path / f"data/one/train-{i}.jsonl", texts[i * 50 : i * 50 + 50])
    for i in range(2):
        write_jsonl(
            tmp_path / f"data/two/train-{i}.jsonl",
            texts[200 + i * 100 : 300 + i * 100],
            field="content",
        )
    write_jsonl(tmp_path / "data/code/train-0.jsonl", texts[:3], field="blob_id")
    return tmp_path / "data"


def prepare(source, tmp_path, **settings):
    settings = {
        "tokenizer": "bytes",
        "cache_dir": str(tmp_path / "cache"),
        "val_share": 0.1,
        **settings,
    }
    return prepare_tokens(TokenizeConfig(dataset_name=str(source), **settings))


def texts_in(folder, split) -> list[str]:
    """The documents of one split, decoded: what stands between end-of-text tokens."""
    tokenizer, part = byte_tokenizer(), Shards(folder, split, read_index(folder))
    ids = [part.read(i, 0, len(t)) for i, t in enumerate(part.tokens)]
    texts = []
    for tokens in ids:
        assert tokens[-1] == tokenizer.eot
        ends = np.flatnonzero(tokens == tokenizer.eot)
        texts += [
            tokenizer.decode(t[t != tokenizer.eot].tolist())
            for t in np.split(tokens, ends + 1)[:-1]
        ]
    return texts


def test_every_document_is_there_once_with_one_end_of_text_behind_it(source, tmp_path):
    folder = prepare(source, tmp_path, dataset_subset="one")
    train, val = texts_in(folder, "train"), texts_in(folder, "val")
    assert sorted(train + val) == sorted(documents(200)) and not set(train) & set(val)
    assert all(corpus.in_validation(t, 0.1) for t in val) and 5 < len(val) < 50
    index = read_index(folder)
    assert sum(s["documents"] for s in index["shards"]) == 200
    assert sum(s["bytes"] for s in index["shards"]) == sum(len(t.encode()) for t in documents(200))


def test_the_file_is_llm_c_s_layout(source, tmp_path):
    path = prepare(source, tmp_path, dataset_subset="one") / "train_000000.bin"
    data = path.read_bytes()
    magic, version, n_tokens = struct.unpack("<3i", data[:12])
    assert (magic, version) == (20240520, 1) and len(data) == 1024 + 2 * n_tokens


def test_a_vocabulary_over_65536_is_written_in_32_bits(tmp_path):
    class Wide:
        vocab_size, eot, name, fingerprint = 70_000, 69_999, "wide", "f"

        def encode_documents(self, documents):
            return np.array(
                [id for text in documents for id in (69_000 + len(text), self.eot)], dtype=np.uint32
            )

        def to_json(self):
            return b"{}"

    def chunks(_):
        yield [{"text": "abc"}], 1

    folder = shards.build(
        tmp_path / "x", Wide(), chunks, lambda rows: corpus.tokenise(rows, Wide(), 0.0), {}, 1
    )
    path = folder / "train_000000.bin"
    assert struct.unpack("<3i", path.read_bytes()[:12]) == (20240801, 7, 2)
    assert Shards(folder, "train", read_index(folder)).read(0, 0, 2).tolist() == [69_003, 69_999]


def test_published_shards_load_as_they_are(tmp_path):
    """llm.c writes end-of-text before each document, and no index; `val` in the name is the validation part."""
    rng = np.random.default_rng(0)
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, 5000
        tokens = rng.integers(0, 50257, 5000).astype(np.uint16)
        (tmp_path / name).write_bytes(header.tobytes() + tokens.tobytes())
    assert prepare_tokens(TokenizeConfig(dataset_name=str(tmp_path))) == tmp_path
    index = read_index(tmp_path)
    train, val = Shards(tmp_path, "train", index), Shards(tmp_path, "val", index)
    assert (len(train), len(val)) == (5000, 5000)
    assert np.array_equal(val.read(0, 0, 5000), tokens)
    assert TrainBatches(train, 64, 0, 50257).rows(0, 3).shape == (3, 65)
    (tmp_path / "fineweb_val_000000.bin").write_bytes(b"no shard" * 200)
    with pytest.raises(ValueError, match="fineweb_val_000000.bin.*not a token shard"):
        read_index(tmp_path)


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


@pytest.mark.parametrize(
    "settings", [{}, {"max_documents": 77}, {"dataset_subset": "one:0.5,two:0.5"}], ids=str
)
@pytest.mark.parametrize("n", [2, 3])
def test_parts_of_several_machines_merge_to_the_same(source, tmp_path, settings, n):
    settings = {"dataset_subset": "one", **settings}
    whole = prepare(source, tmp_path, **settings)
    parts = [prepare(source, tmp_path, num_shards=n, shard_index=i, **settings) for i in range(n)]
    merged = shards.merge(parts, tmp_path / "merged")
    for split in ("train", "val"):
        assert sorted(texts_in(merged, split)) == sorted(texts_in(whole, split))
    for key in ("documents", "tokens", "bytes"):
        assert sum(s[key] for s in read_index(merged)["shards"]) == sum(
            s[key] for s in read_index(whole)["shards"]
        )
    with pytest.raises(ValueError, match="parts"):
        shards.merge(parts[:-1], tmp_path / "not")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_documents": 333},
        {"num_shards": 3, "shard_index": 1},
        {"dataset_subset": "one:0.6,two:0.4"},
    ],
    ids=str,
)
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(
    source, tmp_path, monkeypatch, settings
):
    settings = {"dataset_subset": "one", **settings}
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    straight = read_index(prepare(source, tmp_path, **settings))
    real, seen = corpus.tokenise, []

    def fails_at(n):
        def tokenise(rows, *rest):
            seen.append(rows[0]["text"])
            if len(seen) == n:
                raise KeyboardInterrupt
            return real(rows, *rest)

        return tokenise

    for n in (4, 9):
        seen.clear()
        monkeypatch.setattr(corpus, "tokenise", fails_at(n))
        try:
            prepare(source, tmp_path, cache_dir=str(tmp_path / "other"), **settings)
        except KeyboardInterrupt:
            (note,) = (tmp_path / "other").glob(".*.part/progress.json")
            note.with_name("progress.json.part").write_text("half a no", encoding="utf-8")
    first = seen[0]
    monkeypatch.setattr(corpus, "tokenise", real)
    folder = prepare(source, tmp_path, cache_dir=str(tmp_path / "other"), **settings)
    again = read_index(folder)
    assert not list(folder.glob("progress*"))
    assert shards.content_hash(again) == shards.content_hash(straight)
    assert first != documents(1)[0], "it began anew instead of going on"


def test_smollm_is_still_a_name_of_tokenize_and_builds_the_same_folder(tmp_path):
    write_jsonl(tmp_path / "data/train.jsonl", documents(30))
    outputs, hashes = [], []
    for command in ("tokenize", "smollm"):
        result = run(
            "prep_dataset.py",
            command,
            "--dataset_name",
            "data",
            "--tokenizer",
            "bytes",
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
        (folder,) = tmp_path.glob("token_cache/data-*")
        hashes.append(shards.content_hash(read_index(folder)))
        folder.rename(tmp_path / command)  # so that the other command builds its own
    assert outputs[0] == outputs[1] and hashes[0] == hashes[1]
    listed = run("prep_dataset.py", "--help", cwd=tmp_path).stdout
    assert "tokenize" in listed and "smollm" not in listed
    for typed, meant in (("tokenise", "tokenize"), ("smolm", "smollm")):
        line = one_error_line(run("prep_dataset.py", typed, cwd=tmp_path), 2)
        assert f"did you mean {meant}?" in line


def test_a_killed_build_leaves_no_cache_and_the_next_one_finishes(tmp_path):
    write_jsonl(tmp_path / "data/train.jsonl", documents(60_000))
    command = [
        sys.executable,
        str(ROOT / "prep_dataset.py"),
        "tokenize",
        "--dataset_name",
        "data",
        "--tokenizer",
        "bytes",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("token_cache/.*.part/train_000000.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [p for p in (tmp_path / "token_cache").iterdir() if not p.name.startswith(".")]
    result = run("prep_dataset.py", *command[2:], cwd=tmp_path)
    assert result.returncode == 0 and "documents" in result.stdout, result.stderr


def test_a_cache_is_never_taken_for_another(source, tmp_path):
    base = {"dataset_subset": "one"}
    variants = [
        {},
        {"max_documents": 10},
        {"tokenizer": "bpe:300"},
        {"val_share": 0.2},
        {"text_field": "text"},
        {"dataset_subset": "one,two"},
    ]
    folders = {prepare(source, tmp_path, **{**base, **v}) for v in variants}
    assert len(folders) == len(variants)
    before = prepare(source, tmp_path, **base)
    write_jsonl(source / "one/train-0.jsonl", documents(51))  # the data itself has changed
    assert prepare(source, tmp_path, **base) != before


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "header"])
def test_damage_is_named_by_verify_and_by_the_first_read(source, tmp_path, how):
    folder = prepare(source, tmp_path, dataset_subset="one")
    path = folder / "train_000000.bin"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "header":
        data[0] ^= 1
    path.write_bytes(
        data[:-7] if how == "truncate" else data + b"x" * 8 if how == "append" else data
    )
    assert "train_000000.bin" in one_error_line(
        run("prep_dataset.py", "verify", "--path", folder, cwd=tmp_path), 2
    )
    with pytest.raises((ValueError, OSError), match="train_000000.bin"):
        train = Shards(folder, "train", read_index(folder))
        train.read(0, 0, len(train.tokens[0]))


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


def test_parts_may_be_named_in_any_order(source, tmp_path):
    parts = [
        prepare(source, tmp_path, dataset_subset="one", num_shards=3, shard_index=i)
        for i in range(3)
    ]
    merged = [
        shards.merge(order, tmp_path / name) for name, order in (("a", parts), ("b", parts[::-1]))
    ]
    assert shards.content_hash(read_index(merged[0])) == shards.content_hash(read_index(merged[1]))


def test_a_connection_that_breaks_leaves_what_is_done_and_the_same_line_goes_on(
    source, tmp_path, monkeypatch
):
    straight = prepare(source, tmp_path, dataset_subset="one", cache_dir=str(tmp_path / "straight"))
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    pieces, broken = corpus.Corpus.chunks, []

    def breaks_once(self, state):
        class Stream:
            def __iter__(inner):
                for i, row in enumerate(stream):
                    if i == 100 and not broken:
                        broken.append(state)
                        raise ConnectionError("Connection reset by peer")
                    yield row

            def __getattr__(inner, name):
                return getattr(stream, name)

        stream, self.stream = self.stream, Stream()
        yield from pieces(self, state)
        resumed.append(state)

    resumed = []
    monkeypatch.setattr(corpus.Corpus, "chunks", breaks_once)
    with pytest.raises(
        OSError, match=r"cannot be read now \(Connection reset by peer\); run the same line again"
    ) as e:
        prepare(source, tmp_path, dataset_subset="one")
    assert not isinstance(e.value, ConnectionError | FileNotFoundError) and broken
    folder = prepare(source, tmp_path, dataset_subset="one")
    assert resumed[0] is not None, "it began anew"
    assert shards.content_hash(read_index(folder)) == shards.content_hash(read_index(straight))


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


def test_a_folder_with_a_tokenizer_is_told_apart_by_its_content(source, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(byte_tokenizer().to_json())
    first = prepare(source, tmp_path, dataset_subset="one", tokenizer=str(tmp_path / "tokenizer"))
    other = make_tokenizer("bpe:300", documents(50))
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(other.to_json())
    second = prepare(source, tmp_path, dataset_subset="one", tokenizer=str(tmp_path / "tokenizer"))
    assert first != second and read_index(second)["tokenizer"]["fingerprint"] == other.fingerprint


@pytest.mark.parametrize(
    "setting",
    [{"tokenizer": "bpe:300"}, {"max_documents": 10}, {"val_share": 0.5}, {"text_field": "body"}],
    ids=str,
)
def test_a_setting_that_ready_made_shards_cannot_follow_is_refused(source, tmp_path, setting):
    made = prepare(source, tmp_path, dataset_subset="one")
    assert prepare_tokens(TokenizeConfig(dataset_name=str(made))) == made == prepare(made, tmp_path)
    with pytest.raises(ValueError, match=f"--{next(iter(setting))}: .* is ready-made with"):
        prepare_tokens(TokenizeConfig(dataset_name=str(made), **setting))


def test_verify_claims_no_hashes_where_there_are_none(tmp_path):
    (tmp_path / "pub").mkdir()
    for name in ("x_train_000.bin", "x_val_000.bin"):
        (tmp_path / "pub" / name).write_bytes(
            shards._header(4, np.uint16) + np.arange(4, dtype=np.uint16).tobytes()
        )
    out = run("prep_dataset.py", "verify", "--path", "pub", cwd=tmp_path).stdout
    assert "no hashes to compare" in out and "sha256" not in out


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


RSS = """
import sys, json, threading, time
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
import prep_dataset
def anon():
    return next(int(l.split()[1]) for l in open("/proc/self/status", encoding="utf-8") if l.startswith("RssAnon")) * 1024
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anon())
thread = threading.Thread(target=watch); thread.start()
prep_dataset.prepare_tokens(prep_dataset.TokenizeConfig(dataset_name=sys.argv[0], tokenizer="bytes", cache_dir=sys.argv[1]))
done.set(); thread.join()
print(peak[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_of_a_build_does_not_grow_with_the_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    peaks, texts = [], [" ".join(documents(10)) + str(i) for i in range(8_000)]
    for times in (1, 10):
        folder = tmp_path / f"times{times}"
        folder.mkdir()
        with pyarrow.parquet.ParquetWriter(
            folder / "train.parquet", pyarrow.schema({"text": pyarrow.string()})
        ) as out:
            for _ in range(times):
                out.write_table(pyarrow.table({"text": texts}), row_group_size=500)
        command = [sys.executable, "-c", RSS, str(ROOT), str(folder), str(tmp_path / "cache")]
        # with glibc's many arenas the figure would be that of malloc, not of the program
        env = {**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=True, env=env
        )
        peaks.append(int(result.stdout))
    assert peaks[1] < 1.05 * peaks[0], peaks


def test_validation_is_whole_and_the_last_row_is_filled_up(source, tmp_path):
    folder = prepare(source, tmp_path, dataset_subset="one")
    val = Shards(folder, "val", read_index(folder))
    for T, B in ((16, 4), (7, 3), (100_000, 2)):
        batches = list(val_batches(val, T, B, 257))
        assert all(b["inputs"].shape == b["targets"].shape == (B, T) for b in batches)
        targets = np.concatenate([b["targets"].flatten().numpy() for b in batches])
        assert np.array_equal(targets[targets != -100], val.read(0, 1, len(val)))
    first = list(val_batches(val, 16, 4, 257, max_tokens=100))
    assert sum(int((b["targets"] != -100).sum()) for b in first) == 100
