"""Cleaning real books in every layout, downloads that lie, archives that attack, and what is said about each file."""

import contextlib
import csv
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile

import pytest
from conftest import ROOT, SHARED, one_error_line, run, shared

import prep_dataset
from parts.data import gutenberg as G
from parts.data.corpus import python_docs
from prep_dataset import GutenbergConfig, clean_book, prepare_gutenberg, read_documents

PROSE = "It was a bright cold day in April, and the old clock of the tower struck thirteen over the quiet roofs of the town.\n\n"
HEADER = "The Project Gutenberg EBook of A Day, by Nobody\n\nTitle: A Day\n\nLanguage: English\n\n"
START, END = (
    "*** START OF THE PROJECT GUTENBERG EBOOK A DAY ***\n\n",
    "*** END OF THE PROJECT GUTENBERG EBOOK A DAY ***\n\n",
)


def collapse(text: str) -> str:
    return " ".join(text.split())


# What may not be left of Project Gutenberg's own words. (A novel may well have a licence, or something produced by hand.)
LEFT_OVER = re.compile(
    r"project\s+gutenberg|gutenberg-tm|\*\*\*\s*(start|end) of|small print!|^\W*(?-i:Produced|Transcribed|Prepared) by|\be-?texts?\b|"
    r"\bebooks?\b|pgdp\.net|full license|electronic works",
    re.IGNORECASE | re.MULTILINE,
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All 39 books, cleaned with --languages all --keep_duplicates: (report, combined text)."""
    output = tmp_path_factory.mktemp("all")
    report = prepare_gutenberg(
        GutenbergConfig(
            data_dir=str(shared("data/gutenberg")),
            output_dir=str(output),
            languages=("all",),
            keep_duplicates=True,
        )
    )
    return report, (output / "combined_1.txt").read_text(encoding="utf-8")


def test_every_real_book_keeps_both_boundary_phrases(everything):
    report, text = everything
    kept = [row["file"] for row in report["files"] if row["status"] == "kept"]
    books = dict(zip(kept, map(collapse, text.split("<|endoftext|>")), strict=True))
    with open(SHARED / "data/gutenberg/BOUNDARIES.tsv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 39 == len(books)
    for row in rows:
        for phrase in (row["keep_first"], row["keep_last"]):
            assert phrase == "-" or collapse(phrase) in books[row["file"]], row["file"]


def test_no_line_of_licence_marker_small_print_or_credits_is_left(everything):
    assert not [m.group() for m in LEFT_OVER.finditer(everything[1])]


def test_the_listing_is_no_book_and_every_file_has_its_line(everything):
    report = everything[0]
    status = {row["file"]: row["status"] for row in report["files"]}
    assert (
        status["01342_not_a_book_ftp_listing.txt"] == "not a book"
        and report["counts"]["kept"] == 39
    )
    assert set(status) == {p.name for p in (SHARED / "data/gutenberg").iterdir()}
    for row in report["files"]:
        assert row["reason"] and (
            row["status"] != "kept" or row["chars_in"] > row["chars_out"] + row["header_chars"]
        )


def test_foreign_books_and_second_editions_are_set_aside(tmp_path):
    report = prepare_gutenberg(
        GutenbergConfig(data_dir=str(shared("data/gutenberg")), output_dir=str(tmp_path))
    )
    status = {row["file"]: (row["status"], row["reason"]) for row in report["files"]}
    foreign = [name for name in status if re.search(r"_(de|fr|it|nl|pl)_", name)]
    assert len(foreign) == 8 and all(status[name][0] == "other language" for name in foreign)
    assert [status[name][0] for name in sorted(status) if "alice" in name] == ["kept", "duplicate"]
    assert report["counts"]["kept"] == 30


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


LAYOUTS = {
    "modern": HEADER
    + START
    + "{body}"
    + END
    + "Updated editions will replace the previous one.\n\n"
    + "Licence terms of Project Gutenberg-tm works. " * 400,
    "marker over two lines": HEADER
    + START.replace("PROJECT GUTENBERG", "PROJECT\nGUTENBERG")
    + "{body}*** END OF THIS\nPROJECT GUTENBERG EBOOK\nA DAY ***\n\nx",
    "no spaces, comma": HEADER
    + "***START OF THE PROJECT GUTENBERG EBOOK, A DAY***\n\n{body}***END OF THE PROJECT GUTENBERG EBOOK, A DAY***\n",
    "credits": HEADER
    + START
    + "Produced by A. Person and the Online\nDistributed Proofreading Team at https://www.pgdp.net\n\n{body}"
    + END,
    "end line only": HEADER
    + START
    + "{body}End of the Project Gutenberg EBook of A Day, by\nNobody\n\n",
    "no footer": HEADER + START + "{body}",
    "small print": "**Welcome**\n\n***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nlawyers\n\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n{body}",
    "small print, title banner": "*END THE SMALL PRINT! FOR PUBLIC DOMAIN\nETEXTS*Ver.04.29.93*END*\n\n*The Project Gutenberg Etext of A Day*\n\n{body}"
    "End of Project Gutenberg Etext of A Day\n",
    "small print behind": HEADER
    + START
    + "{body}"
    + END
    + "***START**THE SMALL PRINT!**START***\nlawyers\n\n*END THE SMALL PRINT!*Ver.02/11/02*END*\n\n",
    "two etexts in one": "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n{body}End of The Project Gutenberg Etext of A\n\n"
    + HEADER
    + START
    + "Second.\n\n"
    + END,
    "a volume without a header of its own": "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\nVolume one.\n\n"
    "End of this Project Gutenberg Etext of A Day, v1\n\n\n{body}End of this Project Gutenberg Etext of A Day, v2\n",
    "unmarked": "{body}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_layout_leaves_the_whole_body_and_nothing_else(layout, newline):
    traps = "The squatters held that the valley was public domain.\n\nEntered by the gate one evening, a stranger came.\n\n"
    traps += "Prepared in haste from my notes.\n\nLanguage: it is the dress of thought\nand no more.\n***\n\nThe sound was\nproduced by the bell and\nprepared for tea by him, who\nentered the room from the garden, reading the small print!\n\n"
    body = traps + PROSE * 40 + "He loved Big Brother's *** stars *** and the end of the road.\n\n"
    raw, _ = G.decode(LAYOUTS[layout].format(body=body).replace("\n", newline).encode("utf-8-sig"))
    text = G.normalise(G.strip_boilerplate(raw).text)
    expected = collapse(body) + (" Second." if layout == "two etexts in one" else "")
    expected = ("Volume one. " if "volume" in layout else "") + expected
    assert collapse(text) == expected


def test_other_peoples_text_comes_out_as_it_went_in():
    text = (
        PROSE
        + "    indented verse\n\tand a tab, https://example.org\n\nProduced by me@example.org\n\n\n"
    ) * 30
    assert G.normalise(G.strip_boilerplate(text).text) == text.strip("\n")


@pytest.mark.parametrize(
    "odd",
    [
        " " * 300_000 + "x",
        "x" * 300_000,
        "ebook " * 60_000,
        "*" * 300_000,
        "\n" * 300_000,
        "a@" * 150_000,
    ],
)
def test_odd_text_takes_no_odd_time(odd):
    started = time.time()
    text = G.normalise(G.strip_boilerplate(HEADER + START + odd + "\n" * 9 + odd + "\n" + END).text)
    G.why_no_book(text), G.language_of(text), G.sketch(text)
    assert time.time() - started < 10


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("naïve “quotes”".encode(), "naïve “quotes”", "utf-8"),
        ("naïve".encode("utf-8-sig"), "naïve", "utf-8-sig"),
        ("naïve".encode("latin-1"), "naïve", "cp1252"),
        ("“naïve”".encode("cp1252"), "“naïve”", "cp1252"),
        (b"a\x81b", "a\x81b", "latin-1"),
        ("naïve".encode("utf-16"), "naïve", "utf-16"),
        (b"a\r\nb\rc\x1a", "a\nb\nc", "ascii"),
        (
            b"Character set encoding: ISO-8859-2\n" + "żółć".encode("iso-8859-2"),
            "Character set encoding: ISO-8859-2\nżółć",
            "iso-8859-2",
        ),
        (
            "żółć ".encode() * 40 + b"\xff",
            "żółć " * 40 + "\ufffd",
            "utf-8, 1 invalid bytes replaced",
        ),
    ],
)
def test_decoding(data, text, encoding):
    assert G.decode(data) == (text, encoding)


PARAGRAPHS = {  # text -> whether its lines are joined
    "He walked along the river for a long while, thinking of\nnothing at all, until the lamps were lit and the boats\ncame in.": True,
    "Shall I compare thee to a summer's day, or to the night?\nThou art more lovely and more temperate, and more bright:\nRough winds do": False,
    "    Indented lines of a letter that somebody had once written\n    to a friend of his, and": False,
    "CHAPTER ONE\nin which little happens": False,
    "A table of the kings and of the years of their reigns:   1066\nand of their queens, if any is on record in that year:   1100": False,
}


@pytest.mark.parametrize("paragraph", PARAGRAPHS)
def test_prose_is_unwrapped_and_verse_is_not(paragraph):
    text = f"Title\n\n\n{paragraph}\n\nThe end."
    expected = paragraph.replace("\n", " ") if PARAGRAPHS[paragraph] else paragraph
    assert G.unwrap(text) == text.replace(paragraph, expected)


def test_unwrapping_changes_nothing_but_line_breaks():
    for path in sorted(shared("data/gutenberg").glob("*.txt"))[::5]:
        text, _ = G.decode(path.read_bytes())
        assert G.unwrap(text).replace("\n", " ") == text.replace("\n", " ")


def test_binary_data_is_refused():
    with pytest.raises(ValueError, match="binary"):
        G.decode(b"PK\x03\x04\x00\x00text")


@pytest.mark.parametrize(
    ("text", "why"),
    [("short", "characters"), ("12 34.5; -- 77 |\n" * 100, "letters"), (PROSE * 9, None)],
)
def test_what_is_no_book(text, why):
    assert (G.why_no_book(text) or "").count(why or "") and bool(G.why_no_book(text)) == bool(why)


def test_resemblance_ignores_case_punctuation_and_line_breaks():
    words = [f"word{n}" for n in random.Random(0).choices(range(1000), k=3000)]
    a, b = " ".join(words), "\n".join(w.upper() + "," for w in words)
    assert G.resemblance(G.sketch(a), G.sketch(b)) == 1
    assert G.resemblance(G.sketch(a), G.sketch(" ".join(words[::-1]))) < 0.1
    assert (
        0.3
        < G.resemblance(
            G.sketch(a), G.sketch(" ".join(words[:1500] + [f"x{w}" for w in words[:600]]))
        )
        < 0.8
    )


def prepare(tmp_path, *arguments, **options):
    return run("prep_dataset.py", "gutenberg", *arguments, cwd=tmp_path, **options)


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


def test_the_english_of_python_is_plenty_and_always_the_same():
    documents = python_docs()
    assert documents == python_docs() and sum(map(len, documents)) > 500_000


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


# ---------------------------------------------------------------------------------------------------- downloads


@contextlib.contextmanager
def book_server(answer):
    """A server on the loopback address; answer(path) -> (status, announced length or None, body; a list is sent slowly)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            agents.add(self.headers["User-Agent"])
            status, length, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(OSError):
                for piece in body if isinstance(body, list) else [body]:
                    self.wfile.write(piece)
                    time.sleep(0.1 * isinstance(body, list))

        def log_message(self, *_):
            pass

    asked, agents = [], set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, agents
    finally:
        server.shutdown()
        server.server_close()


def a_book(n):
    return (
        HEADER + START + PROSE * 9 + " ".join(f"word{i * n}" for i in range(300)) + "\n\n" + END
    ).encode()


def test_books_are_fetched_once_kept_and_prepared(tmp_path):
    def answer(path):
        n = int(re.search(r"(\d+)", path)[1])
        return (
            (404, 0, b"")
            if n == 99 or (n == 2 and "cache" in path)
            else (200, len(a_book(n)), a_book(n))
        )

    with book_server(answer) as (url, asked, agents):
        line = (
            "--book_ids",
            "1",
            "2",
            "99",
            "--mirror",
            url,
            "--pause_s",
            "0",
            "--output_dir",
            "out",
        )
        assert "1 of 3 books could not be downloaded" in one_error_line(prepare(tmp_path, *line), 1)
        assert asked == [
            "/cache/epub/1/pg1.txt",
            "/cache/epub/2/pg2.txt",
            "/files/2/2-0.txt",
            "/cache/epub/99/pg99.txt",
            "/files/99/99-0.txt",
        ]
        assert all("pretraining" in agent for agent in agents)
        report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
        assert report["counts"] == {"kept": 2, "not downloaded": 1}
        asked.clear()
        prepare(tmp_path, *line)
        assert asked == [
            "/cache/epub/99/pg99.txt",
            "/files/99/99-0.txt",
        ]  # what is there is not asked for again


@pytest.mark.parametrize("lie", ["cut", "empty", "error"])
def test_a_server_that_lies_leaves_no_file(tmp_path, lie):
    answers = {
        "cut": (200, 10_000, a_book(1)[:500]),
        "empty": (200, 0, b""),
        "error": (503, 3, b"no!"),
    }
    with book_server(lambda _: answers[lie]) as (url, *_):
        line = one_error_line(
            prepare(tmp_path, "--book_ids", "1", "--mirror", url, "--pause_s", "0"), 2
        )
    assert {"cut": "cut off after 500", "empty": "empty", "error": "503"}[lie] in line
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_server_that_drips_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(prep_dataset, "DEADLINE_S", 0.5)
    with (
        book_server(lambda _: (200, 100, [b"x"] * 100)) as (url, *_),
        pytest.raises(OSError, match="not complete after"),
    ):
        prep_dataset.fetch(f"{url}/x", tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_no_server_at_all_is_one_line(tmp_path):
    line = one_error_line(
        prepare(tmp_path, "--book_ids", "1", "2", "--mirror", "http://127.0.0.1:9"), 2
    )
    assert "pg1.txt" in line and "refused" in line


# ----------------------------------------------------------------------------------------------------- archives


def test_archives_in_the_folder_are_read_like_folders(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/books.zip", "w") as z:
        z.writestr("a/one.txt", PROSE * 9)
        z.writestr("cover.jpg", b"\xff\xd8")
    for data_dir in ("in", "in/books.zip"):
        result = prepare(tmp_path, "--data_dir", data_dir, "--output_dir", "out")
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
        assert {r["file"]: r["status"] for r in report["files"]} == {
            "books.zip/a/one.txt": "kept",
            "books.zip/cover.jpg": "ignored",
        }
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "combined_1.txt",
            "report.json",
        ]


def test_extraction_never_overwrites(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("x.txt", "new")
        z.writestr("y.txt", "new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/y.txt").write_text("old", encoding="utf-8")
    line = one_error_line(
        run(
            "prep_dataset.py", "extract", "--archive", "a.zip", "--output_dir", "out", cwd=tmp_path
        ),
        2,
    )
    assert "a.zip" in line and [p.name for p in (tmp_path / "out").iterdir()] == ["y.txt"]
    assert (tmp_path / "out/y.txt").read_text(encoding="utf-8") == "old"


def test_hostile_archives(tmp_path):
    """The archives suite of the fault harness: links, devices, bombs, traversal, lies."""
    harness = shared("faults/run_faults.py")
    (tmp_path / "target.toml").write_text(
        f'name = "prep"\npython = "{{exe}}"\ntrain = ""\nhash = ""\nckpt_glob = "x"\nmax_error_lines = 1\n'
        f'extract = "{{python}} {ROOT}/prep_dataset.py extract --archive {{archive}} --output_dir {{dest}} --max_extract_mb 50"\n',
        encoding="utf-8",
    )
    run_suite = (
        "import sys; from faultlib import Bench, Target; bench = Bench(Target.load(sys.argv[1])); "
        "report = bench.archives(); bench.close(); print(report); sys.exit(bool(report.problems) or report.trials != 33)"
    )
    result = subprocess.run(
        [sys.executable, "-c", run_suite, tmp_path / "target.toml"],
        cwd=harness.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


def test_clean_book_reports_an_unreadable_file(tmp_path):
    assert clean_book(tmp_path / "gone.txt", True, True)["status"] == "unreadable"
