"""The rescaling rules against Python integers and fractions, over their whole range."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.quantization_utils import dyadic as d

accumulators = st.integers(-(2**31) + 1, 2**31 - 1)
multipliers = st.integers(1, 2**31 - 1)
shifts = st.integers(1, 62)
ratios = st.floats(2.0**-61, 2.0**29, exclude_min=True, exclude_max=True)


@st.composite
def near_ties(draw):
    """acc, m, e with acc * m within 1 of an odd multiple of 2**(e-1), where rounding rules differ."""
    e = draw(st.integers(1, 30))
    m = 1 << draw(st.integers(0, e - 1))
    odd = 2 * draw(st.integers(-(2**20), 2**20)) + 1
    acc = odd * (1 << (e - 1)) // m + draw(st.integers(-1, 1))
    return max(-(2**31) + 1, min(acc, 2**31 - 1)), m, e


cases = st.one_of(st.tuples(accumulators, multipliers, shifts), near_ties())


def half_up(value):
    return math.floor(value + Fraction(1, 2))


# round(Fraction) is half to even
RULES = [(d.requantize, half_up), (d.requantize_even, round), (d.requantize_down, math.floor)]


@pytest.mark.parametrize(("rule", "expected"), RULES)
@given(case=cases)
def test_rules_are_the_rounded_fraction(rule, expected, case):
    acc, m, e = case
    want = expected(Fraction(acc * m, 1 << e))
    assert rule(acc, m, e) == want
    as_numpy = rule(*(np.array([v], np.int64) for v in case))
    assert as_numpy.dtype == np.int64
    assert as_numpy.tolist() == [want]
    as_torch = rule(*(torch.tensor([v], dtype=torch.int64) for v in case))
    assert as_torch.dtype == torch.int64
    assert as_torch.tolist() == [want]


@pytest.mark.parametrize(("rule", "expected"), RULES)
@pytest.mark.parametrize("acc", [2**31 - 1, -(2**31) + 1, 1, 0, -1])
@pytest.mark.parametrize("m", [1, 2**30, 2**31 - 1])
@pytest.mark.parametrize("e", [1, 31, 62])
def test_rules_at_the_ends_of_the_range(rule, expected, acc, m, e):
    want = expected(Fraction(acc * m, 1 << e))
    assert rule(np.array([acc], np.int64), np.array([m], np.int64), np.array([e], np.int64)).tolist() == [want]


def test_rules_broadcast_per_channel():
    acc = np.arange(-24, 24).reshape(2, 3, 4, 2)
    m, e = np.array([1, 2, 3]).reshape(3, 1, 1), np.array([1, 2, 3]).reshape(3, 1, 1)
    got = d.requantize(acc, m, e)
    for index in np.ndindex(acc.shape):
        c = index[1]
        assert got[index] == half_up(Fraction(int(acc[index]) * (c + 1), 1 << (c + 1)))


def nearest(ratio, e):
    """The integers m closest to ratio * 2**e."""
    exact = Fraction(ratio) * 2**e
    return {math.floor(exact + Fraction(1, 2)), math.ceil(exact - Fraction(1, 2))}


@given(ratios)
def test_dyadic_is_nearest_and_normalised(ratio):
    for bits in (8, 16):
        m, e = d.dyadic(ratio, output_bits=bits)
        assert 1 <= m < 2**31
        assert 1 <= e <= 62
        cheap = bits == 8 and 2**16 <= half_up(Fraction(ratio) * 2**32) < 2**31
        if cheap:
            assert e == 32
        elif e < 62:
            assert m >= 2**30
        # one rounding; two (31 bits, then the shift that keeps e at 62) only where e would pass 62
        tolerance = Fraction(1, 2) + (Fraction(1, 2) if e == 62 else 0)
        assert abs(Fraction(ratio) * 2**e - m) <= tolerance
        if e < 62 and m != 2**30:  # 2**30 may be a rounded 2**31
            assert m in nearest(ratio, e)


@given(st.floats(2.0**-40, 2.0**12))
def test_dyadic16_is_nearest_and_normalised(ratio):
    m, e = d.dyadic16(ratio)
    assert 2**14 <= m < 2**15
    assert abs(Fraction(ratio) * 2**e - m) <= Fraction(1, 2)


@pytest.mark.parametrize("choose", [d.dyadic, d.dyadic16])
@pytest.mark.parametrize("power", range(-40, 10))
def test_powers_of_two_are_exact(choose, power):
    m, e = choose(2.0**power)
    assert Fraction(m, 1 << e) == Fraction(2) ** power


@given(ratios)
def test_dyadic_array_is_dyadic_of_each(ratio):
    m, e = d.dyadic_array(np.array([ratio, 1.0]))
    assert (m.dtype, e.dtype) == (np.int32, np.uint8)
    assert [(int(a), int(b)) for a, b in zip(m, e, strict=True)] == [d.dyadic(ratio), d.dyadic(1.0)]


@pytest.mark.parametrize("choose", [d.dyadic, d.dyadic16])
@pytest.mark.parametrize("ratio", [0.0, -1.0, math.inf, math.nan])
def test_ratios_that_are_not_positive_are_refused(choose, ratio):
    with pytest.raises(ValueError, match="positive and finite"):
        choose(ratio)


@pytest.mark.parametrize("ratio", [2.0**31, 2.0**-70])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ValueError, match="has no multiplier"):
        d.dyadic(ratio)


def critical(divisor, bound):
    """Values in [0, bound] next to multiples of the divisor: the quotient changes there and nowhere else."""
    numbers = {k * divisor + i for k in (0, 1, 2, bound // divisor - 1, bound // divisor) for i in (-1, 0, 1)}
    return [x for x in {*numbers, bound} if 0 <= x <= bound]


@pytest.mark.parametrize("bound", [0, 1, 8, 255, 1000, 20000])
def test_floor_dyadic_divides_every_integer(bound):
    x = np.arange(bound + 1)
    for divisor in [*range(1, 150), bound + 1, 2 * bound + 1]:
        m, e = d.floor_dyadic(divisor, bound)
        np.testing.assert_array_equal(d.requantize_down(x, m, e), x // divisor)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**30 - 1))
def test_floor_dyadic_divides_up_to_its_bound(divisor, bound):
    m, e = d.floor_dyadic(divisor, bound)
    assert 1 <= m < 2**31
    assert 1 <= e <= 62
    for x in critical(divisor, bound):
        assert d.requantize_down(x, m, e) == x // divisor


@pytest.mark.parametrize(("divisor", "hi"), [(49, 32767), (9, 32767), (64, 32767), (49, 2**24)])
def test_floor_dyadic_of_average_pools(divisor, hi):
    m, e = d.floor_dyadic(divisor, divisor * hi)
    x = np.arange(0, divisor * hi + 1, 7)
    x = np.concatenate([x, np.arange(divisor * (hi - 5), divisor * hi + 1)])
    np.testing.assert_array_equal(d.requantize_down(x, m, e), x // divisor)


@pytest.mark.parametrize("divisor", [1, 2, 1024, 3])
def test_floor_dyadic_up_to_the_greatest_accumulator(divisor):
    bound = 2**31 - 1
    m, e = d.floor_dyadic(divisor, bound)
    assert all(d.requantize_down(x, m, e) == x // divisor for x in critical(divisor, bound))


@pytest.mark.parametrize(
    ("divisor", "bound", "message"),
    [
        (0, 5, "got a divisor of 0"),
        (3, -1, "and a bound of -1"),
        (3, 2**31, "and a bound of 2147483648"),
        (7, 2**31 - 1, "integers up to 2147483647 have no multiplier below .* that divides them by 7"),
    ],
)
def test_floor_dyadic_refuses(divisor, bound, message):
    with pytest.raises(ValueError, match=message):
        d.floor_dyadic(divisor, bound)


@given(st.integers(1, 2**10), st.integers(1, 16), st.integers(0, 300))
def test_a_tie_that_is_called_impossible_never_occurs(m, e, bound):
    ties = [acc for acc in range(-bound, bound + 1) if (2 * acc * m) % (1 << e) == 0 and (2 * acc * m >> e) % 2 == 1]
    if d.tie_is_impossible(m, e, bound):
        assert not ties
    for acc in ties:
        assert d.requantize(acc, m, e) - d.requantize_even(acc, m, e) in (0, 1)


@pytest.mark.parametrize(
    ("m", "e", "bound", "impossible"),
    [
        (2**30, 30, 2**31 - 1, True),  # every product is a multiple of 2**e
        (2**30, 31, 1, False),
        (2**30 + 2, 33, 2**31 - 1, True),
        (2**30 + 2, 32, 2**30, False),
        (2**30 + 2, 32, 2**30 - 1, True),
    ],
)
def test_ties_at_the_limit(m, e, bound, impossible):
    assert d.tie_is_impossible(m, e, bound) == impossible


@given(multipliers, shifts, st.integers(0, 2**31 - 1), accumulators)
def test_rules_agree_where_ties_are_impossible(m, e, bound, acc):
    if abs(acc) <= bound and d.tie_is_impossible(m, e, bound):
        assert d.requantize(acc, m, e) == d.requantize_even(acc, m, e)
