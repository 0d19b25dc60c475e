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
