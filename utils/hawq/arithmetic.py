"""Float32 formulas by which the original HAWQ turns weights, biases and ranges into integers and scales.

Every operation is one float32 operation in the original's order, so that the same bits come out: it multiplies by
reciprocals where a division would be more exact.  Source: Zhen-Dong/HAWQ at commit 1616df6, quant_utils.py and
quant_modules.py (HAWQ-V3, arXiv 2011.10680); checked against recorded runs of that code.
"""

import math
from dataclasses import dataclass

import numpy as np

SMALLEST_RANGE = np.float32(1e-8)
UNSIGNED_BITS = 4  # activations of exactly this width are unsigned, all others signed
RELU6_BOUND = np.float32(6)


@dataclass(frozen=True)
class Options:
    """Flags of the original that its files do not record.

    weight_percentile: 0 for the extremes, else the percentile in (50, 100] that bounds the weights of convolutions.
    channel_wise: one weight scale per output channel, else one for the tensor.
    """

    weight_percentile: float = 0.0
    channel_wise: bool = True


@dataclass(frozen=True)
class LayerIntegers:
    """weight: float32 integers of the weight's shape.  scale: float32 [O].  bias: float32 integers [O]."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def is_unsigned(bits: int) -> bool:
    """Whether the original stores an activation of this width without a sign."""
    return bits == UNSIGNED_BITS


def activation_scale(x_min: np.float32, x_max: np.float32, bits: int) -> np.float32:
    """float32 scale of an activation; at 4 bits the whole range from least to greatest is spread over 15 steps."""
    if is_unsigned(bits):
        return np.float32(max(np.float32(x_max - x_min), SMALLEST_RANGE) / np.float32((1 << bits) - 1))
    greatest = max(abs(x_min), abs(x_max), SMALLEST_RANGE)
    return np.float32(greatest / np.float32((1 << (bits - 1)) - 1))


def fold(weight: np.ndarray, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, var: np.ndarray, eps: float
         ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Weight [O, I, kh, kw] and bias [O] with the BatchNorm folded in, float32; not finite where var + eps <= 0."""
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(var + np.float32(eps))
        return weight * factor.reshape(-1, 1, 1, 1), (np.float32(0) - mean) * factor + beta


def weight_bounds(weight: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest weight of each output channel (of the tensor: one of each), or percentiles of them.

    Percentiles are order statistics, as of torch's kthvalue: per channel the ceil(L * p / 100)-th smallest of L
    weights; of a whole tensor other ones, see :func:`_tensor_percentiles`.
    """
    rows = weight.reshape(len(weight) if options.channel_wise else 1, -1)
    if options.weight_percentile == 0:
        return rows.min(1), rows.max(1)
    count, percentile, ordered = rows.shape[1], options.weight_percentile, np.sort(rows, axis=1)
    if not options.channel_wise:
        return _tensor_percentiles(ordered, percentile)
    low = max(math.ceil(count * (100 - percentile) * 0.01), 1)
    high = max(math.ceil(count * percentile * 0.01), 1)
    return ordered[:, low - 1], ordered[:, high - 1]


def _tensor_percentiles(ordered: np.ndarray, percentile: float) -> tuple[np.ndarray, np.ndarray]:
    """The original's percentiles of a whole tensor.  ordered: float32 [1, N], ascending.

    Indices are rounded, halves to even; the lower end is counted from the greatest value down, and is 0 for the
    percentile 100.
    """
    count, rest = ordered.shape[1], 100 - percentile
    high = ordered[:, round(count * percentile * 0.01) - 1]
    low = high * 0 if rest == 0 else ordered[:, count - round(count * (1 - rest * 0.01))]
    return low, high


def weight_integers(weight: np.ndarray, bits: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """(integers as float32 of the weight's shape, scale float32 [O])."""
    limit = (1 << (bits - 1)) - 1
    low, high = weight_bounds(weight, options)
    scale = np.maximum(np.maximum(np.abs(low), np.abs(high)), SMALLEST_RANGE) / np.float32(limit)
    inverse = (np.float32(1) / scale).reshape(-1, *(1,) * (weight.ndim - 1))
    integers = np.clip(np.rint(inverse * weight), -limit - 1, limit)
    return integers, np.broadcast_to(scale, len(weight)).copy()


def bias_integers(bias: np.ndarray, scale: np.ndarray, input_scale: np.float32) -> np.ndarray:
    """Bias [O] at the scale of the products, integers as float32, clamped to [-2^31, 2^31]."""
    limit = np.float32(1 << 31)
    inverse = np.float32(1) / (scale * input_scale)
    with np.errstate(over="ignore"):
        return np.clip(np.rint(inverse * bias), -limit, limit)


def rescaling_ratio(input_scale: np.float32, weight_scale: np.ndarray, output_scale: np.float32) -> np.ndarray:
    """float64 ratios of a requantization; the product of both scales is rounded to float32 first."""
    product = (np.float64(input_scale) * weight_scale.astype(np.float64)).astype(np.float32)
    ratio: np.ndarray = product.astype(np.float64) / np.float64(output_scale)
    return ratio


def relu6_bound(input_scale: np.float32, weight_scale: np.ndarray) -> np.ndarray:
    """The integer at which ReLU6 clips each channel, as float32."""
    with np.errstate(over="ignore"):
        bound: np.ndarray = np.rint(RELU6_BOUND / input_scale / weight_scale)
    return bound
