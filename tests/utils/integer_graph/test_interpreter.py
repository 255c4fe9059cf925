"""The interpreter against loops over Python integers, and against the bounds its types promise."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from utils.errors import UserError
from utils.integer_graph import interpreter
from utils.integer_graph.ops import OPS, make_node
from utils.quantization_utils.dyadic import ROUNDING


def value_at(image, c, row, col):
    """Pixel, or 0 outside."""
    _, height, width = image.shape
    return int(image[c, row, col]) if 0 <= row < height and 0 <= col < width else 0


def naive_conv(images, node):
    """The definition of a convolution, one Python integer at a time."""
    weight, bias, attrs = node.arrays["weight"], node.arrays["bias"], node.attrs
    outputs, per_group, kh, kw = weight.shape
    (sh, sw), (dh, dw), (top, _, left, _) = attrs["stride"], attrs["dilation"], attrs["padding"]
    result = np.zeros((len(images), *node.type.shape), np.int64)
    for n, o, i, j in np.ndindex(result.shape):
        first = o // (outputs // attrs["groups"]) * per_group
        total = int(bias[o])
        for c, p, q in product(range(per_group), range(kh), range(kw)):
            pixel = value_at(images[n], first + c, i * sh - top + p * dh, j * sw - left + q * dw)
            total += int(weight[o, c, p, q]) * pixel
        result[n, o, i, j] = total
    return result


def inputs_of(node, count, seed=0):
    """Random integers within a node's bounds."""
    shape = (count, *node.type.shape)
    return np.random.default_rng(seed).integers(node.type.lo, node.type.hi + 1, shape)


@pytest.mark.parametrize("seed", range(30))
def test_convolution(seed, builder):
    b = builder(seed)
    x = b.image((b.integer(1, 4), b.integer(1, 5), b.integer(1, 5)))
    node = b.conv(x)
    values = inputs_of(x, 2, seed)
    np.testing.assert_array_equal(OPS["conv2d"].compute([values], node), naive_conv(values, node))


def naive_pool(image, windows, choose):
    return [[choose([int(image[r, c]) for r in rows for c in cols]) for cols in windows[1]] for rows in windows[0]]


@pytest.mark.parametrize("seed", range(20))
def test_max_pool(seed, builder):
    b = builder(seed)
    x = b.image((1, b.integer(1, 9), b.integer(1, 9)))
    node = b.max_pool(x)
    windows = []
    for axis, (extent, out) in enumerate(zip(x.type.shape[1:], node.type.shape[1:], strict=True)):
        k, s, p, d = (node.attrs[key][axis] for key in ("kernel", "stride", "padding", "dilation"))
        taps = [[i * s - p + t * d for t in range(k)] for i in range(out)]
        windows.append([[r for r in rows if 0 <= r < extent] for rows in taps])
    values = inputs_of(x, 1, seed)
    got = OPS["max_pool"].compute([values], node)
    assert got[0, 0].tolist() == naive_pool(values[0, 0], windows, max)


@pytest.mark.parametrize("seed", range(20))
def test_avg_pool(seed, builder):
    b = builder(seed)
    x = b.image((1, b.integer(1, 9), b.integer(1, 9)))
    node = b.avg_pool(x)
    ends = [(node.attrs[f"{axis}_start"], node.attrs[f"{axis}_stop"]) for axis in ("row", "col")]
    windows = [[list(range(*pair)) for pair in zip(*axis, strict=True)] for axis in ends]
    values = inputs_of(x, 1, seed)
    sums = naive_pool(values[0, 0], windows, sum)
    half = Fraction(0 if node.attrs["rounding"] == "down" else 1, 2)
    for i, j in np.ndindex(*node.type.shape[1:]):
        m, e = int(node.arrays["multiplier"][i, j]), int(node.arrays["shift"][i, j])
        exact = (Fraction(sums[i][j] * m, 1 << e) + half).__floor__()
        expected = min(max(exact, node.attrs["lo"]), node.attrs["hi"])
        assert OPS["avg_pool"].compute([values], node)[0, 0, i, j] == expected


def test_data_movement(builder):
    b = builder(0)
    x = b.image((3, 4, 5))
    v = inputs_of(x, 2)
    assert (
        v == OPS["gather"].compute([v], b.emit("gather", [x], arrays={"index": np.arange(3, dtype=np.int32)}))
    ).all()
    swap = b.emit("gather", [x], arrays={"index": np.array([2, 0, 2], np.int32)})
    np.testing.assert_array_equal(OPS["gather"].compute([v], swap), v[:, [2, 0, 2]])
    crop = OPS["pad2d"].compute([v], b.emit("pad2d", [x], attrs={"padding": [-1, 2, 1, -3]}))
    assert crop.shape == (2, 3, 5, 3)
    np.testing.assert_array_equal(crop[:, :, :3, 1:], v[:, :, 1:, :2])
    assert not crop[:, :, 3:].any()
    assert not crop[..., 0].any()
    big = OPS["upsample"].compute([v], b.emit("upsample", [x], attrs={"scale": [2, 3]}))
    np.testing.assert_array_equal(big, np.kron(v, np.ones((2, 3), np.int64)))
    flat = OPS["reshape"].compute([v], b.emit("reshape", [x], attrs={"shape": [60]}))
    np.testing.assert_array_equal(flat, v.reshape(2, 60))


def test_tables_and_products(builder):
    b = builder(0)
    x = b.image((2, 3, 3))
    v = inputs_of(x, 2)
    assert b.lookup(x).type.bits == 8
    for _ in range(4):
        node = b.lookup(x)
        table, offset = np.broadcast_to(node.arrays["table"], (2, node.arrays["table"].shape[-1])), node.attrs["offset"]
        got = OPS["lookup"].compute([v], node)
        assert all(got[i] == table[i[1], v[i] - offset] for i in np.ndindex(v.shape))
    node = b.mul(x, x)
    got, m, e = OPS["mul"].compute([v, v], node), int(node.arrays["multiplier"][0]), int(node.arrays["shift"][0])
    for i in np.ndindex(v.shape):
        exact = (Fraction(int(v[i]) ** 2 * m, 1 << e) + Fraction(1, 2)).__floor__()
        assert got[i] == min(max(exact, node.attrs["lo"]), node.attrs["hi"])


@pytest.mark.parametrize("rounding", list(ROUNDING))
@pytest.mark.parametrize("seed", range(40))
def test_values_stay_within_the_proven_bounds(seed, rounding, random_graph, random_images):
    graph = random_graph(seed, rounding)
    values = interpreter.run(graph, random_images(graph, 4), keep=True)
    for node in graph.nodes[:-1]:
        value = values[node.name]
        assert value.dtype == np.int64
        assert value.shape == (4, *node.type.shape)
        assert node.type.lo <= value.min()
        assert value.max() <= node.type.hi
    assert values[graph.nodes[-1].name].dtype == np.float32


def test_accumulator_bounds_are_reached(builder):
    """The worst input of each output channel gives exactly the bound of the type."""
    b = builder(3)
    x = b.image((3, 1, 1))
    weight = b.rng.integers(-128, 128, (4, 3, 1, 1), dtype=np.int8)
    attrs = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1, "weight_bits": 8}
    bias = b.rng.integers(-999, 999, 4, dtype=np.int32)
    node = b.emit("conv2d", [x], attrs=attrs, arrays={"weight": weight, "bias": bias})
    corners = np.array(list(product([min(x.type.lo, 0), x.type.hi], repeat=3))).reshape(-1, 3, 1, 1)
    values = OPS["conv2d"].compute([corners], node)
    assert (node.type.lo, node.type.hi) == (values.min(), values.max())


def float_graph_input(shape=(2, 3, 3)):
    attrs = {"shape": shape, "inverse_scale": 4.0, "lo": -8, "hi": 7, "bits": 4, "signed": True}
    return make_node("input", "quantize", attrs=attrs)


def test_quantize_rounds_half_to_even_and_clamps():
    node = float_graph_input((8,))
    x = np.array([[0.125, 0.375, -0.125, -0.375, 100.0, -100.0, np.inf, 1e38]], np.float32)
    assert OPS["quantize"].compute([x], node).tolist() == [[0, 2, 0, -2, 7, -8, 7, 7]]


def test_quantize_refuses_nan():
    with pytest.raises(ValueError, match="holds NaN"):
        OPS["quantize"].compute([np.full((1, 8), np.nan, np.float32)], float_graph_input((8,)))


@pytest.mark.parametrize("change", ["dtype", "shape", "empty", "axes"])
def test_images_that_do_not_fit_are_refused(change, random_graph, random_images):
    graph = random_graph(0)
    images = random_images(graph, 2)
    bad = {
        "dtype": images.astype(np.float32),
        "shape": images[:, :, :, :-1],
        "empty": images[:0],
        "axes": images[0],
    }
    with pytest.raises(UserError, match=r"got images .*, expected uint8 \[N, "):
        interpreter.run(graph, bad[change])
