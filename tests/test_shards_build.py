"""Builds of token shards: the same bytes after any kill and in any split of the work."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_error_line, run
from corpus_cases import documents, hub_folder, prepare, texts_in, write_jsonl

import prep_dataset
from parts.data import corpus, shard_writer
from parts.data.shards import content_hash, read_index
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
    merged = shard_writer.merge(parts, tmp_path / "merged")
    for split in ("train", "val"):
        assert sorted(texts_in(merged, split)) == sorted(texts_in(whole, split))
    for key in ("documents", "tokens", "bytes"):
        sums = [sum(s[key] for s in read_index(f)["shards"]) for f in (merged, whole)]
        assert sums[0] == sums[1]
    with pytest.raises(ValueError, match="--parts: .*give each part once"):
        shard_writer.merge(parts[:-1], tmp_path / "not")
    with pytest.raises(ValueError, match="merged: already exists"):
        shard_writer.merge(parts, tmp_path / "merged")


def test_merge_names_its_folder_after_the_parts_and_refuses_other_folders(source, tmp_path):
    settings = {"dataset_subset": "one", "num_shards": 2}
    parts = [str(prepare(source, tmp_path, **settings, shard_index=i)) for i in range(2)]
    merged = prep_dataset.merge_parts(prep_dataset.MergeConfig(tuple(parts)))
    assert str(merged) == parts[0].removesuffix("-part-0-of-2")
    whole = prepare(source, tmp_path, dataset_subset="two")
    for wrong in ((str(whole),), ()):
        with pytest.raises(ValueError, match="--parts: name the folders"):
            prep_dataset.merge_parts(prep_dataset.MergeConfig(wrong))
    assert whole.exists()


def test_parts_may_be_named_in_any_order(source, tmp_path):
    settings = {"dataset_subset": "one", "num_shards": 3}
    parts = [prepare(source, tmp_path, **settings, shard_index=i) for i in range(3)]
    forwards = shard_writer.merge(parts, tmp_path / "a")
    backwards = shard_writer.merge(parts[::-1], tmp_path / "b")
    assert content_hash(read_index(forwards)) == content_hash(read_index(backwards))


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
def test_a_stopped_build_resumes_to_the_same_bytes(source, tmp_path, monkeypatch, settings):
    settings = {"dataset_subset": "one", **settings}
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    uninterrupted = read_index(prepare(source, tmp_path, **settings))
    real, seen = corpus.tokenise, []
    other = tmp_path / "other"

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
            prepare(source, tmp_path, cache_dir=str(other), **settings)
        except KeyboardInterrupt:
            (saved,) = other.glob(".*.part/progress.json")
            # a kill may leave a half-written one beside it
            saved.with_name("progress.json.part").write_text("{", encoding="utf-8")
    assert seen[0] != documents(1)[0], "it started again instead of resuming"
    monkeypatch.setattr(corpus, "tokenise", real)
    folder = prepare(source, tmp_path, cache_dir=str(other), **settings)
    assert not list(folder.glob("progress*"))
    assert content_hash(read_index(folder)) == content_hash(uninterrupted)


def test_a_killed_build_leaves_no_cache_and_the_next_one_finishes(tmp_path):
    write_jsonl(tmp_path / "data/train.jsonl", documents(60_000))
    words = ["tokenize", "--dataset_name", "data", "--tokenizer", "bytes"]
    command = [sys.executable, str(ROOT / "prep_dataset.py"), *words]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, **silent)
    while not list(tmp_path.glob("token_cache/.*.part/train_000000.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [p for p in (tmp_path / "token_cache").iterdir() if not p.name.startswith(".")]
    result = run("prep_dataset.py", *words, cwd=tmp_path)
    assert result.returncode == 0 and "documents" in result.stdout, result.stderr


def test_a_build_resumes_after_a_broken_connection(source, tmp_path, monkeypatch):
    uninterrupted = prepare(source, tmp_path, dataset_subset="one", cache_dir=str(tmp_path / "a"))
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    chunks, broken = corpus.Corpus.chunks, []

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
        yield from chunks(self, state)
        resumed.append(state)

    resumed = []
    monkeypatch.setattr(corpus.Corpus, "chunks", breaks_once)
    message = r"cannot be read now \(Connection reset by peer\); run the same command again"
    with pytest.raises(OSError, match=message) as e:
        prepare(source, tmp_path, dataset_subset="one")
    assert not isinstance(e.value, ConnectionError | FileNotFoundError) and broken
    folder = prepare(source, tmp_path, dataset_subset="one")
    assert resumed[0] is not None, "it started again instead of resuming"
    assert content_hash(read_index(folder)) == content_hash(read_index(uninterrupted))


def test_smollm_is_still_a_name_of_tokenize_and_builds_the_same_folder(tmp_path):
    write_jsonl(tmp_path / "data/train.jsonl", documents(30))
    outputs, hashes = [], []
    flags = ("--dataset_name", "data", "--tokenizer", "bytes")
    for command in ("tokenize", "smollm"):
        result = run("prep_dataset.py", command, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
        (folder,) = tmp_path.glob("token_cache/data-*")
        hashes.append(content_hash(read_index(folder)))
        folder.rename(tmp_path / command)  # so that the other command builds its own
    assert outputs[0] == outputs[1] and hashes[0] == hashes[1]
    listed = run("prep_dataset.py", "--help", cwd=tmp_path).stdout
    assert "tokenize" in listed and "smollm" not in listed
    for typed, meant in (("tokenise", "tokenize"), ("smolm", "smollm")):
        line = one_error_line(run("prep_dataset.py", typed, cwd=tmp_path), 2)
        assert f"did you mean {meant}?" in line


def test_settings_that_give_other_tokens_never_share_a_folder(source, tmp_path):
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


def test_a_tokenizer_given_as_a_folder_is_identified_by_its_content(source, tmp_path):
    path = tmp_path / "tokenizer/tokenizer.json"
    path.parent.mkdir()
    settings = {"dataset_subset": "one", "tokenizer": str(path.parent)}
    path.write_bytes(byte_tokenizer().to_json())
    first = prepare(source, tmp_path, **settings)
    other = make_tokenizer("bpe:300", documents(50))
    path.write_bytes(other.to_json())
    second = prepare(source, tmp_path, **settings)
    assert first != second and read_index(second)["tokenizer"]["fingerprint"] == other.fingerprint


PEAK_MEMORY = """
import sys, threading
root, data, cache = sys.argv[1:]
sys.path.insert(0, root)
sys.argv = ["prep_dataset.py"]
import prep_dataset

def anonymous_bytes():
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) * 1024

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
config = prep_dataset.TokenizeConfig(dataset_name=data, tokenizer="bytes", cache_dir=cache)
prep_dataset.prepare_tokens(config)
done.set()
thread.join()
print(peak[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_of_a_build_does_not_grow_with_the_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [" ".join(documents(10)) + str(i) for i in range(8_000)]
    table = pyarrow.table({"text": texts})
    peaks = []
    for times in (1, 10):
        folder = tmp_path / f"times{times}"
        folder.mkdir()
        with pyarrow.parquet.ParquetWriter(folder / "train.parquet", table.schema) as out:
            for _ in range(times):
                out.write_table(table, row_group_size=500)
        command = [sys.executable, "-c", PEAK_MEMORY, ROOT, folder, tmp_path / "cache"]
        # with glibc's many arenas the figure would be that of malloc, not of the program
        env = {**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
        options = {"capture_output": True, "text": True, "timeout": 300, "check": True}
        peaks.append(int(subprocess.run(list(map(str, command)), env=env, **options).stdout))
    assert peaks[1] < peaks[0] + 10e6, peaks  # of 81 MB more text
