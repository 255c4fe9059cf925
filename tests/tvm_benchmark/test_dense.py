"""Dense kernels equal the interpreter: random layers on every target of this machine, and packing by plain formulas."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.tvm_benchmark.dense_graphs import Case, Shape, cases, conv, graph_of, single
from tests.tvm_benchmark.kernels import HERE, check, finished, image, requantized
from tvm_benchmark.convolution import emit_with
from tvm_benchmark.dense import Tiling
from tvm_benchmark.isa import Target
from tvm_benchmark.layers import Layer, layers_of, merge_groups, pack_weights
from tvm_benchmark.layout import Storage
from tvm_benchmark.plan import Plan, Step, make_plan
from tvm_benchmark.source import Source
from tvm_benchmark.tiles import MAX_ROWS
from utils.integer_graph.ir import Graph

pytestmark = pytest.mark.tvm

TILE_SHAPES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # (tiles, panel)
WALKS, ORDERS = ("rows", "long"), ("panels", "pixels")


def layer_tiling(rng: np.random.Generator, plan: Plan, step: Step, target: Target) -> Tiling:
    """A random legal tiling of a layer for a target."""
    walk, order = rng.choice(WALKS), rng.choice(ORDERS)
    in_bytes = all(plan.views[name].storage.dtype == "uint8" for name in step.inputs)
    if target.amx and in_bytes and rng.integers(4):
        tiles, panel = TILE_SHAPES[rng.integers(len(TILE_SHAPES))]
        return Tiling(int(rng.integers(1, MAX_ROWS + 1)), panel, tiles, str(order), "tiles", str(walk))
    pixels, panel = (int(n) for n in rng.integers(1, (9, 4)))
    return Tiling(pixels, panel, 1, str(order), "registers", str(walk))


def check_case(case: Case, target: Target) -> None:
    """Compile a case under random tilings and compare every stored tensor."""
    rng = np.random.default_rng(case.seed)

    def emit(plan: Plan, step: Step, target: Target) -> Source:
        return emit_with(plan, step, target, layer_tiling(rng, plan, step, target))

    check(graph_of(case), target, batch=case.batch, seed=case.seed, emit_conv=emit)


def some(count: int) -> Any:
    """Settings of so many examples: a failing one is reported as found, since each takes a compilation."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, phases=phases, suppress_health_check=checks)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@given(case=cases())
@some(4)
def test_random_layers(target: Target, case: Case) -> None:
    check_case(case, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@given(case=cases())
@some(150)
def test_many_random_layers(target: Target, case: Case) -> None:
    check_case(case, target)


def layer_named(graph: Graph, name: str, batch: int = 1) -> Layer:
    """The layer of a step of a graph's plan."""
    plan = make_plan(graph, batch)
    return layers_of(plan, next(step for step in plan.steps if step.name == name))[0]


def expected_packing(layer: Layer, group_bytes: int, length: int) -> np.ndarray:
    """int8 [groups, blocks, segments, length / group_bytes, 16, group_bytes], one weight at a time."""
    rows, columns = layer.segments
    kw, last = layer.weight.shape[3], max(layer.outputs - 16, 0)
    count = -(-layer.outputs // 16)
    packed = np.zeros((layer.groups, count, rows * columns, length // group_bytes, 16, group_bytes), np.int8)
    for group, block, r, s, k, lane in np.ndindex(layer.groups, count, rows, columns, layer.segment, 16):
        channel = min(16 * block, last) + lane
        if channel < layer.outputs:
            column, element = divmod(k, layer.inputs) if layer.merged else (s, k)
            assert column < kw
            weight = layer.weight[group * layer.outputs + channel, element, r, column]
            packed[group, block, r * columns + s, k // group_bytes, lane, k % group_bytes] = weight
    return packed


@pytest.mark.parametrize(
    "shape",
    [
        Shape(3, 20, kernel=(3, 2)),
        Shape(5, 7, kernel=(2, 2), dilation=(1, 2)),
        Shape(6, 16, groups=3),
        Shape(70, 33),
    ],
    ids=str,
)
@pytest.mark.parametrize(("group_bytes", "step"), [(4, 4), (2, 2), (1, 1), (4, 64)])
def test_weights_are_packed_in_the_order_of_the_reduction(shape: Shape, group_bytes: int, step: int) -> None:
    layer = layer_named(single(shape), "one")
    length = -(-layer.segment // step) * step
    expected = expected_packing(layer, group_bytes, length)
    np.testing.assert_array_equal(pack_weights(layer, group_bytes, step, False), expected.ravel())


@pytest.mark.parametrize(("group_bytes", "step", "multiple"), [(4, 4, 8), (1, 1, 2), (4, 64, 64)])
def test_two_steps_of_four_bits_share_their_bytes(group_bytes: int, step: int, multiple: int) -> None:
    layer = layer_named(single(Shape(5, 20, kernel=(3, 3), bits=4)), "one")
    length = -(-layer.segment // multiple) * multiple
    expected = expected_packing(layer, group_bytes, length).reshape(-1, 2, 16 * group_bytes).astype(np.int64)
    packed = pack_weights(layer, group_bytes, step, True).astype(np.int64).reshape(-1, 16 * group_bytes)
    np.testing.assert_array_equal(packed >> 4, expected[:, 1])
    np.testing.assert_array_equal(((packed & 15) ^ 8) - 8, expected[:, 0])


@pytest.mark.parametrize(
    ("groups", "outputs", "left"), [(1, 5, 1), (6, 16, 6), (6, 8, 3), (6, 24, 3), (5, 3, 1), (32, 1, 2)]
)
def test_small_groups_are_joined_into_whole_blocks(groups: int, outputs: int, left: int) -> None:
    weight = np.random.default_rng(0).integers(1, 9, (groups * outputs, 2, 1, 1)).astype(np.int8)
    joined, count = merge_groups(weight, groups)
    assert count == left
    dense = np.zeros((groups * outputs, groups * 2), np.int8)  # of the layer as one group
    for o, g in enumerate(np.repeat(np.arange(groups), outputs)):
        dense[o, 2 * g : 2 * g + 2] = weight[o, :, 0, 0]
    inputs = groups * 2 // left
    for o, row in enumerate(joined[:, :, 0, 0]):
        first = o // (groups * outputs // left) * inputs
        np.testing.assert_array_equal(row, dense[o, first : first + inputs])
        assert not np.delete(dense[o], np.s_[first : first + inputs]).any()


def test_bias_takes_up_the_shift_of_signed_inputs() -> None:
    x = image((3, 4, 4), signed=True)
    one = conv("one", x, Shape(3, 5, kernel=(2, 2)), np.random.default_rng(0))
    layer = layer_named(finished([x, one, requantized(one)]), "one")
    assert layer.view.storage == Storage("uint8", 128)
    shift = 128 * one.arrays["weight"].astype(np.int64).sum((1, 2, 3))
    np.testing.assert_array_equal(layer.bias, one.arrays["bias"] - shift)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_every_width(target: Target, bits: int) -> None:
    check(single(Shape(2, 24, groups=4, kernel=(2, 3), bits=bits)), target, batch=2)
