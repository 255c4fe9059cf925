"""Float islands: the few operations that stay float32 between a dequantization and a quantization (op ``float_op``).

y = clamp(rne(fl(f(fl(float32(x) * input_scale)) * inverse_scale))).  Interpolation is float32 products and sums in a
fixed order, so it gives equal bits everywhere; softmax takes exp in float64 and rounds once to float32, so machines
whose exp differs in the last bit of a float64 practically never differ.  Every engine calls these very functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.integer_graph.ir import Node, TensorType
from utils.integer_graph.type_rules import (
    ACCUMULATOR_LIMIT,
    Arrays,
    Attrs,
    clamped,
    int_list,
    integer,
    is_positive_float32,
    require,
)


@dataclass(frozen=True)
class Island:
    """The shape rule and the float32 function of one kind of island; `attrs` are the attributes it needs."""

    shape: Callable[[TensorType, Attrs], tuple[int, ...]]
    compute: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]
    attrs: tuple[str, ...] = ()


def _softmax(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """Over the channels, axis 1."""
    wide = x.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def _interpolated_shape(x: TensorType, attrs: Attrs) -> tuple[int, ...]:
    require(len(x.shape) == 3, f"the input has shape {x.shape}, expected (C, H, W)")
    align = attrs["align_corners"]
    require(type(align) is bool, f"attribute align_corners is {align!r}, expected true or false")
    return (x.shape[0], *int_list(attrs, "size", 2, 1))


def source_positions(size: int, out: int, align_corners: bool) -> np.ndarray:
    """Where each of `out` samples lies among `size` ones, float64 in [0, size - 1] (torch's definition).

    >>> source_positions(2, 4, False).tolist(), source_positions(3, 5, True).tolist()
    ([0.0, 0.25, 0.75, 1.0], [0.0, 0.5, 1.0, 1.5, 2.0])
    """
    index = np.arange(out)
    if align_corners:
        return index * ((size - 1) / max(out - 1, 1))
    return np.clip((index + 0.5) * (size / out) - 0.5, 0, size - 1)


def _interpolate(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """Bilinear, rows first: (1 - w) * a + w * b in float32."""
    for axis, out in zip((2, 3), attrs["size"], strict=True):
        position = source_positions(x.shape[axis], out, attrs["align_corners"])
        first = np.minimum(np.floor(position).astype(np.int64), x.shape[axis] - 1)
        second = np.minimum(first + 1, x.shape[axis] - 1)
        w = (position - first).astype(np.float32).reshape((-1, 1) if axis == 2 else (-1,))
        x = (np.float32(1) - w) * np.take(x, first, axis) + w * np.take(x, second, axis)
    return x


def _same_image_shape(x: TensorType, attrs: Attrs) -> tuple[int, ...]:
    require(len(x.shape) == 3, f"the input has shape {x.shape}, expected (C, H, W)")
    return x.shape


def _instance_norm_shape(x: TensorType, attrs: Attrs) -> tuple[int, ...]:
    for key in ("weight", "bias"):
        good = isinstance(attrs[key], list) and len(attrs[key]) == x.shape[0]
        require(good, f"attribute {key} must list one number for each of {x.shape[0]} channels")
    return _same_image_shape(x, attrs)


def _instance_norm(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias per image and channel, the sums exact in integers."""
    scale = attrs["input_scale"]
    q = np.rint(x / np.float32(scale)).astype(np.int64)
    count = q.shape[2] * q.shape[3]
    total, squares = (v.sum(axis=(2, 3), keepdims=True) for v in (q, q * q))
    variance = (count * squares - total * total).astype(np.float64)
    normalised = (count * q - total) / np.sqrt(variance + attrs["eps"] / (scale * scale) * (count * count))
    weight, bias = (np.array(attrs[key], np.float64)[:, None, None] for key in ("weight", "bias"))
    return (normalised * weight + bias).astype(np.float32)


def _local_response_norm(x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """x / (k + alpha * mean of x^2 over `size` neighbouring channels)^beta, in float64."""
    size, wide = attrs["size"], x.astype(np.float64)
    padded = np.pad(wide * wide, ((0, 0), (size // 2, (size - 1) // 2), (0, 0), (0, 0)))
    total = sum(padded[:, i : i + x.shape[1]] for i in range(size))
    return (wide / (attrs["k"] + attrs["alpha"] * (total / size)) ** attrs["beta"]).astype(np.float32)


FUNCTIONS: Mapping[str, Island] = {
    "softmax": Island(lambda x, attrs: x.shape, _softmax),
    "interpolate": Island(_interpolated_shape, _interpolate, ("size", "align_corners")),
    "instance_norm": Island(_instance_norm_shape, _instance_norm, ("eps", "weight", "bias")),
    "local_response_norm": Island(_same_image_shape, _local_response_norm, ("size", "alpha", "beta", "k")),
}


def rule(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Type rule of ``float_op``."""
    function = attrs["function"]
    require(function in FUNCTIONS, f"function {function!r} is unknown, expected one of {', '.join(FUNCTIONS)}")
    missing = [key for key in FUNCTIONS[function].attrs if key not in attrs]
    require(not missing, f"function {function} lacks the attributes {missing}")
    for key in ("input_scale", "inverse_scale"):
        value = attrs[key]
        require(is_positive_float32(value), f"attribute {key} is {value!r}, expected a positive float32 value")
    lo, hi = (integer(attrs, key, -ACCUMULATOR_LIMIT, ACCUMULATOR_LIMIT) for key in ("lo", "hi"))
    return clamped(FUNCTIONS[function].shape(inputs[0], attrs), attrs, lo, hi)


def compute(inputs: Sequence[np.ndarray], node: Node) -> np.ndarray:
    """Reference of ``float_op``: int64 [N, ...] to int64 [N, ...]."""
    attrs = node.attrs
    real = inputs[0].astype(np.float32) * np.float32(attrs["input_scale"])
    result = FUNCTIONS[attrs["function"]].compute(real, attrs)
    with np.errstate(over="ignore"):
        scaled = np.rint(result * np.float32(attrs["inverse_scale"]))
    return np.clip(scaled, attrs["lo"], attrs["hi"]).astype(np.int64)
