"""A checkpoint is whole or not there, and damage is noticed before anything is parsed."""

import errno
import json
import os

import pytest
import torch

from parts.base.files import append_lines, write_file
from parts.storage import checkpoint as C


def save(folder, step, keep_last=3):
    return C.save_checkpoint(
        folder,
        step,
        {"model.safetensors": {"w": torch.full((3, 2), float(step))}},
        {"step": step},
        {"extra.txt": b"x"},
        keep_last,
    )


def test_what_was_saved_comes_back(tmp_path):
    folder = save(tmp_path, 7)
    assert folder.name == "step_000007" and C.newest_checkpoint(
        tmp_path
    ) == folder == C.newest_checkpoint(folder)
    tensors, state = C.load_checkpoint(folder)
    assert torch.equal(tensors["w"], torch.full((3, 2), 7.0)) and state == {"step": 7}
    assert sorted(p.name for p in folder.iterdir()) == [
        "MANIFEST.json",
        "extra.txt",
        "model.safetensors",
        "trainer_state.json",
    ]


def test_only_the_last_ones_are_kept_also_past_a_million_steps(tmp_path):
    for step in (5, 999_999, 1_000_000, 12):
        save(tmp_path, step, keep_last=2)
    assert [p.name for p in C.list_checkpoints(tmp_path)] == ["step_000012", "step_1000000"]


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_copy_under_another_name_is_neither_an_obstacle_nor_deleted(tmp_path):
    copy = save(tmp_path, 1).rename(tmp_path / "checkpoints/step_keep")
    assert (
        save(tmp_path, 2, keep_last=1)
        == save(tmp_path, 2, keep_last=1)
        == C.newest_checkpoint(tmp_path)
    )
    assert copy.exists() and C.newest_checkpoint(copy) == copy


DAMAGES = {
    "flip": damage_flip,
    "truncate": lambda p: os.truncate(p, p.stat().st_size - 1),
    "delete": os.unlink,
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "extra.txt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, name, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGES[damage](newer / name)
    assert C.newest_checkpoint(tmp_path) == older
    assert f"{newer / name}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="damaged"):
        C.newest_checkpoint(newer)
    DAMAGES[damage](older / name)
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        C.newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": {"../../x": {"bytes": 1, "sha256": ""}}}', "\xff"]
)
def test_a_broken_manifest_is_an_error_that_names_it(tmp_path, manifest):
    folder = save(tmp_path, 1)
    (folder / "MANIFEST.json").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(ValueError, match="damaged"):
        C.newest_checkpoint(folder)


def test_no_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        C.newest_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("at", range(6))
def test_a_save_that_fails_at_any_file_leaves_the_older_one_and_no_litter(
    tmp_path, monkeypatch, at
):
    older, calls = save(tmp_path, 1), iter(range(100))

    def failing_fsync(fd, _real=os.fsync):
        if next(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        _real(fd)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    assert C.newest_checkpoint(tmp_path) is not None and older.exists()
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_write_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_file(tmp_path / "a/b.txt", b"one")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a/b.txt", b"two")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"] and (
        tmp_path / "a/b.txt"
    ).read_bytes() == b"one"


def test_lines_that_could_not_be_written_wait_for_the_next_call(tmp_path, capsys):
    lines = [{"step": 1}]
    append_lines(tmp_path / "missing/m.jsonl", lines)
    assert lines and "the run continues" in capsys.readouterr().out
    append_lines(tmp_path / "m.jsonl", lines)
    assert not lines and json.loads((tmp_path / "m.jsonl").read_text(encoding="utf-8")) == {
        "step": 1
    }
