"""Lowering: the arena, the workspace, the records of steps, the entry points of the module."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from tests.tvm_benchmark.dense_graphs import Case, Shape, cases, conv, graph_of
from tests.tvm_benchmark.kernels import finished, image, requantized
from tvm_benchmark.isa import TARGETS, choose
from tvm_benchmark.layout import ALIGNMENT
from tvm_benchmark.lowering import SLACK, TABLE, Arena, Lowered, build, lower, module_text
from tvm_benchmark.plan import Plan, make_plan
from utils.integer_graph import interpreter
from utils.integer_graph.ir import Graph, Node

FRAMED = Shape(4, 4, kernel=(3, 3), padding=(1, 1, 1, 1), bits=2)


def chain(length: int, first: Node | None = None) -> Graph:
    """Equal layers in a row."""
    nodes = [first or image((4, 6, 5))]
    for i in range(length):
        one = conv(f"c{i}", nodes[-1], FRAMED)
        nodes += [one, requantized(one, signed=False)]
    return finished(nodes)


def lowered_chain(length: int = 3, **options: Any) -> tuple[Plan, Lowered]:
    plan = make_plan(chain(length), 2)
    return plan, lower(plan, TARGETS["portable"], **options)


def test_constants_are_aligned_and_in_order() -> None:
    arena = Arena()
    arrays = [np.arange(3, dtype=np.int32), np.full(64, 7, np.int8), np.arange(3, dtype=np.int32)]
    offsets = [arena.add(array) for array in arrays]
    assert offsets == [0, 64, 128]
    data = arena.bytes()
    assert (data.dtype, len(data)) == (np.uint8, 192 + SLACK)
    for offset, array in zip(offsets, arrays, strict=True):
        np.testing.assert_array_equal(data[offset : offset + array.nbytes].view(array.dtype), array)
    assert not data[192:].any()


def test_a_sharing_arena_stores_equal_bytes_once() -> None:
    arena = Arena(share=True)
    assert [arena.add(np.full(n, 1, np.int8)) for n in (70, 3, 70)] == [0, 128, 0]
    assert arena.size == 192


def test_equal_kernels_are_one_function() -> None:
    """The first layer of the chain reads other bounds, the last one writes no frame."""
    _, lowered = lowered_chain(5)
    names = [record["kernel"] for record in lowered.steps if record["kind"] == "conv"]
    assert len(set(names[1:4])) == 1
    assert lowered.module.count(f"def {names[1]}(") == 1
    assert lowered.module.count(f"Module.{names[1]}(") == names.count(names[1])


def test_every_kind_of_the_plan_has_a_row() -> None:
    assert {"image", "quantize", "conv", "depthwise", "movement", "pointwise", "max_pool", "avg_pool"} == set(TABLE)


def test_records_count_work_and_bytes() -> None:
    plan, lowered = lowered_chain()
    assert [record["name"] for record in lowered.steps] == [step.name for step in plan.steps]
    record = lowered.steps[1]
    assert (record["name"], record["kind"], record["weight_bits"]) == ("c0", "conv", 2)
    assert record["macs"] == 6 * 5 * 4 * 4 * 9
    assert (record["input_bytes"], record["output_bytes"]) == (4 * 6 * 5, 4 * 6 * 5)
    assert sum(record["weight_bytes"] for record in lowered.steps) == len(lowered.weights) - SLACK
    assert lowered.steps[0]["macs"] == lowered.steps[0]["weight_bits"] == 0


def touched(plan: Plan, index: int) -> set[str]:
    """Buffers that a step reads or writes."""
    step = plan.steps[index]
    return {plan.views[name].buffer.name for name in (*step.inputs, *step.reads, *step.writes)}


def check_workspace(plan: Plan, lowered: Lowered) -> None:
    """No two buffers of which both are needed at one step share a byte; all end before the slack."""
    buffers = {view.buffer.name: view.buffer for view in plan.views.values()}
    uses = {name: [i for i in range(len(plan.steps)) if name in touched(plan, i)] for name in buffers}
    uses[plan.result].append(len(plan.steps))
    for index in range(len(plan.steps) + 1):
        alive = [name for name, steps in uses.items() if steps[0] <= index <= steps[-1]]
        spans = sorted(
            (lowered.tensors[name]["offset"], lowered.tensors[name]["offset"] + buffers[name].bytes(plan.batch))
            for name in alive
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(start % ALIGNMENT == 0 and end + SLACK <= lowered.space_bytes for start, end in spans)


@given(cases())
@settings(max_examples=25, deadline=None)
def test_live_tensors_share_no_byte(case: Case) -> None:
    plan = make_plan(graph_of(case), case.batch)
    check_workspace(plan, lower(plan, TARGETS["portable"]))


def test_memory_is_used_again_unless_it_is_kept() -> None:
    (plan, lowered), (_, kept) = lowered_chain(6), lowered_chain(6, keep=True)
    check_workspace(plan, lowered)
    check_workspace(plan, kept)
    sizes = {view.buffer.name: view.buffer.bytes(plan.batch) for view in plan.views.values()}
    assert kept.space_bytes >= sum(sizes.values()) + SLACK
    assert lowered.space_bytes < kept.space_bytes


def test_emitters_of_dense_layers_can_be_replaced() -> None:
    seen = []

    def emit(*arguments: Any) -> Any:
        seen.append(arguments[1].name)
        return TABLE["conv"](*arguments)

    lowered_chain(emit_conv=emit)
    assert seen == ["c0", "c1", "c2"]


def test_module_text_names_functions_and_calls() -> None:
    text = module_text({"def kernel(a):\n    return 0\n": "kernel_0"}, {"main": ["kernel_0(space)"]}, "space: int")
    assert text.splitlines()[:3] == ["@I.ir_module(s_tir=True)", "class Module:", "    def kernel_0(a):"]
    assert text.endswith("        T.evaluate(Module.kernel_0(space))\n")


def run(graph: Graph, images: np.ndarray, entry_points: bool = False) -> np.ndarray:
    """Logits of a graph on the best target, in a workspace full of rubbish, by ``main`` or by one step after the
    other."""
    import tvm

    target = choose()
    plan = make_plan(graph, len(images))
    lowered = lower(plan, target, steps=entry_points)
    compiled = build(lowered, target)
    rubbish = np.random.default_rng(0).integers(0, 256, lowered.space_bytes).astype(np.uint8)
    space, weights, data = (tvm.runtime.tensor(a) for a in (rubbish, lowered.weights, images.ravel()))
    for name in [f"step_{i}" for i in range(len(plan.steps))] if entry_points else ["main", "main"]:
        compiled[name](space, weights, data)
    count = len(images) * int(np.prod(graph.nodes[-1].type.shape))
    found = space.numpy()[lowered.result : lowered.result + 4 * count]
    return found.view(np.float32).reshape(len(images), -1)


def pixels(graph: Graph, batch: int) -> np.ndarray:
    shape = (batch, *graph.nodes[0].type.shape)
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.tvm
@pytest.mark.parametrize("entry_points", [False, True])
def test_entry_points_give_the_interpreters_logits(entry_points: bool) -> None:
    graph = chain(4)
    images = pixels(graph, 2)
    np.testing.assert_array_equal(run(graph, images, entry_points), interpreter.run(graph, images))


REUSED = Case(
    Shape(1, 17),
    Shape(17, 17, kernel=(5, 3), padding=(2, 2, 1, 1)),
    size=(1, 2),
    view="slice",
    input_bits=4,
    signed=False,
    residual="after",
    batch=1,
    flat=True,
    seed=922929,
)


@pytest.mark.tvm
@given(cases())
@example(REUSED)  # small kernels, which LLVM inlines into main
@settings(
    max_examples=5,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
def test_shared_memory_does_not_change_the_logits(case: Case) -> None:
    graph = graph_of(case)
    images = pixels(graph, case.batch)
    np.testing.assert_array_equal(run(graph, images), interpreter.run(graph, images))


@pytest.mark.tvm
def test_every_target_compiles_on_every_machine() -> None:
    plan = make_plan(chain(1), 1)
    for target in TARGETS.values():
        assert build(lower(plan, target), target) is not None
