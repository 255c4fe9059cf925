"""Convolutions with one input channel for each output channel."""

import numpy as np

from tvm_benchmark.depthwise_bytes import ByteKernel, Tile, fits_bytes
from tvm_benchmark.epilogue import Epilogue
from tvm_benchmark.isa import Target
from tvm_benchmark.loops import image_rows
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Constants, Value, block_channels, block_start, blocks
from tvm_benchmark.source import Source
from utils.integer_graph.ir import Node


def emit(plan: Plan, step: Step, target: Target, tile: Tile | None = None) -> Source:
    """The kernel of a depthwise convolution.  tile: of the kernel on bytes (the default: chosen by a count of
    instructions); it must fit the output."""
    assert step.anchor is not None
    view = plan.views[step.inputs[0]]
    if target.dot == "avx512" and view.storage.dtype == "uint8" and fits_bytes(plan, step):
        bias = stored_bias(step.anchor, view.storage.zero)
        return ByteKernel(plan, step, step.anchor, bias, target, tile).emit()
    source = Source()
    _emit_lanes(source, plan, step, step.anchor, target)
    return source


def stored_bias(node: Node, zero: int) -> np.ndarray:
    """The bias int32 [C] for stored inputs, which are ``zero`` too great."""
    sums = node.arrays["weight"].astype(np.int64).sum((1, 2, 3))
    return (node.arrays["bias"].astype(np.int64) - zero * sums).astype(np.int32)


def _emit_lanes(source: Source, plan: Plan, step: Step, node: Node, target: Target) -> None:
    """16 channels at a time in int32 lanes, one multiplication for each tap."""
    (channels, height, width), view = step.shape, plan.views[step.inputs[0]]
    weight, attrs = node.arrays["weight"], node.attrs
    kh, kw = weight.shape[2:]
    pointer = source.tensor(step.inputs[0], view)
    packed = weight.reshape(channels, kh * kw)[block_channels(channels)].transpose(0, 2, 1)
    weights = source.constant(packed.ravel())
    bias = Constants(source, stored_bias(node, view.storage.zero), block_channels(channels))
    epilogue = Epilogue(source, plan, step, target)
    (sh, sw), (dh, dw), (top, _, left, _) = attrs["stride"], attrs["dilation"], attrs["padding"]
    with (
        image_rows(source, plan.batch, height, plan.batch * channels * height * width) as (n, h),
        source.loop("b", blocks(channels)) as b,
    ):
        epilogue.begin(b)
        start, first = block_start(b, channels), bias.vector(b)
        factors = [
            source.let(f'T.cast({weights}[T.Ramp((({b})*{kh * kw} + {tap})*{LANES}, 1, {LANES})], "int32x16")')
            for tap in range(kh * kw)
        ]
        with source.loop("w", width) as w:
            at = source.let(f"{view.at(n, f'({h})*{sh} - {top}', f'({w})*{sw} - {left}')} + {start}", "at")
            total = first
            for tap, factor in enumerate(factors):
                i, j = divmod(tap, kw)
                offset = f"{at} + {i * dh * view.buffer.row + j * dw * view.buffer.pitch}"
                value = f'T.cast({pointer}[T.Ramp({offset}, 1, {LANES})], "int32x16")'
                total = source.let(f"{total} + {value} * {factor}")
            epilogue.finish({step.name: Value(total)}, lambda view: view.at(n, h, w), start)
