"""Every form of the rescaling, every pointwise op, against the definition."""

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import (
    KERNEL_TARGETS,
    check,
    clamp_attrs,
    finished,
    image,
    relu,
    requantized,
    unclamped_sum,
)
from tvm_benchmark.isa import Target
from tvm_benchmark.pointwise import block_channels, block_start, blocks, rescale_mode
from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node
from utils.quantization_utils.dyadic import ROUNDING

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)

# Mode, multiplier and shift of two kinds of channels, rounding.  Operands are 16-bit.
FORMS = (
    ("narrow", (3, 5), (6, 9), "up"),
    ("narrow", (3, 5), (6, 9), "down"),
    ("high", (1 << 24, (1 << 31) - 1), (32, 32), "up"),
    ("high", (1 << 24, (1 << 31) - 1), (32, 32), "down"),
    ("high", (1 << 24, (1 << 31) - 1), (32, 37), "down"),
    ("high", ((1 << 30) + 1, (1 << 31) - 1), (32, 32), "even"),
    ("high", ((1 << 30) + 2, 1), (33, 62), "even"),
    ("pairs", (1 << 30, (1 << 30) + 12345), (40, 31), "up"),
    ("pairs", (1 << 30, (1 << 30) + 12345), (40, 31), "down"),
    ("pairs", ((1 << 31) - 1, (1 << 30) + 12345), (62, 31), "even"),
    ("wide", (1 << 20, (1 << 31) - 1), (25, 33), "even"),
    ("pairs", (1 << 30, 1), (30, 62), "even"),
)
ROUNDINGS = pytest.mark.parametrize("rounding", list(ROUNDING))


def signed16(channels: int) -> Node:
    return image((channels, 3, 5), bits=16, signed=True)


def rescaled(x: Node, m: tuple[int, int], e: tuple[int, int], rounding: str) -> Node:
    channels = x.type.shape[0]
    arrays = {"multiplier": np.resize(m, channels).astype(np.int32), "shift": np.resize(e, channels).astype(np.uint8)}
    return make_node("y", "requantize", [x], attrs=clamp_attrs(16, rounding=rounding), arrays=arrays)


@EACH
@pytest.mark.parametrize("row", FORMS, ids=lambda row: f"{row[0]} {row[3]} {row[2]}")
def test_forms_of_rescaling(target: Target, row: tuple) -> None:
    form, x = row[0], signed16(18)
    y = rescaled(x, *row[1:])
    assert rescale_mode(y, (x.type.lo, x.type.hi)) == form
    check(finished([x, y]), target)


@EACH
@ROUNDINGS
def test_results_beyond_int32_before_the_clamp(target: Target, rounding: str) -> None:
    x, attrs = signed16(3), clamp_attrs(16, rounding=rounding)
    arrays = {"multiplier": np.array([1 << 30], np.int32), "shift": np.array([4], np.uint8)}
    y = make_node("y", "requantize", [x], attrs=attrs, arrays=arrays)
    assert rescale_mode(y, (x.type.lo, x.type.hi)) == "wide"
    both = {f"{key}{i}": value for key, value in arrays.items() for i in (0, 1)}
    z = make_node("z", "add", [x, y], attrs=attrs, arrays=both)
    check(finished([x, y, z]), target)


@EACH
def test_products_beyond_int32(target: Target) -> None:
    x = image((20, 2, 3), bits=16, signed=False)
    y = make_node("y", "clip", [x], arrays={"lo": np.array([9], np.int32), "hi": np.array([65000], np.int32)})
    arrays = {"multiplier": np.array([1 << 20], np.int32), "shift": np.array([38], np.uint8)}
    check(finished([x, y, make_node("z", "mul", [x, y], attrs=clamp_attrs(16, signed=False), arrays=arrays)]), target)


@EACH
@pytest.mark.parametrize("channels", [5, 21])
def test_clip_of_channels(target: Target, channels: int) -> None:
    x = image((channels, 2, 3), signed=True)
    bounds = {"lo": np.arange(channels, dtype=np.int32) - 60, "hi": np.arange(channels, dtype=np.int32) * 2}
    check(finished([x, make_node("y", "clip", [x], arrays=bounds)]), target)


@EACH
def test_a_sum_of_32_bits_whose_branches_are_greatest_in_other_channels(target: Target) -> None:
    """Both branches reach about 3 * 2**29, their sum hardly more: one channel takes the first, the other the second."""
    x = signed16(2)
    attrs = {"rounding": "even", "lo": None, "hi": None, "bits": 32, "signed": True}
    arrays = {f"multiplier{i}": np.full(2, 3 << 29, np.int32) for i in (0, 1)}
    arrays |= {"shift0": np.array([15, 30], np.uint8), "shift1": np.array([30, 15], np.uint8)}
    y = make_node("y", "add", [x, x], attrs=attrs, arrays=arrays)
    assert 2**30 < y.type.hi < 2**31
    check(finished([x, y, relu(y), requantized(relu(y), rounding="even")]), target)


@EACH
@pytest.mark.parametrize("channels", [5, 40])
def test_sums_that_are_not_clamped(target: Target, channels: int) -> None:
    """Stored in 32 bits, clipped, rescaled to 8 bits, and read again by the next sum."""
    x = image((channels, 3, 4), bits=16, signed=True)
    one = relu(unclamped_sum("one", [x, x], 1 << 20))
    two = relu(unclamped_sum("two", [one, x], 1 << 28))
    nodes = [x, unclamped_sum("one", [x, x], 1 << 20), one, unclamped_sum("two", [one, x], 1 << 28), two]
    check(finished([*nodes, requantized(two, rounding="even")]), target, batch=2)


TABLES = {
    "64 signed bytes": (6, -128, 127, 8, False),
    "256 unsigned bytes": (8, 0, 255, 8, False),
    "words": (8, -30000, 30000, 16, False),
    "of channels": (8, -128, 127, 8, True),
}


@EACH
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_tables(target: Target, table: tuple, channels: int) -> None:
    bits, lo, hi, out, each = table
    x = image((channels, 3, 4), bits=bits, signed=True)
    size = (channels, 1 << bits) if each else 1 << bits
    values = np.random.default_rng(0).integers(lo, hi, size, endpoint=True).astype(np.int16)
    attrs = {"offset": -(1 << (bits - 1)), "bits": out, "signed": lo < 0}
    check(finished([x, make_node("y", "lookup", [x], attrs=attrs, arrays={"table": values})]), target)


@EACH
@pytest.mark.parametrize("classes", [1, 10, 37])
def test_logits_of_classes(target: Target, classes: int) -> None:
    x = image((classes, 1, 1), bits=16, signed=True)
    flat = make_node("flat", "reshape", [x], attrs={"shape": [classes]})
    scale = np.random.default_rng(0).uniform(0.01, 2, classes).astype(np.float32)
    graph = finished([x])
    logits = make_node("logits", "logits", [flat], arrays={"scale": scale})
    check(type(graph)((x, flat, logits), {}), target, batch=3)


def test_the_last_block_ends_with_the_last_channel() -> None:
    assert blocks(37) == 3
    assert block_start("b", 37) == "T.min((b)*16, 21)"
    assert block_channels(37)[-1].tolist() == list(range(21, 37))
    assert block_channels(3)[0].tolist() == [0, 1, *[2] * 14]
