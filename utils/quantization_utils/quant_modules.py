"""Quantized modules: an activation quantizer per tensor, and layers that quantize their weights.

A quantized layer refers to the float model's module and BatchNorm without owning them: the float model keeps its
parameters and names, the quantized layer adds the arithmetic.
BatchNorm works in one of two ways (architecture, section 6): *live*, on batch statistics behind a layer whose
unfolded weights are quantized (symmetric per-channel quantization commutes with folding), or *folded* with running
statistics.  Evaluation and conversion always fold; training folds when ``frozen`` is set.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.quantization_utils.fold_bn import affine_of, fold
from utils.quantization_utils.observers import Observer, batch_range
from utils.quantization_utils.quant_primitives import (
    BIAS_LIMIT,
    MIN_ACTIVATION_SCALE,
    MIN_WEIGHT_SCALE,
    FakeQuantize,
    FakeQuantizeLearned,
    FakeQuantizeWeight,
    Relu,
    activation_scale,
    dense,
    int_range,
    per_channel,
    quantize,
    weight_scale,
)

RUNNING_MIN_MAX = -1.0
AFFINE_BITS = 8


class Quantizer(nn.Module):
    """Fake quantization of one activation tensor, with the ReLU or ReLU6 in front of it absorbed.

    bits: 2..16.  signed: whether negative values occur.  relu: clamp at zero first.  ceiling: upper clip, such as 6.
    ``x_min``/``x_max`` (0-d float32 buffers) hold the real range; a learned scale replaces them (LSQ).
    Widths above 8 bits only observe during training: their rounding is far below everything else's.
    """

    def __init__(self, bits: int, signed: bool, relu: bool = False, ceiling: float | None = None) -> None:
        super().__init__()
        self.bits, self.signed, self.relu, self.ceiling = bits, signed, relu, ceiling
        self.in_place = False
        self.enabled = False
        self.tracking = False
        self.momentum = RUNNING_MIN_MAX
        self.percentile = 0.0
        self.observer: Observer | None = None
        self.learned: nn.Parameter | None = None
        self.x_min: Tensor
        self.x_max: Tensor
        self.register_buffer("x_min", torch.zeros(()))
        self.register_buffer("x_max", torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """Real value of one integer step, 0-d float32."""
        if self.learned is not None:
            return self.learned.detach().clamp_min(MIN_ACTIVATION_SCALE)
        return activation_scale(self.x_min, self.x_max, self.bits, self.signed)

    def bounds(self) -> tuple[int, int]:
        """Inclusive integers this tensor can hold: the width's range, a ReLU's zero, a ceiling's integer."""
        lo, hi = int_range(self.bits, self.signed)
        if self.relu:
            lo = max(lo, 0)
        if self.ceiling is not None:
            hi = min(hi, int(torch.round(torch.tensor(self.ceiling) * self.scale.cpu().reciprocal())))
        return lo, hi

    def set_range(self, x_min: Tensor, x_max: Tensor) -> None:
        """Take a calibrated range; zero is always inside it, a ceiling bounds it."""
        self.x_min.copy_(x_min.clamp(max=0.0))
        self.x_max.copy_(x_max.clamp(min=0.0) if self.ceiling is None else x_max.clamp(0.0, self.ceiling))

    def learn_scale(self) -> None:
        """Replace the range by a learned scale that starts where the range stands (LSQ)."""
        self.learned = nn.Parameter(self.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.update(self._clipped(x))
        if not self.enabled:
            return self._clipped(x)
        if self.tracking and self.training and self.learned is None:
            self._track(x)
        if self.bits > 8 and self.training:
            return self._clipped(x)
        return self._fake_quantize(x)

    def _clipped(self, x: Tensor) -> Tensor:
        if self.ceiling is not None:
            return x.clamp(0.0 if self.relu else None, self.ceiling)
        if not self.relu:
            return x
        clipped: Tensor = Relu.apply(dense(x)) if self.in_place else torch.relu(x)
        return clipped

    def _track(self, x: Tensor) -> None:
        """Follow the range of training batches: running extremes, or ``momentum * old + (1-momentum) * batch``."""
        with torch.no_grad():
            low, high = batch_range(x, self.percentile)
            if self.momentum == RUNNING_MIN_MAX:
                self.set_range(torch.minimum(self.x_min, low), torch.maximum(self.x_max, high))
            else:
                self.set_range(
                    *(self.momentum * o + (1 - self.momentum) * n for o, n in ((self.x_min, low), (self.x_max, high)))
                )

    def _fake_quantize(self, x: Tensor) -> Tensor:
        lo, hi = self.bounds()
        if self.learned is not None and self.training:
            scale = self.learned.clamp_min(MIN_ACTIVATION_SCALE)
            gradient_scale = 1 / math.sqrt(x.numel() * hi)
            learned: Tensor = FakeQuantizeLearned.apply(dense(x), scale, lo, hi, gradient_scale)
            return learned
        own = dense(x) if self.in_place else x.clone()
        fixed: Tensor = FakeQuantize.apply(own, self.scale, lo, hi, self.relu)
        return fixed

    def integers(self, x: Tensor) -> Tensor:
        """The integers behind a fake-quantized tensor (int32), for comparison with the integer graph."""
        return torch.round(x * self.scale.reciprocal()).to(torch.int32)


@dataclass(frozen=True)
class IntegerWeights:
    """What conversion needs of a layer: integer weights int8 [O, ...], weight scale float32 [O], real bias [O]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


class QuantLayer(nn.Module):
    """A convolution or linear layer with quantized weights, its BatchNorm, and the quantizer in front of it.

    bits: 2..8.  ``frozen`` folds the BatchNorm with running statistics in training too.  ``narrow_range``: weights with
    a learned scale leave out the lowest integer, for which no positive weight has a counterpart.
    """

    INTEGERS = torch.int8

    def __init__(self, module: nn.Conv2d | nn.Linear, bn: _BatchNorm | None, bits: int) -> None:
        super().__init__()
        self._references = (module, bn)  # a tuple: referred to, not registered
        self._source: tuple[Quantizer, ...] = ()
        self.bits = bits
        self.enabled = False
        self.frozen = False
        self.per_channel = True
        self.percentile = 0.0
        self.learned: nn.Parameter | None = None
        self.narrow_range = True

    @property
    def module(self) -> nn.Conv2d | nn.Linear:
        return self._references[0]

    @property
    def bn(self) -> _BatchNorm | None:
        return self._references[1]

    def attach(self, source: Quantizer) -> None:
        """Name the quantizer of the tensor this layer reads."""
        self._source = (source,)

    @property
    def source(self) -> Quantizer | None:
        """The quantizer of the tensor this layer reads."""
        return self._source[0] if self._source else None

    def learn_scale(self) -> None:
        """Replace the weight range by a learned scale per channel that starts at the given range (LSQ)."""
        self.learned = nn.Parameter(self._range_scale(self.module.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.bn is not None and self.training and not self.frozen:
            weight = self._fake_unfolded(self._live_scale()) if self.enabled else self.module.weight
            normalised: Tensor = self.bn(self.apply_weights(x, weight, self.module.bias))
            return normalised
        weight, bias = fold(self.module.weight, self.module.bias, self.bn)
        if self.enabled:
            scale = self._folded_scale(weight, bias)
            weight = self._fake(weight, scale)
            if bias is not None and self._source and not self.training:
                bias = _on_accumulator_grid(bias, scale * self._source[0].scale)
        return self.apply_weights(x, weight, bias)

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or linear layer with other weights and another bias."""
        module = self.module
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)

    def _range_scale(self, weight: Tensor) -> Tensor:
        return weight_scale(weight, self.bits, self.per_channel, self.percentile)

    def _live_scale(self) -> Tensor:
        """Scale of the unfolded weights.  Only a per-tensor range depends on the BatchNorm's factors."""
        if self.learned is not None:
            return self.learned.abs().clamp_min(MIN_WEIGHT_SCALE)
        if self.per_channel or self.bn is None:
            return self._range_scale(self.module.weight)
        with torch.no_grad():
            k = affine_of(self.bn)[0].abs()
            folded = self._range_scale(self.module.weight * per_channel(k, self.module.weight))
            return folded / k.clamp_min(MIN_WEIGHT_SCALE)

    def _folded_scale(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Scale of the folded weights, wide enough for an int32 bias (architecture, section 1)."""
        if self.learned is None:
            scale = self._range_scale(weight)
        else:
            scale = self.learned.abs() if self.bn is None else self.learned.abs() * affine_of(self.bn)[0].abs()
        if bias is not None and self._source:
            scale = torch.maximum(scale, bias.detach().abs() / (self._source[0].scale * BIAS_LIMIT))
        return scale.clamp_min(MIN_WEIGHT_SCALE)

    def integer_range(self) -> tuple[Any, Any]:
        """Inclusive integers of the folded weights."""
        lo, hi = int_range(self.bits, True)
        return (-hi, hi) if self.learned is not None and self.narrow_range else (lo, hi)

    def _fake(self, weight: Tensor, scale: Tensor) -> Tensor:
        lo, hi = self.integer_range()
        if self.learned is not None and self.training:
            gradient_scale = 1 / math.sqrt(weight[0].numel() * hi)
            return FakeQuantizeLearned.apply(weight.contiguous(), scale, lo, hi, gradient_scale)
        return FakeQuantizeWeight.apply(weight, per_channel(scale, weight), lo, hi)

    def _fake_unfolded(self, scale: Tensor) -> Tensor:
        """Fake quantization in front of the BatchNorm that commutes with folding it.

        Where integers are more on one side than on the other and weights are clipped, a negative factor turns the
        sides around.
        """
        weight = self.module.weight
        clips = self.percentile > 0 if self.learned is None else not self.narrow_range
        if self.bn is None or not clips:
            return self._fake(weight, scale)
        sign = per_channel(torch.where(affine_of(self.bn)[0].detach() < 0, -1.0, 1.0), weight)
        return self._fake(weight * sign, scale) * sign

    @torch.no_grad()
    def integer_weights(self) -> IntegerWeights:
        """Fold, scale and round: exactly the weights that evaluation's fake quantization uses."""
        weight, bias = fold(self.module.weight, self.module.bias, self.bn)
        scale = self._folded_scale(weight, bias)
        integers = quantize(weight, per_channel(scale, weight), *self.integer_range())
        bias = torch.zeros_like(scale) if bias is None else bias
        return IntegerWeights(integers.to(self.INTEGERS), scale, bias)


def evaluated_bias(layer: QuantLayer) -> Tensor:
    """The bias [O] of a quantized layer as evaluation adds it, on the accumulator's grid: its answer to zeros."""
    module = layer.module
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            return layer(module.weight.new_zeros(1, module.in_features))[0]
        zeros = module.weight.new_zeros(1, module.in_channels, *module.weight.shape[2:])
        return layer(zeros)[0, :, 0, 0]


class QuantBatchNorm(nn.Module):
    """A standalone BatchNorm: in integers a depthwise 1x1 convolution with one 8-bit weight per channel.

    A single weight per channel is always +-127 times its scale, so fake quantization has nothing to round.
    """

    def __init__(self, bn: _BatchNorm) -> None:
        super().__init__()
        self._references = (bn,)
        self._source: tuple[Quantizer, ...] = ()
        self.bits = AFFINE_BITS
        self.enabled = False
        self.frozen = False

    @property
    def bn(self) -> _BatchNorm:
        return self._references[0]

    def attach(self, source: Quantizer) -> None:
        """Name the quantizer of the tensor this layer reads."""
        self._source = (source,)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            normalised: Tensor = self.bn(x)
            return normalised
        k, shift = affine_of(self.bn)
        if self.enabled and self._source and not self.training:
            shift = _on_accumulator_grid(shift, self._weight_scale(k, shift) * self._source[0].scale)
        shape = (1, -1, *([1] * (x.dim() - 2)))
        return torch.addcmul(shift.reshape(shape), x, k.reshape(shape))

    @torch.no_grad()
    def integer_weights(self) -> IntegerWeights:
        """The affine map as 8-bit weights [C, 1, 1, 1] with their scales and real bias."""
        k, shift = affine_of(self.bn)
        weight = k.reshape(-1, 1, 1, 1)
        scale = self._weight_scale(k, shift)
        integers = quantize(weight, per_channel(scale, weight), *int_range(self.bits, True))
        return IntegerWeights(integers.to(torch.int8), scale, shift)

    def _weight_scale(self, k: Tensor, shift: Tensor) -> Tensor:
        """Scale [C] of the weights k, wide enough for an int32 bias."""
        scale = weight_scale(k.reshape(-1, 1), self.bits)
        if not self._source:
            return scale
        return torch.maximum(scale, shift.detach().abs() / (self._source[0].scale * BIAS_LIMIT))


def _on_accumulator_grid(bias: Tensor, step: Tensor) -> Tensor:
    """A real bias as the integer graph has it: a whole number of the accumulator's steps."""
    return torch.round(bias / step) * step


class RoundedAdd(nn.Module):
    """A sum whose branches are rounded to the output's scale one by one, as the integer graph does.

    At 16 bits the difference to rounding the sum is invisible; at 8 bits it is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._target: tuple[Quantizer, ...] = ()

    def attach(self, target: Quantizer) -> None:
        """Name the quantizer of the sum."""
        self._target = (target,)

    def forward(self, *branches: Tensor) -> Tensor:
        if self._target and self._target[0].enabled and self._target[0].bits <= 8:
            scale = self._target[0].scale
            wide = 1 << 30
            branches = tuple(FakeQuantizeWeight.apply(branch, scale, -wide, wide) for branch in branches)
        total = branches[0] + branches[1] if len(branches) > 1 else branches[0] + branches[0]
        for branch in branches[2:]:
            total = total + branch
        return total


class RoundedClip(nn.Module):
    """``min(max(x, lo), hi)`` of integers: a bound between two steps of the quantizer in front moves to the nearest.

    factor: what the quantized tensor was multiplied by on its way here.
    """

    def __init__(self, lo: float | None, hi: float | None, source: Quantizer, factor: float = 1.0) -> None:
        super().__init__()
        self.lo, self.hi, self.factor = lo, hi, factor
        self._source = (source,)

    def forward(self, x: Tensor) -> Tensor:
        lo, hi = (None if bound is None else self._on_grid(bound) for bound in (self.lo, self.hi))
        return torch.relu(x) if lo == 0 and hi is None else torch.clamp(x, lo, hi)

    def _on_grid(self, bound: float) -> float:
        source = self._source[0]
        if bound == 0 or not source.enabled:
            return bound
        step = float(source.scale) * self.factor
        return round(bound / step) * step
