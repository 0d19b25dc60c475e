"""Builds of token shards: the same bytes after any kill and in any split of the work."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_error_line, run
from corpus_cases import documents, hub_folder, prepare, texts_in, write_jsonl

from parts.data import corpus, shards
from parts.data.shards import read_index
from parts.data.tokenizers import byte_tokenizer, make_tokenizer


@pytest.fixture
def source(tmp_path):
    return hub_folder(tmp_path / "data")


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


def test_parts_may_be_named_in_any_order(source, tmp_path):
    parts = [
        prepare(source, tmp_path, dataset_subset="one", num_shards=3, shard_index=i)
        for i in range(3)
    ]
    merged = [
        shards.merge(order, tmp_path / name) for name, order in (("a", parts), ("b", parts[::-1]))
    ]
    assert shards.content_hash(read_index(merged[0])) == shards.content_hash(read_index(merged[1]))


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


def test_a_folder_with_a_tokenizer_is_told_apart_by_its_content(source, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(byte_tokenizer().to_json())
    first = prepare(source, tmp_path, dataset_subset="one", tokenizer=str(tmp_path / "tokenizer"))
    other = make_tokenizer("bpe:300", documents(50))
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(other.to_json())
    second = prepare(source, tmp_path, dataset_subset="one", tokenizer=str(tmp_path / "tokenizer"))
    assert first != second and read_index(second)["tokenizer"]["fingerprint"] == other.fingerprint


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
