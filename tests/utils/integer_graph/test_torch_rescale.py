"""Rescaling in float64: each of its ways equals the definition, at the ends of its range."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from utils.integer_graph import torch_rescale as t
from utils.integer_graph.type_rules import RESCALED_LIMIT
from utils.quantization_utils.dyadic import ROUNDING

CPU = torch.device("cpu")


def rescaled(acc, bias, m, e, bound, rounding):
    """Branch applied to acc int64 [rows, width]; returns int64 [rows, width] and the chosen way."""
    columns = [np.asarray(v, np.int64) for v in (m, e, bias, bound)]
    branch = t.plan_branch(t.Dyadic(*columns, rounding), CPU)
    values = torch.from_numpy(acc).double()
    branch.apply(values, torch.empty_like(values))
    return values.long().numpy(), branch.apply.__qualname__.split(".")[0]


@st.composite
def rescalings(draw):
    """Four channels with random multipliers, bounds of any size and accumulators up to them."""
    top, bits, low_e = draw(st.integers(1, 30)), draw(st.integers(1, 31)), draw(st.sampled_from([1, 17, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bound = rng.integers(0, 2**top, 4)
    bias = rng.integers(-(2**top), 2**top, 4) * draw(st.integers(0, 1))
    m, e = rng.integers(2 ** (bits - 1), 2**bits, 4), rng.integers(low_e, 63, 4)
    acc = rng.integers(-bound, bound + 1, (5, 4))
    return np.concatenate([acc, bound[None], -bound[None], 0 * bound[None]]), bias, m, e, bound


@pytest.mark.parametrize("rounding", list(ROUNDING))
@settings(max_examples=300)
@given(case=rescalings())
def test_equals_the_definition(rounding, case):
    acc, bias, m, e, bound = case
    expected = ROUNDING[rounding](acc + bias, m, e)
    assume(np.abs(expected).max() < RESCALED_LIMIT)
    got, _ = rescaled(acc, bias, m, e, bound, rounding)
    np.testing.assert_array_equal(got, expected)


WAYS = [
    ("_identity", 2**20, 0, 2**30, 30, "up"),
    ("_one_product", 2**20, 5, 2**31 - 1, 40, "up"),
    ("_one_product", 2**20, 5, 2**20, 30, "even"),
    ("_two_limbs", 2**30, 2**30 - 1, 2**31 - 1, 40, "up"),
    ("_two_limbs", 2**30, 0, 2**31 - 1, 40, "even"),
    ("_two_limbs", 2**30, 0, 2**30, 62, "even"),
    ("_identity", 2**20, 0, 2**30, 30, "down"),
    ("_one_product", 2**20, 5, 2**31 - 1, 40, "down"),
    ("_two_limbs", 2**31 - 1, 0, 1, 62, "even"),
    ("_two_limbs", 2**30, 2**30 - 1, 2**31 - 1, 40, "down"),
    ("_int64", 2**30, 7, 2**31 - 1, 16, "down"),
    ("_int64", 2**30, 0, 2**31 - 1, 16, "up"),
    ("_int64", 2**30, 0, 2**30, 40, "even"),
]


@pytest.mark.parametrize(("way", "bound", "bias", "m", "e", "rounding"), WAYS)
def test_each_way_is_taken_and_exact(way, bound, bias, m, e, rounding):
    rng = np.random.default_rng(0)
    acc = np.concatenate([rng.integers(-bound, bound + 1, (500, 1)), [[bound], [-bound]]])
    got, chosen = rescaled(acc, [bias], [m], [e], [bound], rounding)
    assert chosen == way
    np.testing.assert_array_equal(got, ROUNDING[rounding](acc + bias, m, e))


@pytest.mark.parametrize(("bound", "way"), [(2**22, "_one_product"), (2**22 + 1, "_two_limbs")])
def test_the_limit_of_one_product(bound, way):
    """bound * m + 2**(e-1) is 2**53 - 2**22 + 2**21 and, one further, above 2**53."""
    m, e = 2**31 - 1, 22
    assert (bound * m + 2 ** (e - 1) <= 2**53) == (way == "_one_product")
    acc = np.array([[bound], [-bound], [bound - 1]])
    got, chosen = rescaled(acc, [0], [m], [e], [bound], "up")
    assert chosen == way
    np.testing.assert_array_equal(got, ROUNDING["up"](acc, m, e))


@pytest.mark.parametrize("piece", [1, 10, 64, 10**6])
def test_pieces_cover_everything(piece):
    """Two branches, one of them split into parts, into a slice of a wider tensor, whatever the piece size."""
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.integers(-999, 999, (2, 3, 5, 4))).float() for _ in range(3)]
    bias = np.array([7, -7, 100, 0])
    first = t.Accumulator((parts[0], parts[1]), (16, 1), torch.from_numpy(bias).double())
    count = t.repeats(15, 4)
    m, e = np.tile([3, 5, 7, 9], count), np.full(4 * count, 4)
    bound = np.full(4 * count, 999 * 17)
    branches = [
        t.plan_branch(t.Dyadic(m, e, np.tile(bias, count), bound, "up"), CPU),
        t.plan_branch(t.Dyadic(m, e, np.zeros_like(m), bound, "up"), CPU),
    ]
    scratch = t.Scratch(CPU)
    scratch.piece = piece
    out = torch.full((30, 6), -1.0)
    t.rescale_sum([first, parts[2]], branches, scratch, (-50, 60), out[:, 1:5])
    acc = (16 * parts[0] + parts[1]).long().numpy() + bias
    total = sum(ROUNDING["up"](a, m[:4], e[:4]) for a in (acc, parts[2].long().numpy()))
    np.testing.assert_array_equal(out[:, 1:5].numpy(), np.clip(total, -50, 60).reshape(30, 4))
    assert (out[:, [0, 5]] == -1).all()
    np.testing.assert_array_equal(first.dense().long().numpy(), acc)


@given(st.integers(1, 300), st.integers(1, 5000))
def test_repeats_divide_the_positions(positions, channels):
    count = t.repeats(positions, channels)
    assert positions % count == 0
    assert count == 1 or count * channels <= t.ROW
