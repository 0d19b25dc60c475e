"""Constants of the text format: the end of a document, and where a book is cut into passages."""

from __future__ import annotations

import re

EOT = "<|endoftext|>"  # ends a document: one special token, or a line of its own in a text file


def passage_pattern(n_chars: int) -> re.Pattern:
    """
    Pattern whose findall() cuts a text into passages that, joined, are the text again.

    A passage has n_chars characters and runs on to the next blank line, or to the end of the line
    if there is none within another n_chars. Training and validation text are divided by passage.
    """
    return re.compile(rf"[\s\S]{{{n_chars}}}(?:[\s\S]{{0,{n_chars}}}?\n\n+|[^\n]*\n)?|[\s\S]+\Z")
