"""
Clean one Project Gutenberg book: no header, licence, small print, credits and footer.

The files were made by hand over fifty years, so no single form of marker is trusted. Markers are
searched in the whole file and read in order:

    1991-2004        *END*THE SMALL PRINT! ...  before the book, or, from 2002 on, after it
    2002 and later   *** START OF THE PROJECT GUTENBERG EBOOK ... ***  and  *** END OF ..., also
                     over two lines
    any year         End of the Project Gutenberg Etext of ...  (or no footer at all)

The text between an opening marker and the next closing one is the book. Then paragraphs that only
an editor of Project Gutenberg can have written are removed: they speak of "etexts" or of Project
Gutenberg, or say "Produced by" near the beginning. The forms of markers were collected from the
books themselves; the licence is at https://www.gutenberg.org/license.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import re
from dataclasses import dataclass, field

from parts.data.readers import why_binary

# ------------------------------------------------------------------------------------ bytes to text

DECLARED = re.compile(rb"(?im)^character set encoding:[ \t]*(?:unicode[ \t]+)?([a-z][\w-]*)")
CODECS = re.compile(r"(?:iso-?8859|windows|cp|koi8|mac|big5|gb|shift|euc|iso-2022)[\w-]*")
UTF_8_NAMES = ("utf-8", "utf8")
LATIN_1_NAMES = ("iso-8859-1", "iso8859-1")
# CR LF, and what is left of it after more than one conversion; LF, CR, next line, line separator
LINE_END = re.compile(r"\r*\n|[\r\x85\u2028]")
# a page break between two lines; one on a line of its own, or at the end of a line, adds nothing
PAGE_BREAK = re.compile(r"(?<=[^\n])[\x0b\x0c]+(?=[^\n])")


def decode(data: bytes) -> tuple[str, str, int]:
    """
    (text with "\\n" line ends, name of the encoding, number of bytes replaced) of a file.

    Tries a byte order mark, UTF-8, the encoding that the header declares, then Windows-1252
    (Latin-1 with curly quotes). A few invalid bytes, such as those of a character that was cut in
    two, do not rule an encoding out: they become U+FFFD. Raises ValueError for binary data.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text, name = data.decode("utf-16", errors="replace"), "utf-16"
        n_replaced = len(data) - len(data.decode("utf-16", errors="ignore").encode("utf-16"))
    elif b"\0" in data:
        raise ValueError(why_binary(data[:4096]))
    else:
        text, name, n_replaced = _decode_8bit(data)
    text = LINE_END.sub("\n", text.removeprefix("\ufeff")).replace("\u2029", "\n\n")
    text = PAGE_BREAK.sub("\n", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text), name, n_replaced


def _decode_8bit(data: bytes) -> tuple[str, str, int]:
    if data.isascii():
        return data.decode("ascii"), "ascii", 0
    match = DECLARED.search(data[:5000])
    declared = match[1].decode().lower() if match else ""
    text = data.decode("utf-8", errors="replace")
    n_invalid = text.count("\ufffd") - data.count("\ufffd".encode())  # sequences, not bytes
    n_valid = _n_non_ascii(text) - n_invalid
    has_mark = data.startswith(b"\xef\xbb\xbf")
    # a file with a wrong header has no valid sequence, a file with one accent may have lost it
    says_so = declared in UTF_8_NAMES and (n_valid > 0 or n_invalid == 1)
    # an invalid sequence at the end says nothing: there the file was cut
    if has_mark or says_so or n_valid > n_invalid - text.endswith("\ufffd"):
        n_replaced = len(data) - len(data.decode("utf-8", errors="ignore").encode())
        return text, "utf-8-sig" if has_mark else "utf-8", n_replaced
    if CODECS.fullmatch(declared) and declared not in LATIN_1_NAMES:
        with contextlib.suppress(LookupError):
            text = data.decode(declared, errors="replace")
            n_replaced = text.count("\ufffd")
            if _n_non_ascii(text) > 2 * n_replaced:
                return text, declared, n_replaced
    # also for files that declare Latin-1: they have Windows-1252 quotes, too
    text = data.decode("cp1252", errors="replace")
    return text, "cp1252", text.count("\ufffd")


def _n_non_ascii(text: str) -> int:
    return len(text) - len(text.encode("ascii", errors="ignore"))


# ------------------------------------------------------------------------------------ markers

# between two words of a marker, which may be broken over lines
_GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*)"
_PG = rf"(?:the{_GAP})?(?:copyrighted{_GAP})?proje[ck]t{_GAP}gutenberg"
# the rest of a marker, up to its closing stars
_TO_STARS = r"(?:(?:(?!\n\n|\*\*\*)[\s\S]){0,400}?\*\*\*+|[^\n]*)"
MARKERS = {
    "start": rf"^\W{{0,12}}start{_GAP}of{_GAP}(?:the|this){_GAP}{_PG}{_TO_STARS}",
    "header_end": (
        r"^(?:language|character set encoding|edition)\s*:\s*[\w-]+[ \t]*\n"
        r"(?:[^\n]{0,90}\n){0,4}?[ \t]*\*\*\*[ \t]*$"
    ),
    "small_print": (
        r"^\W{0,6}(?:start\W{0,4}the\s+small\s+print[^\n]*|the\s+legal\s+small\s+print\W*$)"
    ),
    "small_print_end": (
        r"^\W{0,6}end\W{0,4}the\s+small\s+print(?:[^\n]*\n?[^\n]{0,80}?\*end\*+|[^\n]*)"
    ),
    "end": (
        rf"^\W{{0,12}}(?:the{_GAP})?(?:end|ende|fin|fine|slutet|fim|loppu){_GAP}"
        rf"(?:[\w'’]+{_GAP}){{0,5}}?{_PG}"
    ),
    "etext_end": (
        rf"^\W{{0,12}}end{_GAP}of{_GAP}(?:this|the){_GAP}(?:project{_GAP})?e-?(?:text|book)\b"
    ),
    "licence": (
        rf"^\W{{0,6}}(?:start:?\W{{0,3}}full\s+license|the{_GAP}full{_GAP}{_PG}"
        r"|updated\s+editions\s+will\s+replace)"
    ),
}
MARKER = re.compile(
    "|".join(f"(?P<{name}>{form})" for name, form in MARKERS.items()),
    re.IGNORECASE | re.MULTILINE,
)
# From "Small Print!" to the end of its paragraph. Lower case does not count: a character of a novel
# may read the small print!
SMALL_PRINT = re.compile(
    r"^[^\n]*(?-i:SMALL|Small|\*The small)\s+print!(?:[^\n]|\n(?!\n))*",
    re.IGNORECASE | re.MULTILINE,
)
# Characters. The longest real header has 13,000 (a licence at the end: 20,000).
LONGEST_HEADER = 20_000

# Words that no book of the public domain has: a paragraph with one is about the electronic edition.
EDITORS_WORDS = re.compile(
    rf"{_PG}|gutenberg(?:-tm|™|\.org|\.net|\s+e-?(?:text|book))"
    r"|\b(?:e-?texts?|ebooks?|etexts?\d*)\b|\bpglaf\b|\bpgdp\b|gutenberg\s+proje[ck]t"
    r"|(?-i:SMALL|Small)\s+(?-i:PRINT|Print)!|distributed\s+proofread"
    r"|<<this\s+electronic\s+version",
    re.IGNORECASE,
)
# Near the beginning of a book, credits, addresses, header fields and terms of use are removed, too.
_VERBS = (
    "Produced Prepared Transcribed Scanned Digitized Digitised Typed Keyed Reformatted Proofed "
    "Proofread Reproofed Converted Contributed"
).split()
_VERBS.append("HTML version")
_VERB = "|".join([*_VERBS, *map(str.upper, _VERBS)])
CREDITS = re.compile(
    # capitals and the start of a line, because a line of prose may begin with "produced by"
    rf"^\W*(?:(?i:this|text|e-?text|first)\W+(?:\w+\W+){{0,3}}?)?(?-i:{_VERB})"
    r"(?::|(?:\s+\w+){0,3}?\s+(?:by|BY)\b|\s+from\s+the\b)"
    r"|[^\s@]{1,64}@[^\s@]{1,64}\.\w|https?://|\bwww\.|sharewared|disclaimer\s+of\s+damages"
    r"|indemnify|tax.deductible|michael\s+s\.?\s+hart|right\s+of\s+replacement"
    r"|limited\s+warranty|donations\s+more\s+than\s+ever|world\s+library,?\s+inc"
    r"|should\s+be\s+named\s+\S+\.(?:txt|zip)|plain\s+vanilla|^\W*(?:disclaimer|indemnity)\W*$"
    r"|^(?:release\s+date|posting\s+date|character\s+set\s+encoding|last\s+updated"
    r"|most\s+recently\s+updated|credits)\s*:|^language:\s*\w+$",
    re.IGNORECASE | re.MULTILINE,
)
# Near the beginning, too: short notices about the file, not the book. Its character set, accents it
# has lost, marks for italics, and notes that say whose they are. (The heading of a longer note has
# no text in its paragraph, and stays with the note.)
ABOUT_THE_FILE = re.compile(
    r"\b(?:[78][\s-]?|(?:seven|eight)-)bit\s+(?:\w+\s+){0,2}?"
    r"(?:ascii|version|edition|characters?|text|file|format)\b"
    r"|\b(?:ascii|iso-?8859-\d+|latin-?1|utf-?8|unicode|html)\W+(?:\w+\W+){0,2}?"
    r"(?:version|edition|file|format|text|characters?)\b"
    r"|\bthis\s+electronic\s+(?:version|edition|text)\b"
    # "[accents removed]"; without brackets or "Note:" this may be a sentence of a philologist
    r"|\A\s*(?:[\[(*]|note\b)[^\]]{0,60}?\b(?:accents|accented\s+\w+|diacritic\w*|umlauts)\s+"
    r"(?:\w+\s+){0,3}?(?:removed|omitted|dropped|stripped|replaced)\b"
    r"|\bitalics?\b[^.]{0,80}\b(?:by|with|within|between|in)\W+underscores?\b"
    r"|\A\W*transcriber\W?s?\W?\s+notes?\W+\w",
    re.IGNORECASE,
)
LONGEST_ABOUT_THE_FILE = 6  # lines
EDGE_PARAGRAPHS = 30  # "near the beginning"
# Lines. From a longer paragraph (a book without blank lines) only the lines that match are removed.
LONGEST_NOTICE = 40


# ------------------------------------------------------------------------------------ cleaning


@dataclass
class Stripped:
    """The book and what was removed: counts of characters, and the first words of each notice."""

    text: str
    header_chars: int = 0
    footer_chars: int = 0
    notices: list[str] = field(default_factory=list)
    notice_chars: int = 0


def strip_boilerplate(text: str) -> Stripped:
    """
    The book without what Project Gutenberg put around it.

    A text that does not come from there is returned whole.
    """
    text = _without_trailing_blanks(text)
    first = MARKER.search(text)
    head = text[: min(first.start() if first else len(text), LONGEST_HEADER)]
    small_print = list(SMALL_PRINT.finditer(head))
    if first is None and not small_print and not EDITORS_WORDS.search(head):
        return Stripped(text)
    # the end of the small print has many forms: what counts is where it is mentioned last
    opened = small_print[-1].end() if small_print else 0
    pieces = [(a, b) for a, b in _pieces_of_book(text, opened) if text[a:b].strip()]
    notices = []
    books = [_without_notices(text[a:b], notices) for a, b in pieces]
    header = pieces[0][0] if pieces else len(text)
    footer = len(text) - pieces[-1][1] if pieces else 0
    notice_chars = sum(b - a for a, b in pieces) - sum(map(len, books))
    return Stripped("\n\n".join(b for b in books if b), header, footer, notices, notice_chars)


def _pieces_of_book(text: str, opened: int | None) -> list[tuple[int, int]]:
    """
    (start, end) of each piece between an opening and a closing marker.

    opened: where the current piece starts, None outside the book.
    """
    pieces = []
    closed = 0  # end of the last marker
    is_first = True
    for m in MARKER.finditer(text):
        if m.lastgroup == "header_end" and not is_first and opened is not None:
            continue  # three stars below a line that only looks like a header's
        opens = m.lastgroup in ("start", "header_end", "small_print_end")
        in_header = is_first and m.start() <= LONGEST_HEADER
        if opened is not None and not (in_header and (opens or m.lastgroup == "small_print")):
            pieces.append((opened, m.start()))
        elif opened is None and not _is_footer(text[closed : m.start()]):
            pieces.append((closed, m.start()))  # a volume without a header of its own
        opened = m.end() if opens else None
        closed = m.end()
        is_first = False
    if opened is not None:
        pieces.append((opened, len(text)))
    elif not _is_footer(text[closed:]):
        pieces.append((closed, len(text)))
    return pieces


def _is_footer(text: str) -> bool:
    """
    Whether the text after an end marker is Project Gutenberg's.

    It is short, or has one of the editors' words in every other kilobyte.
    """
    return len(text) < 3000 or len(EDITORS_WORDS.findall(text)) * 2000 > len(text)


def _without_notices(text: str, notices: list[str]) -> str:
    """The piece without paragraphs about the electronic edition; appends the start of each."""
    text = text.strip("\n")
    paragraphs = re.split(r"\n\n+", text)
    gaps = [*re.findall(r"\n\n+", text), ""]  # so that the distance between chapters survives
    kept = []
    for i, (paragraph, gap) in enumerate(zip(paragraphs, gaps, strict=True)):
        n_lines = paragraph.count("\n") + 1
        is_notice = EDITORS_WORDS.search(paragraph)
        if i < EDGE_PARAGRAPHS and n_lines <= LONGEST_NOTICE // 2:
            is_notice = is_notice or CREDITS.search(paragraph)
        if i < EDGE_PARAGRAPHS and n_lines <= LONGEST_ABOUT_THE_FILE:
            is_notice = is_notice or ABOUT_THE_FILE.search(paragraph)
        if is_notice and n_lines > LONGEST_NOTICE:
            kept.append(_without_lines_of_notices(paragraph, notices) + gap)
        elif is_notice:
            notices.append(" ".join(paragraph.split())[:80])
        else:
            kept.append(paragraph + gap)
    return "".join(kept).strip("\n")


def _without_lines_of_notices(paragraph: str, notices: list[str]) -> str:
    """A long paragraph without the lines of each match; a match may reach into the next line."""
    lines = paragraph.split("\n")
    ends = list(itertools.accumulate(len(line) + 1 for line in lines))
    touched = set()
    for m in EDITORS_WORDS.finditer(paragraph):
        first, last = bisect.bisect_right(ends, m.start()), bisect.bisect_right(ends, m.end())
        touched.update(range(first, last + 1))
    notices += [lines[n].strip()[:80] for n in sorted(touched)]
    return "\n".join(line for n, line in enumerate(lines) if n not in touched)


def normalise(text: str) -> str:
    """The text without trailing blanks, with at most two blank lines in a row, none at its ends."""
    return re.sub(r"\n{4,}", "\n\n\n", _without_trailing_blanks(text)).strip("\n")


def unwrap(text: str) -> str:
    """
    Prose paragraphs on one line each; verse, tables and titles are unchanged.

    Project Gutenberg breaks lines at about 70 characters. Line breaks are noise to a model, and to
    a byte-level BPE a word at the start of a line is another token than the same word inside one
    (figures in docs/benchmarks.md). A paragraph is prose if every line but the last has at least 45
    characters, none after the first is indented, a third of those start in lower case (verse starts
    its lines with capitals), and nothing is set in columns.
    """
    pieces = re.split(r"(\n\n+)", text)
    for i, paragraph in enumerate(pieces):
        first, *rest = paragraph.split("\n")
        is_long = min(map(len, [first, *rest][:-1]), default=0) >= 45
        is_indented = any(line[:1].isspace() for line in rest)
        if not is_long or is_indented or re.search(r"\S {3,}\S", paragraph):
            continue
        n_lower_case = sum(line[:1].islower() for line in rest)
        if 3 * n_lower_case >= len(rest):
            pieces[i] = paragraph.replace("\n", " ")
    return "".join(pieces)


def _without_trailing_blanks(text: str) -> str:
    # a regular expression takes minutes on long runs of blanks
    return "\n".join(line.rstrip(" \t") for line in text.split("\n"))


# ------------------------------------------------------------------------------------ kind of text

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
    "english": "en", "german": "de", "french": "fr", "italian": "it", "spanish": "es",
    "portuguese": "pt", "dutch": "nl", "polish": "pl", "swedish": "sv", "danish": "da",
    "finnish": "fi", "latin": "la", "esperanto": "eo", "tagalog": "tl", "hungarian": "hu",
    "chinese": "zh", "japanese": "ja", "russian": "ru", "greek": "el", "czech": "cs",
    "norwegian": "no",
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
    ISO 639-1 code of a text, or "und" if it cannot be determined.

    Letters of another script decide first. Then the language whose 16 function words are most
    frequent in the first 200,000 characters, if they are at least 8 of 100 words. Then the header
    field `Language:` of the raw file, which is missing before 2000.
    """
    sample = text[:200_000].lower()
    n_letters = max(sum(map(str.isalpha, sample)), 1)
    for code, letters in SCRIPTS.items():
        if len(re.findall(letters, sample)) > 0.3 * n_letters:
            return code
    words = re.findall(r"[^\W\d_]+", sample)
    counts = {}
    for code, function_words in FUNCTION_WORDS.items():
        counts[code] = sum(map(set(function_words.split()).__contains__, words))
    best = max(counts, key=counts.get)
    if counts[best] >= 0.08 * max(len(words), 1):
        return best
    declared = re.search(r"(?im)^language:\s*(\w+)", raw[:10_000])
    if declared is None:
        return "und"
    name = declared[1].lower()
    return LANGUAGE_NAMES.get(name, name)


# combining marks: parts of letters that str.isalpha does not count
MARKS = re.compile(r"[\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0900-\u0dff\u0e00-\u0eff]")


# How a file begins that is not plain text, after blanks and comments
OTHER_FORMATS = {
    "an HTML page": re.compile(
        r"(?:\s|<!--[\s\S]*?-->|<\?xml[^>]*>)*+<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE
    ),
    "an XML file": re.compile(r"\s*<\?xml\b"),
    "an RTF file": re.compile(r"\s*\{\\rtf\d"),
    "a PDF file": re.compile(r"\s*%PDF-\d"),
}
# Tags of a page's structure. <i> and <b> are left out: volunteers mark italics with them.
TAG = re.compile(
    r"</?(?:p|div|span|br|hr|h[1-6]|a|img|table|tr|td|th|ul|ol|li|link|meta|script|pre)"
    r"(?:\s[^<>]{0,300})?/?>",
    re.IGNORECASE,
)


def why_no_text(raw: str) -> str | None:
    """
    Why a file is not plain text but, for example, a saved web page; None if it is.

    A page without a head is known by its tags: two in a thousand characters, and ten at least. A
    book that mentions a few tags is text.
    """
    for kind, beginning in OTHER_FORMATS.items():
        if beginning.match(raw):
            return f"{kind}, not plain text; save it as plain text"
    n_tags = sum(1 for _ in TAG.finditer(raw[:200_000]))
    if n_tags >= 10 and n_tags * 500 >= len(raw[:200_000]):
        return f"a page of HTML without its head ({n_tags} tags), not plain text"
    return None


def why_no_book(text: str) -> str | None:
    """Why this is no book, or None. Listings and tables are mostly digits and signs, no letters."""
    if len(text) < 500:
        return f"only {len(text)} characters of text"
    sample = "".join(text[:200_000].split())
    share = sum(map(str.isalpha, sample)) / max(len(sample), 1)
    share_of_marks = len(MARKS.findall(sample)) / max(len(sample), 1)
    if share + share_of_marks < 0.6:
        return f"only {share:.0%} of its characters are letters"
    return None
