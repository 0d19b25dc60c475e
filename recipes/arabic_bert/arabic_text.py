"""
Arabic characters: normalise a text, remove its diacritics, write Arabic words in ASCII.

    normalise(text)            NFC; presentation forms become letters; invisible characters and
                               tatweel are removed; letters stay as they are
    normalise(text, letters)   also unifies letters, letters = letter_table(unify_alef=True)
    without_marks(text)        a normalised text without diacritics

Diacritics are removed after segmentation, which needs them: fathatan marks the alef of an
accusative, a suffix.
"""

from __future__ import annotations

import re
import unicodedata

# Buckwalter's transliteration, the common way to write Arabic in ASCII
_LATIN = "'|>&<}AbptvjHxd*rzs$SDTZEg" + "fqklmnhwYy" + "{"
_ARABIC = [*range(0x621, 0x63B), *range(0x641, 0x64B), 0x671]
_TO_ARABIC = dict(zip(map(ord, _LATIN), _ARABIC, strict=True))

# for a character class of a pattern
LETTERS = (
    r"\u0621-\u063a\u0641-\u064a\u066e\u066f\u0671-\u06d3\u06d5\u06ee\u06ef\u06fa-\u06fc\u06ff"
)
MARKS = (
    r"\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed"
    r"\u08d3-\u08e1\u08e3-\u08ff"
)
FATHATAN = "\u064b"
WORD_JOINER = "\u2060"  # normalise() removes it, so that it can mark something afterwards

_PRESENTATION_FORM = re.compile("[\ufb50-\ufdff\ufe70-\ufefc]")
# zero-width spaces and joiners, marks and overrides of direction, the byte-order mark; tatweel
_REMOVED = re.compile("[\u200b-\u200f\u061c\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\u0640]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_MARK = re.compile(f"[{MARKS}]")
_LETTER = re.compile(f"[{LETTERS}]")


def to_arabic(latin: str) -> str:
    """Arabic of a text in Buckwalter's transliteration; other characters stay."""
    return latin.translate(_TO_ARABIC)


def letter_table(
    unify_alef: bool = False,
    unify_yeh: bool = False,
    unify_teh_marbuta: bool = False,
    unify_farsi: bool = False,
) -> dict[int, str]:
    """
    Letters to replace, for normalise().

    unify_alef: alef with hamza, madda or wasla is alef; unify_yeh: alef maqsura is yeh;
    unify_teh_marbuta: teh marbuta is heh; unify_farsi: Farsi yeh and keheh are yeh and kaf.
    """
    table = {}
    if unify_alef:
        table |= str.maketrans(to_arabic("|><{"), to_arabic("AAAA"))
    if unify_yeh:
        table |= str.maketrans(to_arabic("Y"), to_arabic("y"))
    if unify_teh_marbuta:
        table |= str.maketrans(to_arabic("p"), to_arabic("h"))
    if unify_farsi:
        table |= str.maketrans("\u06cc\u06a9", to_arabic("yk"))
    return table


def normalise(text: str, letters: dict | None = None) -> str:
    """
    The text in the one form that all steps work on; normalise(normalise(x)) == normalise(x).

    Control characters and runs of blanks become one blank, lines stay lines. `letters` is a table
    of letter_table(). Diacritics stay.
    """
    text = _PRESENTATION_FORM.sub(_letters_of_form, text)
    text = _REMOVED.sub("", text)
    text = _CONTROL.sub(" ", text)
    text = unicodedata.normalize("NFC", text)
    if letters:
        # alef that loses its hamza may combine with a mark after it
        while (unified := unicodedata.normalize("NFC", text.translate(letters))) != text:
            text = unified
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def _letters_of_form(form: re.Match) -> str:
    # the form of a diacritic that has no letter is a blank with it
    return unicodedata.normalize("NFKC", form[0]).lstrip(" ")


def without_marks(text: str) -> str:
    """A normalised text without diacritics and Quranic marks, normalised."""
    bare = _MARK.sub("", text)
    if "  " in bare or " \n" in bare or "\n " in bare or bare[:1] == " " or bare[-1:] == " ":
        return "\n".join(" ".join(line.split()) for line in bare.split("\n"))
    return bare


def has_arabic(text: str) -> bool:
    """Whether the text has an Arabic letter."""
    return _LETTER.search(text) is not None


def n_arabic(text: str) -> int:
    """Number of Arabic letters in a text."""
    return len(_LETTER.findall(text))
