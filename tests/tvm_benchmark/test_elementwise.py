"""Pointwise steps that read all operands from memory."""

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
    requantized,
)
from tvm_benchmark.isa import Target
from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)
FIRST = pytest.mark.parametrize("target", KERNEL_TARGETS[:1], ids=lambda target: target.name)


def pooled(x: Node, axes: str) -> Node:
    """The average over rows ("r"), columns ("c") or both."""
    _, height, width = x.type.shape
    rows = ([0], [height]) if "r" in axes else (list(range(height)), list(range(1, height + 1)))
    columns = ([0], [width]) if "c" in axes else (list(range(width)), list(range(1, width + 1)))
    attrs = {"row_start": rows[0], "row_stop": rows[1], "col_start": columns[0], "col_stop": columns[1]}
    arrays = {"multiplier": np.array([[1 << 24]], np.int32), "shift": np.array([[26]], np.uint8)}
    return make_node(f"gate.{axes}", "avg_pool", [x], attrs={**attrs, **clamp_attrs()}, arrays=arrays)


def product(a: Node, b: Node) -> Node:
    arrays = dyadic_arrays(np.random.default_rng(1), 1, 0.01)
    return make_node("product", "mul", [a, b], attrs=clamp_attrs(), arrays=arrays)


@EACH
@pytest.mark.parametrize("count", [1, 5, 100])
def test_one_long_row(target: Target, count: int) -> None:
    """Constants of the whole tensor: any number of elements, less than a vector too."""
    x = image((count, 1, 1) if count < 100 else (20, 21, 19), signed=True)
    rng = np.random.default_rng(0)
    y = make_node("y", "requantize", [x], attrs=clamp_attrs(16), arrays=dyadic_arrays(rng, 1, 70.0))
    arrays = {**dyadic_arrays(rng, 1, 0.7, "0"), **dyadic_arrays(rng, 1, 0.003, "1")}
    check(finished([x, y, make_node("sum", "add", [x, y], attrs=clamp_attrs(), arrays=arrays)]), target, batch=3)


@EACH
def test_constants_of_channels(target: Target) -> None:
    x = image((37, 3, 4))
    y = requantized(x, bits=16)
    check(finished([x, y]), target, batch=2)


@FIRST
@pytest.mark.parametrize("axes", ["rc", "r", "c"])
@pytest.mark.parametrize("channels", [6, 40])
def test_gates_are_broadcast(target: Target, axes: str, channels: int) -> None:
    x = image((channels, 5, 6), signed=True)
    gate = pooled(x, axes)
    check(finished([x, gate, product(x, gate)]), target, batch=2)


@FIRST
def test_a_gate_for_all_channels(target: Target) -> None:
    x = image((40, 5, 6), signed=True)
    one = make_node("one", "gather", [x], arrays={"index": np.array([7], np.int32)})
    check(finished([x, one, product(one, x)]), target, batch=2)


@FIRST
def test_a_halo_makes_rows(target: Target) -> None:
    x = image((18, 4, 5), signed=True)
    y = make_node("y", "add", [x], attrs=clamp_attrs(), arrays=dyadic_arrays(np.random.default_rng(0), 1, 0.8, "0"))
    z = depthwise(y, (3, 3), padding=(1, 1, 1, 1))
    check(finished([x, y, z]), target, batch=2)


@FIRST
def test_branches_of_a_concat_lie_in_one_buffer(target: Target) -> None:
    x, rng = image((20, 3, 4)), np.random.default_rng(0)
    y = requantized(x)
    arrays = {**dyadic_arrays(rng, 20, 0.7, "0"), **dyadic_arrays(rng, 1, 0.9, "1")}
    joined = make_node("joined", "concat", [x, y], attrs=clamp_attrs(), arrays=arrays)
    check(finished([x, y, joined, requantized(joined, signed=False)]), target, batch=2)
