"""Range searches against loops over candidates written in numpy."""

import numpy as np
import pytest
import torch

from utils.quantization_utils.range_search import (
    CHANNEL_CANDIDATES,
    TENSOR_CANDIDATES,
    least_divergence,
    least_error,
    quantile_bin,
)


def error_of(row: np.ndarray, reach: float, bounds: tuple[int, int], power: float) -> float:
    step = reach / bounds[1]
    return float((np.abs(np.clip(np.rint(row / step), *bounds) * step - row) ** power).mean())


def best_of(row: np.ndarray, bounds: tuple[int, int], candidates: int, power: float) -> float:
    """The first candidate with the least error."""
    tried = [np.abs(row).max() * (1 - 0.01 * i) for i in range(candidates)]
    return min(tried, key=lambda reach: error_of(row, reach, bounds, power))


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("candidates", [TENSOR_CANDIDATES, CHANNEL_CANDIDATES])
def test_least_error_is_that_of_a_loop(power, bits, candidates):
    hi = 2 ** (bits - 1) - 1
    values = torch.randn(6, 50, dtype=torch.float64) * torch.tensor([[1e-3], [1.0], [7.0], [1.0], [2.0], [30.0]])
    values[3] = values[3].abs() ** 3
    found = least_error(values, values.abs().amax(1), (-hi, hi), candidates, power)
    expected = [best_of(row, (-hi, hi), candidates, power) for row in values.numpy()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert (found < values.abs().amax(1)).any() or bits == 8


def test_of_equal_errors_the_widest_range_wins():
    values = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    found = least_error(values, values.abs().amax(1), (-7, 7), TENSOR_CANDIDATES, 2.0)
    assert found.tolist() == [0.0, 1.0]


def test_counts_stand_for_repeated_values():
    values, counts = torch.randn(1, 9, dtype=torch.float64), torch.tensor([[1, 5, 2, 9, 1, 1, 3, 4, 2]])
    repeated = values.repeat_interleave(counts[0], dim=1)
    reach = values.abs().amax(1)
    found = least_error(values, reach, (-8, 7), TENSOR_CANDIDATES, 2.0, counts.double())
    assert torch.equal(found, least_error(repeated, reach, (-8, 7), TENSOR_CANDIDATES, 2.0))


def test_a_row_with_nan_keeps_its_reach():
    values = torch.tensor([[float("nan"), 1.0]])
    assert least_error(values, torch.ones(1), (-7, 7), TENSOR_CANDIDATES, 2.0).tolist() == [1.0]


def divergences(counts: np.ndarray, levels: int) -> dict[int, float]:
    """KL(P || Q) by number of bins: P clipped, Q merged into groups and spread over the bins that are not empty."""
    counts = counts.astype(float)
    counts[0] = counts[1]
    found = {}
    for length in range(levels, len(counts) + 1):
        inside, p = counts[:length], counts[:length].copy()
        p[-1] += counts[length:].sum()
        group = np.arange(length) * levels // length
        q = np.zeros(length)
        for g in range(levels):
            members = (group == g) & (inside > 0)
            if members.any():
                q[members] = inside[group == g].sum() / members.sum()
        if inside.sum() == 0 or (q[p > 0] == 0).any():
            continue
        p, q = p / p.sum(), q / q.sum()
        found[length] = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    return found


@pytest.mark.parametrize("levels", [4, 16, 32])
@pytest.mark.parametrize("seed", range(4))
def test_least_divergence_is_that_of_a_loop(levels, seed):
    random = np.random.default_rng(seed)
    magnitudes = np.abs(random.standard_t(2, 3000))
    counts = np.histogram(magnitudes, 150, (0, magnitudes.max() * (1, 0.3)[seed % 2]))[0]
    expected = divergences(counts, levels)
    found = least_divergence(torch.from_numpy(counts).double(), levels) - 0.5
    assert found in expected
    assert expected[int(found)] == pytest.approx(min(expected.values()), rel=1e-9, abs=1e-12)


def test_divergence_without_values_beyond_zero_or_in_one_bin():
    for place in (0, 1, 63):
        counts = torch.zeros(64, dtype=torch.float64)
        counts[place] = 10
        assert 8 < least_divergence(counts, 8) <= 64.5


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_quantile_bin_is_the_first_that_reaches_the_share(share):
    counts = torch.randint(0, 9, (100,)).double()
    seen = np.cumsum(counts.numpy())
    assert quantile_bin(counts, share) == int(np.argmax(seen >= share * seen[-1]))
