"""Float islands against torch's functions and against exact fractions."""

import numpy as np
import pytest
import torch

from utils.integer_graph.float_islands import FUNCTIONS, source_positions
from utils.integer_graph.ops import OPS

EPSILON = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("size", [[1, 1], [2, 9], [7, 5], [3, 3]])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 3)])
def test_interpolation_is_torch_s(shape, size, align):
    x = np.random.default_rng(0).normal(size=(2, 3, *shape)).astype(np.float32)
    got = FUNCTIONS["interpolate"].compute(x, {"size": size, "align_corners": align})
    wide = torch.from_numpy(x).double()
    expected = torch.nn.functional.interpolate(wide, size, mode="bilinear", align_corners=align).numpy()
    assert got.dtype == np.float32
    # rounding of the weight, and of three operations, on each axis
    np.testing.assert_allclose(got, expected, rtol=0, atol=8 * EPSILON * np.abs(x).max())


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("out", range(1, 8))
def test_positions_stay_inside(size, out):
    for align in (False, True):
        positions = source_positions(size, out, align)
        assert len(positions) == out
        assert positions.min() >= 0
        assert positions.max() <= size - 1


def test_softmax():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 3)).astype(np.float32) * 50
    got = FUNCTIONS["softmax"].compute(x, {})
    expected = torch.softmax(torch.from_numpy(x).double(), 1).numpy()
    np.testing.assert_allclose(got, expected, rtol=EPSILON, atol=1e-38)


def test_the_node_dequantizes_and_quantizes(builder):
    b = builder(0)
    x = b.image((3, 2, 2))
    attrs = {"bits": 8, "signed": False, "lo": 0, "hi": 255}
    node = b.emit("float_op", [x], attrs={**attrs, "function": "softmax", "input_scale": 0.25, "inverse_scale": 255.0})
    values = b.rng.integers(x.type.lo, x.type.hi, (2, 3, 2, 2))
    shares = torch.softmax(torch.from_numpy(values) * 0.25, 1).numpy()
    assert np.abs(OPS["float_op"].compute([values], node) - shares * 255).max() <= 0.5 + 255 * 2 * EPSILON
