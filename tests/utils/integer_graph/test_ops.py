"""Every broken invariant is refused with a message that names the node, what was got and what is expected."""

import dataclasses

import numpy as np
import pytest

from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import OPS, infer_type, make_node, verify

STORAGE = {"bits": 8, "signed": True}
ROUNDED = {"rounding": "up", "lo": -128, "hi": 127, **STORAGE}
CONV = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "weight_bits": 8}


def image(shape=(2, 4, 4)):
    table = np.zeros((shape[0], 256), np.int16) + np.arange(-128, 128, dtype=np.int16)
    return make_node("in", "image", attrs={"shape": shape, **STORAGE}, arrays={"table": table}, scale=0.5)


def weights(shape, value=1, bias=0):
    return {"weight": np.full(shape, value, np.int8), "bias": np.full(shape[0], bias, np.int32)}


def dyadic(m=1 << 20, e=24, count=1, suffix=""):
    return {f"multiplier{suffix}": np.full(count, m, np.int32), f"shift{suffix}": np.full(count, e, np.uint8)}


def chain():
    """image, conv2d, requantize, reshape, linear, logits."""
    x = image()
    nodes = [x, make_node("conv", "conv2d", [x], attrs=CONV, arrays=weights((3, 2, 4, 4)))]
    nodes.append(make_node("q", "requantize", nodes[-1:], attrs=ROUNDED, arrays=dyadic(), scale=0.25))
    nodes.append(make_node("flat", "reshape", nodes[-1:], attrs={"shape": [3]}))
    nodes.append(make_node("fc", "linear", nodes[-1:], attrs={"weight_bits": 8}, arrays=weights((5, 3))))
    nodes.append(make_node("out", "logits", nodes[-1:], arrays={"scale": np.ones(5, np.float32)}))
    return nodes


def test_the_chain_verifies_and_scales_are_inherited():
    nodes = chain()
    verify(Graph(tuple(nodes)))
    assert [n.scale for n in nodes] == [0.5, None, 0.25, 0.25, None, None]


def test_random_graphs_verify(random_graph):
    for seed in range(40):
        verify(random_graph(seed))


def test_tuples_become_lists():
    assert image((2, 4, 4)).attrs["shape"] == [2, 4, 4]


def replaced(index, **fields):
    def change(nodes):
        nodes[index] = dataclasses.replace(nodes[index], **fields)
        return nodes

    return change


def array(index, key, value):
    def change(nodes):
        arrays = {**nodes[index].arrays, key: value}
        nodes[index] = dataclasses.replace(nodes[index], arrays=arrays)
        return nodes

    return change


def attr(index, key, value):
    def change(nodes):
        nodes[index] = dataclasses.replace(nodes[index], attrs={**nodes[index].attrs, key: value})
        return nodes

    return change


def type_field(index, **fields):
    def change(nodes):
        nodes[index] = dataclasses.replace(nodes[index], type=dataclasses.replace(nodes[index].type, **fields))
        return nodes

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n[:1], "1 nodes, expected an input and the logits"),
        (replaced(2, name="conv"), "conv: the name is used twice"),
        (replaced(1, inputs=("q",)), r"conv: the inputs \['q'\] are not defined before it"),
        (lambda n: n[1:], "conv: the inputs"),
        (replaced(0, op="reshape"), "in: op reshape: the first node"),
        (lambda n: [n[0], dataclasses.replace(n[0], name="again"), *n[1:]], "again: op image: the first node"),
        (lambda n: n[:-1], "fc: op linear: the last node"),
        (replaced(2, op="rescale"), "q: op 'rescale' is unknown, expected one of image"),
        (replaced(2, scale=-1.0), "q: the scale is -1.0"),
        (type_field(1, hi=5), "conv: the stored type is .*hi=5.*, expected"),
        (type_field(2, lo=-127), "q: the stored type is .*lo=-127"),
        (type_field(3, shape=(4,)), "flat: the stored type"),
        (type_field(0, signed=False), "in: the stored type"),
        (array(1, "weight", np.zeros((3, 2, 4, 4), np.int16)), "conv: op conv2d got arrays .*weight: int16.*expected"),
        (array(1, "extra", np.zeros(3, np.int16)), "conv: op conv2d got arrays .*extra"),
        (array(1, "bias", np.zeros(4, np.int32)), r"conv: array bias has shape \[4\], expected \[3\]"),
        (array(1, "weight", np.ones((3, 1, 4, 4), np.int8)), "conv: 2 input and 3 output channels in 1 groups"),
        (attr(1, "weight_bits", 1), "conv: attribute weight_bits is 1"),
        (attr(1, "groups", 3), "conv: attribute groups is 3"),
        (attr(1, "stride", [0, 1]), r"conv: attribute stride is \[0, 1\], expected 2 integers >= 1"),
        (attr(1, "padding", [1, 1]), "conv: attribute padding"),
        (array(1, "bias", np.full(3, 2**31 - 1, np.int32)), "conv: the accumulator may reach .*, expected below 2"),
        (attr(2, "rounding", "away"), "q: attribute rounding is 'away', expected one of up, even, down"),
        (attr(2, "lo", 200), "q: the clamp .* is empty"),
        (attr(2, "hi", 200), "q: values reach .*200.*expected within"),
        (attr(2, "lo", 1.5), "q: attribute lo is 1.5, expected an integer or null"),
        (attr(2, "bits", 40), "q: attribute bits is 40"),
        (attr(2, "signed", 1), "q: attribute signed is 1"),
        (
            lambda n: attr(2, "bits", 32)(attr(2, "signed", False)(n)),
            "q: attribute bits is 32 without a sign, expected",
        ),
        (array(2, "multiplier", np.array([0], np.int32)), "q: array multiplier has the value 0"),
        (array(2, "multiplier", np.array([1, 2], np.int32)), r"q: array multiplier has shape \[2\], expected \[3\]"),
        (array(2, "shift", np.array([63], np.uint8)), r"q: array shift has the value \[63\], expected 1..62"),
        (array(2, "shift", np.array([0], np.uint8)), "q: array shift has the value"),
        (array(2, "shift", np.array([1, 1], np.uint8)), "q: array shift has shape"),
        (attr(3, "shape", [4]), "flat: shape .* cannot become"),
        (array(4, "weight", np.ones((5, 4), np.int8)), "fc: array weight has shape"),
        (array(5, "scale", np.full(5, np.nan, np.float32)), "out: array scale holds"),
        (array(5, "scale", np.ones(4, np.float32)), r"out: array scale has shape \[4\], expected \[5\] or \[1\]"),
    ],
)
def test_verify_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        verify(Graph(tuple(change(chain()))))


def test_weights_beyond_their_width_are_refused():
    with pytest.raises(ValueError, match=r"conv: weights reach \[-9, -9\], expected within \[-8, 7\] of 4 bits"):
        make_node("conv", "conv2d", [image()], attrs={**CONV, "weight_bits": 4}, arrays=weights((1, 2, 1, 1), -9))


def test_a_sum_that_only_its_bias_brings_back_is_refused():
    """An engine may add the bias last, so the sum without it must fit int32 too."""
    table = np.tile(np.arange(256, dtype=np.int16), (300, 1))
    unsigned = {"bits": 8, "signed": False}
    x = make_node("in", "image", attrs={"shape": [300, 1, 1], **unsigned}, arrays={"table": table})
    wide = {"rounding": "up", "bits": 16, "signed": False, "lo": None, "hi": None}
    x = make_node("wide", "requantize", [x], attrs=wide, arrays=dyadic(1 << 30, 22))
    top = 300 * 127 * (255 << 8)
    bias = -(2**31) + 1
    assert top >= 2**31
    assert abs(top + bias) < 2**31
    with pytest.raises(ValueError, match=f"conv: the accumulator may reach {top}, expected below"):
        make_node("conv", "conv2d", [x], attrs=CONV, arrays=weights((1, 300, 1, 1), 127, bias))


def test_a_rescaled_value_beyond_48_bits_is_refused():
    x = make_node("wide", "requantize", [image()], attrs={**ROUNDED, "bits": 32, "lo": None}, arrays=dyadic(1 << 30, 7))
    with pytest.raises(ValueError, match=r"y: the rescaled value may reach .* before its clamp, expected below 2"):
        make_node("y", "requantize", [x], attrs=ROUNDED, arrays=dyadic(1 << 30, 1))


def summed(acc, m, e):
    """Accumulators plus themselves, not clamped, in 32 bits."""
    attrs = {"rounding": "even", "bits": 32, "signed": True, "lo": None, "hi": None}
    return make_node("y", "add", [acc, acc], attrs=attrs, arrays=dyadic(m, e, 3, "0") | dyadic(m, e, 3, "1"))


def test_an_unclamped_sum_keeps_its_bounds():
    """Sums of 32 products of 8-bit values reach about 2**19."""
    conv = make_node("conv", "conv2d", [image()], attrs=CONV, arrays=weights((3, 2, 4, 4), 127, 5))
    assert conv.type.hi == 32 * 127 * 127 + 5
    low, high = 32 * 127 * -128 + 5, 32 * 127 * 127 + 5
    for m, e, factor in [(1 << 30, 30, 2), (1 << 30, 20, 2048), (1 << 30, 19, 4096)]:
        total = summed(conv, m, e)
        assert (total.type.bits, total.type.signed) == (32, True)
        assert (total.type.lo, total.type.hi) == (low * factor, high * factor)
    clipped = {"lo": np.zeros(1, np.int32), "hi": np.full(1, 2**31 - 1, np.int32)}
    relu = make_node("relu", "clip", [total], arrays=clipped)
    assert (relu.type.bits, relu.type.lo, relu.type.hi) == (32, 0, high * 4096)


def test_an_unclamped_sum_that_may_leave_32_bits_is_refused():
    conv = make_node("conv", "conv2d", [image()], attrs=CONV, arrays=weights((3, 2, 4, 4), 127, 5))
    reach = (32 * 127 * 127 + 5) * 8192
    message = rf"^y: values reach \[-.*, {reach}\], expected within \[-2147483648, 2147483647\] of 32 signed bits"
    with pytest.raises(ValueError, match=message):
        summed(conv, 1 << 30, 18)


def node_of(op, inputs, **parts):
    return lambda: make_node("n", op, inputs, **parts)


POOL = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False}
WINDOWS = {"row_start": [0], "row_stop": [4], "col_start": [0], "col_stop": [4], **ROUNDED}
AREA = dyadic(count=(1, 1))
ISLAND = {"input_scale": 1.0, "inverse_scale": 1.0, "lo": 0, "hi": 1, **STORAGE}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (node_of("image", [], attrs={"shape": [3]}), r"lacks the attributes \['bits', 'signed'\]"),
        (
            node_of("image", [], attrs={"shape": [3], **STORAGE}, arrays={"table": np.zeros((2, 256), np.int16)}),
            "table",
        ),
        (node_of("requantize", [], attrs=ROUNDED, arrays=dyadic()), "got 0 inputs, expected 1"),
        (node_of("add", [], attrs=ROUNDED), "got 0 inputs, expected one or more"),
        (
            node_of("add", [image(), image((2, 4, 5))], attrs=ROUNDED, arrays=dyadic(suffix="0") | dyadic(suffix="1")),
            "equal",
        ),
        (
            node_of(
                "concat", [image(), image((2, 4, 5))], attrs=ROUNDED, arrays=dyadic(suffix="0") | dyadic(suffix="1")
            ),
            "but for",
        ),
        (node_of("mul", [image(), image((2, 3, 4))], attrs=ROUNDED, arrays=dyadic()), "that broadcast"),
        (node_of("mul", [image(), image((2, 1, 1))], attrs=ROUNDED, arrays=dyadic(count=2)), r"expected \[1\]"),
        (node_of("clip", [image()], arrays={"lo": np.ones(1, np.int32), "hi": np.zeros(1, np.int32)}), "lo <= hi"),
        (node_of("clip", [image()], arrays={"lo": np.full(1, -200, np.int32), "hi": np.zeros(1, np.int32)}), "leave"),
        (node_of("max_pool", [image()], attrs={**POOL, "kernel": [5, 2]}), "larger than the padded input 4"),
        (node_of("max_pool", [image()], attrs={**POOL, "padding": [2, 0]}), "padding 2 is too much"),
        (node_of("max_pool", [image()], attrs={**POOL, "ceil_mode": 1}), "ceil_mode is 1"),
        (node_of("avg_pool", [image()], attrs={**WINDOWS, "row_stop": [5]}, arrays=AREA), "row_start and row_stop"),
        (node_of("avg_pool", [image()], attrs={**WINDOWS, "col_start": [4]}, arrays=AREA), "col_start and col_stop"),
        (
            node_of("lookup", [image()], attrs={"offset": 0, **STORAGE}, arrays={"table": np.zeros(256, np.int16)}),
            "covers",
        ),
        (
            node_of(
                "lookup", [image()], attrs={"offset": -128, **STORAGE}, arrays={"table": np.zeros((3, 256), np.int16)}
            ),
            "T",
        ),
        (
            node_of(
                "lookup", [image()], attrs={"offset": -128, **STORAGE}, arrays={"table": np.full(256, 300, np.int16)}
            ),
            "reach",
        ),
        (node_of("gather", [image()], arrays={"index": np.array([2], np.int32)}), r"channels in \[0, 2\)"),
        (node_of("pad2d", [image()], attrs={"padding": [-2, -2, 0, 0]}), "leaves nothing"),
        (node_of("upsample", [image()], attrs={"scale": [0, 1]}), "scale"),
        (node_of("linear", [image()], attrs={"weight_bits": 8}, arrays=weights((2, 32))), r"expected \(K,\)"),
        (
            node_of("conv2d", [image((2, 3, 3))], attrs=CONV, arrays=weights((1, 2, 4, 4))),
            "larger than the padded input",
        ),
        (
            node_of("quantize", [], attrs={"shape": [3], "inverse_scale": 0.1, "lo": 0, "hi": 1, **STORAGE}),
            "inverse_scale",
        ),
        (
            node_of("quantize", [], attrs={"shape": [3], "inverse_scale": 0.5, "lo": 0, "hi": 2**24 + 1, **STORAGE}),
            r"attribute hi is 16777217, expected an integer in \[-16777216, 16777216\]",
        ),
        (
            node_of("float_op", [image()], attrs={**ISLAND, "function": "exp"}),
            "'exp' is unknown, expected one of softmax",
        ),
        (node_of("float_op", [image()], attrs={**ISLAND, "function": "interpolate"}), "lacks the attributes"),
        (
            node_of("float_op", [image()], attrs={**ISLAND, "function": "softmax", "input_scale": 0.1}),
            "input_scale is 0.1",
        ),
    ],
)
def test_make_node_refuses(build, message):
    with pytest.raises(ValueError, match=r"^n: ") as caught:
        build()
    assert caught.match(message)


def test_a_node_that_reads_logits_is_refused():
    nodes = chain()
    with pytest.raises(ValueError, match="reads float32"):
        make_node("n", "reshape", nodes[-1:], attrs={"shape": [5]})


def test_bounds_follow_the_clamp_and_the_interval():
    x = image()
    q = make_node("q", "requantize", [x], attrs={**ROUNDED, "lo": None, "hi": 3}, arrays=dyadic(1 << 20, 21))
    assert (q.type.lo, q.type.hi) == (-64, 3)
    two = {**dyadic(1 << 20, 21, suffix="0"), **dyadic(1 << 20, 22, suffix="1")}
    total = make_node("add", "add", [x, x], attrs={**ROUNDED, "lo": None, "hi": None}, arrays=two)
    assert (total.type.lo, total.type.hi) == (-96, 64 + 32)
    square = make_node("mul", "mul", [x, x], attrs={**ROUNDED, "bits": 16, "lo": None, "hi": None}, arrays=dyadic(1, 1))
    assert (square.type.lo, square.type.hi) == (-128 * 127 // 2, 128 * 128 // 2)


def test_infer_type_is_what_verify_uses():
    node = chain()[2]
    source = chain()[1].type
    assert infer_type(node.op, [source], node.attrs, node.arrays) == node.type
    assert isinstance(node, Node)
    assert set(OPS) >= {"image", "logits"}
