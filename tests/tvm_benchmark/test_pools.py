"""Pools equal the interpreter: padding, dilation, ceiling, windows of every position."""

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import KERNEL_TARGETS, check, clamp_attrs, dyadic_arrays, finished, image, requantized
from tvm_benchmark.isa import Target
from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)
FIRST = pytest.mark.parametrize("target", KERNEL_TARGETS[:1], ids=lambda target: target.name)


def max_pool(
    x: Node, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool
) -> Node:
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil}
    return make_node("pool", "max_pool", [x], attrs=attrs)


def avg_pool(x: Node, rows: list[list[int]], columns: list[list[int]], each: bool, rounding: str = "up") -> Node:
    """Windows [starts, stops] of both axes; each: a multiplier for every position."""
    shape = (len(rows[0]), len(columns[0])) if each else (1, 1)
    attrs = {"row_start": rows[0], "row_stop": rows[1], "col_start": columns[0], "col_stop": columns[1]}
    arrays = dyadic_arrays(np.random.default_rng(0), shape[0] * shape[1], 0.2)
    arrays = {key: value.reshape(shape) for key, value in arrays.items()}
    return make_node("pool", "avg_pool", [x], attrs={**attrs, **clamp_attrs(rounding=rounding)}, arrays=arrays)


@EACH
@pytest.mark.parametrize("body", [False, True])
def test_max_pool_of_images(target: Target, body: bool) -> None:
    x = image((24, 9, 11), signed=True)
    y = max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    check(finished([x, y, *([requantized(y)] if body else [])]), target, batch=2)


CASES = [
    ((1, 5, 5), 8, ([2, 2], [2, 2], [0, 0], [1, 1], True)),
    ((70, 7, 6), 16, ([3, 2], [1, 3], [1, 0], [1, 1], False)),
    ((5, 12, 11), 4, ([3, 3], [2, 1], [1, 2], [2, 3], False)),
    ((33, 8, 9), 8, ([2, 3], [3, 2], [1, 1], [2, 2], True)),
]


@FIRST
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("body", [False, True])
def test_max_pool_windows(target: Target, case: tuple, body: bool) -> None:
    shape, bits, window = case
    x = image(shape, bits=bits, signed=True)
    y = max_pool(x, *window)
    check(finished([x, y, *([requantized(y)] if body else [])]), target)


@EACH
def test_global_average(target: Target) -> None:
    x = image((130, 3, 5), signed=True)
    y = avg_pool(x, [[0], [3]], [[0], [5]], False)
    check(finished([x, y]), target, batch=3)


@FIRST
@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (20, 16), (64, 4)])
@pytest.mark.parametrize("rounding", ["up", "even"])
def test_average_of_windows(target: Target, channels: int, bits: int, rounding: str) -> None:
    x = image((channels, 5, 7), bits=bits, signed=bits == 16)
    y = avg_pool(x, [[0, 1, 3], [2, 4, 5]], [[0, 2], [3, 7]], True, rounding)
    check(finished([x, y, requantized(y, signed=False)]), target, batch=2)
