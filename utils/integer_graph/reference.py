"""What each op means: the numpy int64 reference, the definition of correct for every other engine.

A function takes the inputs (int64 [N, ...]) and the node, whose type, attributes and arrays were checked before
(``ops.verify``), and returns int64 [N, *node.type.shape] (float32 for the logits).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from utils.integer_graph.ir import Node
from utils.quantization_utils.dyadic import ROUNDING

Reference = Callable[[Sequence[np.ndarray], Node], np.ndarray]


def _per_channel(values: np.ndarray, rank: int) -> np.ndarray:
    """int64 [C] or [1] shaped to broadcast along axis 1 of [N, C, ...]."""
    return values.astype(np.int64).reshape(-1, *(1,) * (rank - 2))


def _rescaled(x: np.ndarray, node: Node, suffix: str = "") -> np.ndarray:
    m, e = (_per_channel(node.arrays[key + suffix], x.ndim) for key in ("multiplier", "shift"))
    return ROUNDING[node.attrs["rounding"]](x, m, e)


def _clamped(x: np.ndarray, node: Node) -> np.ndarray:
    lo, hi = node.attrs["lo"], node.attrs["hi"]
    return x if lo is None and hi is None else np.clip(x, lo, hi)


def image(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """table[c, pixel] of uint8 images [N, C, H, W]."""
    table, pixels = node.arrays["table"].astype(np.int64), inputs[0]
    return np.stack([table[c][pixels[:, c]] for c in range(len(table))], axis=1)


def quantize(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """clamp(rne(fl(x * inverse_scale))) of float32 images; NaN is refused."""
    with np.errstate(over="ignore"):
        scaled = np.rint(inputs[0] * np.float32(node.attrs["inverse_scale"]))
    if np.isnan(scaled).any():
        raise ValueError(f"{node.name}: the input holds NaN, expected numbers")
    return np.clip(scaled, node.attrs["lo"], node.attrs["hi"]).astype(np.int64)


def conv2d(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Convolution by im2col and float64 matrix products of one image at a time.

    Exact: the type rule proves every sum of products below 2^31, far below the 2^53 that float64 holds.
    """
    (x,), attrs, weight = inputs, node.attrs, node.arrays["weight"]
    top, bottom, left, right = attrs["padding"]
    (dh, dw), (sh, sw), groups = attrs["dilation"], attrs["stride"], attrs["groups"]
    outputs, per_group, kh, kw = weight.shape
    _, height, width = node.type.shape
    rows = weight.reshape(groups, outputs // groups, per_group * kh * kw).astype(np.float64)
    result = np.empty((len(x), outputs, height, width), np.int64)
    for one, out in zip(x, result, strict=True):
        padded = np.pad(one.astype(np.float64), ((0, 0), (top, bottom), (left, right)))
        taps = sliding_window_view(padded, (dh * (kh - 1) + 1, dw * (kw - 1) + 1), axis=(1, 2))
        taps = taps[:, ::sh, ::sw, ::dh, ::dw].transpose(0, 3, 4, 1, 2)
        out[...] = (rows @ taps.reshape(groups, per_group * kh * kw, height * width)).reshape(out.shape)
    return result + _per_channel(node.arrays["bias"], 4)


def linear(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """x @ weight.T + bias in float64, exact for the same reason as :func:`conv2d`."""
    product = inputs[0].astype(np.float64) @ node.arrays["weight"].astype(np.float64).T
    return product.astype(np.int64) + node.arrays["bias"].astype(np.int64)


def requantize(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """clamp(requantize(x))."""
    return _clamped(_rescaled(inputs[0], node), node)


def add(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """clamp(sum of the requantized branches)."""
    total = _rescaled(inputs[0], node, "0")
    for i, x in enumerate(inputs[1:], 1):
        total += _rescaled(x, node, str(i))
    return _clamped(total, node)


def concat(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """The requantized, clamped branches side by side."""
    return np.concatenate([_clamped(_rescaled(x, node, str(i)), node) for i, x in enumerate(inputs)], axis=1)


def mul(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """clamp(requantize(x0 * x1))."""
    return _clamped(_rescaled(inputs[0] * inputs[1], node), node)


def clip(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """min(max(x, lo), hi), per channel or per tensor."""
    (x,) = inputs
    return np.clip(x, *(_per_channel(node.arrays[key], x.ndim) for key in ("lo", "hi")))


def max_pool(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Greatest value of each window, padding below every integer."""
    (x,), attrs = inputs, node.attrs
    lowest, pads, taps = np.iinfo(np.int64).min, [(0, 0), (0, 0)], []
    for axis, size in enumerate(node.type.shape[1:]):
        reach = (size - 1) * attrs["stride"][axis] + attrs["dilation"][axis] * (attrs["kernel"][axis] - 1) + 1
        before = attrs["padding"][axis]
        pads.append((before, max(reach - before - x.shape[2 + axis], 0)))
        span = (size - 1) * attrs["stride"][axis] + 1
        starts = [attrs["dilation"][axis] * tap for tap in range(attrs["kernel"][axis])]
        taps.append([slice(start, start + span, attrs["stride"][axis]) for start in starts])
    padded = np.pad(x, pads, constant_values=lowest)
    result = np.full((len(x), *node.type.shape), lowest, np.int64)
    for rows in taps[0]:
        for cols in taps[1]:
            np.maximum(result, padded[:, :, rows, cols], out=result)
    return result


def avg_pool(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """clamp(requantize(sum over rows x columns)), the sums as differences of int64 cumulative sums."""
    total = inputs[0]
    for axis, name in ((2, "row"), (3, "col")):
        before = [(0, 0)] * 4
        before[axis] = (1, 0)
        cumulative = np.cumsum(np.pad(total, before), axis=axis)
        ends = (np.take(cumulative, node.attrs[f"{name}_{end}"], axis=axis) for end in ("stop", "start"))
        total = np.subtract(*ends)
    m, e = (node.arrays[key].astype(np.int64) for key in ("multiplier", "shift"))
    return _clamped(ROUNDING[node.attrs["rounding"]](total, m, e), node)


def lookup(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """table[x - offset] or table[c, x - offset]."""
    index, table = inputs[0] - node.attrs["offset"], node.arrays["table"].astype(np.int64)
    if table.ndim == 1:
        return table[index]
    return np.stack([row[index[:, c]] for c, row in enumerate(table)], axis=1)


def gather(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Channel `index[i]` as channel i, zeros where the index is -1."""
    index = node.arrays["index"]
    return np.take(inputs[0], np.maximum(index, 0), axis=1) * _per_channel(index >= 0, inputs[0].ndim)


def pad2d(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Zeros added where the padding is positive, rows and columns removed where it is negative."""
    (x,), (top, bottom, left, right) = inputs, node.attrs["padding"]
    height, width = x.shape[2:]
    x = x[:, :, max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
    return np.pad(x, ((0, 0), (0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))))


def upsample(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Each value repeated scale[0] times down and scale[1] times across."""
    rows, cols = node.attrs["scale"]
    return inputs[0].repeat(rows, axis=2).repeat(cols, axis=3)


def reshape(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Row-major reshape of each image."""
    return inputs[0].reshape(len(inputs[0]), *node.type.shape)


def logits(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """float32(x) * scale: one rounding of the integer, one of the product."""
    return inputs[0].astype(np.float32) * node.arrays["scale"]
