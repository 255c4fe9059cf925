"""Every form of the rescaling, every pointwise op, against the definition."""

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import KERNEL_TARGETS, check, clamp_attrs, finished, image
from tvm_benchmark.isa import Target
from tvm_benchmark.pointwise import block_channels, block_start, blocks, rescale_mode
from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)

# Mode -> multiplier and shift of two kinds of channels, rounding.  Operands are 16-bit.
FORMS = {
    "narrow": ((3, 5), (6, 9), "up"),
    "high": ((1 << 24, (1 << 31) - 1), (32, 32), "up"),
    "pairs": ((1 << 30, (1 << 30) + 12345), (40, 31), "up"),
    "wide": ((1 << 20, (1 << 31) - 1), (25, 33), "even"),
}


def signed16(channels: int) -> Node:
    return image((channels, 3, 5), bits=16, signed=True)


def rescaled(x: Node, form: str) -> Node:
    (m, e, rounding), channels = FORMS[form], x.type.shape[0]
    arrays = {"multiplier": np.resize(m, channels).astype(np.int32), "shift": np.resize(e, channels).astype(np.uint8)}
    return make_node("y", "requantize", [x], attrs=clamp_attrs(16, rounding=rounding), arrays=arrays)


@EACH
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_rescaling(target: Target, form: str) -> None:
    x = signed16(18)
    y = rescaled(x, form)
    assert rescale_mode(y, (x.type.lo, x.type.hi)) == form
    check(finished([x, y]), target)


@EACH
def test_results_beyond_int32_before_the_clamp(target: Target) -> None:
    x = signed16(3)
    arrays = {"multiplier": np.array([1 << 30], np.int32), "shift": np.array([4], np.uint8)}
    y = make_node("y", "requantize", [x], attrs=clamp_attrs(16), arrays=arrays)
    assert rescale_mode(y, (x.type.lo, x.type.hi)) == "wide"
    both = {f"{key}{i}": value for key, value in arrays.items() for i in (0, 1)}
    z = make_node("z", "add", [x, y], attrs=clamp_attrs(16), arrays=both)
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
