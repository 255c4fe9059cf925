"""The plan: what is computed together, what is stored and where."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tvm_benchmark.dense_graphs import Shape, conv
from tests.tvm_benchmark.kernels import (
    clamp_attrs,
    depthwise,
    finished,
    image,
    relu,
    relu6,
    requantized,
    unclamped_sum,
)
from tvm_benchmark.layout import NO_HALO
from tvm_benchmark.plan import Plan, Step, make_plan
from utils.errors import UserError
from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import make_node

POINT = Shape(4, 4)
X = image((4, 6, 5))


def joining(name: str, op: str, branches: Sequence[Node], attrs: dict[str, Any] | None = None) -> Node:
    """An add or concat whose branches are halved."""
    arrays = {f"multiplier{i}": np.full(1, 1 << 15, np.int32) for i in range(len(branches))}
    arrays |= {f"shift{i}": np.full(1, 16, np.uint8) for i in range(len(branches))}
    return make_node(name, op, branches, attrs=attrs or clamp_attrs(16), arrays=arrays)


def gathered(name: str, x: Node, index: Sequence[int]) -> Node:
    return make_node(name, "gather", [x], arrays={"index": np.array(index, np.int32)})


def scaled(name: str, x: Node, factor: Node) -> Node:
    """The broadcast product of two tensors, 8 bits."""
    arrays = {"multiplier": np.full(1, 1 << 10, np.int32), "shift": np.full(1, 18, np.uint8)}
    return make_node(name, "mul", [x, factor], attrs=clamp_attrs(), arrays=arrays)


def planned(*nodes: Node, batch: int = 1) -> Plan:
    """The plan of a graph that ends in the logits of the last node, checked."""
    plan = make_plan(finished(nodes), batch)
    check_order(plan)
    return plan


def check_order(plan: Plan) -> None:
    """Every channel that a step reads was written by a step before it, and every channel is written once."""
    written: set[tuple[str, int]] = set()

    def channels(name: str) -> set[tuple[str, int]]:
        view = plan.views[name]
        return {(view.buffer.name, c) for c in range(view.first, view.first + view.channels)}

    for step in plan.steps:
        for name in (*step.inputs, *step.reads):
            assert channels(name) <= written, f"{step.name} reads {name}"
        for name in step.writes:
            assert not channels(name) & written, f"{step.name} writes {name}"
            written |= channels(name)
    assert channels(plan.result) <= written


def step_named(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.name == name)


def body(step: Step) -> list[str]:
    return [node.name for node in step.body]


def test_a_requantization_belongs_to_its_convolution() -> None:
    one = conv("one", X, POINT)
    plan = planned(X, one, requantized(one))
    assert [step.kind for step in plan.steps] == ["image", "conv", "movement", "pointwise"]
    step = step_named(plan, "one")
    assert (step.inputs, body(step), step.reads, step.writes) == (("image",), ["one.q"], (), ("one.q",))
    assert "one" not in plan.views


def test_an_add_belongs_to_the_later_of_its_branches() -> None:
    one = conv("one", X, POINT)
    wide = requantized(one, bits=16)
    low = requantized(wide)
    two = conv("two", low, POINT)
    total = joining("sum", "add", [wide, two])
    plan = planned(X, one, wide, low, two, total)
    assert step_named(plan, "one").writes == ("one.q", "one.q.q")
    step = step_named(plan, "two")
    assert (step.inputs, body(step), step.reads, step.writes) == (("one.q.q",), ["sum"], ("one.q",), ("sum",))
    assert plan.views["one.q"].storage.dtype == "int16"


def test_accumulators_with_two_readers_in_other_steps_are_stored() -> None:
    one = conv("one", X, POINT)
    low = requantized(one)
    two = conv("two", low, POINT)
    plan = planned(X, one, low, two, joining("sum", "add", [one, two]))
    assert step_named(plan, "one").writes == ("one", "one.q")
    assert plan.views["one"].storage.dtype == "int32"


def test_a_shortcut_convolution_is_computed_with_the_sum() -> None:
    short, one = conv("short", X, POINT), conv("one", X, POINT)
    low = requantized(one)
    two = conv("two", low, POINT)
    plan = planned(X, short, one, low, two, joining("sum", "add", [two, short]))
    step = step_named(plan, "two")
    assert [node.name for node in step.anchors] == ["two", "short"]
    assert (step.inputs, step.reads, step.writes) == (("one.q", "image"), (), ("sum",))
    assert "short" not in {s.name for s in plan.steps} | set(plan.views)


def test_a_residual_unit_of_the_original_is_one_step() -> None:
    """Accumulators and the shortcut's, added without a clamp, clipped, rescaled for the next unit."""
    one, short = conv("one", X, POINT), conv("short", X, POINT)
    clipped = relu6(one)
    low = requantized(clipped, rounding="even")
    two = conv("two", low, POINT)
    total = unclamped_sum("sum", [short, two])
    following = requantized(relu(total), rounding="even")
    plan = planned(
        X, short, one, clipped, low, two, total, relu(total), following, unclamped_sum("next", [relu(total)])
    )
    assert body(step_named(plan, "one")) == ["one.relu6", "one.relu6.q"]
    assert step_named(plan, "one").writes == ("one.relu6.q",)
    step = step_named(plan, "two")
    assert [node.name for node in step.anchors] == ["two", "short"]
    assert body(step) == ["sum", "sum.relu", "sum.relu.q", "next"]
    assert not step.reads


@pytest.mark.parametrize("reason", ["groups", "depthwise", "another reader"])
def test_other_shortcuts_are_stored(reason: str) -> None:
    shape = Shape(2, 2, groups=2) if reason == "groups" else POINT
    short = depthwise(X, (1, 1)) if reason == "depthwise" else conv("short", X, shape)
    one = conv("one", X, POINT)
    total = joining("sum", "add", [one, short])
    more = [joining("more", "add", [total, short])] if reason == "another reader" else []
    plan = planned(X, short, one, total, *more)
    assert step_named(plan, short.name).writes == (short.name,)
    assert step_named(plan, "one").reads == (short.name,)


def test_branches_of_a_concat_are_slices_of_its_buffer() -> None:
    one, two = conv("one", X, Shape(4, 7)), conv("two", X, Shape(4, 3))
    plan = planned(X, one, two, joining("joined", "concat", [one, X, two]))
    buffer = plan.views["joined"].buffer
    assert buffer.shape == (14, 6, 5)
    places = {
        name: (plan.views[name].first, plan.views[name].channels) for name in ("joined:0", "joined:1", "joined:2")
    }
    assert places == {"joined:0": (0, 7), "joined:1": (7, 4), "joined:2": (11, 3)}
    assert all(plan.views[name].buffer is buffer for name in places)
    assert step_named(plan, "one").writes == ("joined:0",)
    assert step_named(plan, "joined:1").kind == "pointwise"
    assert step_named(plan, "two").writes == ("joined:2",)


def test_slices_of_slices_lie_in_the_first_buffer() -> None:
    x = image((20, 3, 3))
    outer = gathered("outer", x, range(4, 16))
    inner = gathered("inner", outer, range(2, 7))
    plan = planned(x, outer, inner, conv("one", inner, Shape(5, 4)))
    view = plan.views["inner"]
    assert (view.buffer.name, view.first, view.channels) == ("image", 6, 5)
    assert step_named(plan, "one").inputs == ("inner",)


@pytest.mark.parametrize("index", [[0, 2, 3], [2, 1, 0], [-1, 0, 1], [0, 0, 1]])
def test_other_gathers_move(index: list[int]) -> None:
    picked = gathered("picked", X, index)
    plan = planned(X, picked, conv("one", picked, Shape(3, 4)))
    assert step_named(plan, "picked").kind == "movement"


def test_a_halo_is_as_wide_as_its_widest_reader_on_each_side() -> None:
    part = gathered("part", X, [1, 2])
    one = conv("one", X, Shape(4, 4, kernel=(3, 1), padding=(2, 0, 0, 0)))
    two = conv("two", part, Shape(2, 4, kernel=(1, 3), padding=(1, 1, 0, 2)))
    three = depthwise(X, (1, 5), padding=(0, 0, 3, 0))
    flats = [
        make_node(f"f{i}", "reshape", [n], attrs={"shape": [int(np.prod(n.type.shape))]})
        for i, n in enumerate(requantized(n) for n in (one, two, three))
    ]
    sources = [requantized(n) for n in (one, two, three)]
    plan = planned(X, part, one, two, three, *sources, *flats, joining("joined", "concat", flats))
    assert plan.views["image"].buffer.halo == plan.views["part"].buffer.halo == (2, 1, 3, 2)
    assert plan.views["one.q"].buffer.halo == NO_HALO


def test_the_halo_of_a_branch_is_that_of_the_concat() -> None:
    one = conv("one", X, POINT)
    joined = joining("joined", "concat", [one, X], clamp_attrs())
    part = gathered("part", joined, [5, 6])
    two = conv("two", part, Shape(2, 3, kernel=(3, 3), padding=(1, 1, 1, 1)))
    plan = planned(X, one, joined, part, two)
    assert {plan.views[name].buffer.halo for name in ("joined:0", "joined:1", "part")} == {(1, 1, 1, 1)}
    assert plan.views["image"].buffer.halo == NO_HALO


def test_a_reshape_of_one_pixel_is_the_tensor_itself() -> None:
    one = requantized(conv("one", X, Shape(4, 6, kernel=(6, 5))))
    flat = make_node("vector", "reshape", [one], attrs={"shape": [6]})
    weight = {"weight": np.ones((3, 6), np.int8), "bias": np.zeros(3, np.int32)}
    linear = make_node("linear", "linear", [flat], attrs={"weight_bits": 8}, arrays=weight)
    plan = planned(X, conv("one", X, Shape(4, 6, kernel=(6, 5))), one, flat, linear)
    assert [(step.name, step.inputs) for step in plan.steps] == [
        ("image", ()),
        ("one", ("image",)),
        ("linear", ("one.q",)),
    ]
    assert body(plan.steps[-1]) == ["logits"]


def test_a_product_belongs_to_the_step_of_its_large_factor() -> None:
    one = requantized(conv("one", X, POINT))
    gate = requantized(conv("gate", X, Shape(4, 4, kernel=(6, 5))))
    nodes = (conv("gate", X, Shape(4, 4, kernel=(6, 5))), gate, conv("one", X, POINT), one)
    plan = planned(X, *nodes, scaled("gated", one, gate))
    assert body(step_named(plan, "one")) == ["one.q", "gated"]
    assert step_named(plan, "one").reads == ("gate.q",)


def test_a_step_does_not_read_what_it_writes() -> None:
    """A factor or a summand that is a slice of what the step itself stores has to wait for the next step."""
    acc = conv("one", X, POINT)
    one = requantized(acc)
    channel, same = gathered("channel", one, [2]), gathered("same", one, range(4))
    planned(X, acc, one, channel, scaled("gated", one, channel))
    planned(X, acc, one, same, joining("sum", "add", [one, same]))
    two = conv("two", X, POINT)
    low = requantized(two)
    joined = joining("joined", "concat", [one, low], clamp_attrs())
    half = gathered("half", joined, range(4, 8))
    planned(X, acc, one, two, low, joined, half, joining("sum", "add", [low, half]))


def test_a_shortcut_that_is_read_through_a_reshape_stays() -> None:
    short, one = conv("short", X, Shape(4, 4, kernel=(6, 5))), conv("one", X, Shape(4, 4, kernel=(6, 5)))
    vectors = [make_node(f"v{i}", "reshape", [n], attrs={"shape": [4]}) for i, n in enumerate((short, one))]
    low = joining("sum", "add", vectors, clamp_attrs())
    weight = {"weight": np.ones((4, 4), np.int8), "bias": np.zeros(4, np.int32)}
    linear = make_node("linear", "linear", [low], attrs={"weight_bits": 8}, arrays=weight)
    planned(X, short, one, *vectors, low, linear, joining("more", "add", [linear, vectors[0]]))


def test_a_factor_of_another_shape_is_no_shortcut() -> None:
    gate = conv("gate", X, Shape(4, 4, kernel=(6, 5), bits=2))
    one = conv("one", X, Shape(4, 4, bits=2))
    plan = planned(X, gate, one, scaled("gated", one, gate))
    assert step_named(plan, "one").reads == ("gate",)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Up to ten nodes on 4 channels: anchors, pointwise nodes, concats, slices, at random."""
    nodes = [X]
    same = [X]
    for i in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(("conv", "dw", "q", "add", "mul", "concat", "slice", "pool")))
        a, b = draw(st.sampled_from(same)), draw(st.sampled_from(same))
        if kind in ("conv", "dw", "pool") and a.type.bits > 16:
            kind = "q"
        if kind == "conv":
            new = [conv(f"n{i}", a, Shape(4, 4, kernel=(3, 3), padding=(1, 1, 1, 1), groups=1, bits=2))]
        elif kind == "dw":
            new = [conv(f"n{i}", a, Shape(1, 1, groups=4, bits=2))]
        elif kind == "pool":
            attrs = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "ceil_mode": False}
            new = [make_node(f"n{i}", "max_pool", [a], attrs=attrs)]
        elif kind == "q":
            x = requantized(a)
            new = [Node(f"n{i}", x.op, x.inputs, x.type, x.attrs, x.arrays, x.scale)]
        elif kind == "add":
            new = [joining(f"n{i}", "add", [a, b], clamp_attrs())]
        elif kind == "mul":
            narrow = requantized(a)
            narrow = Node(f"m{i}", narrow.op, narrow.inputs, narrow.type, narrow.attrs, narrow.arrays, narrow.scale)
            channel = gathered(f"c{i}", narrow, [draw(st.integers(0, 3))])
            new = [narrow, channel, scaled(f"n{i}", narrow, channel)]
        else:
            joined = joining(f"j{i}", "concat", [a, b], clamp_attrs())
            first = draw(st.integers(0, 4))
            new = [joined, gathered(f"n{i}", joined, range(first, first + 4))]
        nodes += new
        same.append(new[-1])
    return finished(nodes)


@given(graphs(), st.sampled_from((1, 2)))
def test_random_plans_are_in_order(graph: Graph, batch: int) -> None:
    plan = make_plan(graph, batch)
    check_order(plan)
    stored = {view.buffer.name for view in plan.views.values()}
    assert all(plan.views[name].buffer.name == name for name in stored)


def test_a_float_island_is_refused_in_one_sentence() -> None:
    attrs = {"function": "softmax", "input_scale": 1.0, "inverse_scale": 127.0} | clamp_attrs()
    island = make_node("act", "float_op", [X], attrs=attrs)
    with pytest.raises(UserError, match=r"^act computes softmax in float32: got a float island, expected integers thr"):
        make_plan(finished([X, island]), 1)
