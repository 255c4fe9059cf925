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


@pytest.mark.parametrize("scale", [0.01, 0.75, 30.0])
def test_instance_norm_is_torch_s(scale):
    rng = np.random.default_rng(0)
    scale = float(np.float32(scale))
    real = rng.integers(-128, 128, (2, 3, 5, 4)).astype(np.float32) * np.float32(scale)
    real[0, 1] = real[0, 1, 0, 0]  # a constant channel
    weight, bias = rng.normal(size=(2, 3))
    attrs = {"input_scale": scale, "eps": 1e-5, "weight": weight.tolist(), "bias": bias.tolist()}
    got = FUNCTIONS["instance_norm"].compute(real, attrs)
    wide = (torch.from_numpy(a.astype(np.float64)) for a in (real, weight, bias))
    x, w, b = wide
    expected = torch.nn.functional.instance_norm(x, weight=w, bias=b, eps=1e-5).numpy()
    assert got.dtype == np.float32
    # The float32 values are integers times the scale only up to their own rounding.
    np.testing.assert_allclose(got, expected, rtol=0, atol=64 * EPSILON * max(np.abs(expected).max(), 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_local_response_norm_is_torch_s(size):
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 2)).astype(np.float32) * 3
    attrs = {"size": size, "alpha": 0.3, "beta": 0.75, "k": 2.0}
    got = FUNCTIONS["local_response_norm"].compute(x, attrs)
    expected = torch.nn.functional.local_response_norm(torch.from_numpy(x).double(), **attrs).numpy()
    np.testing.assert_allclose(got, expected, rtol=2 * EPSILON, atol=1e-30)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"function": "instance_norm", "eps": 1e-5, "weight": [1.0], "bias": [0.0, 0.0, 0.0]}, "weight must list"),
        ({"function": "instance_norm", "eps": 1e-5}, "lacks the attributes"),
        ({"function": "local_response_norm", "size": 3, "alpha": 1.0, "beta": 1.0}, "lacks the attributes"),
    ],
)
def test_islands_check_their_attributes(builder, attrs, message):
    b = builder(0)
    storage = {"bits": 8, "signed": True, "lo": -128, "hi": 127, "input_scale": 0.25, "inverse_scale": 4.0}
    with pytest.raises(ValueError, match=message):
        b.emit("float_op", [b.image((3, 2, 2))], attrs={**storage, **attrs})
