"""Normalisation of Arabic text: recipes/arabic_bert/arabic_text.py."""

import random
import unicodedata

import pytest
from conftest import shared

from recipes.arabic_bert.arabic_text import (
    has_arabic,
    letter_table,
    normalise,
    to_arabic,
    without_marks,
)

ALL_LETTERS = letter_table(True, True, True, True)
BLOCKS = [(0x20, 0x7E), (0x600, 0x6FF), (0x8D0, 0x8FF), (0x2000, 0x206F), (0xFB50, 0xFEFF)]


def real_texts():
    """Every shared Arabic text, in lines."""
    for path in ("txt/news_lines.txt", "tashkeela/val.txt", "farasa_reference/input.txt"):
        yield from shared(f"data/arabic/{path}").read_text(encoding="utf-8").split("\n")


def random_texts(n):
    """Texts of characters that the steps of normalise() may combine."""
    chars = [chr(c) for low, high in BLOCKS for c in range(low, high + 1)] + list("\n\t\r\x1a\x85")
    rng = random.Random(0)
    return ["".join(rng.choices(chars, k=40)) for _ in range(n)]


@pytest.mark.parametrize("letters", (None, ALL_LETTERS), ids=("as they are", "unified"))
def test_normalising_twice_is_normalising_once(letters):
    for text in [*random_texts(5000), *real_texts()]:
        once = normalise(text, letters)
        assert normalise(once, letters) == once
        bare = without_marks(once)
        assert without_marks(normalise(bare, letters)) == without_marks(bare)


def test_the_result_is_nfc_and_has_nothing_invisible():
    gone = set("\u0640\ufeff\u2060\u061c\x1a")
    gone |= set(map(chr, [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
    for text in [*random_texts(2000), *real_texts()]:
        text = normalise(text)
        assert unicodedata.is_normalized("NFC", text)
        assert not gone & set(text)


def test_letters_and_their_order_stay_unless_asked():
    letters = {chr(c) for c in range(0x621, 0x64B)} - {"\u0640"}
    for text in real_texts():
        plain = [c for c in unicodedata.normalize("NFC", text) if c in letters]
        forms = any("\ufb50" <= c <= "\ufefc" for c in text)
        assert forms or plain == [c for c in normalise(text) if c in letters]


@pytest.mark.parametrize(
    "raw, expected",
    (
        ("\ufefb", to_arabic("lA")),  # ligature
        ("\ufee3\ufea4\ufee4\ufeaa", to_arabic("mHmd")),
        ("\ufe7d", "\u0651"),  # shadda on a tatweel: the tatweel is removed
        ("\ufe70\ufc60", "\u064b\u064e\u0651"),  # forms of marks without a letter; no blanks
        (to_arabic("mH") + "\u0640\u0640" + to_arabic("md"), to_arabic("mHmd")),
        (to_arabic("A") + "\u0654", to_arabic(">")),
        (to_arabic("b") + "\u0651\u064e", to_arabic("b") + "\u064e\u0651"),  # order of marks
        ("\u202b" + to_arabic("ktb") + "\u202c\u200f", to_arabic("ktb")),
        ("  a \t b\r\n\u00a0c\x1ad ", "a b\nc d"),
        (to_arabic("qdy>ylY"), to_arabic("qdy>ylY")),
        ("", ""),
    ),
)
def test_cases(raw, expected):
    assert normalise(raw) == expected


def test_flags_unify_the_letters_they_name_and_no_others():
    text = to_arabic("><|{ Y p") + " \u06cc\u06a9"
    assert normalise(text, letter_table()) == text
    assert normalise(text, letter_table(unify_alef=True)) == to_arabic("AAAA Y p") + " \u06cc\u06a9"
    assert normalise(text, letter_table(unify_yeh=True)) == to_arabic("><|{ y p") + " \u06cc\u06a9"
    assert normalise(text, letter_table(unify_teh_marbuta=True))[5:8] == to_arabic("Y h")
    assert normalise(text, letter_table(unify_farsi=True)) == to_arabic("><|{ Y p yk")
    # an alef that loses its hamza and then meets a madda
    assert normalise(to_arabic(">") + "\u0653", ALL_LETTERS) == to_arabic("A")


def test_marks_are_removed_and_letters_are_not():
    text = normalise("\u0643\u0650\u062a\u064e\u0627\u0628\u064c \u0670\u06d6\u0653 +9")
    assert without_marks(text) == to_arabic("ktAb") + " +9"
    assert has_arabic(text)
    assert not has_arabic("Latin only, 123 \u0660\u060c")
