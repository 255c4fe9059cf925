"""Pointwise steps that stand alone: every operand is read from memory."""

import numpy as np

from tvm_benchmark.epilogue import Epilogue
from tvm_benchmark.isa import Target
from tvm_benchmark.loops import image_rows, kind
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import block_start, blocks
from tvm_benchmark.source import Source
from utils.integer_graph.ir import Node

CHUNK = 256  # vectors of one thread's turn


def emit(plan: Plan, step: Step, target: Target) -> Source:
    """The kernel of a step without an anchor."""
    source = Source()
    if _is_flat(plan, step):
        _emit_flat(source, plan, step, target)
    else:
        _emit_rows(source, plan, step, target)
    return source


def _per_tensor(node: Node) -> bool:
    """Whether all channels share the node's constants."""
    if node.op == "lookup":
        return node.arrays["table"].ndim == 1
    return all(array.size == 1 for array in node.arrays.values())


def _is_flat(plan: Plan, step: Step) -> bool:
    """Whether the step is one long row of elements."""
    views = [plan.views[name] for name in (*step.reads, *step.writes)]
    same = all(view.is_dense and view.buffer.shape == step.shape for view in views)
    return same and all(map(_per_tensor, step.body))


def _emit_flat(source: Source, plan: Plan, step: Step, target: Target) -> None:
    total = plan.batch * int(np.prod(step.shape))
    epilogue = Epilogue(source, plan, step, target, total)
    count = blocks(total)
    with source.loop("chunk", -(-count // CHUNK), kind(total)) as chunk:
        extent = CHUNK if count % CHUNK == 0 else f"T.min({CHUNK}, {count} - ({chunk})*{CHUNK})"
        epilogue.begin("0")
        with source.loop("b", extent) as b:
            start = block_start(f"({chunk})*{CHUNK} + {b}", total)
            epilogue.finish({}, lambda view: "0", source.let(start, "start"))


def _emit_rows(source: Source, plan: Plan, step: Step, target: Target) -> None:
    channels, height, width = step.shape
    epilogue = Epilogue(source, plan, step, target)
    with (
        image_rows(source, plan.batch, height, plan.batch * channels * height * width) as (n, h),
        source.loop("b", blocks(channels)) as b,
    ):
        epilogue.begin(b)
        start = block_start(b, channels)
        with source.loop("w", width) as w:
            epilogue.finish({}, lambda view: view.at(n, h, w), start)
