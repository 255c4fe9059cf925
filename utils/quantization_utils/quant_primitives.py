"""Quantization of real tensors: integer ranges, scales, fake quantization and its gradients.

Rounding is half to even and goes through the float32 reciprocal of the scale, ``rne(fl(x * fl(1/s)))``, the same
expression in training, calibration and conversion.
Sources: HAWQ-V3, arXiv 2011.10680 (symmetric, static ranges); LSQ, arXiv 1902.08153 (learned scales).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

MIN_ACTIVATION_SCALE = 2.0**-24
MIN_WEIGHT_SCALE = 2.0**-40
BIAS_LIMIT = 2.0**30


def int_range(bits: int, signed: bool) -> tuple[int, int]:
    """Inclusive integer range of a width.

    >>> int_range(4, signed=True), int_range(4, signed=False)
    ((-8, 7), (0, 15))
    """
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def activation_scale(x_min: Tensor, x_max: Tensor, bits: int, signed: bool) -> Tensor:
    """Scale of an activation with the given real range (0-d float32 tensors).

    Signed: ``max(|x_min|, |x_max|) / (2**(bits-1) - 1)``; unsigned: ``x_max / (2**bits - 1)``.
    Never below 2**-24, so that a tensor which is always zero stays representable.
    """
    reach = torch.maximum(x_min.abs(), x_max.abs()) if signed else x_max
    return (reach / int_range(bits, signed)[1]).clamp_min(MIN_ACTIVATION_SCALE)


def weight_scale(weight: Tensor, bits: int, per_channel: bool = True, percentile: float = 0.0) -> Tensor:
    """Symmetric scale ``max|w| / (2**(bits-1) - 1)``.

    weight: float32 [O, ...].  Returns [O] (all entries equal where ``per_channel`` is false).  ``percentile`` p in
    (50, 100) takes the ceil(L*p/100)-th smallest and the ceil(L*(100-p)/100)-th smallest of a channel's L weights
    as its range, as HAWQ's ``--weight-percentile`` does.
    """
    rows = weight.detach().reshape(weight.shape[0] if per_channel else 1, -1)
    reach = rows.abs().amax(1) if percentile == 0 else _percentile_reach(rows, percentile)
    scale = (reach / int_range(bits, True)[1]).clamp_min(MIN_WEIGHT_SCALE)
    return scale.expand(weight.shape[0])


def _percentile_reach(rows: Tensor, percentile: float) -> Tensor:
    count = rows.shape[1]
    low = rows.kthvalue(max(1, -int(-count * (100 - percentile) // 100)), 1).values
    high = rows.kthvalue(min(count, -int(-count * percentile // 100)), 1).values
    return torch.maximum(low.abs(), high.abs())


def quantize(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """``clamp(rne(fl(x * fl(1/scale))), lo, hi)``, integers in a float32 tensor of x's shape."""
    return (x * scale.reciprocal()).round_().clamp_(lo, hi)


def per_channel(scale: Tensor, like: Tensor) -> Tensor:
    """Reshape [O] to [O, 1, ...] so that it broadcasts over a weight."""
    return scale.reshape(-1, *([1] * (like.dim() - 1)))


_SCRATCH: dict[torch.device, Tensor] = {}


def _scratch(like: Tensor) -> Tensor:
    """A reused float32 buffer shaped like ``like``: fresh large allocations cost more than the arithmetic on them."""
    buffer = _SCRATCH.get(like.device)
    if buffer is None or buffer.numel() < like.numel():
        buffer = _SCRATCH[like.device] = torch.empty(like.numel(), device=like.device)
    # The buffer has x's own memory order, so that channels-last tensors stay so.
    return buffer[: like.numel()].as_strided(like.shape, like.stride())


class FakeQuantize(Function):
    """``clamp(round(x / s), lo, hi) * s`` in place on ``x``; the gradient passes where x was inside the range.

    x: float32, dense, not needed by its producer's backward (batch norm, convolution and add do not need theirs).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
        scaled = torch.mul(x, scale.reciprocal(), out=_scratch(x))
        torch.clamp(scaled, lo - 0.5, hi + 0.5, out=x)
        ctx.save_for_backward(torch.eq(x, scaled))
        ctx.mark_dirty(x)
        return x.round_().clamp_(lo, hi).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * _scratch(inside).copy_(inside), None, None, None


class FakeQuantizeRelu(Function):
    """:class:`FakeQuantize` to unsigned integers with the ReLU in front absorbed: no gradient below zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, hi: int) -> Tensor:
        scaled = torch.mul(x, scale.reciprocal(), out=_scratch(x))
        torch.clamp(scaled, 0, hi + 0.5, out=x)
        ctx.save_for_backward(torch.eq(x, scaled))
        ctx.mark_dirty(x)
        return x.round_().clamp_(max=hi).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * _scratch(inside).copy_(inside), None, None


class FakeQuantizeLearned(Function):
    """Fake quantization whose scale is learned (LSQ, equations 1 to 3).

    The gradient of the scale is ``sum(grad * (round(x/s) - x/s))`` inside the range and ``sum(grad * bound)``
    outside, times ``gradient_scale`` (LSQ: ``1/sqrt(numel * hi)``).  scale: one element, or [O, 1, ...] for weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bounds = lo, hi, gradient_scale
        return torch.mul(x, scale.reciprocal()).clamp_(lo, hi).round_().mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        lo, hi, gradient_scale = ctx.bounds
        scaled = torch.mul(x, scale.reciprocal(), out=_scratch(x))
        clamped = scaled.clamp(lo, hi)
        inside = torch.eq(clamped, scaled)
        # Inside: round(t) - t.  Outside: the bound, which is round(clamped).
        term = clamped.round_().sub_(scaled.mul_(inside))
        grad_scale = term.mul_(grad).sum_to_size(scale.shape).mul_(gradient_scale)
        return grad * scaled.copy_(inside), grad_scale, None, None, None


class FakeQuantizeWeight(Function):
    """Per-channel fake quantization of weights, straight-through gradient, no gradient to the scale."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
        return torch.mul(weight, scale.reciprocal()).round_().clamp_(lo, hi).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None
