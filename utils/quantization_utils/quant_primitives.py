"""Quantization of real tensors: integer ranges, scales, fake quantization and its gradients.

Rounding is half to even and goes through the float32 reciprocal of the scale, ``rne(fl(x * fl(1/s)))``, the same
expression in training, calibration and conversion.
Sources: HAWQ-V3, arXiv 2011.10680 (symmetric, static ranges); LSQ, arXiv 1902.08153 (learned scales).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

MIN_ACTIVATION_SCALE = 2.0**-24
MIN_WEIGHT_SCALE = 2.0**-40
BIAS_LIMIT = 2.0**30
EIGHT_BITS = 8  # of weights: from which on their rounding hardly counts


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


# Elements worked on at a time: a few passes over one piece stay in the cache.  Reused buffers for the same reason;
# fresh large allocations cost more than the arithmetic on them.
PIECE = 1 << 20
_BUFFERS: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def _buffer(like: Tensor, slot: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reused memory of the shape of one piece; what an earlier call left in the same slot is overwritten."""
    key = (like.device, dtype, slot)
    memory = _BUFFERS.get(key)
    if memory is None or memory.numel() < like.numel():
        with torch.inference_mode(False):  # what inference mode makes cannot be written to outside of it
            memory = _BUFFERS[key] = torch.empty(max(PIECE, like.numel()), dtype=dtype, device=like.device)
    return memory[: like.numel()].view(like.shape)


def dense(x: Tensor) -> Tensor:
    """``x`` itself if its elements lie side by side in memory, in whatever order of axes; a copy otherwise."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, [1, numel]."""
    return x.as_strided((1, x.numel()), (x.numel(), 1))


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the memory order of ``x``."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces [1, PIECE] of [1, N] tensors."""
    yield from zip(*(t.split(PIECE, dim=1) for t in tensors), strict=True)


class Relu(Function):
    """ReLU in place that keeps one byte per element for its backward, not the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        ctx.mark_dirty(x)
        return x.relu_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return _masked(grad, inside)


def _masked(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad * inside`` in the memory order of the bool ``inside``."""
    grad = _like(grad, inside)
    result = torch.empty_like(grad)
    for piece, mask, out in _pieces(_flat(grad), _flat(inside), _flat(result)):
        torch.mul(piece, _buffer(piece).copy_(mask), out=out)
    return result


class FakeQuantize(Function):
    """``clamp(round(x / s), lo, hi) * s`` in place on ``x``; the gradient passes where x was inside the range.

    x: float32, dense, not needed by its producer's backward (batch norm, convolution and add do not need theirs).
    relu: the ReLU in front is absorbed: lo is 0 and no gradient passes below zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, relu: bool) -> Tensor:
        inside = torch.empty_like(x, dtype=torch.bool)
        inverse, low = scale.reciprocal(), 0.0 if relu else lo - 0.5
        for piece, mask in _pieces(_flat(x), _flat(inside)):
            scaled = torch.mul(piece, inverse, out=_buffer(piece))
            torch.clamp(scaled, low, hi + 0.5, out=piece)
            torch.eq(piece, scaled, out=mask)
            piece.round_().clamp_(lo, hi).mul_(scale)
        ctx.save_for_backward(inside)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return _masked(grad, inside), None, None, None, None


class FakeQuantizeLearned(Function):
    """Fake quantization whose scale is learned (LSQ, equations 1 to 3).

    The gradient of the scale is ``sum(grad * (round(x/s) - x/s))`` inside the range and ``sum(grad * bound)``
    outside, times ``gradient_scale`` (LSQ: ``1/sqrt(numel * hi)``).  With y the result both terms together are
    ``(sum(grad * y) - sum(grad * x, inside)) / s``.  x: dense; scale: 0-d, or [O] for weights [O, ...].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, gradient_scale: float) -> Tensor:
        result = torch.empty_like(x)
        rows = (_rows(t, scale) for t in (x, result))
        for piece, step, out in _with_scale(scale.reshape(-1, 1), *rows):
            torch.mul(piece, step.reciprocal(), out=out).clamp_(lo, hi).round_().mul_(step)
        ctx.save_for_backward(x, scale, result)
        ctx.bounds = lo, hi, gradient_scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, result = ctx.saved_tensors
        lo, hi, gradient_scale = ctx.bounds
        passed, parts = torch.empty_like(x), []
        rows = (_rows(t, scale) for t in (x, _like(grad, x), result, passed))
        for piece, step, g, y, out in _with_scale(scale.reshape(-1, 1), *rows):
            scaled = torch.mul(piece, step.reciprocal(), out=_buffer(piece))
            torch.ops.aten.hardtanh_backward.grad_input(g, scaled, lo, hi, grad_input=out)
            parts.append((_row_dots(g, y) - _row_dots(out, piece)) / step[:, 0])
        total = torch.cat(parts) if scale.dim() else torch.stack(parts).sum()
        return passed, (total * gradient_scale).reshape(scale.shape), None, None, None


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of matching rows, [rows]."""
    if a.shape[0] == 1:
        return torch.dot(a[0], b[0]).reshape(1)
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).reshape(-1)


def _rows(x: Tensor, scale: Tensor) -> Tensor:
    """[1, numel] for one scale, [O, L] for a scale per output channel (weights are contiguous)."""
    return x.reshape(scale.shape[0], -1) if scale.dim() else _flat(x)


def _with_scale(column: Tensor, first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of the tensors, each with the scales [rows, 1] that belong to it in second place."""
    if first.shape[0] == 1:
        for piece in _pieces(first, *others):
            yield piece[0], column, *piece[1:]
    else:
        size = max(1, PIECE // max(first.shape[1], 1))
        yield from zip(first.split(size), column.split(size), *(t.split(size) for t in others), strict=True)


class FakeQuantizeWeight(Function):
    """Per-channel fake quantization of weights, straight-through gradient, no gradient to the scale."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
        return torch.mul(weight, scale.reciprocal()).round_().clamp_(lo, hi).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None
