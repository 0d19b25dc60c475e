"""
Cleaning one Project Gutenberg book: bytes -> text without header, licence, small print, credits and footer.

The files were made by hand over fifty years, so nothing here trusts one form of marker. Markers are found anywhere
in the file and read in the order in which they stand:

    small print of 1991-2004, before the book (or, from 2002 on, behind it):   *END*THE SMALL PRINT! ...
    2002 and later:   *** START OF THE PROJECT GUTENBERG EBOOK ... ***  and  *** END OF ..., also over two lines
    any year:         End of the Project Gutenberg Etext of ...   (or no footer at all)

What lies between an opening and the next closing is book. Then paragraphs that only an editor of Project Gutenberg
can have written (they speak of "etexts", of Project Gutenberg, or say "Produced by" near the beginning) are taken out.
Marker forms were collected from the books themselves; the licence text is at https://www.gutenberg.org/license.
"""

from __future__ import annotations

import bisect
import itertools
import re
import zlib
from dataclasses import dataclass, field

import numpy as np

# ------------------------------------------------------------------------------------------------ bytes -> text

CODECS = re.compile(
    rb"(?im)^character set encoding:\s*((?:iso-?8859|windows|cp|koi8|mac|big5|gb|shift|euc|iso-2022)[\w-]*)"
)


def decode(data: bytes) -> tuple[str, str]:
    """
    (text with "\\n" line ends, name of the encoding). Tries a byte order mark, UTF-8, the encoding that the header
    declares, then Windows-1252 (Latin-1 and curly quotes). UTF-8 with rare invalid bytes stays UTF-8, each such byte
    as U+FFFD. Raises ValueError for binary data.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text, name = data.decode("utf-16", errors="replace"), "utf-16"
    elif b"\0" in data:
        raise ValueError("a binary file (it has NUL bytes)")
    else:
        text, name = _decode_8bit(data)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text), name


def _decode_8bit(data: bytes) -> tuple[str, str]:
    if data.isascii():
        return data.decode("ascii"), "ascii"
    text = data.decode("utf-8", errors="replace")
    n_bad = text.count("\ufffd")
    if n_bad == 0:
        return text, "utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8"
    if len(re.findall(r"[^\x00-\x7f\ufffd]", text)) > 20 * n_bad:
        return text, f"utf-8, {n_bad} invalid bytes replaced"
    for codec in [m.group(1).decode() for m in [CODECS.search(data[:5000])] if m] + ["cp1252"]:
        if codec.lower() not in (
            "iso-8859-1",
            "iso8859-1",
        ):  # files that say so hold Windows-1252 quotes too
            try:
                return data.decode(codec), codec.lower()
            except (LookupError, UnicodeDecodeError):
                continue
    return data.decode("latin-1"), "latin-1"


# ------------------------------------------------------------------------------------------- header and footer

_GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*)"  # between two words of a marker: it may be broken over lines
_PG = rf"(?:the{_GAP})?(?:copyrighted{_GAP})?proje[ck]t{_GAP}gutenberg"
_TO_STARS = r"(?:(?:(?!\n\n|\*\*\*)[\s\S]){0,400}?\*\*\*+|[^\n]*)"  # the rest of a marker: up to its closing stars
MARKERS = {
    "start": rf"^\W{{0,12}}start{_GAP}of{_GAP}(?:the|this){_GAP}{_PG}{_TO_STARS}",
    "header end": r"^(?:language|character set encoding|edition)\s*:\s*[\w-]+[ \t]*\n(?:[^\n]{0,90}\n){0,4}?[ \t]*\*\*\*[ \t]*$",
    "small print": r"^\W{0,6}(?:start\W{0,4}the\s+small\s+print[^\n]*|the\s+legal\s+small\s+print\W*$)",
    "small print end": r"^\W{0,6}end\W{0,4}the\s+small\s+print(?:[^\n]*\n?[^\n]{0,80}?\*end\*+|[^\n]*)",
    "end": rf"^\W{{0,12}}(?:the{_GAP})?(?:end|ende|fin|fine|slutet|fim|loppu){_GAP}(?:[\w'’]+{_GAP}){{0,5}}?{_PG}",
    "etext end": rf"^\W{{0,12}}end{_GAP}of{_GAP}(?:this|the){_GAP}(?:project{_GAP})?e-?(?:text|book)\b",
    "licence": rf"^\W{{0,6}}(?:start:?\W{{0,3}}full\s+license|the{_GAP}full{_GAP}{_PG}|updated\s+editions\s+will\s+replace)",
}
MARKER = re.compile(
    "|".join(f"(?P<{name.replace(' ', '_')}>{form})" for name, form in MARKERS.items()),
    re.IGNORECASE | re.MULTILINE,
)
# From "Small Print!" to the end of its paragraph; a character of a novel who reads the small print! writes it small.
SMALL_PRINT = re.compile(
    r"^[^\n]*(?-i:SMALL|Small|\*The small)\s+print!(?:[^\n]|\n(?!\n))*",
    re.IGNORECASE | re.MULTILINE,
)
LONGEST_HEADER = (
    20_000  # characters; the longest real one has 13,000 (a licence at the end: 20,000)
)

# Words that no book of the public domain has: a paragraph with one was written for the electronic edition.
EDITORS_WORDS = re.compile(
    rf"{_PG}|gutenberg(?:-tm|™|\.org|\.net|\s+e-?(?:text|book))|\b(?:e-?texts?|ebooks?|etexts?\d*)\b|\bpglaf\b|\bpgdp\b|"
    r"gutenberg\s+proje[ck]t|(?-i:SMALL|Small)\s+(?-i:PRINT|Print)!|distributed\s+proofread|<<this\s+electronic\s+version",
    re.IGNORECASE,
)
# Near the beginning of a book also credits, addresses, header fields and terms of use are taken out.
_VERBS = "Produced Prepared Transcribed Scanned Digitized Digitised Typed Keyed Reformatted Proofed Proofread Reproofed Converted"
_VERBS = [*_VERBS.split(), "Contributed", "HTML version"]
_VERB = "|".join([*_VERBS, *map(str.upper, _VERBS)])
CREDITS = re.compile(
    # capitals and the beginning of a line, for a line of prose may well begin with "produced by"
    rf"^\W*(?:(?i:this|text|e-?text|first)\W+(?:\w+\W+){{0,3}}?)?(?-i:{_VERB})(?::|(?:\s+\w+){{0,3}}?\s+(?:by|BY)\b|\s+from\s+the\b)"
    r"|[^\s@]{1,64}@[^\s@]{1,64}\.\w|https?://|\bwww\.|sharewared|disclaimer\s+of\s+damages|indemnify|tax.deductible|michael\s+s\.?\s+hart|"
    r"right\s+of\s+replacement|limited\s+warranty|donations\s+more\s+than\s+ever|"
    r"world\s+library,?\s+inc|should\s+be\s+named\s+\S+\.(?:txt|zip)|plain\s+vanilla|^\W*(?:disclaimer|indemnity)\W*$|"
    r"^(?:release\s+date|posting\s+date|character\s+set\s+encoding|last\s+updated|most\s+recently\s+updated|credits)\s*:|^language:\s*\w+$",
    re.IGNORECASE | re.MULTILINE,
)
EDGE_PARAGRAPHS = 30
LONGEST_NOTICE = (
    40  # lines; in a longer paragraph (a book without blank lines) only the lines themselves go
)


@dataclass
class Stripped:
    """The book, and what was taken off: counts of characters and the first words of each notice."""

    text: str
    header_chars: int = 0
    footer_chars: int = 0
    notices: list[str] = field(default_factory=list)
    notice_chars: int = 0


def strip_boilerplate(text: str) -> Stripped:
    """The book without what Project Gutenberg put around it. A text that does not come from there is returned whole."""
    text = _without_trailing_blanks(text)
    pieces, opened, closed, marked = (
        [],
        0,
        0,
        False,
    )  # opened: where the piece at hand began, None outside a book
    first = MARKER.search(text)
    head = text[: min(first.start() if first else len(text), LONGEST_HEADER)]
    for m in SMALL_PRINT.finditer(
        head
    ):  # its end has many forms: what counts is where it is last spoken of
        opened = m.end()
    if first is None and not opened and not EDITORS_WORDS.search(head):
        return Stripped(text)
    for m in MARKER.finditer(text):
        if m.lastgroup == "header_end" and marked and opened is not None:
            continue  # three stars below a line that only looks like a header's
        opens = m.lastgroup in ("start", "header_end", "small_print_end")
        is_header = (
            not marked and (opens or m.lastgroup == "small_print") and m.start() <= LONGEST_HEADER
        )
        if opened is not None and not is_header:
            pieces.append((opened, m.start()))
        elif opened is None and not _is_footer(text[closed : m.start()]):
            pieces.append((closed, m.start()))  # a volume that follows without a header of its own
        opened = m.end() if opens else None
        closed, marked = m.end(), True
    if opened is not None:
        pieces.append((opened, len(text)))
    elif not _is_footer(text[closed:]):
        pieces.append((closed, len(text)))
    pieces = [(a, b) for a, b in pieces if text[a:b].strip()]
    notices = []
    books = [_without_notices(text[a:b], notices) for a, b in pieces]
    header = pieces[0][0] if pieces else len(text)
    footer = len(text) - pieces[-1][1] if pieces else 0
    notice_chars = sum(b - a for a, b in pieces) - sum(map(len, books))
    return Stripped("\n\n".join(b for b in books if b), header, footer, notices, notice_chars)


def _is_footer(text: str) -> bool:
    """Whether what follows an end marker is Project Gutenberg's: short, or with its words in every other kilobyte."""
    return len(text) < 3000 or len(EDITORS_WORDS.findall(text)) * 2000 > len(text)


def _without_notices(text: str, notices: list[str]) -> str:
    """The piece without paragraphs about the electronic edition; their first words are added to `notices`."""
    paragraphs = re.split(r"\n\n+", text.strip("\n"))
    kept = []
    for i, paragraph in enumerate(paragraphs):
        n_lines = paragraph.count("\n") + 1
        found = EDITORS_WORDS.search(paragraph) or (
            i < EDGE_PARAGRAPHS and n_lines <= LONGEST_NOTICE // 2 and CREDITS.search(paragraph)
        )
        if found and n_lines > LONGEST_NOTICE:
            lines = paragraph.split("\n")
            ends = list(itertools.accumulate(len(line) + 1 for line in lines))
            gone = set()  # the lines that a match touches: "Project" may end one and "Gutenberg" begin the next
            for m in EDITORS_WORDS.finditer(paragraph):
                gone.update(
                    range(
                        bisect.bisect_right(ends, m.start()), bisect.bisect_right(ends, m.end()) + 1
                    )
                )
            notices += [lines[n].strip()[:80] for n in sorted(gone)]
            paragraph, found = (
                "\n".join(line for n, line in enumerate(lines) if n not in gone),
                None,
            )
        if found:
            notices.append(" ".join(paragraph.split())[:80])
        else:
            kept.append(i)
            paragraphs[i] = paragraph
    # Rebuild from the original gaps, so that the distance between chapters survives.
    gaps = [*re.findall(r"\n\n+", text.strip("\n")), ""]
    return "".join(paragraphs[i] + gaps[i] for i in kept).strip("\n")


def normalise(text: str) -> str:
    """Line ends without trailing blanks, at most two blank lines in a row, none at either end."""
    return re.sub(r"\n{4,}", "\n\n\n", _without_trailing_blanks(text)).strip("\n")


def unwrap(text: str) -> str:
    """
    Prose paragraphs on one line each; verse, tables and titles as they are. Only line breaks become blanks.

    Project Gutenberg breaks lines at about 70 characters. Where a line breaks is noise to a model, and to a byte-level BPE
    a word at the beginning of a line is another token than the same word inside one (docs/benchmarks.md has the figures).
    The rule: every line but the last has 45 characters or more, none after the first is indented, at least a third of
    those begin in lower case (verse begins its lines with capitals), and nothing is set in columns.
    """
    pieces = re.split(r"(\n\n+)", text)
    for i, paragraph in enumerate(pieces):
        first, *rest = paragraph.split("\n")
        long_lines = min(map(len, [first, *rest][:-1]), default=0) >= 45
        if (
            not long_lines
            or any(line[:1].isspace() for line in rest)
            or re.search(r"\S {3,}\S", paragraph)
        ):
            continue
        if 3 * sum(line[:1].islower() for line in rest) >= len(rest):
            pieces[i] = paragraph.replace("\n", " ")
    return "".join(pieces)


def _without_trailing_blanks(text: str) -> str:
    return "\n".join(
        line.rstrip(" \t") for line in text.split("\n")
    )  # the obvious pattern takes minutes on long runs of blanks


# ------------------------------------------------------------------------------ what kind of text, and seen before?

FUNCTION_WORDS = {
    "en": "the and of to in that was his he with it is for had not but",
    "de": "der die und das nicht ich ist zu den ein mit sich auf dem war er",
    "fr": "le la les et des un une dans que qui pas pour est il elle du",
    "it": "il di che la non un per sono una con del era gli della si come",
    "es": "el la de que y en los las por con una no se del su para",
    "pt": "o que de a e do da em um uma os não com para se as",
    "nl": "de het een en van ik te dat niet die is met op zijn hij voor",
    "pl": "i w nie na się to że z do jest jak po co ale był tak",
    "sv": "och att det som en på är av för med den till var inte han jag",
    "da": "og det at en den til er som på de med han af for ikke der",
    "fi": "ja on ei hän se oli että kun mutta niin kuin ole minä joka sen jo",
    "la": "et in est non ut cum ad quod sed qui si ex quae per sunt nec",
    "eo": "la kaj de en al estas ne mi por ke kun li estis pri oni sed",
    "tl": "ang ng sa mga na at si ay ni ko kay niya siya hindi ito kung",
    "hu": "a az és nem hogy egy is de volt meg csak van már el ezt mint",
}
LANGUAGE_NAMES = {
    "english": "en", "german": "de", "french": "fr", "italian": "it", "spanish": "es", "portuguese": "pt", "dutch": "nl",
    "polish": "pl", "swedish": "sv", "danish": "da", "finnish": "fi", "latin": "la", "esperanto": "eo", "tagalog": "tl",
    "hungarian": "hu", "chinese": "zh", "japanese": "ja", "russian": "ru", "greek": "el", "czech": "cs", "norwegian": "no",
}  # fmt: skip
SCRIPTS = {
    "ru": r"[\u0400-\u04ff]",
    "el": r"[\u0370-\u03ff]",
    "he": r"[\u0590-\u05ff]",
    "ar": r"[\u0600-\u06ff]",
    "zh": r"[\u3400-\u9fff]",
}


def language_of(text: str, raw: str = "") -> str:
    """
    ISO 639-1 code of a text, or "und" where the rule cannot tell.

    The rule: of 16 frequent function words per language, the language whose words are most frequent in the first
    200,000 characters, if they are at least 8 in 100 words; letters of another script decide first. Below that the
    header field `Language:` of the raw file. (The field is not asked first: it is missing before 2000.)
    """
    sample = text[:200_000].lower()
    n_letters = max(sum(map(str.isalpha, sample)), 1)
    for code, letters in SCRIPTS.items():
        if len(re.findall(letters, sample)) > 0.3 * n_letters:
            return code
    words = re.findall(r"[^\W\d_]+", sample)
    counts = {
        code: sum(map(set(listed.split()).__contains__, words))
        for code, listed in FUNCTION_WORDS.items()
    }
    best = max(counts, key=counts.get)
    if counts[best] >= 0.08 * max(len(words), 1):
        return best
    field_ = re.search(r"(?im)^language:\s*(\w+)", raw[:10_000])
    return LANGUAGE_NAMES.get(field_[1].lower(), field_[1].lower()) if field_ else "und"


def why_no_book(text: str) -> str | None:
    """Why this is no book, or None. Listings and tables are mostly digits and signs; prose and verse are letters."""
    if len(text) < 500:
        return f"only {len(text)} characters of text"
    sample = "".join(text[:200_000].split())
    share = sum(map(str.isalpha, sample)) / max(len(sample), 1)
    marks = len(
        re.findall(r"[\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0900-\u0dff\u0e00-\u0eff]", sample)
    ) / max(len(sample), 1)
    return f"only {share:.0%} of its characters are letters" if share + marks < 0.6 else None


SKETCH_SIZE = 256


def sketch(text: str) -> np.ndarray:
    """
    The SKETCH_SIZE smallest hashes of the text's runs of five words, sorted, uint64.

    The share that two sketches have in common estimates how much of the texts is the same; case, punctuation and line
    breaks do not matter. Source: Broder 1997, "On the resemblance and containment of documents".
    """
    words = " ".join(re.findall(r"[^\W_]+", text.lower())).encode().split()
    words = np.fromiter(map(zlib.crc32, words), dtype=np.uint64)
    runs = words[: max(len(words) - 4, 0)].copy()
    with np.errstate(over="ignore"):
        for i in range(1, 5):
            runs = (runs ^ words[i : len(words) - 4 + i]) * np.uint64(0x9E3779B97F4A7C15)
            runs ^= runs >> np.uint64(29)
    return np.unique(
        np.partition(runs, SKETCH_SIZE * 4)[: SKETCH_SIZE * 4]
        if len(runs) > SKETCH_SIZE * 4
        else runs
    )[:SKETCH_SIZE]


def resemblance(a: np.ndarray, b: np.ndarray) -> float:
    """Estimated share, 0 to 1, of five-word runs that two sketched texts have in common (Jaccard)."""
    union = np.union1d(a, b)[:SKETCH_SIZE]
    return float(np.isin(union, np.intersect1d(a, b)).mean()) if len(union) else 0.0


class Editions:
    """
    Remembers the books kept so far and tells whether one more is an edition of one of them.

    Holds 2 KB per book and finds candidates by their 16 smallest hashes, so tens of thousands of books are no burden.
    """

    def __init__(self, alike: float = 0.6):
        self.alike = alike  # different books share almost no five-word runs; editions of one share most of them
        self._sketches: dict[str, np.ndarray] = {}
        self._first_with: dict[int, str] = {}

    def twin_of(self, mine: np.ndarray) -> tuple[str, float] | None:
        """(name, resemblance) of a kept book that is the same, or None."""
        candidates = dict.fromkeys(
            self._first_with[h] for h in mine[:16].tolist() if h in self._first_with
        )
        found = [(name, resemblance(mine, self._sketches[name])) for name in candidates]
        best = max(found, key=lambda pair: pair[1], default=None)
        return best if best and best[1] >= self.alike else None

    def add(self, name: str, mine: np.ndarray) -> None:
        """Remember a kept book."""
        self._sketches[name] = mine
        for h in mine[:16].tolist():
            self._first_with.setdefault(h, name)
