"""
Texts of large XML files that need not be well-formed, and Wikipedia's markup.

    with open_text(path) as (file, head):
        texts = XmlTexts(file, encoding_of(head)[0])
        for text in texts: ...            # of each <text> or <Text>; then texts.n_unfinished
    without_markup(text)                  # of a Wikipedia article

Half of the files of the Abu El-Khair corpus are not well-formed (wrong end tags, control
characters), so an XML parser stops in them. Only <text> elements are looked for here, and what is
broken elsewhere does not matter. 200 MB of a Wikipedia dump take 20 MB of memory.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import html
import re
import zlib
from pathlib import Path

from parts.base.text import one_line
from recipes.arabic_bert.arabic_text import to_arabic

CHUNK = 1 << 18  # bytes read at once
HEAD = 1 << 18  # bytes by which the encoding is recognised
MAX_TEXT_CHARS = 1 << 22  # a longer text is skipped and counted: a missing end tag, in practice
MAX_TAG_CHARS = 1 << 12
DAMAGED = (OSError, EOFError, zlib.error)  # raised in the middle of a .bz2 or .gz file
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARED = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)""")
_OPEN = re.compile(r"<text(?:\s[^<>]*?)?(/?)>", re.IGNORECASE)
_CLOSE = re.compile(r"</text\s*>", re.IGNORECASE)
_NAMESPACE = re.compile(r"<ns>\s*(-?\d+)\s*<")


# ---------------------------------------------------------------------------------- encodings


@contextlib.contextmanager
def open_text(path):
    """(binary file of what is in a file, .bz2 and .gz unpacked on the way, its first bytes)."""
    path = Path(path)
    opener = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    with opener(path, "rb") as file:
        head = b""
        with contextlib.suppress(*DAMAGED):  # raised again by whoever reads on
            while len(head) < HEAD and (piece := file.read1(HEAD)):
                head += piece
        file.seek(0)
        yield file, head


def encoding_of(head: bytes) -> tuple[str, str | None]:
    """
    (encoding of a file, from its first bytes; what is wrong with its declaration, or None).

    A byte-order mark decides, then whether the bytes are UTF-8, then the XML declaration;
    windows-1256 if none of these fits.
    """
    for bom, name in _BOMS:
        if head.startswith(bom):
            return name, None
    found = _DECLARED.search(head[:1024])
    declared = found[1].decode() if found else None
    known = _lookup(declared)
    n_bad, n_good = _utf8_characters(head)
    if n_good > n_bad:
        actual = "utf-8"
    elif known in (None, "utf-8"):
        actual = "cp1256" if n_bad else "utf-8"
    else:
        actual = known
    if declared and known is None:
        return actual, f"declares the unknown encoding {one_line(declared, 30)}, read as {actual}"
    if known and known != actual and not (known == "ascii" or n_good == n_bad == 0):
        return actual, f"declares {one_line(declared, 30)}, but is {actual}"
    return (known or actual) if n_good == n_bad == 0 else actual, None


def _lookup(name: str | None) -> str | None:
    """Python's name of a text encoding, None if it has none."""
    try:
        info = codecs.lookup(name or "")
    except LookupError:
        return None
    return info.name if info._is_text_encoding else None


def _utf8_characters(head: bytes) -> tuple[int, int]:
    """(bytes that are not UTF-8, characters of several bytes), the last character left out."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(head)
    n_other = sum(c > "\x7f" for c in text)
    n_bad = text.count("\ufffd")
    return n_bad, n_other - n_bad


# ---------------------------------------------------------------------------------- <text>


class XmlTexts:
    """
    The contents of the <text> elements of a binary file, in order, entities replaced.

    n_articles counts them all; n_unfinished those without an end tag and n_too_long those of more
    than MAX_TEXT_CHARS, which are not yielded. `namespace` is the number that MediaWiki gives the
    page of the last text, 0 for articles; None in other files.
    """

    def __init__(self, file, encoding: str):
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self.n_articles = 0
        self.n_unfinished = 0
        self.n_too_long = 0
        self.namespace = None
        self._next_namespace = None
        self._is_empty = False  # <text/>
        self._buffer = ""
        self._at = 0  # how much of it is done with
        self._at_end = False

    def _read(self) -> None:
        chunk = self._file.read1(CHUNK)  # read() loses what is before the damage in a .bz2
        self._at_end = not chunk
        self._buffer = self._buffer[self._at :] + self._decoder.decode(chunk, final=self._at_end)
        self._at = 0

    def __iter__(self):
        while self._find_open():
            text = self._find_close()
            if text is not None:
                self.namespace, self._next_namespace = self._next_namespace, None
                yield text

    def _find_open(self) -> bool:
        """Move into the next text; False if there is none."""
        while True:
            found = _OPEN.search(self._buffer, self._at)
            end = found.start() if found else len(self._buffer)
            if numbers := _NAMESPACE.findall(self._buffer, self._at, end):
                self._next_namespace = int(numbers[-1])
            if found:
                self.n_articles += 1
                self._is_empty = bool(found[1])
                self._at = found.end()
                return True
            if self._at_end:
                return False
            tag = self._buffer.rfind("<", self._at)  # may be half of the tag, or of <ns>
            is_tag = tag >= 0 and len(self._buffer) - tag < MAX_TAG_CHARS
            self._at = tag if is_tag else len(self._buffer)
            self._read()

    def _find_close(self) -> str | None:
        """The text up to its end tag, None if there is no such text."""
        if self._is_empty:
            return ""
        searched = self._at
        is_too_long = False
        while not (found := _CLOSE.search(self._buffer, searched)):
            if self._at_end:
                self.n_unfinished += 1
                self._at = len(self._buffer)
                return None
            if len(self._buffer) - self._at > MAX_TEXT_CHARS:
                is_too_long = True
                self._at = len(self._buffer) - MAX_TAG_CHARS
            searched = max(len(self._buffer) - self._at - MAX_TAG_CHARS, 0)
            self._read()
        text = self._buffer[self._at : found.start()]
        self._at = found.end()
        if is_too_long or len(text) > MAX_TEXT_CHARS:
            self.n_too_long += 1
            return None
        unfinished = list(_OPEN.finditer(text))  # further texts begin in it: it had no end tag
        if unfinished:
            self.n_articles += len(unfinished)
            self.n_unfinished += len(unfinished)
            text = text[unfinished[-1].end() :]
        return _content(text)


def _content(text: str) -> str:
    stripped = text.strip()
    if stripped.startswith("<![CDATA[") and stripped.endswith("]]>"):
        return stripped[9:-3]
    return html.unescape(text)


# ---------------------------------------------------------------------------------- wiki markup

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_NO_PROSE = "ref|math|chem|gallery|timeline|syntaxhighlight|source|code|pre|score|imagemap|table"
_ELEMENT_TAG = re.compile(rf"<(/?)({_NO_PROSE})\b[^<>]*?(/?)>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][a-z0-9]*\b[^<>]{0,2000}>", re.IGNORECASE)
_BRACKETS = re.compile(r"\{\{|\}\}|\{\||\|\}(?!\})|\[\[|\]\]")
_OPENER = {"}}": "{{", "|}": "{|", "]]": "[["}
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]{0,1000}+\s{0,9}+([^\]\n]{0,1000}+)\]")
_URL = re.compile(r"(?:https?|ftp)://[^\s<>\[\]|]+")
_LINE_START = re.compile(r"^[*#:; ]+|^-{4,}", re.MULTILINE)
_HEADING = re.compile(r"^=+[ \t]*(.*?)[ \t]*=+[ \t]*$", re.MULTILINE)
_MAGIC_WORD = re.compile(r"__[^\W\d_]{3,30}__")
_REDIRECT = re.compile(rf"\s*#\s*(?:redirect|{to_arabic('tHwyl')})\b", re.IGNORECASE)
_OTHER_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*$")
_NO_TEXT_LINKS = frozenset(
    (*map(to_arabic, ("mlf", "Swrp", "tSnyf", "wsA}T")), "file", "image", "category", "media")
)


def is_redirect(text: str) -> bool:
    """Whether a Wikipedia article only names another one."""
    return _REDIRECT.match(text) is not None


def without_markup(text: str) -> str:
    """
    The prose of a Wikipedia article: links become their text; templates, tables, references,
    pictures, categories, formulas and code are removed. Linear in time, also for odd brackets.
    """
    text = _COMMENT.sub("", text)
    text = _without_elements(text)
    text = _without_brackets(text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = _URL.sub("", text)
    text = re.sub("'{2,}", "", text)
    text = _HEADING.sub(r"\1", text)
    text = _LINE_START.sub("", text)
    text = _MAGIC_WORD.sub("", text)
    return html.unescape(text).strip()  # &nbsp; is written &amp;nbsp; in the dump


def _without_elements(text: str) -> str:
    """The text without the elements that are no prose; a tag without its partner is removed."""
    tags = list(_ELEMENT_TAG.finditer(text))
    end_of = {}  # number of an opening tag -> number of its end tag
    nearest = {}  # name -> number of the next end tag
    for i in reversed(range(len(tags))):
        name = tags[i][2].lower()
        if tags[i][1]:
            nearest[name] = i
        elif not tags[i][3] and name in nearest:
            end_of[i] = nearest[name]
    parts = []
    start = i = 0
    while i < len(tags):
        parts.append(text[start : tags[i].start()])
        i = end_of.get(i, i)
        start = tags[i].end()
        i += 1
    return "".join([*parts, text[start:]])


def _without_brackets(text: str) -> str:
    """The text without templates and tables, with the text of links."""
    stack = [("", [])]  # (opening bracket, what is in it so far)
    n_open = dict.fromkeys(_OPENER.values(), 0)
    start = 0
    for found in _BRACKETS.finditer(text):
        bracket = found[0]
        stack[-1][1].append(text[start : found.start()])
        start = found.end()
        if bracket in n_open:
            stack.append((bracket, []))
            n_open[bracket] += 1
        elif n_open[_OPENER[bracket]]:
            while True:
                opener, inside = stack.pop()
                n_open[opener] -= 1
                if opener == _OPENER[bracket]:
                    break
                stack[-1][1].extend(inside)  # has no end; its bracket is left out
            if opener == "[[":
                stack[-1][1].append(_link_text("".join(inside)))
    stack[-1][1].append(text[start:])
    return "".join(part for _, parts in stack for part in parts)


def _link_text(link: str) -> str:
    target, _, rest = link.partition("|")
    prefix = target.partition(":")[0].strip() if ":" in target else ""
    if prefix.lower() in _NO_TEXT_LINKS or _OTHER_LANGUAGE.match(prefix):
        return ""
    return rest.rpartition("|")[2] or target.lstrip(":")
