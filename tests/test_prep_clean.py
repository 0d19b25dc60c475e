"""Cleaning books: real ones in every layout, odd ones, and other people's text."""

import csv
import random
import re
import time

import pytest
from conftest import SHARED, shared
from prep_cases import END, HEADER, PROSE, START

from parts.data import gutenberg as G
from prep_dataset import GutenbergConfig, prepare_gutenberg


def collapse(text: str) -> str:
    return " ".join(text.split())


# Words of Project Gutenberg that must not be left. (A novel may mention a licence, or something
# produced by hand.)
LEFT_OVER = re.compile(
    r"project\s+gutenberg|gutenberg-tm|\*\*\*\s*(start|end) of|small print!"
    r"|^\W*(?-i:Produced|Transcribed|Prepared) by|\be-?texts?\b|\bebooks?\b|pgdp\.net"
    r"|full license|electronic works",
    re.IGNORECASE | re.MULTILINE,
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All 39 books, cleaned with --languages all --keep_duplicates: (report, combined text)."""
    output = tmp_path_factory.mktemp("all")
    config = GutenbergConfig(data_dir=str(shared("data/gutenberg")), output_dir=str(output))
    config.languages = ("all",)
    config.keep_duplicates = True
    report = prepare_gutenberg(config)
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


def test_a_listing_is_not_a_book_and_every_file_has_a_row_with_a_reason(everything):
    report = everything[0]
    status = {row["file"]: row["status"] for row in report["files"]}
    assert status["01342_not_a_book_ftp_listing.txt"] == "not a book"
    assert report["counts"]["kept"] == 39
    assert set(status) == {p.name for p in (SHARED / "data/gutenberg").iterdir()}
    for row in report["files"]:
        assert row["reason"]
        if row["status"] == "kept":
            assert row["chars_in"] > row["chars_out"] + row["header_chars"]


def test_foreign_books_and_second_editions_are_left_out(tmp_path):
    folder = shared("data/gutenberg")
    config = GutenbergConfig(data_dir=str(folder), output_dir=str(tmp_path))
    report = prepare_gutenberg(config)
    status = {row["file"]: row["status"] for row in report["files"]}
    foreign = [name for name in status if re.search(r"_(de|fr|it|nl|pl)_", name)]
    assert [status[name] for name in foreign] == 8 * ["other language"]
    assert [status[name] for name in sorted(status) if "alice" in name] == ["kept", "duplicate"]
    assert report["counts"]["kept"] == 30


SMALL_PRINT_END = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
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
    + "***START OF THE PROJECT GUTENBERG EBOOK, A DAY***\n\n{body}"
    + "***END OF THE PROJECT GUTENBERG EBOOK, A DAY***\n",
    "credits": HEADER
    + START
    + "Produced by A. Person and the Online\n"
    + "Distributed Proofreading Team at https://www.pgdp.net\n\n{body}"
    + END,
    "end line only": HEADER
    + START
    + "{body}End of the Project Gutenberg EBook of A Day, by\nNobody\n\n",
    "no footer": HEADER + START + "{body}",
    "small print": "**Welcome**\n\n"
    + "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nlawyers\n\n"
    + SMALL_PRINT_END
    + "\n{body}",
    "small print, title banner": "*END THE SMALL PRINT! FOR PUBLIC DOMAIN\n"
    + "ETEXTS*Ver.04.29.93*END*\n\n"
    + "*The Project Gutenberg Etext of A Day*\n\n{body}"
    + "End of Project Gutenberg Etext of A Day\n",
    "small print after the book": HEADER
    + START
    + "{body}"
    + END
    + "***START**THE SMALL PRINT!**START***\nlawyers\n\n"
    + "*END THE SMALL PRINT!*Ver.02/11/02*END*\n\n",
    "two etexts in one": SMALL_PRINT_END
    + "{body}End of The Project Gutenberg Etext of A\n\n"
    + HEADER
    + START
    + "Second.\n\n"
    + END,
    "a volume without a header of its own": SMALL_PRINT_END
    + "Volume one.\n\nEnd of this Project Gutenberg Etext of A Day, v1\n\n\n"
    + "{body}End of this Project Gutenberg Etext of A Day, v2\n",
    "unmarked": "{body}",
}
# prose that looks like credits, header fields or markers
TRAPS = """The squatters held that the valley was public domain.

Entered by the gate one evening, a stranger came.

Prepared in haste from my notes.

Language: it is the dress of thought
and no more.
***

The sound was
produced by the bell and
prepared for tea by him, who
entered the room from the garden, reading the small print!

"""
LAST = "He loved Big Brother's *** stars *** and the end of the road.\n\n"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_layout_leaves_the_whole_body_and_nothing_else(layout, newline):
    body = TRAPS + PROSE * 40 + LAST
    file = LAYOUTS[layout].format(body=body).replace("\n", newline)
    raw, _ = G.decode(file.encode("utf-8-sig"))
    text = G.normalise(G.strip_boilerplate(raw).text)
    expected = collapse(body)
    if layout == "two etexts in one":
        expected += " Second."
    if layout == "a volume without a header of its own":
        expected = "Volume one. " + expected
    assert collapse(text) == expected


def test_text_from_elsewhere_is_unchanged():
    odd = "    indented verse\n\tand a tab, https://example.org\n\nProduced by me@example.org\n\n\n"
    text = (PROSE + odd) * 30
    assert G.normalise(G.strip_boilerplate(text).text) == text.strip("\n")


@pytest.mark.parametrize("repeated", [" ", "x", "ebook ", "*", "\n", "a@"])
def test_repetitive_text_takes_no_quadratic_time(repeated):
    odd = repeated * (300_000 // len(repeated)) + "x"
    book = HEADER + START + odd + "\n" * 9 + odd + "\n" + END
    started = time.process_time()
    text = G.normalise(G.strip_boilerplate(book).text)
    G.why_no_book(text)
    G.language_of(text)
    G.sketch(text)
    assert time.process_time() - started < 10


POLISH = "Character set encoding: ISO-8859-2\nżółć"


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
        (POLISH.encode("iso-8859-2"), POLISH, "iso-8859-2"),
        ("ż ".encode() * 40 + b"\xff", "ż " * 40 + "\ufffd", "utf-8, 1 invalid bytes replaced"),
    ],
)
def test_decoding(data, text, encoding):
    assert G.decode(data) == (text, encoding)


PARAGRAPHS = {  # kind -> (text, whether its lines are joined)
    "prose": (
        "He walked along the river for a long while, thinking of\n"
        "nothing at all, until the lamps were lit and the boats\n"
        "came in.",
        True,
    ),
    "verse": (
        "Shall I compare thee to a summer's day, or to the night?\n"
        "Thou art more lovely and more temperate, and more bright:\n"
        "Rough winds do",
        False,
    ),
    "letter": (
        "    Indented lines of a letter that somebody had once written\n"
        "    to a friend of his, and",
        False,
    ),
    "title": ("CHAPTER ONE\nin which little happens", False),
    "table": (
        "A table of the kings and of the years of their reigns:   1066\n"
        "and of their queens, if any is on record in that year:   1100",
        False,
    ),
}


@pytest.mark.parametrize("kind", PARAGRAPHS)
def test_prose_is_unwrapped_and_verse_is_not(kind):
    paragraph, is_joined = PARAGRAPHS[kind]
    text = f"Title\n\n\n{paragraph}\n\nThe end."
    expected = paragraph.replace("\n", " ") if is_joined else paragraph
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
def test_why_a_text_is_no_book(text, why):
    reason = G.why_no_book(text)
    assert reason is None if why is None else why in reason


def test_resemblance_ignores_case_punctuation_and_line_breaks():
    words = [f"word{n}" for n in random.Random(0).choices(range(1000), k=3000)]
    book = G.sketch(" ".join(words))
    same = G.sketch("\n".join(w.upper() + "," for w in words))
    backwards = G.sketch(" ".join(words[::-1]))
    half = G.sketch(" ".join(words[:1500] + [f"x{w}" for w in words[:600]]))
    assert G.resemblance(book, same) == 1
    assert G.resemblance(book, backwards) < 0.1
    assert 0.3 < G.resemblance(book, half) < 0.8
