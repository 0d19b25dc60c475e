r"""
The little of q's syntax that preparing data needs: comments, strings, brackets, functions.

    / a comment, at the start of a line or after a blank      a line  /  opens a block of comment,
    "a string with \" and \\", which may go on over lines     a line  \  closes it; without an open
    p)python of embedPy, with the indented lines below it     one, all that follows is comment

Files of k have the same comments and strings.
Source: "Syntax", https://code.kx.com/q/basics/syntax.
"""

from __future__ import annotations

import re

from parts.base.text import one_line

TOKENS = re.compile(
    r"""
      (?P<comment> ^/[ \t\r]*$ [\s\S]*? (?: ^\\[ \t\r]*$ | \Z )   # a block
                 | ^\\[ \t\r]*$ [\s\S]*                           # the end of the script
                 | (?<!\S)/.*
                 | \A\#!.* )
    | (?P<foreign> ^(?![kq]\))[A-Za-z]\).* (?:\n[ \t].*)* )       # a line of another language
    | (?P<prefix> ^[kq]\) )                                       # a line of k or q
    | (?P<string> "[^"\\]*(?:\\[\s\S][^"\\]*)* (?P<closed>"?) )
    | (?P<bracket> [()\[\]{}] )
    """,
    re.MULTILINE | re.VERBOSE,
)
PAIRS = {")": "(", "]": "[", "}": "{"}
# one piece of what a file begins with: a block or line of comment, or a blank line
HEAD_PIECE = re.compile(
    r"""
      ^/[ \t\r]*\n [\s\S]*? (?: ^\\[ \t\r]*$\n? | \Z )
    | \A\#!.*\n?
    | ^[ \t]*/.*\n?
    | ^[ \t\r]*\n
    """,
    re.MULTILINE | re.VERBOSE,
)
FUNCTION = re.compile(r"^(?:[kq]\))?(\.?[A-Za-z][\w.]*)[ \t]*::?[ \t]*\{", re.MULTILINE)
# what only a paragraph of a licence says, and what stands in a line about owner or licence
LICENCE_TEXT = re.compile(
    r"permission\s+is\s+hereby|redistributions?\s+(?:and|of|in)\b|neither\s+the\s+name"
    r"|without\s+(?:even\s+the\s+implied\s+|any\s+)?warrant|shall\s+be\s+included\s+in"
    r"|you\s+may\s+not\s+use|free\s+software|you\s+should\s+have\s+received",
    re.IGNORECASE,
)
NOTICE_LINE = re.compile(r"(?i)copyright|\(c\)|spdx-|licen[cs]e|all rights reserved")
MIN_WORDS = 2  # of a comment that describes a file


def is_balanced(text: str) -> bool:
    """Whether all brackets outside of strings and comments are paired, and all strings closed."""
    opened = []
    for token in TOKENS.finditer(text):
        if token["string"] and not token["closed"]:
            return False
        bracket = token["bracket"]
        if bracket in PAIRS:
            if not opened or opened.pop() != PAIRS[bracket]:
                return False
        elif bracket:
            opened.append(bracket)
    return not opened


def without_comments(text: str) -> str:
    """The code without comments; strings stay as they are."""
    return TOKENS.sub(lambda token: "" if token["comment"] else token[0], text)


def function_names(text: str) -> list[str]:
    """Names of the functions `name:{...}` that begin a line, in order, each once."""
    code = TOKENS.sub(lambda token: "" if token["comment"] or token["string"] else token[0], text)
    return list(dict.fromkeys(FUNCTION.findall(code)))


def leading_comment(text: str) -> str:
    """
    The comment that a file begins with, up to its code; "" if there is none.

    Of several paragraphs, with blank lines between, the last belongs to the code if there is no
    blank line below it.
    """
    pieces, end = [], 0
    while piece := HEAD_PIECE.match(text, end):
        pieces.append(piece[0])
        end = piece.end()
    last = len(pieces)
    while last and pieces[last - 1].strip():
        last -= 1
    before = "".join(pieces[:last])
    head = before if before.strip() and end < len(text) else text[:end]
    return head if head.strip() else ""


def describes(comment: str) -> bool:
    """Whether a comment says more than who owns the file and under which licence."""
    paragraphs = re.split(r"\n[\s/*#=-]*\n", comment)
    kept = [paragraph for paragraph in paragraphs if not LICENCE_TEXT.search(paragraph)]
    lines = "\n".join(kept).split("\n")
    rest = " ".join(line for line in lines if not NOTICE_LINE.search(line) and line[:2] != "#!")
    return len(re.findall(r"[^\W\d_]{2,}", rest)) >= MIN_WORDS


def describe(row: dict) -> tuple[str, str] | None:
    """
    (prompt, completion) of a row {"path", "text"}; None if there is no code, or nothing to say.

    The prompt is the leading comment, the completion all that follows: joined, they are the text.
    If there is no such comment, or only a licence, the prompt is a comment with the path and the
    names of the functions, and the completion the whole text. A prompt ends with a line break.
    """
    text = row["text"]
    comment = leading_comment(text)
    if not without_comments(text).strip():
        return None
    if describes(comment):
        return comment, text[len(comment) :]
    names = ", ".join(function_names(text))
    path = one_line(row.get("path") or "")
    said = ": ".join(filter(None, (path, names)))
    return (f"/ {said}\n", text) if said else None
