"""Pools equal the interpreter: padding, dilation, ceiling, windows of every position."""

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
    relu,
    requantized,
)
from tvm_benchmark.isa import Target
from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node
from utils.quantization_utils.dyadic import ROUNDING, floor_dyadic

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
@pytest.mark.parametrize("rounding", list(ROUNDING))
def test_average_of_windows(target: Target, channels: int, bits: int, rounding: str) -> None:
    x = image((channels, 5, 7), bits=bits, signed=bits == 16)
    y = avg_pool(x, [[0, 1, 3], [2, 4, 5]], [[0, 2], [3, 7]], True, rounding)
    check(finished([x, y, requantized(y, signed=False)]), target, batch=2)


@EACH
@pytest.mark.parametrize(("kernel", "padding"), [(7, 0), (3, 1)])
def test_means_that_are_rounded_down(target: Target, kernel: int, padding: int) -> None:
    """16-bit integers that are not negative, one multiplier for all windows, zeros of the padding counted."""
    x = image((20, 7, 7), bits=16, signed=True)
    y, starts = relu(x), np.arange(-padding, 7 + padding - kernel + 1)
    bounds = [np.maximum(starts, 0).tolist(), np.minimum(starts + kernel, 7).tolist()]
    m, e = floor_dyadic(kernel * kernel, kernel * kernel * 32767)
    ends = {
        f"{axis}_{end}": bound for axis in ("row", "col") for end, bound in zip(("start", "stop"), bounds, strict=True)
    }
    attrs = {**ends, **clamp_attrs(16, rounding="down"), "lo": 0}
    arrays = {"multiplier": np.full((1, 1), m, np.int32), "shift": np.full((1, 1), e, np.uint8)}
    z = make_node("pool", "avg_pool", [y], attrs=attrs, arrays=arrays)
    check(finished([x, y, z, requantized(z, rounding="even")]), target, batch=2)


@EACH
def test_max_pool_of_accumulators(target: Target) -> None:
    x = image((20, 6, 7), signed=True)
    y = depthwise(x, (3, 3), padding=(1, 1, 1, 1))
    z = max_pool(y, [3, 3], [2, 2], [1, 1], [1, 1], False)
    check(finished([x, y, z]), target)
    check(finished([x, y, z, requantized(z, bits=16, rounding="even")]), target)
