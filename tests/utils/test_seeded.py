"""The hash against a reference in Python integers, and against what independent uniform numbers must show."""

import math

import numpy as np
import pytest

from utils.seeded import hash64, integers, permutation, uniform

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Next output of SplitMix64 from a state, in Python's unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("words", [(0,), (1, 2, 3), (-1, 7), (2**63, 2**64 - 1), (2**70 + 5, 0, 0)])
def test_hash_equals_chained_splitmix64(words: tuple[int, ...]) -> None:
    expected = 0
    for word in words:
        expected = splitmix64((expected + word) & MASK)
    assert hash64(*words).tolist() == [expected]


def test_arrays_give_the_hash_of_each_element() -> None:
    numbers = np.array([-3, 0, 5, 2**40])
    assert hash64(7, numbers, 1).tolist() == [int(hash64(7, int(n), 1)[0]) for n in numbers]


def test_order_of_words_matters() -> None:
    assert hash64(1, 2)[0] != hash64(2, 1)[0]


def test_uniform_has_the_moments_of_a_uniform_and_neighbours_are_uncorrelated() -> None:
    count = 100_000
    values = uniform(0, 3, np.arange(count), 1)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * count)  # five standard errors
    assert abs(values.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    numbers = np.arange(count)
    for other in (uniform(0, 3, numbers + 1, 1), uniform(0, 4, numbers, 1), uniform(0, 3, numbers, 2)):
        assert abs(np.corrcoef(values, other)[0, 1]) < 5 / math.sqrt(count)


def test_integers_reach_every_value_about_equally_often() -> None:
    count, limit = 90_000, 9
    counts = np.bincount(integers(limit, 5, np.arange(count)), minlength=limit)
    assert len(counts) == limit
    chi_squared = ((counts - count / limit) ** 2 / (count / limit)).sum()
    assert chi_squared < (limit - 1) + 5 * math.sqrt(2 * (limit - 1))


def test_permutation_holds_each_number_once_and_depends_on_every_word() -> None:
    first = permutation(1000, 1, 2)
    assert sorted(first.tolist()) == list(range(1000))
    assert first.tolist() == permutation(1000, 1, 2).tolist()
    assert first.tolist() != permutation(1000, 1, 3).tolist()
    assert first.tolist() != permutation(1000, 0, 2).tolist()
