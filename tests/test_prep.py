"""Preparing a folder of books: what is written, what is reported, and what is left after a failure."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
from conftest import ROOT, one_error_line, run, shared
from prep_cases import END, HEADER, PROSE, START, prepare

from prep_dataset import GutenbergConfig, clean_book, prepare_gutenberg, read_documents


def test_a_second_preparation_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for n in range(7):
        (source / f"{n}.txt").write_text(
            HEADER + START + PROSE * 9 + f"Number {n}. " * 50 + "\n\n" + END, encoding="utf-8"
        )
    results = []
    for workers in (1, 2, 5):
        output = tmp_path / f"out{workers}"
        prepare_gutenberg(
            GutenbergConfig(
                data_dir=str(source), output_dir=str(output), workers=workers, keep_duplicates=True
            )
        )
        results.append((output / "combined_1.txt").read_bytes())
    assert results[0] == results[1] == results[2] and results[0].count(b"\n<|endoftext|>\n") == 6


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    peaks = []
    for n in (4, 40):
        for i in range(n):
            (source / f"{i}.txt").write_text(
                HEADER + START + PROSE * 1000 + f"{i} " * 300 + "\n\n" + END, encoding="utf-8"
            )
        tracemalloc.start()
        prepare_gutenberg(
            GutenbergConfig(
                data_dir=str(source),
                output_dir=str(tmp_path / "out"),
                workers=1,
                keep_duplicates=True,
            )
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 1e6


def test_separator_in_a_book_size_limit_and_folders(tmp_path):
    source = tmp_path / "in" / "deep"
    source.mkdir(parents=True)
    (source / "a.txt").write_text(
        PROSE * 20 + "a <|endoftext|> in the text\n<|endoftext|>\nand one between lines",
        encoding="utf-8",
    )
    (source / "b.txt").write_text(
        "Another story altogether, of ships and of shoes and of sealing wax. " * 300,
        encoding="utf-8",
    )
    (source / "c.TXT").write_text(
        "Chapter and verse on cabbages, on kings, and on why the sea is boiling hot. " * 10,
        encoding="utf-8",
    )
    (source / "d.html").write_text("<p>no text</p>", encoding="utf-8")
    (source / "e.txt").write_bytes(b"")
    result = prepare(tmp_path, "--data_dir", "in", "--max_size_mb", "0.004", "--output_dir", "out")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert {r["file"]: r["status"] for r in report["files"]} == {
        "deep/a.txt": "kept", "deep/b.txt": "kept", "deep/c.TXT": "kept", "deep/d.html": "ignored", "deep/e.txt": "empty",
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "combined_1.txt",
        "combined_2.txt",
        "combined_3.txt",
        "report.json",
    ]
    documents = read_documents(tmp_path / "out")
    assert len(documents) == 3 and documents[0].endswith(
        "a <|endoftext|> in the text\n<| endoftext |>\nand one between lines"
    )


def test_boilerplate_can_be_kept(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(HEADER + START + PROSE * 9 + END, encoding="utf-8")
    assert prepare(tmp_path, "--data_dir", "in", "--no-strip_boilerplate").returncode == 0
    assert START.strip() in (tmp_path / "gutenberg_preprocessed/combined_1.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--book_ids or --data_dir"),
        (("--data_dir", "nowhere"), "nowhere"),
        (("--data_dir", "empty"), "no .txt files"),
        (("--data_dir", "binary"), "binary"),
        (("--data_dir", "in", "--languages", "fr"), "other language"),
        (("--data_dir", "in", "--workers", "0"), "--workers"),
        (("--data_dir", "in", "--max_size_mb", "-1"), "--max_size_mb"),
        (("--data_dri", "in"), "did you mean --data_dir"),
        (("--book_ids", "x"), "--book_ids"),
        (("--data_dir", "in", "--output_dir", "in/a.txt"), "in/a.txt"),
        (("--data_dir", "in", "--output_dir", "in"), "also --data_dir"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, arguments, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/x.txt").write_bytes(b"\0" * 1000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PROSE * 9, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert named in one_error_line(prepare(tmp_path, *arguments), 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_command_names_the_commands(tmp_path):
    assert "did you mean gutenberg" in one_error_line(
        run("prep_dataset.py", "gutenburg", cwd=tmp_path), 2
    )


def test_an_earlier_result_inside_the_folder_is_no_source(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 9, encoding="utf-8")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    for _ in range(2):
        assert prepare(tmp_path, "--data_dir", ".", "--output_dir", "out").returncode == 0
        report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
        assert {r["file"]: r["status"] for r in report["files"]} == {
            "a.txt": "kept",
            "dangling.txt": "unreadable",
        }


def test_a_failed_second_preparation_leaves_the_first(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PROSE * 9, encoding="utf-8")
    assert prepare(tmp_path, "--data_dir", "in").returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "gutenberg_preprocessed").iterdir()}
    one_error_line(prepare(tmp_path, "--data_dir", "in", "--languages", "fr"), 2)
    assert {p: p.read_bytes() for p in (tmp_path / "gutenberg_preprocessed").iterdir()} == before


def test_reading_back_names_the_file_that_is_no_utf8_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt.*0xef at offset 2"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"a\.txt.*binary"):
        read_documents(tmp_path)


@pytest.mark.parametrize("seconds", [0.5, 0.9, 1.3, 2.0])
def test_ctrl_c_stops_all_workers_and_leaves_nothing(tmp_path, seconds):
    """As a terminal does it: the signal goes to the whole process group."""
    command = [
        sys.executable,
        ROOT / "prep_dataset.py",
        "gutenberg",
        "--data_dir",
        shared("data/gutenberg"),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in out + err, err[-1500:]
    assert not list(tmp_path.iterdir())


def test_sigterm_ends_the_workers_too(tmp_path):
    command = [
        sys.executable,
        ROOT / "prep_dataset.py",
        "gutenberg",
        "--data_dir",
        shared("data/gutenberg"),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not (tmp_path / "gutenberg_preprocessed/.preparing.part/combined_1.txt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 75
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    process.communicate()
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_output_folder_are_not_ours(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PROSE * 9, encoding="utf-8")
    (tmp_path / "out").mkdir()
    for name in ("combined_notes.txt", "combined_7.txt"):
        (tmp_path / "out" / name).write_text("x", encoding="utf-8")
    assert prepare(tmp_path, "--data_dir", "in", "--output_dir", "out").returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "combined_1.txt",
        "combined_notes.txt",
        "report.json",
    ]


def test_clean_book_reports_an_unreadable_file(tmp_path):
    assert clean_book(tmp_path / "gone.txt", True, True)["status"] == "unreadable"
