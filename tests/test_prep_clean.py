"""Cleaning books: real ones in every layout, odd ones, and other people's text."""

import csv
import itertools
import json
import random
import re
import time

import pytest
from conftest import SHARED, shared
from prep_cases import END, HEADER, PROSE, START

from parts.data import gutenberg as G
from parts.data.near_duplicates import resemblance, sketch
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
    raw, *_ = G.decode(file.encode("utf-8-sig"))
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
    sketch(text)
    assert time.process_time() - started < 10


POLISH = "Character set encoding: ISO-8859-2\nżółć"


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("naïve “quotes”".encode(), "naïve “quotes”", "utf-8"),
        ("naïve".encode("utf-8-sig"), "naïve", "utf-8-sig"),
        ("naïve".encode("latin-1"), "naïve", "cp1252"),
        ("“naïve”".encode("cp1252"), "“naïve”", "cp1252"),
        ("naïve".encode("utf-16"), "naïve", "utf-16"),
        (b"a\r\nb\rc\x1a", "a\nb\nc", "ascii"),
        (POLISH.encode("iso-8859-2"), POLISH, "iso-8859-2"),
    ],
)
def test_decoding(data, text, encoding):
    assert G.decode(data) == (text, encoding, 0)


DOZEN = "Élodie a mangé, près du café, une pêche à la crème brûlée; où était Zoë?"
RUSSIAN = "Все счастливые семьи похожи друг на друга."
CHINESE = "道可道非常道名可名非常名無名天地之始有名萬物之母"


def declares(encoding: str, text: str) -> str:
    return f"Title: A Day\n\nCharacter set encoding: {encoding}\n\n{text}"


@pytest.mark.parametrize(
    ("data", "encoding", "n_replaced"),
    [
        (declares("UTF-8", f"{DOZEN} é").encode()[:-1], "utf-8", 1),
        (declares("Unicode UTF-8", f"{DOZEN} “").encode()[:-1], "utf-8", 2),
        (declares("UTF-8", "One accent only: é").encode()[:-1], "utf-8", 1),
        (
            declares("UTF-8", "é \xff\xff\xff").encode("latin-1").replace(b"\xe9", b"\xc3\xa9"),
            "utf-8",
            3,
        ),
        (f"{DOZEN} é".encode()[:-1], "utf-8", 1),
        (f"{DOZEN} é".encode("utf-8-sig")[:-1], "utf-8-sig", 1),
        ("\ufeffOne accent only: é".encode()[:-1], "utf-8-sig", 1),
        ("Of two accents the second: é é".encode()[:-1], "utf-8", 1),
        ("é".encode()[1:] + DOZEN.encode(), "utf-8", 1),  # the first byte is missing
        (declares("ISO-8859-1", f"{DOZEN} é").encode()[:-1], "utf-8", 1),  # the header is wrong
        (f"{DOZEN} \ufffd é".encode()[:-1], "utf-8", 1),  # one was replaced by an earlier program
        (declares("Big5", CHINESE).encode("big5")[:-1], "big5", 1),
        (declares("EUC-KR", "모든 국민은 법 앞에 평등하다").encode("euc-kr")[:-1], "euc-kr", 1),
        ("naïve".encode("utf-16")[:-1], "utf-16", 1),
        ("“quoted” \x81".encode("cp1252", "replace").replace(b"?", b"\x81"), "cp1252", 1),
    ],
)
def test_a_character_that_was_cut_does_not_change_the_encoding_of_the_book(
    data, encoding, n_replaced
):
    assert G.decode(data) == (data.decode(encoding, errors="replace"), encoding, n_replaced)


@pytest.mark.parametrize(
    ("encoding", "declared", "text"),
    [
        ("cp1252", "", "A book with one café in it."),
        ("cp1252", "", "“A café”, said Zoë; the naïve façade cost £5."),
        ("cp1252", "ISO-8859-1", "“A café”, said Zoë."),
        ("cp1252", "UTF-8", "“A café”, said Zoë; the header is wrong."),
        ("cp1252", "ASCII", "SÃO PAULO É” and naïve Müller"),  # two bytes look like UTF-8
        ("koi8-r", "KOI8-R", RUSSIAN),
        ("windows-1251", "windows-1251", RUSSIAN),
        ("big5", "Big5", CHINESE),
        ("shift_jis", "Shift_JIS", "吾輩は猫である。名前はまだ無い。"),
    ],
)
def test_a_book_in_another_encoding_is_not_taken_for_damaged_utf_8(encoding, declared, text):
    text = declares(declared, text) if declared else text
    assert G.decode(text.encode(encoding)) == (text, encoding, 0)


def cleaned_alone(folder, data: bytes, **settings) -> tuple[dict, str]:
    """(its row of report.json, the text) of one file that is prepared."""
    folder.mkdir()
    (folder / "book.txt").write_bytes(data)
    out = folder / "out"
    prepare_gutenberg(GutenbergConfig(data_dir=str(folder), output_dir=str(out), **settings))
    (row,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["files"]
    return row, (out / "combined_1.txt").read_text(encoding="utf-8")


def test_the_report_counts_the_bytes_that_were_replaced(tmp_path):
    book = declares("UTF-8", START + PROSE * 40 + DOZEN + " é")
    row, text = cleaned_alone(tmp_path / "cut", book.encode()[:-1])
    assert (row["encoding"], row["replaced_bytes"]) == ("utf-8", 1)
    assert text.endswith(f"{DOZEN} \ufffd")
    row, text = cleaned_alone(tmp_path / "whole", book.encode())
    assert row["replaced_bytes"] == 0 and text.endswith(f"{DOZEN} é")


LINES = (
    HEADER
    + START
    + (PROSE.replace("tower struck", "tower\nstruck") + "Verse\nof two lines\n\n\n") * 9
    + END
)


def with_mixed_ends(text: str) -> str:
    """Each line with another end. A lone CR stands before no LF, where the two would be one end."""
    ends = itertools.cycle(["\n", "\r\n", "\r\r\n", "\r\r\r\n", "\u2028"])
    return "".join(line + next(ends) for line in text.split("\n"))


LINE_ENDS = {
    "CR LF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"),
    "CR CR LF": lambda text: text.replace("\n", "\r\r\n"),
    "CR CR CR LF": lambda text: text.replace("\n", "\r\r\r\n"),
    "next line": lambda text: text.replace("\n", "\x85"),
    "line separator": lambda text: text.replace("\n", "\u2028"),
    "half CR CR LF": lambda text: text.replace("\n", "\r\r\n", text.count("\n") // 2),
    "CR before half LF": lambda text: text.replace("\n", "\r", text.count("\n") // 2),
    "mixed": with_mixed_ends,
}


@pytest.mark.parametrize("kind", LINE_ENDS)
def test_a_book_is_the_same_with_every_kind_of_line_end(kind, tmp_path):
    _, expected = cleaned_alone(tmp_path / "lf", LINES.encode(), workers=1)
    assert "tower struck" in expected and "Verse\nof two lines\n\n\n" in expected
    _, text = cleaned_alone(tmp_path / "other", LINE_ENDS[kind](LINES).encode(), workers=1)
    assert text == expected


def test_separators_of_paragraphs_and_pages_end_a_line_where_nothing_else_does():
    assert G.decode("one\u2029two".encode())[0] == "one\n\ntwo"
    assert G.decode(b"one\x0ctwo\n\x0cthree\x0c\nfour\n\x0c\nfive\x0b")[0] == (
        "one\ntwo\nthree\nfour\n\nfive"
    )


PAGE = f"<p>{PROSE}</p>\n" * 20
DOCTYPE = "<!DOCTYPE html>\n"
OTHER_FORMATS = {
    "an HTML page": f"{DOCTYPE}<html><head></head><body>{PROSE * 40}</body></html>",
    "HTML in capitals": f"\n<HTML>\n<BODY>\n{PROSE * 40}</BODY></HTML>",
    "XHTML": f'<?xml version="1.0"?>\n<!-- a -->\n<!-- b -->\n{DOCTYPE}<html>{PROSE * 40}</html>',
    "HTML from Project Gutenberg": f"{DOCTYPE}<html><p>{START}</p>{PAGE}<p>{END}</p></html>",
    "HTML without a head": PAGE,
    "HTML without closing tags": f"<P>{PROSE * 2}" * 20,
    "HTML after a note": f"Saved on Monday.\n\n{PAGE}",
    "an XML file": f'<?xml version="1.0"?>\n<TEI><text>{PROSE * 40}</text></TEI>',
    "an RTF file": rf"{{\rtf1\ansi {PROSE * 40}}}",
}
BOOKS_WITH_TAGS = {
    "italics": PROSE.replace("cold", "<i>cold</i>").replace("thirteen", "<b>thirteen</b>") * 40,
    "a few tags": PROSE * 40 + "He wrote <p> and <br> where his teacher wrote <html>.\n\n" * 3,
    "a page in a book": f"<div>\n{PROSE * 2}</div>\n\n" + PROSE * 40,
    "signs": "If a < b and c > d, then <a, b> is the pair and </3 a broken heart.\n\n" * 40,
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_a_file_of_another_format_is_not_a_book_and_the_reason_names_the_format(kind, tmp_path):
    (tmp_path / "page.txt").write_text(OTHER_FORMATS[kind], encoding="utf-8")
    (tmp_path / "book.txt").write_text(PROSE * 40, encoding="utf-8")
    out = tmp_path / "out"
    report = prepare_gutenberg(GutenbergConfig(data_dir=str(tmp_path), output_dir=str(out)))
    book, page = report["files"]
    assert (book["status"], page["status"]) == ("kept", "not a book")
    assert (kind if kind.startswith("an ") else "HTML") in page["reason"]
    assert "<" not in (out / "combined_1.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", BOOKS_WITH_TAGS)
def test_a_book_that_mentions_tags_is_a_book(kind, tmp_path):
    row, text = cleaned_alone(tmp_path / "a", BOOKS_WITH_TAGS[kind].encode())
    assert row["status"] == "kept" and collapse(text) == collapse(BOOKS_WITH_TAGS[kind])


ABOUT_THE_FILE = [
    "This is the 7 bit version!",
    "This is the 8-bit version of A Day.\nThe 7-bit version is a_day7.txt.",
    "*** seven-bit ASCII ***",
    "[This is the plain ASCII version.]",
    "ISO-8859-1 text",
    "An HTML version is also available.",
    "[accents removed]",
    "(Note: all accented characters have been replaced by plain letters.)",
    "Text in italics is enclosed by underscores.",
    "[Transcriber's Note: the spelling of the original is kept.]",
    "This electronic edition was made from the edition of 1908.",
]
PROSE_NEAR_THE_BEGINNING = """Accents removed from their syllables make no verse, says the master.

The Greek
accents are omitted here, as in all editions for schools.

[He speaks in the accents of the hills, and is removed by the guard.]

At the age of seven bit by a dog, he read no text; all 7 bit the dust.

He liked the version in italics best, and was accustomed to underscore nothing.

The transcriber's notes were lost with the ship.

He removed the accents of his youth.
"""


@pytest.mark.parametrize("line", ABOUT_THE_FILE)
def test_a_line_about_the_file_is_removed_near_the_beginning_and_is_in_the_report(line):
    body = f"A DAY\n\n{PROSE_NEAR_THE_BEGINNING}\n{PROSE * 40}"
    book = f"{HEADER}{START}{line}\n\n{body}{line}\n\n{END}"
    stripped = G.strip_boilerplate(book)
    assert collapse(stripped.text) == collapse(body + line)  # far from the beginning it stays
    assert stripped.notices == [collapse(line)[:80]]
    assert G.strip_boilerplate(f"{line}\n\n{body}").text == f"{line}\n\n{body}"  # from elsewhere


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
        text, *_ = G.decode(path.read_bytes())
        assert G.unwrap(text).replace("\n", " ") == text.replace("\n", " ")


def test_binary_data_is_refused():
    with pytest.raises(ValueError, match="it looks like a zip archive"):
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
    book = sketch(" ".join(words))
    same = sketch("\n".join(w.upper() + "," for w in words))
    backwards = sketch(" ".join(words[::-1]))
    half = sketch(" ".join(words[:1500] + [f"x{w}" for w in words[:600]]))
    assert resemblance(book, same) == 1
    assert resemblance(book, backwards) < 0.1
    assert 0.3 < resemblance(book, half) < 0.8
