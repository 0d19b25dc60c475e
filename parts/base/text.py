"""Constants of text: the end of a document, the passages of a book, the characters of bytes."""

from __future__ import annotations

import re

EOT = "<|endoftext|>"  # ends a document: one special token, or a line of its own in a text file


# special tokens that end a document, the first of these that a vocabulary has
DOCUMENT_ENDS = (EOT, "</s>", "<eos>", "<|end_of_text|>")


JOINERS = "\u200c\u200d"  # invisible, but a part of Persian words and of emoji


def without_surrogates(text: str) -> str:
    """The text with each lone surrogate, which UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def one_line(text, most: int | None = None) -> str:
    """
    The text in one line of at most `most` characters and "...", as a terminal may show it.

    For what a file says about itself: control characters, which could move the cursor or change
    the title of the window, are shown as \\x1b, and so are those that reverse the direction.
    """
    shown, n_chars = [], 0
    for c in " ".join(str(text).split()):
        plain = c.isprintable() or c in JOINERS
        shown.append(c if plain else c.encode("unicode_escape").decode())
        n_chars += len(shown[-1])
        if most and n_chars > most:
            return "".join(shown[:-1]).rstrip() + "..."
    return "".join(shown)


def passage_pattern(n_chars: int) -> re.Pattern:
    """
    Pattern whose findall() cuts a text into passages that, joined, are the text again.

    A passage has n_chars characters and runs on to the next blank line, or to the end of the line
    if there is none within another n_chars. Training and validation text are divided by passage.
    """
    return re.compile(rf"[\s\S]{{{n_chars}}}(?:[\s\S]{{0,{n_chars}}}?\n\n+|[^\n]*\n)?|[\s\S]+\Z")


def _byte_to_char() -> dict[int, str]:
    """
    The printable character that GPT-2's files have for each byte, in GPT-2's order of bytes.

    It is the byte's own character if that is visible, else number 256 + n for the n-th other byte.
    """
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + n) for n, b in enumerate(hidden)}}


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
