"""Windows of average pools against torch's own pooling."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.quantization_utils.windows import AvgWindows, adaptive_windows, pool_windows


def pooled(x: torch.Tensor, windows: AvgWindows) -> np.ndarray:
    """Sums over the windows divided by their areas."""
    rows = list(zip(windows.row_start, windows.row_stop, strict=True))
    cols = list(zip(windows.col_start, windows.col_stop, strict=True))
    sums = [[x[..., r0:r1, c0:c1].sum((-2, -1)) for c0, c1 in cols] for r0, r1 in rows]
    total = torch.stack([torch.stack(row, -1) for row in sums], -2)
    return (total / torch.from_numpy(windows.area)).numpy()


AXIS = list(itertools.product((1, 2, 3), (1, 2, 3), (0, 1)))  # kernel, stride, padding


@pytest.mark.parametrize("size", [(5, 5), (6, 4), (3, 7)])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_every_small_average_pool(size, ceil_mode, include):
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    for (kh, sh, ph), (kw, sw, pw) in itertools.product(AXIS, AXIS):
        if 2 * ph > kh or 2 * pw > kw:
            continue
        expected = F.avg_pool2d(x, (kh, kw), (sh, sw), (ph, pw), ceil_mode, include)
        windows = pool_windows(size, tuple(expected.shape[2:]), (kh, kw), (sh, sw), (ph, pw), include, None)
        np.testing.assert_allclose(pooled(x, windows), expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("include", [False, True])
def test_divisor_override(include):
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    expected = F.avg_pool2d(x, 3, 2, 1, False, include, divisor_override=7)
    windows = pool_windows((6, 5), tuple(expected.shape[2:]), (3, 3), (2, 2), (1, 1), include, 7)
    np.testing.assert_allclose(pooled(x, windows), expected.numpy(), rtol=1e-12)
    assert (windows.area == 7).all()


def test_every_small_adaptive_pool():
    for source, target in itertools.product(
        itertools.product(range(1, 8), (3, 5)), itertools.product(range(1, 9), (1, 2, 4))
    ):
        x = torch.randn(1, 1, *source, dtype=torch.float64)
        expected = F.adaptive_avg_pool2d(x, target)
        np.testing.assert_allclose(
            pooled(x, adaptive_windows(source, target)), expected.numpy(), rtol=1e-12, atol=1e-12
        )


def test_areas_are_integers_of_the_output_shape():
    windows = adaptive_windows((5, 7), (2, 3))
    assert windows.area.dtype == np.int64
    assert windows.area.shape == (2, 3)
