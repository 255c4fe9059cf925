"""Tensors quantized to codes that may have a zero point: what engines other than the integer graph compute.

``x_hat = s * (clamp(round(x / s) + z, lo, hi) - z)`` is ``s * clamp(round(x / s), lo - z, hi - z)``: a zero point only
moves the bounds of the multiples of s.  So the modules here are those of the integer graph with other scales and
bounds, and calibration, equalisation, bias correction and learned rounding treat them alike.  Zero is always a code,
therefore zero padding of the real values pads with the zero point.

Source: MQBench (its fake quantizers and observers); the bias stays float.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.quantization_utils.calibrators import MSE_METHODS, HistogramObserver, ema_of, make_observer
from utils.quantization_utils.fold_bn import affine_of, fold
from utils.quantization_utils.observers import Observer, Range
from utils.quantization_utils.quant_modules import Quantizer, QuantLayer
from utils.quantization_utils.quant_primitives import MIN_WEIGHT_SCALE, int_range, per_channel
from utils.quantization_utils.range_search import CHANNEL_CANDIDATES, TENSOR_CANDIDATES, best_factor

MIN_SCALE = torch.finfo(torch.float32).eps
PIECE = 1 << 18  # weights searched at a time: they stay in the cache


@dataclass(frozen=True)
class Code:
    """Inclusive codes of a tensor; ``affine``: with a zero point among them, else zero is the code 0."""

    lo: int
    hi: int
    affine: bool

    def scale_and_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (a whole number, same dtype) of real ranges, elementwise; zero is put into them."""
        low, high = low.clamp_max(0), high.clamp_min(0)
        if not self.affine:
            scale = (torch.maximum(-low, high) / ((self.hi - self.lo) / 2)).clamp_min(MIN_SCALE)
            return scale, torch.zeros_like(scale)
        scale = ((high - low) / (self.hi - self.lo)).clamp_min(MIN_SCALE)
        return scale, (self.lo - torch.round(low / scale)).clamp(self.lo, self.hi)


def make_code(bits: int, affine: bool, narrow: bool) -> Code:
    """0 .. 2**bits - 1 with a zero point, or signed codes around zero; narrow: without the lowest of those.

    >>> make_code(8, affine=True, narrow=False), make_code(8, affine=False, narrow=True)
    (Code(lo=0, hi=255, affine=True), Code(lo=-127, hi=127, affine=False))
    """
    lo, hi = int_range(bits, not affine)
    return Code(lo + (narrow and not affine), hi, affine)


class CodedQuantizer(Quantizer):
    """Fake quantization of one activation tensor to codes.  signed: whether values may be negative."""

    def __init__(self, code: Code, bits: int, signed: bool) -> None:
        super().__init__(bits, signed)
        self.code = code

    @property
    def scale(self) -> Tensor:
        """Real value of one step, 0-d float32."""
        return self.code.scale_and_zero(self.x_min, self.x_max)[0]

    def bounds(self) -> tuple[int, int]:
        """Inclusive multiples of the scale: the codes less the zero point."""
        zero = int(self.code.scale_and_zero(self.x_min, self.x_max)[1])
        return self.code.lo - zero, self.code.hi - zero


class CodedLayer(QuantLayer):
    """A layer whose weights are quantized to codes, in a range that :func:`calibrate_codes` fixes.

    folded: whether it is the folded weights that are quantized.  Otherwise the BatchNorm acts on the quantized
    weights, in float.
    """

    INTEGERS = torch.int16

    def __init__(self, module: nn.Conv2d | nn.Linear, bn: _BatchNorm | None, bits: int, code: Code, folded: bool):
        super().__init__(module, bn, bits)
        self.code, self.folded = code, folded
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(len(module.weight)))

    def coded_weights(self) -> Tensor:
        """The float weights [O, ...] that the codes stand for."""
        return fold(self.module.weight.detach(), None, self.bn if self.folded else None)[0]

    @torch.no_grad()
    def take_range(self, low: Tensor, high: Tensor) -> None:
        """Fix scale and zero point of :meth:`coded_weights` from real ranges [O]."""
        scale, self.zero = self.code.scale_and_zero(low, high)
        if self.folded and self.bn is not None:
            k = affine_of(self.bn)[0].abs()
            scale = torch.where(k > MIN_WEIGHT_SCALE, scale / k.clamp_min(MIN_WEIGHT_SCALE), torch.ones_like(k))
        self.learned = nn.Parameter(scale)

    def integer_range(self) -> tuple[Tensor, Tensor]:
        """Inclusive multiples of the scale of the folded weights, [O, 1, ...]."""
        lo, hi = self.code.lo - self.zero, self.code.hi - self.zero
        if not self.folded and self.bn is not None:  # a negative factor of the BatchNorm turns the weights over
            turned = affine_of(self.bn)[0] < 0
            lo, hi = torch.where(turned, -hi, lo), torch.where(turned, -lo, hi)
        return per_channel(lo, self.module.weight), per_channel(hi, self.module.weight)


@torch.no_grad()
def calibrate_codes(layer: CodedLayer, method: str, power: float) -> None:
    """Fix the range of a layer's weights: ``minmax``, or ``mse`` with the mean error ``|w_hat - w| ** power``.

    One range for each output channel, or for all together, as ``layer.per_channel`` says.
    """
    weight = layer.coded_weights()
    rows = weight.reshape(len(weight) if layer.per_channel else 1, -1)
    low, high = rows.aminmax(dim=1)
    if method == "mse":
        candidates = CHANNEL_CANDIDATES if layer.per_channel else TENSOR_CANDIDATES
        parts = rows.split(max(1, PIECE // rows.shape[1]))
        found = [least_error_factor(p, p.amin(1), p.amax(1), layer.code, candidates, power) for p in parts]
        factor = torch.cat(found)
        low, high = low * factor, high * factor
    layer.take_range(low.expand(len(weight)), high.expand(len(weight)))


def least_error_factor(
    values: Tensor, low: Tensor, high: Tensor, code: Code, candidates: int, power: float, counts: Tensor | None = None
) -> Tensor:
    """The factor [R] of each row's range ``low`` to ``high`` that quantizes best, see :func:`best_factor`."""

    def steps(factor: float) -> tuple[Tensor, tuple[Any, Any]]:
        scale, zero = (t.unsqueeze(1) for t in code.scale_and_zero(low * factor, high * factor))
        return scale, (code.lo - zero, code.hi - zero)

    return best_factor(values, steps, candidates, power, counts)


class CodedSearch(HistogramObserver):
    """The range with the least error in codes; a histogram of all batches stands for the values."""

    def __init__(self, code: Code, power: float) -> None:
        super().__init__(two_sided=True, signed=True)
        self.code, self.power = code, power

    def result(self) -> Range:
        low, high = (torch.tensor([v], dtype=torch.float64) for v in (self.low, self.high))
        factor = torch.ones(())
        if self.high > self.low:
            values, counts = self.histogram.points()
            (factor,) = least_error_factor(values, low, high, self.code, TENSOR_CANDIDATES, self.power, counts)
        return (low[0] * factor).float(), (high[0] * factor).float()


def observer_for(quantizer: Quantizer, method: str, percentile: float, power: float) -> Observer:
    """The observer of a method of ``calibrators.METHODS``; searches for least error are made in the tensor's codes."""
    if isinstance(quantizer, CodedQuantizer) and method in MSE_METHODS:
        search = partial(CodedSearch, quantizer.code, power)
        return search() if method == "mse" else ema_of(search)
    return make_observer(method, quantizer.bits, quantizer.signed, percentile, power)
