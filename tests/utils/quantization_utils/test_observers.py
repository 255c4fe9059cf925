"""Extremes and their averages against numpy formulas over the same batches."""

import numpy as np
import pytest
import torch

from utils.quantization_utils.observers import Ema, MinMax, batch_range, is_finite


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
    assert observed(MinMax(), seen) == (float(everything.min()), float(everything.max()))
    assert observed(MinMax(), [torch.ones(3)]) == (0.0, 1.0)


def test_ema_starts_at_the_first_batch_and_keeps_nine_tenths():
    seen = batches()
    low, high = (np.float32(v) for v in (seen[0].min(), seen[0].max()))
    for batch in seen[1:]:
        low, high = (0.9 * o + 0.1 * np.float32(n) for o, n in ((low, batch.min()), (high, batch.max())))
    np.testing.assert_allclose(observed(Ema(), seen), (low, high), rtol=1e-6)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99, 100.0])
def test_percentile_is_an_order_statistic_of_the_batch(percentile):
    x = torch.randn(997)
    ordered = np.sort(x.numpy())
    rank = min(round(997 * percentile / 100), 997)
    found = batch_range(x, percentile)
    assert (float(found[0]), float(found[1])) == (float(ordered[997 - rank]), float(ordered[rank - 1]))


def test_an_average_of_any_batch_range():
    seen = batches(2)
    (a, b), (c, d) = (tuple(float(v) for v in batch_range(batch, 99.0)) for batch in seen)
    found = observed(Ema(lambda x: batch_range(x, 99.0)), seen)
    np.testing.assert_allclose(found, (0.9 * a + 0.1 * c, 0.9 * b + 0.1 * d), rtol=1e-6)


def test_the_order_of_batches_matters_to_the_average_alone():
    seen = batches()
    assert observed(Ema(), seen) != observed(Ema(), seen[::-1])
    assert observed(MinMax(), seen) == observed(MinMax(), seen[::-1])


def test_is_finite():
    one = torch.ones(())
    assert is_finite(-one, one)
    assert not is_finite(one * float("nan"), one)
    assert not is_finite(one, one * float("inf"))
