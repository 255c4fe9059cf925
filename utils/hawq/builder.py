"""Builds integer graphs with the original's rules: the same operators as everywhere, other options.

What differs from graphs of our own models: ties go to the even integer, multipliers have 31 bits, activations of
exactly 4 bits alone are unsigned, a residual sum of 16 bits is not clamped (so it is stored in 32), average pools round
down, ReLU6's bound is one integer per channel.  Facts: see ``arithmetic``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from utils.errors import UserError
from utils.hawq.arithmetic import SMALLEST_RANGE, LayerIntegers, is_unsigned, relu6_bound, rescaling_ratio
from utils.hawq.names import float_layer
from utils.hawq.parameters import Parameters
from utils.hawq.schemes import RESIDUAL_BITS as WIDE_BITS
from utils.integer_graph.input_table import pixel_table
from utils.integer_graph.ir import ACCUMULATOR_BITS, Node, int_range
from utils.integer_graph.ops import WINDOW_ATTRS, make_node
from utils.integer_graph.type_rules import accumulator_bounds
from utils.preprocess import Preprocess
from utils.quantization_utils.cost_model import LayerBits
from utils.quantization_utils.dyadic import dyadic_array, floor_dyadic
from utils.quantization_utils.windows import pool_windows

MULTIPLIER_BITS = 16  # any output wider than 8 bits gives the 31-bit multipliers of the original
MIN_RATIO = 2.0**-61  # below 2^-32 the result is 0 for every accumulator
MAX_RATIO = 2.0**16  # from there on a clamp to 16 bits decides for every accumulator but 0
MAX_SUM = 1 << 30  # of the pixels of an average pool, up to which a multiplier is proved to divide
INT32_MAX = (1 << 31) - 1
UNIT = np.ones(1, np.float32)


@dataclass(frozen=True)
class Value:
    """A tensor of the network: its node, the scale of the activation it comes from, and, for accumulators, the scales
    of the weights, float32 [C] (exactly 1 for activations)."""

    node: Node
    scale: np.float32
    weight_scale: np.ndarray


class Builder:
    """Adds nodes in order.

    module: the float network, for geometry and BatchNorm's eps.  bits: of its layers, by the float network's names.
    """

    def __init__(self, module: nn.Module, parameters: Parameters, bits: Mapping[str, LayerBits]) -> None:
        self.module, self.parameters, self.bits = module, parameters, bits
        self.nodes: list[Node] = []
        self.saturated: dict[str, int] = {}

    def emit(self, name: str, op: str, inputs: Sequence[Node], attrs: Mapping[str, Any] | None = None,
             arrays: Mapping[str, np.ndarray] | None = None, scale: float | None = None) -> Node:  # fmt: skip
        """Append one checked node.  Raises UserError for ranges so small that the integers do not fit 32 bits."""
        with _as_user_error():
            node = make_node(name, op, inputs, attrs=attrs, arrays=arrays, scale=scale)
        self.nodes.append(node)
        return node

    def input(self, name: str, bits: int, shape: tuple[int, ...], preprocess: Preprocess | None) -> Value:
        """The first quantizer: of uint8 pixels, or of normalised float32 images where there is no preprocessing."""
        scale = self.parameters.activation(name, bits)
        if scale <= SMALLEST_RANGE:
            raise UserError(f"the range of {name} is 0: the file was saved before its first forward, give a later one")
        inverse, (lo, hi) = np.float32(1) / scale, int_range(bits, not is_unsigned(bits))
        attrs: dict[str, Any] = {"shape": list(shape), "bits": bits, "signed": lo < 0}
        if preprocess is None:
            attrs |= {"inverse_scale": float(inverse), "lo": lo, "hi": hi}
            return self._value(self.emit(name, "quantize", [], attrs, None, float(scale)), scale)
        arrays = {"table": pixel_table(preprocess, inverse, lo, hi)}
        return self._value(self.emit(name, "image", [], attrs, arrays, float(scale)), scale)

    def conv(self, name: str, x: Value) -> Value:
        """A convolution with its BatchNorm folded in, or MobileNetV2's last one; gives accumulators."""
        path = self.path(name)
        conv = self.module.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        assert not isinstance(conv.padding, str)
        rows, cols = conv.padding
        attrs = {
            "stride": list(conv.stride),
            "padding": [rows, rows, cols, cols],
            "dilation": list(conv.dilation),
            "groups": conv.groups,
        }
        return self._layer(name, path, "conv2d", tuple(conv.weight.shape), x, attrs)

    def linear(self, name: str, x: Value) -> Value:
        """The classifier; gives accumulators."""
        path = self.path(name)
        layer = self.module.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return self._layer(name, path, "linear", tuple(layer.weight.shape), x, {})

    def path(self, name: str) -> str:
        """The float network's layer for a module of the original."""
        path = float_layer(name, self.bits)
        assert path is not None, f"{name} was to fit the network"
        return path

    def bits_before(self, name: str) -> int:
        """Bits of the activation that a layer of the original reads."""
        return self.bits[self.path(name)].activation

    def _layer(self, name: str, path: str, op: str, shape: tuple[int, ...], x: Value, attrs: dict[str, Any]) -> Value:
        bits = self.bits[path].weight
        eps = self._eps(path)
        integers = self.parameters.layer(name, shape, bits, x.scale, eps)
        _refuse_other_bits(name, integers.weight, bits)
        integers, changed = _within_int32(integers, (x.node.type.lo, x.node.type.hi))
        if changed:
            self.saturated[path] = changed
        arrays: dict[str, np.ndarray] = {
            "weight": integers.weight.astype(np.int8),
            "bias": integers.bias.astype(np.int32),
        }
        node = self.emit(path, op, [x.node], {"weight_bits": bits, "layer": path, **attrs}, arrays)
        return Value(node, x.scale, integers.scale)

    def _eps(self, path: str) -> float | None:
        """Of the BatchNorm behind a convolution of a block; the classifiers have none."""
        if not path.endswith(".conv"):
            return None
        bn = self.module.get_submodule(f"{path.removesuffix('.conv')}.bn")
        assert isinstance(bn, nn.BatchNorm2d)
        return bn.eps

    def act(self, name: str, bits: int, x: Value, positive: bool = False, quantizer: str | None = None) -> Value:
        """A quantizer: one rescaling and a clamp; ``positive``: behind a ReLU, which the clamp then is.

        quantizer: its name in the file, where the node is called otherwise.
        """
        scale = self.parameters.activation(quantizer or name, bits)
        arrays = self._multipliers(x, scale, MAX_RATIO)
        attrs = self._clamp(bits, positive or x.node.type.lo >= 0)
        return self._value(self.emit(name, "requantize", [x.node], attrs, arrays, float(scale)), scale)

    def add(self, name: str, x: Value, identity: Value) -> Value:
        """Both branches rescaled to 16 bits on their own, then summed, without a clamp anywhere."""
        scale = self.parameters.activation(name, WIDE_BITS)
        attrs = {"rounding": "even", "lo": None, "hi": None, "bits": ACCUMULATOR_BITS, "signed": True}
        arrays = self._multipliers(identity, scale, math.inf, "0") | self._multipliers(x, scale, math.inf, "1")
        return self._value(self.emit(name, "add", [identity.node, x.node], attrs, arrays, float(scale)), scale)

    def concat(self, name: str, values: Sequence[Value]) -> Value:
        """Every branch rescaled to the common scale and clamped, then joined."""
        scale = self.parameters.activation(name, WIDE_BITS)
        arrays: dict[str, np.ndarray] = {}
        for i, value in enumerate(values):
            arrays |= self._multipliers(value, scale, MAX_RATIO, str(i))
        attrs = self._clamp(WIDE_BITS, min(value.node.type.lo for value in values) >= 0)
        nodes = [value.node for value in values]
        return self._value(self.emit(name, "concat", nodes, attrs, arrays, float(scale)), scale)

    def relu(self, x: Value) -> Value:
        """max(x, 0) of a block's output."""
        bounds = {"lo": np.zeros(1, np.int32), "hi": np.full(1, max(x.node.type.hi, 0), np.int32)}
        return replace(x, node=self.emit(f"{x.node.name}.relu", "clip", [x.node], None, bounds))

    def relu6(self, x: Value) -> Value:
        """Accumulators clipped at 0 and at the integer of each channel that stands for 6."""
        hi = np.minimum(relu6_bound(x.scale, x.weight_scale).astype(np.float64), INT32_MAX).astype(np.int32)
        bounds = {"lo": np.zeros_like(hi), "hi": hi}
        return replace(x, node=self.emit(f"{x.node.name}.relu6", "clip", [x.node], None, bounds))

    def max_pool(self, name: str, x: Value, kernel: int, stride: int, padding: int = 0) -> Value:
        """Greatest value of each window."""
        attrs = {"kernel": [kernel] * 2, "stride": [stride] * 2, "padding": [padding] * 2, "dilation": [1, 1]}
        return replace(x, node=self.emit(name, "max_pool", [x.node], {**attrs, "ceil_mode": False}))

    def global_mean(self, name: str, bits: int, x: Value) -> Value:
        """Mean of all pixels and the quantizer behind it."""
        height, width = x.node.type.shape[1:]
        assert height == width
        if height * width * x.node.type.hi >= MAX_SUM:
            x = self._decisive(x, height * width, bits, self.parameters.activation(name, bits))
        return self.act(name, bits, self.avg_pool(f"{x.node.name}.mean", x, height))

    def _decisive(self, x: Value, area: int, bits: int, scale: np.float32) -> Value:
        """x, clipped where one pixel alone takes the mean to the clamp of the quantizer behind: it changes nothing."""
        hi = int_range(bits, not is_unsigned(bits))[1]
        enough = area * (math.ceil(hi * float(scale) / float(x.scale)) + 1)
        bounds = {"lo": np.zeros(1, np.int32), "hi": np.full(1, min(enough, x.node.type.hi), np.int32)}
        return replace(x, node=self.emit(f"{x.node.name}.enough", "clip", [x.node], None, bounds))

    def avg_pool(self, name: str, x: Value, kernel: int, stride: int = 1, padding: int = 0) -> Value:
        """Mean of each window, padding counted, rounded down; of integers that are not negative, at their scale.

        The original computes trunc(mean + 0.01), which is that.
        """
        assert x.node.type.lo >= 0
        kind, area = x.node.type, kernel * kernel
        with _as_user_error():
            m, e = floor_dyadic(area, area * kind.hi)
        size = tuple((extent + 2 * padding - kernel) // stride + 1 for extent in kind.shape[1:])
        pairs = ((kernel, kernel), (stride, stride), (padding, padding))
        windows = pool_windows(kind.shape[1:], size, *pairs, count_include_pad=True, divisor=None)
        attrs: dict[str, Any] = {side: list(getattr(windows, side)) for side in WINDOW_ATTRS}
        attrs |= {"rounding": "down", "lo": kind.lo, "hi": kind.hi, "bits": kind.bits, "signed": kind.signed}
        arrays: dict[str, np.ndarray] = {
            "multiplier": np.full((1, 1), m, np.int32),
            "shift": np.full((1, 1), e, np.uint8),
        }
        return replace(x, node=self.emit(name, "avg_pool", [x.node], attrs, arrays, x.node.scale))

    def flat(self, x: Value) -> Value:
        """[C, 1, 1] as [C]."""
        shape = {"shape": [x.node.type.shape[0]]}
        return replace(x, node=self.emit(f"{x.node.name}.flat", "reshape", [x.node], shape))

    def logits(self, x: Value) -> Node:
        """The last node: float32(accumulator) * float32(weight scale * input scale)."""
        return self.emit("logits", "logits", [x.node], None, {"scale": x.weight_scale * x.scale})

    def _value(self, node: Node, scale: np.float32) -> Value:
        return Value(node, scale, UNIT)

    def _clamp(self, bits: int, positive: bool) -> dict[str, Any]:
        """The original's range; where nothing is negative the same integers are stored without a sign."""
        lo, hi = int_range(bits, not is_unsigned(bits))
        return {"rounding": "even", "lo": max(lo, 0) if positive else lo, "hi": hi, "bits": bits,
                "signed": lo < 0 and not (positive and bits <= 8)}  # fmt: skip

    def _multipliers(self, x: Value, scale: np.float32, largest: float, suffix: str = "") -> dict[str, np.ndarray]:
        ratios = np.clip(rescaling_ratio(x.scale, x.weight_scale, scale), MIN_RATIO, largest)
        with _as_user_error():
            m, e = dyadic_array(ratios, output_bits=MULTIPLIER_BITS)
        return {f"multiplier{suffix}": m, f"shift{suffix}": e}


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"the file's network does not fit 32-bit integers: {error}") from error


def _within_int32(layer: LayerIntegers, x: tuple[int, int]) -> tuple[LayerIntegers, int]:
    """Biases that accumulators can hold, and how many had to be changed.

    The original clamps biases to 2^31, where int32 ends.  A channel without weights is stored at half its bias and
    twice its scale, which gives the same results.  In others the bias is reduced by what the products may add, which
    is little in reality: such a channel's weights are next to 0.
    """
    low, high = accumulator_bounds(layer.weight.reshape(len(layer.weight), -1), *x)
    least, most = (-(INT32_MAX + low)).astype(np.float64), (INT32_MAX - high).astype(np.float64)
    bias, scale = layer.bias.astype(np.float64), layer.scale.copy()
    dead = (low == 0) & (high == 0) & (np.abs(bias) > INT32_MAX)
    bias[dead], scale[dead] = bias[dead] / 2, scale[dead] * np.float32(2)
    fitting = np.clip(bias, least, most)
    return LayerIntegers(layer.weight, scale, fitting), int((fitting != bias).sum())


def _refuse_other_bits(name: str, weight: np.ndarray, bits: int) -> None:
    lo, hi = int_range(bits, True)
    if weight.min() < lo or weight.max() > hi:
        got = f"[{weight.min():.0f}, {weight.max():.0f}]"
        raise UserError(
            f"{name}.weight_integer reaches {got}, which does not fit the {bits} bits of the scheme; give the "
            "--quant-scheme that the file was made with"
        )
