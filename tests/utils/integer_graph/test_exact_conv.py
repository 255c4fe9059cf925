"""Pieces of a product: they add up to it, and float32 holds every partial sum of each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.integer_graph.exact_conv import FLOAT32_LIMIT, is_exact, split


@st.composite
def products(draw):
    """Random weights and input bounds, from trivial to far beyond float32."""
    groups, outputs = draw(st.sampled_from([(1, 3), (2, 4), (3, 3)]))
    shape = (outputs, draw(st.sampled_from([1, 2, 7, 40])), draw(st.integers(1, 3)), 2)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    reach = draw(st.sampled_from([1, 7, 127]))
    weight = rng.integers(-reach - 1, reach + 1, shape).astype(np.int8)
    hi = draw(st.sampled_from([1, 255, 2047, 32767, 65535]))
    return weight, draw(st.sampled_from([0, -hi - 1])), hi, groups


@given(products())
def test_pieces_add_up_and_are_exact(case):
    weight, lo, hi, groups = case
    pieces = split(weight, lo, hi, groups)
    if pieces is None:
        assert not is_exact(weight, lo, hi)
        return
    total = np.zeros(weight.shape, np.int64)
    for piece in pieces:
        total[:, piece.start : piece.stop] += piece.factor * piece.weight.astype(np.int64)
        # the worst partial sum: all products of one sign
        worst = np.maximum(piece.weight * np.int64(hi), piece.weight * np.int64(lo))
        best = np.minimum(piece.weight * np.int64(hi), piece.weight * np.int64(lo))
        axes = tuple(range(1, weight.ndim))
        assert max(worst.sum(axes).max(), -best.sum(axes).min()) <= FLOAT32_LIMIT
        assert np.array_equal(piece.weight.astype(np.float32).astype(np.int64), piece.weight)
    np.testing.assert_array_equal(total, weight)


def test_one_piece_where_it_is_enough():
    weight = np.full((2, 4, 1, 1), 127, np.int8)
    assert [(p.start, p.stop, p.factor) for p in split(weight, 0, 255)] == [(0, 4, 1)]


def test_as_few_chunks_as_the_limit_allows():
    hi, value, channels = 255, 127, 1200
    per_chunk = FLOAT32_LIMIT // (hi * value)
    pieces = split(np.full((1, channels, 1, 1), value, np.int8), 0, hi)
    assert [(p.start, p.stop) for p in pieces] == [
        (s, min(s + per_chunk, channels)) for s in range(0, channels, per_chunk)
    ]


def test_nibbles_where_one_channel_is_too_much():
    weight = np.full((1, 2, 3, 3), 125, np.int8)
    assert not is_exact(weight[:, :1], 0, 65535)
    assert sorted({p.factor for p in split(weight, 0, 65535)}) == [1, 16]
    grouped = split(np.full((2, 1, 3, 3), 125, np.int8), 0, 65535, groups=2)
    assert [p.factor for p in grouped] == [16, 1]


def test_float64_where_nothing_else_is_cheaper():
    assert split(np.full((2, 100, 3, 3), 127, np.int8), 0, 65535, groups=2) is None


@pytest.mark.parametrize("count", [FLOAT32_LIMIT // 127, FLOAT32_LIMIT // 127 + 1])
def test_the_limit_itself(count):
    weight = np.full((1, count), 127, np.int8)
    assert is_exact(weight, 0, 1) == (count * 127 <= FLOAT32_LIMIT)
