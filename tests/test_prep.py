"""Preparing a folder of books: what is written and reported, and what a failure leaves."""

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


def write_book(path, text):
    """Write a book in Project Gutenberg's layout; the number in the file's name is in its text."""
    number = f"Number {path.stem}. " * 100 + "\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + START + text + number + END, encoding="utf-8")


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def statuses(folder) -> dict[str, str]:
    """{file: status} of the report in a folder."""
    return {row["file"]: row["status"] for row in report_of(folder)["files"]}


def names_in(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_second_preparation_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    for n in range(7):
        write_book(tmp_path / f"in/{n}.txt", PROSE * 9)
    results = []
    for workers in (1, 2, 5):
        output = tmp_path / f"out{workers}"
        config = GutenbergConfig(data_dir=str(tmp_path / "in"), output_dir=str(output))
        config.workers = workers
        config.keep_duplicates = True
        prepare_gutenberg(config)
        results.append((output / "combined_1.txt").read_bytes())
    assert results[0] == results[1] == results[2]
    assert results[0].count(b"\n<|endoftext|>\n") == 6


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    peaks = []
    config = GutenbergConfig(data_dir=str(tmp_path / "in"), output_dir=str(tmp_path / "out"))
    config.workers = 1
    config.keep_duplicates = True
    for n in (4, 40):
        for i in range(n):
            write_book(tmp_path / f"in/{i}.txt", PROSE * 1000)
        tracemalloc.start()
        prepare_gutenberg(config)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 1e6


def test_separator_in_a_book_size_limit_and_folders(tmp_path):
    files = {
        "a.txt": PROSE * 20 + "a <|endoftext|> in the text\n<|endoftext|>\nand one between lines",
        "b.txt": "Another story altogether, of ships and of shoes and of sealing wax. " * 300,
        "c.TXT": "Chapter and verse on cabbages, on kings, and on why the sea is hot. " * 10,
        "d.html": "<p>no text</p>",
        "e.txt": "",
    }
    (tmp_path / "in/deep").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "in/deep" / name).write_text(text, encoding="utf-8")
    result = prepare(tmp_path, "--data_dir", "in", "--max_size_mb", "0.004", "--output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert statuses(tmp_path / "out") == {
        "deep/a.txt": "kept",
        "deep/b.txt": "kept",
        "deep/c.TXT": "kept",
        "deep/d.html": "ignored",
        "deep/e.txt": "empty",
    }
    combined = {"combined_1.txt", "combined_2.txt", "combined_3.txt"}
    assert names_in(tmp_path / "out") == combined | {"report.json"}
    documents = read_documents(tmp_path / "out")
    end = "a <|endoftext|> in the text\n<| endoftext |>\nand one between lines"
    assert len(documents) == 3 and documents[0].endswith(end)


def test_boilerplate_can_be_kept(tmp_path):
    write_book(tmp_path / "in/1.txt", PROSE * 9)
    assert prepare(tmp_path, "--data_dir", "in", "--no-strip_boilerplate").returncode == 0
    combined = tmp_path / "gutenberg_preprocessed/combined_1.txt"
    assert START.strip() in combined.read_text(encoding="utf-8")


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
    result = run("prep_dataset.py", "gutenburg", cwd=tmp_path)
    assert "did you mean gutenberg" in one_error_line(result, 2)


def test_an_earlier_result_inside_the_folder_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 9, encoding="utf-8")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    for _ in range(2):
        assert prepare(tmp_path, "--data_dir", ".", "--output_dir", "out").returncode == 0
        assert statuses(tmp_path / "out") == {"a.txt": "kept", "dangling.txt": "unreadable"}


def test_a_failed_second_preparation_leaves_the_first(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PROSE * 9, encoding="utf-8")
    assert prepare(tmp_path, "--data_dir", "in").returncode == 0
    output = tmp_path / "gutenberg_preprocessed"
    before = {p: p.read_bytes() for p in output.iterdir()}
    one_error_line(prepare(tmp_path, "--data_dir", "in", "--languages", "fr"), 2)
    assert {p: p.read_bytes() for p in output.iterdir()} == before


def test_reading_back_names_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt.*0xef at offset 2"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"a\.txt.*binary"):
        read_documents(tmp_path)


def start_preparing(folder) -> subprocess.Popen:
    """`prep_dataset.py gutenberg` on all real books, in a process group of its own."""
    words = ["gutenberg", "--data_dir", str(shared("data/gutenberg")), "--workers", "2"]
    command = [sys.executable, str(ROOT / "prep_dataset.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)


@pytest.mark.parametrize("seconds", [0.5, 0.9, 1.3, 2.0])
def test_ctrl_c_stops_all_workers_and_leaves_nothing(tmp_path, seconds):
    """As a terminal does it: the signal goes to the whole process group."""
    process = start_preparing(tmp_path)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in out + err, err[-1500:]
    assert not list(tmp_path.iterdir())


def test_sigterm_ends_the_workers_too(tmp_path):
    process = start_preparing(tmp_path)
    while not (tmp_path / "gutenberg_preprocessed/.preparing.part/combined_1.txt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 75
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    process.communicate()
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_output_folder_stay(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PROSE * 9, encoding="utf-8")
    (tmp_path / "out").mkdir()
    for name in ("combined_notes.txt", "combined_7.txt"):
        (tmp_path / "out" / name).write_text("x", encoding="utf-8")
    assert prepare(tmp_path, "--data_dir", "in", "--output_dir", "out").returncode == 0
    expected = {"combined_1.txt", "combined_notes.txt", "report.json"}
    assert names_in(tmp_path / "out") == expected


def test_clean_book_reports_an_unreadable_file(tmp_path):
    assert clean_book(tmp_path / "gone.txt", True, True)["status"] == "unreadable"
