"""Observers against numpy formulas over the same batches."""

import numpy as np
import pytest
import torch

from utils.quantization_utils.observers import (
    HISTOGRAM_BINS,
    METHODS,
    MSE_CANDIDATES,
    Mse,
    batch_range,
    is_finite,
    make_observer,
)


def batches(count: int = 4) -> list[torch.Tensor]:
    """Batches whose spread grows, so that running rules differ from taking the last one."""
    return [torch.randn(2, 3, 8, 8) * (i + 1) for i in range(count)]


def observed(observer, seen):
    for batch in seen:
        observer.update(batch)
    return tuple(float(v) for v in observer.result())


def test_minmax_is_the_range_of_all_batches_and_zero():
    seen = batches()
    everything = np.concatenate([b.numpy().ravel() for b in seen])
    assert observed(make_observer("minmax", 8, True), seen) == (float(everything.min()), float(everything.max()))
    assert observed(make_observer("minmax", 8, False), [torch.ones(3)]) == (0.0, 1.0)


def test_ema_starts_at_the_first_batch_and_keeps_nine_tenths():
    seen = batches()
    low, high = (np.float32(v) for v in (seen[0].min(), seen[0].max()))
    for batch in seen[1:]:
        low, high = (0.9 * o + 0.1 * np.float32(n) for o, n in ((low, batch.min()), (high, batch.max())))
    np.testing.assert_allclose(observed(make_observer("ema", 8, True), seen), (low, high), rtol=1e-6)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99, 100.0])
def test_percentile_is_an_order_statistic_of_the_batch(percentile):
    x = torch.randn(997)
    ordered = np.sort(x.numpy())
    rank = min(round(997 * percentile / 100), 997)
    found = batch_range(x, percentile)
    assert (float(found[0]), float(found[1])) == (float(ordered[997 - rank]), float(ordered[rank - 1]))


def test_percentile_observer_averages_those():
    seen = batches(2)
    (a, b), (c, d) = (tuple(float(v) for v in batch_range(batch, 99.0)) for batch in seen)
    found = observed(make_observer("percentile", 8, True, percentile=99.0), seen)
    np.testing.assert_allclose(found, (0.9 * a + 0.1 * c, 0.9 * b + 0.1 * d), rtol=1e-6)


def squared_error(values: np.ndarray, reach: float, bits: int, signed: bool) -> float:
    """Error of quantizing real values with a range."""
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    lowest = -levels if signed else 0
    step = reach / levels
    return float(((np.clip(np.rint(values / step), lowest, levels) * step - values) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_mse_finds_the_best_of_its_candidates(bits, signed):
    seen = [batch if signed else batch.abs() for batch in batches()]
    values = np.concatenate([b.numpy().ravel() for b in seen]).astype(np.float64)
    found = max(abs(v) for v in observed(Mse(bits, signed), seen))
    candidates = np.abs(values).max() * np.linspace(1, 0.05, MSE_CANDIDATES)
    best = min(squared_error(values, c, bits, signed) for c in candidates)
    # A histogram of 2048 bins stands for the values: each moves by at most half a bin.
    blur = len(values) * (np.abs(values).max() / HISTOGRAM_BINS) ** 2
    assert squared_error(values, found, bits, signed) <= best * 1.05 + blur


def test_mse_shrinks_the_range_of_an_outlier():
    x = torch.randn(10_000)
    x[0] = 100.0
    assert max(abs(v) for v in observed(Mse(4, True), [x])) < 50


def test_mse_histogram_keeps_every_value_when_it_grows():
    observer = Mse(8, False)
    for batch in (torch.rand(100), 5 * torch.rand(100), 100 * torch.rand(100)):
        observer.update(batch)
    assert float(observer.counts.sum()) == 300
    assert observer.reach >= observer.high


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [False, True])
def test_constant_tensors_have_a_finite_range(method, signed):
    for value in (0.0, 2.5, -2.5):
        low, high = make_observer(method, 8, signed), torch.full((7,), value)
        found = observed(low, [high, high])
        assert all(np.isfinite(found))
        assert found[0] <= max(value, 0) or value == 0


def test_wide_tensors_are_never_clipped():
    for method in METHODS:
        seen = batches()
        found = observed(make_observer(method, 16, True), seen)
        assert found == observed(make_observer("minmax", 16, True), seen)


def test_is_finite():
    one = torch.ones(())
    assert is_finite(-one, one)
    assert not is_finite(one * float("nan"), one)
    assert not is_finite(one, one * float("inf"))
