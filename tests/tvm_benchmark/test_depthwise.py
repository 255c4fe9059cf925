"""Depthwise convolutions of every shape equal the interpreter, on every path."""

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import (
    KERNEL_TARGETS,
    check,
    clamp_attrs,
    depthwise,
    dyadic_arrays,
    finished,
    image,
    relu6,
    requantized,
)
from tvm_benchmark.depthwise_bytes import ByteKernel, Reach, Tile, best_tile, fits_bytes, is_packed
from tvm_benchmark.isa import Target
from tvm_benchmark.plan import make_plan
from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)
FAST = pytest.mark.parametrize("target", [t for t in KERNEL_TARGETS if t.dot == "avx512"], ids=lambda t: t.name)


def with_table(x: Node) -> Node:
    """A table on every value of an 8-bit tensor, results signed."""
    table = np.random.default_rng(3).integers(-128, 127, 256, endpoint=True).astype(np.int16)
    attrs = {"offset": -128 if x.type.signed else 0, "bits": 8, "signed": True}
    return make_node(f"{x.name}.table", "lookup", [x], attrs=attrs, arrays={"table": table})


@EACH
@pytest.mark.parametrize("signed", [False, True])
def test_three_by_three(target: Target, signed: bool) -> None:
    x = image((24, 7, 9), signed=signed)
    y = depthwise(x, (3, 3), padding=(1, 1, 1, 1))
    assert "depthwise" in check(finished([x, y, requantized(y, signed=not signed)]), target, batch=2)


@EACH
def test_wide_inputs_take_lanes(target: Target) -> None:
    x = image((20, 5, 4), bits=16, signed=True)
    y = depthwise(x, (2, 3), stride=(2, 1), padding=(1, 0, 2, 0))
    check(finished([x, y, requantized(y, bits=16)]), target)


CASES = [
    # channels, height, width, kernel, stride, padding, dilation, input bits, output bits
    (32, 9, 12, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8, 8),  # two pixels together
    (24, 4, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8, 4),  # eight pixels together
    (24, 9, 9, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 4, 8),  # a part of a register
    (130, 6, 5, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 8, 8),  # overlapping registers, two groups of rows
    (64, 11, 8, (6, 2), (3, 2), (0, 3, 1, 0), (1, 2), 8, 8),
    (80, 1, 1, (1, 1), (1, 1), (1, 0, 1, 1), (1, 1), 8, 8),  # more outputs than inputs
]


@FAST
@pytest.mark.parametrize(("case", "table"), list(zip(CASES, [False, True] * 3, strict=True)), ids=str)
def test_packed_bytes(target: Target, case: tuple, table: bool) -> None:
    channels, height, width, kernel, stride, padding, dilation, bits, out = case
    x = image((channels, height, width), bits=bits, signed=table)
    y = depthwise(x, kernel, stride=stride, padding=padding, dilation=dilation)
    q = requantized(y, bits=out, signed=not table)
    check(finished([x, y, q, *([with_table(q)] if table else [])]), target, batch=2)


@FAST
@pytest.mark.parametrize("channels", [80, 96])
def test_other_bodies_take_lanes(target: Target, channels: int) -> None:
    x, rng = image((channels, 5, 6)), np.random.default_rng(0)
    y = depthwise(x, (3, 3), padding=(1, 1, 1, 1))
    q = requantized(y)
    arrays = {**dyadic_arrays(rng, 1, 1.5, "0"), **dyadic_arrays(rng, channels, 0.01, "1")}
    total = make_node("sum", "add", [q, y], attrs=clamp_attrs(16), arrays=arrays)
    check(finished([x, y, q, total]), target)


@EACH
@pytest.mark.parametrize("channels", [24, 70, 96])
def test_a_clip_of_channels_in_front(target: Target, channels: int) -> None:
    """On bytes too; halves to even, 31-bit multipliers."""
    x = image((channels, 5, 6))
    y = depthwise(x, (3, 3), padding=(1, 1, 1, 1))
    clipped = relu6(y)
    q = requantized(clipped, rounding="even")
    check(finished([x, y, clipped, q]), target, batch=2)


@FAST
@pytest.mark.parametrize("table", [False, True])
def test_a_clip_is_no_obstacle_to_bytes(target: Target, table: bool) -> None:
    x = image((64, 5, 6))
    y = depthwise(x, (3, 3), padding=(1, 1, 1, 1))
    clipped = relu6(y)
    q = requantized(clipped, signed=False, rounding="even")
    graph = finished([x, y, clipped, q, *([with_table(q)] if table else [])])
    plan = make_plan(graph, 1)
    step = next(step for step in plan.steps if step.kind == "depthwise")
    assert is_packed(step)
    assert fits_bytes(plan, step)
    check(graph, target)


@FAST
def test_halves_to_even_where_ties_are_possible(target: Target) -> None:
    x = image((64, 4, 4))
    y = depthwise(x, (3, 3), padding=(1, 1, 1, 1))
    arrays = {"multiplier": np.array([1], np.int32), "shift": np.array([9], np.uint8)}
    q = make_node("q", "requantize", [y], attrs=clamp_attrs(8, rounding="even"), arrays=arrays)
    check(finished([x, y, q]), target)


@FAST
@pytest.mark.parametrize(("tile", "stride"), [(Tile(1, 4), 2), (Tile(2, 2), 1), (Tile(3, 1), 2), (Tile(4, 1), 1)])
def test_every_tile_computes_the_same(target: Target, tile: Tile, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = image((70, 9, 11), signed=True)
    y = depthwise(x, (3, 3), stride=(stride, stride), padding=(1, 1, 1, 1))
    monkeypatch.setattr("tvm_benchmark.depthwise_bytes.best_tile", lambda *_: tile)
    check(finished([x, y, requantized(y)]), target)


def test_two_rows_share_one_interleave() -> None:
    """Four input rows serve two outputs of a 3x3 kernel, and the weights of each are shifted by a row."""
    node = depthwise(image((64, 8, 8)), (3, 3), padding=(1, 1, 1, 1))
    reach = Reach(node, Tile(2, 2), 1)
    assert reach.groups == [[0, 1, 2, 3]]
    assert reach.columns == [0, 1, 2, 3]
    assert reach.taps(0, 0) == [0, 1, 2, None]
    assert reach.taps(1, 0) == [None, 0, 1, 2]


def test_tiles_fit_the_output() -> None:
    """One output pixel leaves one tile."""
    x = image((64, 3, 3))
    y = depthwise(x, (3, 3))
    plan = make_plan(finished([x, y, requantized(y)]), 1)
    step = next(step for step in plan.steps if step.kind == "depthwise")
    assert best_tile(plan, step, y) == Tile(1, 1)


def test_pixels_together_fill_registers() -> None:
    """144 channels of four pixels are nine whole registers."""
    x = image((144, 3, 8))
    y = depthwise(x, (1, 1))
    graph = finished([x, y, requantized(y)])
    plan = make_plan(graph, 1)
    step = next(step for step in plan.steps if step.kind == "depthwise")
    kernel = ByteKernel(plan, step, y, y.arrays["bias"], KERNEL_TARGETS[0], None)
    assert (kernel.pixels, kernel.blocks) == (4, 9)
    assert sorted(kernel.order.ravel()) == sorted(list(range(144)) * 4)
