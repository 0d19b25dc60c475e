"""Near duplicates against the exact comparison of every pair."""

import random
import re

import numpy as np
import pytest

from parts.data.near_duplicates import NearDuplicates, resemblance, sketch


def runs(text: str) -> set:
    """The runs of five words of a text."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a: str, b: str) -> float:
    """Exact share of runs in common."""
    union = runs(a) | runs(b)
    return len(runs(a) & runs(b)) / len(union) if union else 0.0


def changed(words: list[str], n: int, rng) -> list[str]:
    """The words with n of them replaced."""
    words = list(words)
    for i in rng.sample(range(len(words)), n):
        words[i] = f"new{rng.randrange(10**9)}"
    return words


def family(n_words: int, n_header: int, n_members: int, rng) -> list[str]:
    """Texts that begin with one header; every second is the one before, hardly changed."""
    header = [f"head{i}" for i in range(n_header)]
    texts = []
    for _ in range(n_members):
        words = header + [f"w{rng.randrange(10**9)}" for _ in range(n_words - n_header)]
        texts += [" ".join(words), " ".join(changed(words, max(1, n_words // 150), rng))]
    return texts


@pytest.mark.parametrize(("n_words", "n_header"), [(100, 0), (100, 60), (600, 400), (150, 110)])
def test_a_copy_is_found_however_many_texts_share_its_header(n_words, n_header):
    kept = NearDuplicates(alike=0.8, size=1024)
    texts = family(n_words, n_header, 60, random.Random(1))
    for i, text in enumerate(texts):
        twin = kept.twin_of(sketch(text, 1024))
        if i % 2:
            assert twin == (str(i - 1), jaccard(text, texts[i - 1])) and twin[1] >= 0.8
        else:
            assert twin is None
            kept.add(str(i), sketch(text, 1024))


@pytest.mark.parametrize(("n_texts", "n_sections"), [(60, 4), (100, 6), (300, 12)])
def test_texts_that_are_put_together_from_the_same_sections_have_their_copies_found(
    n_texts, n_sections
):
    """As settings files of one program are: other texts have had all of their sections before."""
    rng = random.Random(2)
    sections = [" ".join(f"s{i}x{j}" for j in range(9)) for i in range(4 * n_sections)]
    kept, texts = NearDuplicates(alike=0.8, size=1024), []
    for _ in range(n_texts):
        text = " ".join(rng.sample(sections, n_sections))
        if kept.twin_of(sketch(text, 1024)) is None:
            kept.add(text, sketch(text, 1024))
            texts.append(text)
    assert len(texts) > 0.9 * n_texts
    found = [kept.twin_of(sketch(text + " end", 1024)) for text in texts]
    assert [twin and twin[0] for twin in found] == texts


def test_the_order_of_words_matters():
    for i in range(4):
        words = ["one", "two", "three", "four", "five"]
        words[i : i + 2] = words[i : i + 2][::-1]
        assert resemblance(sketch("one two three four five"), sketch(" ".join(words))) == 0


@pytest.mark.parametrize("n_changed", [0, 1, 7, 40, 300])
def test_texts_below_the_size_of_a_sketch_are_compared_exactly(n_changed):
    rng = random.Random(n_changed)
    words = [f"w{i}" for i in range(300)]
    a, b = " ".join(words), " ".join(changed(words, n_changed, rng))
    assert resemblance(sketch(a, 1024), sketch(b, 1024), 1024) == jaccard(a, b)


@pytest.mark.parametrize("n_changed", [20, 100, 400])
def test_longer_texts_are_estimated(n_changed):
    rng = random.Random(n_changed)
    words = [f"w{rng.randrange(9000)}" for _ in range(20_000)]
    a, b = " ".join(words), " ".join(changed(words, n_changed, rng))
    for size in (256, 1024):
        estimate = resemblance(sketch(a, size), sketch(b, size), size)
        assert abs(estimate - jaccard(a, b)) < 4 * 0.5 / np.sqrt(size)


def test_runs_that_repeat_count_once_and_do_not_push_others_out():
    words = [f"w{i}" for i in range(200)]
    text = " ".join(words)
    many = " ".join(["again and again and again"] * 3000)
    a = sketch(f"{many} {text}", 256)
    assert 190 < len(a) < 256
    assert resemblance(a, sketch(text, 256), 256) == jaccard(f"{many} {text}", text)


def test_texts_below_five_words_are_like_nothing():
    for text in ("", "one", "a:1", "one two three", "one two three four", "+/*-"):
        assert not len(sketch(text))
        assert resemblance(sketch(text), sketch(text)) == 0
        assert NearDuplicates().twin_of(sketch(text)) is None
