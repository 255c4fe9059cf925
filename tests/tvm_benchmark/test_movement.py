"""Copies equal the interpreter."""

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import KERNEL_TARGETS, check, depthwise, finished, image
from tvm_benchmark.isa import Target
from tvm_benchmark.movement import alternating, channel_runs
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)
FIRST = pytest.mark.parametrize("target", KERNEL_TARGETS[:1], ids=lambda target: target.name)

INDICES = {
    "shuffle": np.arange(116).reshape(2, 58).T.ravel(),
    "a part of a shuffle": np.arange(116).reshape(2, 58).T.ravel()[58:],
    "three groups": np.arange(24).reshape(3, 8).T.ravel(),
    "runs": np.array([3, 4, 5, -1, -1, 9, 0]),
    "one by one": np.random.default_rng(0).integers(-1, 24, 70),
}


@EACH
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_gather(target: Target, index: np.ndarray) -> None:
    x = image((int(index.max()) + 1, 3, 4), signed=True)
    y = make_node("y", "gather", [x], arrays={"index": index.astype(np.int32)})
    check(finished([x, y]), target, batch=2)


def test_runs_of_channels() -> None:
    """(first of the result, first of the input, how many)."""
    assert channel_runs(INDICES["runs"]) == [(0, 3, 3), (3, -1, 2), (5, 9, 1), (6, 0, 1)]


def test_alternating_runs() -> None:
    """(first of the even, first of the odd channels, how many pairs)."""
    assert alternating(INDICES["shuffle"]) == (0, 58, 58)
    assert alternating(INDICES["a part of a shuffle"]) == (29, 87, 29)
    assert alternating(INDICES["three groups"]) is None
    assert alternating(np.array([3, -1, 4, 0])) is None


@FIRST
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("padding", [[1, 2, 3, 0], [-1, 2, 0, -3], [-2, -1, -1, -1]], ids=str)
def test_pad2d(target: Target, padding: list[int], bits: int) -> None:
    x = image((7, 5, 6), bits=bits, signed=True)
    y = make_node("y", "pad2d", [x], attrs={"padding": padding})
    check(finished([x, y]), target, batch=2)


@FIRST
@pytest.mark.parametrize("channels", [1, 40])
def test_upsample(target: Target, channels: int) -> None:
    x = image((channels, 3, 4))
    y = make_node("y", "upsample", [x], attrs={"scale": [2, 3]})
    check(finished([x, y]), target, batch=2)


@FIRST
@pytest.mark.parametrize("shape", [[4, 6, 5], [30, 2, 2], [120]], ids=str)
def test_reshape(target: Target, shape: list[int]) -> None:
    x = image((20, 2, 3), signed=True)
    y = make_node("y", "reshape", [x], attrs={"shape": shape})
    check(finished([x, y]), target, batch=2)


@FIRST
@pytest.mark.parametrize("op", ["pad2d", "upsample", "gather"])
def test_results_with_a_halo(target: Target, op: str) -> None:
    """A convolution reads the result: its rows have gaps."""
    x = image((6, 4, 5), signed=True)
    attrs = {"pad2d": {"padding": [1, -1, 1, 1]}, "upsample": {"scale": [1, 2]}, "gather": {}}[op]
    arrays = {"index": np.array([5, 0, -1, 2], np.int32)} if op == "gather" else {}
    y = make_node("y", op, [x], attrs=attrs, arrays=arrays)
    z = depthwise(y, (3, 3), padding=(1, 1, 1, 1))
    check(finished([x, y, z]), target, batch=2)
