"""Calibrators against numpy formulas over the same batches."""

import numpy as np
import pytest
import torch

from utils.quantization_utils.calibrators import HISTOGRAM_BINS, METHODS, QUANTILE, Histogram, make_observer
from utils.quantization_utils.quant_primitives import int_range
from utils.quantization_utils.range_search import TENSOR_CANDIDATES

TOLERANCE = 0.005  # stated in the docstring of search_mse
VALUES = {
    "normal": lambda n: torch.randn(n),
    "heavy tails": lambda n: torch.distributions.StudentT(3.0).sample((n,)),
    "outlier": lambda n: torch.cat([torch.randn(n - 1), torch.tensor([60.0])]),
    "clipped": lambda n: (3 * torch.randn(n)).clamp(-6, 6),
}


def batches(count: int = 4) -> list[torch.Tensor]:
    """Batches whose spread grows, so that running rules differ from taking the last one."""
    return [torch.randn(2, 3, 8, 8) * (i + 1) for i in range(count)]


def observed(observer, seen):
    for batch in seen:
        observer.update(batch)
    return tuple(float(v) for v in observer.result())


def averaged(ranges):
    low, high = ranges[0]
    for new_low, new_high in ranges[1:]:
        low, high = 0.9 * low + 0.1 * new_low, 0.9 * high + 0.1 * new_high
    return low, high


def error_of(values: np.ndarray, reach: float, bits: int, signed: bool, power: float) -> float:
    lo, hi = int_range(bits, signed)
    step = reach / hi
    return float((np.abs(np.clip(np.rint(values / step), lo, hi) * step - values) ** power).mean())


def direct_error(values: np.ndarray, bits: int, signed: bool, power: float) -> float:
    tried = np.abs(values).max() * (1 - 0.01 * np.arange(TENSOR_CANDIDATES))
    return min(error_of(values, reach, bits, signed, power) for reach in tried)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_histogram_is_as_good_as_the_values(name, signed, bits, power):
    x = VALUES[name](20_000)
    x = x if signed else x.clamp_min(0)
    found = observed(make_observer("mse", bits, signed, power=power), x.split(5_000))
    values = x.double().numpy()
    reach = max(-found[0], found[1])
    assert error_of(values, reach, bits, signed, power) <= direct_error(values, bits, signed, power) * (1 + TOLERANCE)


def test_mse_shrinks_both_ends_by_one_of_its_factors():
    x = torch.cat([torch.randn(10_000), torch.tensor([40.0, -30.0])])
    low, high = observed(make_observer("mse", 4, True), [x])
    assert low / -30 == pytest.approx(high / 40)
    assert high < 20
    assert high / 40 * 100 == pytest.approx(round(high / 40 * 100), abs=1e-4)


def test_ema_of_searched_ranges_starts_at_the_first_batch():
    seen = batches()
    for method, alone in (("ema_mse", "mse"), ("ema_quantile", "ema_quantile")):
        single = [observed(make_observer(alone, 4, True), [batch]) for batch in seen]
        np.testing.assert_allclose(observed(make_observer(method, 4, True), seen), averaged(single), rtol=1e-6)


@pytest.mark.parametrize("method", ["ema", "ema_minmax"])
def test_both_names_of_the_average_of_extremes(method):
    seen = batches()
    expected = averaged([(float(b.min()), float(b.max())) for b in seen])
    np.testing.assert_allclose(observed(make_observer(method, 8, True), seen), expected, rtol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_quantile_is_the_middle_of_the_bin_that_reaches_it(signed):
    x = torch.distributions.StudentT(2.0).sample((300_000,))
    x = x if signed else x.abs()
    magnitudes = np.abs(x.double().numpy())
    counts, edges = np.histogram(magnitudes, HISTOGRAM_BINS, (0, magnitudes.max()))
    place = int(np.argmax(np.cumsum(counts) >= QUANTILE * len(magnitudes)))
    c = (edges[place] + edges[place + 1]) / 2
    found = observed(make_observer("ema_quantile", 8, signed), [x])
    width = edges[1]  # float32 may put a value on a bin's edge into its neighbour
    np.testing.assert_allclose(found, (max(float(x.min()), -c), min(float(x.max()), c)), atol=1.01 * width)
    assert found[1] < float(x.max())


def test_kl_cuts_an_outlier_off_and_stays_inside_the_values():
    x = torch.cat([torch.randn(50_000), torch.tensor([50.0])])
    low, high = observed(make_observer("kl", 8, True), x.split(10_000))
    assert 2 < high < 25
    assert low == float(x.min()) or low == -high


def test_histogram_counts_as_numpy_does():
    x = torch.randn(5_000)
    reach = float(x.abs().max())
    for two_sided, values, span in ((False, x.abs(), (0, reach)), (True, x, (-reach, reach))):
        histogram = Histogram(two_sided)
        histogram.add(x, reach)
        expected = np.histogram(values.double().numpy(), len(histogram.counts), span)[0]
        # A value within float32's rounding of an edge may fall to either side.
        assert np.abs(np.cumsum(histogram.counts.numpy()) - np.cumsum(expected)).max() <= 3


def test_histogram_keeps_every_value_where_it_was_when_it_grows():
    for two_sided in (False, True):
        histogram = Histogram(two_sided)
        parts = [torch.rand(100), 5 * torch.rand(100), -100 * torch.rand(100)]
        for part in parts:
            histogram.add(part, float(part.abs().max()))
        assert float(histogram.counts.sum()) == 300
        assert histogram.reach / 2 < 100
        values, counts = histogram.points()
        everything = torch.cat(parts) if two_sided else torch.cat(parts).abs()
        assert float((values * counts).sum()) == pytest.approx(float(everything.sum()), abs=300 * histogram.width)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-30])
def test_constant_tensors_have_a_finite_range(method, signed, value):
    batch = torch.full((7,), value)
    found = observed(make_observer(method, 8, signed), [batch, batch])
    assert all(np.isfinite(found))
    assert found[0] <= max(value, 0)
    assert abs(found[1]) <= 2.5


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_never_forgotten(method):
    seen = batches()
    seen[1][0, 0, 0, 0] = float("nan")
    assert any(np.isnan(observed(make_observer(method, 8, True), seen)))


@pytest.mark.parametrize("method", METHODS)
def test_wide_tensors_are_never_clipped(method):
    seen = batches()
    assert observed(make_observer(method, 16, True), seen) == observed(make_observer("minmax", 16, True), seen)
