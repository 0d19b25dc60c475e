"""A power cut at any moment leaves a finished folder, or a build that can be resumed."""

import hashlib
import json
import os

import pytest
from corpus_cases import hub_folder, prepare

from parts.data import corpus, shard_writer, shards


@pytest.fixture
def source(tmp_path):
    return hub_folder(tmp_path / "data")


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """
    A list of what reaches the disk, in order: ("fsync", paths, content) and ("rename", from, to).

    paths: every name of the file or folder (a merged shard has two). content: see `content_of`.
    """
    events, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(fd):
        inode = os.fstat(fd).st_ino
        paths = [p for p in (tmp_path, *tmp_path.rglob("*")) if p.stat().st_ino == inode]
        events.append(("fsync", {str(p) for p in paths}, content_of(paths[0])))
        real_fsync(fd)

    def replace(old, new):
        events.append(("rename", str(old), str(new)))
        if str(new).endswith("progress.json"):
            check_note(json.loads(old.read_text(encoding="utf-8")), old.parent, events)
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return events


def content_of(path):
    """The sha256 of a file, or the names in a folder."""
    if path.is_dir():
        return {p.name for p in path.iterdir()}
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fsyncs(events, path) -> list:
    """Content of the file or folder at each of its fsyncs."""
    return [event[2] for event in events if event[0] == "fsync" and str(path) in event[1]]


def check_note(note, folder, events):
    """progress.json is about to appear: the shards that it names are durable as they are now."""
    named = [shard["name"] for part in note["shards"].values() for shard in part]
    assert fsyncs(events, folder / "progress.json.part")
    for name in named:
        assert content_of(folder / name) in fsyncs(events, folder / name), name
        assert name in fsyncs(events, folder)[-1]
    events.append(("note", named))


def check_finished(folder, events):
    """Every file was durable before the folder got its name, and the name is durable, too."""
    part = folder.with_name(f".{folder.name}.part")
    renamed = events.index(("rename", str(part), str(folder)))
    before, after = events[:renamed], events[renamed + 1 :]
    for path in folder.iterdir():
        written = part / path.name
        if path.suffix == ".json":
            assert ("rename", f"{written}.part", str(written)) in before, path.name
            written = f"{written}.part"
        assert content_of(path) in fsyncs(before, written), path.name
    assert before[-1][:2] == ("fsync", {str(part)})
    assert after[0][:2] == ("fsync", {str(folder.parent)})


def test_a_build_and_its_notes_are_durable_before_they_are_renamed(
    source, tmp_path, monkeypatch, disk
):
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    monkeypatch.setattr(shard_writer, "SAVE_EVERY", 5000)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 8000)
    folder = prepare(source, tmp_path, dataset_subset="one")
    names = {f"train_00000{i}.bin" for i in range(4)} | {"val_000000.bin"}
    assert {p.name for p in folder.iterdir()} == names | {"index.json", "tokenizer.json"}
    notes = [event[1] for event in disk if event[0] == "note"]
    assert len(notes) > 3 and len(notes[-1]) > len(notes[0])
    check_finished(folder, disk)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_merge_is_durable_before_it_is_renamed(source, tmp_path, monkeypatch, disk, hard_links):
    parts = [
        prepare(source, tmp_path, dataset_subset="one", num_shards=2, shard_index=i)
        for i in range(2)
    ]
    disk.clear()

    def refuse(*_):
        raise OSError("another disk")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    check_finished(shard_writer.merge(parts, tmp_path / "merged"), disk)


def test_a_build_does_not_resume_from_a_shard_that_is_too_short(source, tmp_path, monkeypatch):
    straight = prepare(source, tmp_path, dataset_subset="one", cache_dir=str(tmp_path / "straight"))
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    real, chunks = corpus.tokenise, []

    def stops_or_counts(rows, *rest):
        chunks.append(rows)
        if len(chunks) == stop_at:
            raise KeyboardInterrupt
        return real(rows, *rest)

    monkeypatch.setattr(corpus, "tokenise", stops_or_counts)
    stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path, dataset_subset="one")
    (part,) = (tmp_path / "cache").glob(".*.part")
    with open(part / "train_000000.bin", "r+b") as f:
        f.truncate(2000)
    stop_at = None
    chunks.clear()
    folder = prepare(source, tmp_path, dataset_subset="one")
    assert len(chunks) == 200 / 8, "it resumed from a damaged shard"
    index = shards.verify(folder)
    assert shards.content_hash(index) == shards.content_hash(shards.read_index(straight))


def test_a_build_stopped_between_train_and_val_of_a_chunk_repeats_nothing(
    source, tmp_path, monkeypatch
):
    straight = prepare(source, tmp_path, dataset_subset="one", cache_dir=str(tmp_path / "straight"))
    monkeypatch.setattr(corpus, "CHUNK_DOCUMENTS", 8)
    write, calls = shard_writer._Writer.write, []

    def stops_before_val(self, *counted):
        calls.append(self.split)
        if calls.count("val") == 9 and self.split == "val":
            raise KeyboardInterrupt
        write(self, *counted)

    monkeypatch.setattr(shard_writer._Writer, "write", stops_before_val)
    monkeypatch.setattr(shard_writer, "SAVE_EVERY", 5000)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path, dataset_subset="one")
    monkeypatch.setattr(shard_writer._Writer, "write", write)
    folder = prepare(source, tmp_path, dataset_subset="one")
    index = shards.read_index(folder)
    assert shards.content_hash(index) == shards.content_hash(shards.read_index(straight))
