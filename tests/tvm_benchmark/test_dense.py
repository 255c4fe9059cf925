"""Dense kernels equal the interpreter: random layers on every target of this machine, and packing by plain formulas."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.tvm_benchmark.kernels import HERE, check, clamp_attrs, finished, image, requantized
from tvm_benchmark.convolution import emit_with
from tvm_benchmark.dense import Layer, Tiling, layers_of, merge_groups, pack_weights
from tvm_benchmark.isa import TARGETS, Target
from tvm_benchmark.layout import Buffer, Storage, View
from tvm_benchmark.plan import Plan, Step, convolution_kind, make_plan
from tvm_benchmark.source import Source
from tvm_benchmark.tiles import ACCUMULATORS, MAX_ROWS
from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm

TILE_SHAPES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # (tiles, panel)
WALKS, ORDERS = ("rows", "long"), ("panels", "pixels")


@dataclass(frozen=True)
class Shape:
    """A convolution: channels are those of one group, ``padding`` is (top, bottom, left, right)."""

    inputs: int
    outputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    bits: int = 8


@dataclass(frozen=True)
class Case:
    """Image (or a slice of it, or of a concat) -> conv -> 16-bit body -> conv of the same shape with a residual ->
    linear.

    view: "whole", "slice" or "concat".  residual: what is added to the second convolution, "stored" (the 16-bit
    tensor), or a shortcut convolution that comes "before" or "after" it.
    """

    first: Shape
    second: Shape
    size: tuple[int, int]
    view: str
    input_bits: int
    signed: bool
    residual: str
    batch: int
    flat: bool
    seed: int


def weights(rng: np.random.Generator, x: Node, shape: tuple[int, ...], bits: int) -> dict[str, np.ndarray]:
    """Weights over the whole range of ``bits``, narrower where the accumulator would leave int32."""
    reach = max(abs(x.type.lo), x.type.hi, 1) * int(np.prod(shape[1:]))
    most = min(1 << (bits - 1), (2**31 - 20000) // reach)
    weight = rng.integers(-most, most, shape).astype(np.int8)
    return {"weight": weight, "bias": rng.integers(-9999, 9999, shape[0]).astype(np.int32)}


def conv(name: str, x: Node, shape: Shape, rng: np.random.Generator) -> Node:
    """The convolution of a shape on a node."""
    arrays = weights(rng, x, (shape.outputs * shape.groups, shape.inputs, *shape.kernel), shape.bits)
    attrs = {
        "stride": shape.stride,
        "dilation": shape.dilation,
        "padding": shape.padding,
        "groups": shape.groups,
        "weight_bits": shape.bits,
    }
    return make_node(name, "conv2d", [x], attrs=attrs, arrays=arrays)


def seen(case: Case) -> list[Node]:
    """Nodes up to what the first convolution reads: the image, a slice of it or a slice of a concat with itself."""
    channels = case.first.inputs * case.first.groups
    extra = 0 if case.view == "whole" else 3
    x = image((channels + extra, *case.size), bits=case.input_bits, signed=case.signed, seed=case.seed)
    if case.view == "whole":
        return [x]
    nodes, first = [x], 2
    if case.view == "concat":
        scale = {f"multiplier{i}": np.full(1, 3 << 18, np.int32) for i in (0, 1)}
        scale |= {f"shift{i}": np.full(1, 20 - i, np.uint8) for i in (0, 1)}
        attrs = clamp_attrs(case.input_bits, case.signed)
        nodes.append(make_node("joined", "concat", [x, x], attrs=attrs, arrays=scale))
        first = channels
    index = np.arange(first, first + channels, dtype=np.int32)
    return [*nodes, make_node("slice", "gather", [nodes[-1]], arrays={"index": index})]


def graph_of(case: Case) -> Graph:
    """The network of a case, verified."""
    rng = np.random.default_rng(case.seed)
    nodes = seen(case)
    one = conv("one", nodes[-1], case.first, rng)
    wide = requantized(one, bits=16, seed=case.seed)
    low = requantized(wide, signed=case.signed, seed=case.seed)
    two, other = conv("two", low, case.second, rng), wide
    if case.residual != "stored":
        other = conv("shortcut", nodes[-1], case.first, rng)
    scale = {"multiplier0": np.full(1, 1 << 24, np.int32), "shift0": np.full(1, 32, np.uint8)}
    scale |= {"multiplier1": np.full(1, 3 << 20, np.int32), "shift1": np.full(1, 22, np.uint8)}
    total = make_node("sum", "add", [two, other], attrs=clamp_attrs(16), arrays=scale)
    bounds = {"lo": np.full(1, -30000, np.int32), "hi": rng.integers(0, 30000, 1).astype(np.int32)}
    clipped = make_node("clipped", "clip", [total], arrays=bounds)
    last = requantized(clipped, signed=not case.signed, seed=case.seed)
    branches = {"stored": [two], "before": [other, two], "after": [two, other]}[case.residual]
    nodes += [one, wide, low, *branches, total, clipped, last]
    if case.flat:
        flat = make_node("vector", "reshape", [last], attrs={"shape": [int(np.prod(last.type.shape))]})
        arrays = weights(rng, flat, (int(rng.integers(1, 40)), *flat.type.shape), case.first.bits)
        linear = make_node("linear", "linear", [flat], attrs={"weight_bits": case.first.bits}, arrays=arrays)
        nodes += [flat, linear]
    return finished(nodes)


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


@st.composite
def shapes(draw: st.DrawFn, size: tuple[int, int], wide: bool) -> Shape:
    """A convolution that fits an image.  wide: 16-bit inputs, which leave room for few channels."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 4, 5)))
    inputs = draw(st.sampled_from((1, 2, 3, 5, 8, 13, 16, 24) if groups > 1 else (1, 3, 4, 16, 30, 64, 70)))
    outputs = draw(st.sampled_from((1, 2, 3, 8, 10, 16, 24) if groups > 1 else (1, 5, 16, 17, 32, 40, 70)))
    kernel, stride, dilation, pads = [], [], [], []
    for extent in size:
        before, after = (draw(st.integers(0, 3)) for _ in range(2))
        step = draw(st.integers(1, 2))
        most = (extent + before + after - 1) // step + 1
        kernel.append(draw(st.integers(1, min(5, most))))
        dilation.append(step)
        stride.append(draw(st.sampled_from((1, 1, 1, 2, 3))))
        pads += [before, after]
    if wide:
        inputs = min(inputs, 16)
    if draw(st.booleans()) and groups == 1:
        kernel, stride, pads = [1, 1], [1, 1], [0, 0, 0, 0]
    outputs += inputs == outputs == 1 < groups  # else it is a depthwise layer
    return Shape(inputs, outputs, groups, tuple(kernel), tuple(stride), tuple(dilation), tuple(pads), 8)


def out_size(shape: Shape, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    free = [
        size[i] + sum(shape.padding[2 * i : 2 * i + 2]) - shape.dilation[i] * (shape.kernel[i] - 1) - 1 for i in (0, 1)
    ]
    return free[0] // shape.stride[0] + 1, free[1] // shape.stride[1] + 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two convolutions, all they can be combined with, and what they read."""
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    input_bits = draw(st.sampled_from((8, 8, 8, 4, 16)))
    one = draw(shapes(size, input_bits == 16))
    bits = draw(st.sampled_from((2, 4, 8, 8)))
    channels = one.outputs * one.groups
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 5) if channels % g == 0 and (g == 1 or g < channels)]))
    kernel = draw(st.tuples(*[st.sampled_from((1, 1, 3, 5))] * 2))
    pads = tuple(k // 2 for k in kernel for _ in (0, 1))
    return Case(
        first=Shape(one.inputs, one.outputs, one.groups, one.kernel, one.stride, one.dilation, one.padding, bits),
        second=Shape(channels // groups, channels // groups, groups, kernel, (1, 1), (1, 1), pads, bits),
        size=size,
        view=draw(st.sampled_from(("whole", "whole", "slice", "concat"))),
        input_bits=input_bits,
        signed=draw(st.booleans()),
        residual=draw(st.sampled_from(("stored", "before", "after"))),
        batch=draw(st.sampled_from((1, 3))),
        flat=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


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


def single(shape: Shape, size: tuple[int, int] = (5, 4), view: str = "whole") -> Graph:
    """Image -> convolution "one" -> 8 bits -> logits; ``view`` as in :class:`Case`."""
    case = Case(shape, shape, size, view, 8, False, "stored", 1, False, 3)
    nodes = seen(case)
    one = conv("one", nodes[-1], shape, np.random.default_rng(3))
    return finished([*nodes, one, requantized(one)])


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
