"""Which texts are for testing: by repository, whole, and none of training."""

import random

import pytest

from recipes.q_lora.prepare_data import split


def of(*texts) -> dict:
    """Argument of `split`: (bytes, *repositories) of each text."""
    return {bytes([i]): (set(repos), n) for i, (n, *repos) in enumerate(texts)}


def test_a_text_of_several_repositories_is_for_testing_only_if_all_of_them_are():
    for seed in range(50):
        rng = random.Random(seed)
        texts = of(
            *(
                (rng.randrange(1, 100), *rng.sample("abcdefghijkl", rng.choice([1, 1, 1, 2, 3])))
                for _ in range(200)
            )
        )
        test = split(texts, 0.1)
        train_repos = set().union(*(texts[key][0] for key in texts.keys() - test))
        only_test = {key for key in texts if not texts[key][0] & train_repos}
        assert test == only_test or not only_test
        assert test and texts.keys() - test


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("n", [2, 3, 30, 1000])
def test_both_sides_have_texts_and_the_share_is_near(share, n):
    texts = {f"{i}".encode(): (set(), 100) for i in range(n)}
    test = split(texts, share)
    assert 0 < len(test) < n
    if n == 1000:
        assert abs(len(test) / n - share) < 0.002


def test_a_large_repository_does_not_become_the_test_set():
    for seed in range(30):
        names = [f"{seed}/{i}" for i in range(12)]
        texts = of(*((500 if i < 2 else 20, name) for i, name in enumerate(names)))
        test = split(texts, 0.1)
        assert 120 <= sum(texts[key][1] for key in test) <= 240


def test_two_large_repositories_and_one_alone():
    assert split(of((500, "a"), (300, "b")), 0.1) == {b"\x01"}
    one = of(*((10, "a") for _ in range(100)))
    assert 8 <= len(split(one, 0.1)) <= 12
    shared_texts = of(*((10, "a", "b") for _ in range(100)))
    assert 8 <= len(split(shared_texts, 0.1)) <= 12
