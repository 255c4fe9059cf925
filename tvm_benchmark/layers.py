"""A convolution or matrix product as a kernel sees it, and its packed weights.

The reduction runs over *segments*, runs of bytes that are contiguous in NHWC: one for each kernel row (kernel width x
channels), or one for each tap where pixels have gaps.  Weights are packed once as [group][block][segment][step][16
outputs][bytes of a step]; a step is as many bytes as the target's dot product takes.  What a segment reads beyond its
end meets zero weights.
"""

from dataclasses import dataclass

import numpy as np

from tvm_benchmark.layout import View
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, blocks
from utils.integer_graph.ir import Node


@dataclass(frozen=True)
class Layer:
    """A conv2d or linear node as a kernel sees it, small groups merged until 16 outputs are whole blocks.

    weight: int8 [outputs, inputs / groups, kh, kw].  segment: bytes (input elements) of one run of the reduction.
    row_step, column_step: elements from one segment to the next.  start: elements from a pixel to its first tap.
    """

    weight: np.ndarray
    bias: np.ndarray
    groups: int
    stride: tuple[int, int]
    view: View
    bits: int
    merged: bool  # whole kernel rows are one segment
    dilation: tuple[int, int]
    padding: tuple[int, int]  # top, left

    @property
    def outputs(self) -> int:
        """Of one group."""
        return len(self.weight) // self.groups

    @property
    def inputs(self) -> int:
        """Of one group."""
        return int(self.weight.shape[1])

    @property
    def segments(self) -> tuple[int, int]:
        """Rows and columns of segments."""
        kh, kw = self.weight.shape[2:]
        return (kh, 1) if self.merged else (kh, kw)

    @property
    def segment(self) -> int:
        return self.inputs * (self.weight.shape[3] if self.merged else 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Elements between rows of segments and between columns of segments."""
        return self.dilation[0] * self.view.buffer.row, self.dilation[1] * self.view.buffer.pitch

    @property
    def is_point(self) -> bool:
        """Whether every output pixel reads the same pixel of the input, and no other."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def start(self) -> int:
        return -(self.padding[0] * self.view.buffer.row + self.padding[1] * self.view.buffer.pitch)


def layers_of(plan: Plan, step: Step) -> list[Layer]:
    """The layers of a conv or linear step: its anchor's and, where it has one, the second's."""
    return [_layer(node, plan.views[name]) for node, name in zip(step.anchors, step.inputs, strict=True)]


def _layer(node: Node, view: View) -> Layer:
    weight = node.arrays["weight"]
    weight = weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))
    attrs = {"stride": [1, 1], "dilation": [1, 1], "padding": [0] * 4, "groups": 1, **node.attrs}
    bias = node.arrays["bias"].astype(np.int64) - view.storage.zero * weight.astype(np.int64).sum((1, 2, 3))
    weight, groups = merge_groups(weight, attrs["groups"])
    dense = view.channels == view.buffer.pitch and groups == 1 and attrs["dilation"][1] == 1
    return Layer(
        weight=weight,
        bias=bias.astype(np.int32),
        groups=groups,
        stride=tuple(attrs["stride"]),
        view=view,
        bits=attrs["weight_bits"],
        merged=dense,
        dilation=tuple(attrs["dilation"]),
        padding=(attrs["padding"][0], attrs["padding"][2]),
    )


def merge_groups(weight: np.ndarray, groups: int) -> tuple[np.ndarray, int]:
    """Join neighbouring groups (zeros off the diagonal) until one has whole blocks of 16 outputs.

    weight: int8 [O, I / groups, kh, kw].  Returns int8 [O, I / merged groups, kh, kw] and the number of groups left.
    """
    outputs, inputs = len(weight) // groups, weight.shape[1]
    if groups == 1:
        return weight, 1
    factor = next((f for f in range(1, groups + 1) if groups % f == 0 and f * outputs % LANES == 0), groups)
    joined = np.zeros((len(weight), factor * inputs, *weight.shape[2:]), weight.dtype)
    for o in range(len(weight)):
        at = (o // outputs) % factor * inputs
        joined[o, at : at + inputs] = weight[o]
    return joined, groups // factor


def pack_weights(layer: Layer, group_bytes: int, step_bytes: int, four_bit: bool) -> np.ndarray:
    """Weights int8 [groups][blocks][segments][steps][16][group_bytes], flat.

    A segment is padded with zeros to a multiple of step_bytes.  four_bit: two neighbouring steps share their bytes,
    the first in the low nibbles; a segment then has an even number of steps.
    """
    pad = step_bytes * (2 if four_bit and step_bytes == group_bytes else 1)
    length = -(-layer.segment // pad) * pad
    w = layer.weight.transpose(0, 2, 3, 1)  # outputs, kh, kw, inputs
    w = w.reshape(len(w), -1, layer.segment)
    w = np.pad(w, ((0, 0), (0, 0), (0, length - layer.segment)))
    count = blocks(layer.outputs)
    start = np.minimum(np.arange(count) * LANES, max(layer.outputs - LANES, 0))
    channel = start[:, None] + np.arange(LANES)
    valid = channel < layer.outputs
    channel = np.arange(layer.groups)[:, None, None] * layer.outputs + np.minimum(channel, layer.outputs - 1)
    w = w[channel] * valid[None, :, :, None, None]  # groups, blocks, 16, segments, length
    w = w.reshape(layer.groups, count, LANES, -1, length // group_bytes, group_bytes)
    w = np.ascontiguousarray(w.transpose(0, 1, 3, 4, 2, 5)).astype(np.int8)
    if not four_bit:
        return w.ravel()
    pairs = w.reshape(-1, 2, LANES * group_bytes).view(np.uint8)
    return ((pairs[:, 0] & 15) | (pairs[:, 1] << 4)).view(np.int8).ravel()


def block_bias(layer: Layer) -> np.ndarray:
    """Bias int32 [groups * blocks * 16], in the order of the packed blocks."""
    count = blocks(layer.outputs)
    start = np.minimum(np.arange(count) * LANES, max(layer.outputs - LANES, 0))
    channel = np.minimum(start[:, None] + np.arange(LANES), layer.outputs - 1)
    return layer.bias[np.arange(layer.groups)[:, None, None] * layer.outputs + channel].ravel().astype(np.int32)
