"""Learned rounding of weights: every weight goes to the integer below it or to the one above it.

AdaRound (Nagel et al. 2020, arXiv 2004.10568): ``w = s * clamp(floor(w/s) + h(a), lo, hi)`` with the rectified sigmoid
``h(a) = clip(1.2 * sigmoid(a) - 0.1, 0, 1)``; a term ``1 - |2h - 1|^beta`` per weight drives h to 0 or 1.

The rounding that was found goes back into the float weights, which then lie on the grid, and the grid's scale into
``QuantLayer.learned``.  The ordinary rounding to the nearest integer gives the chosen integers from there on, so
conversion, checkpoints and training know nothing of all this.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from utils.quantization_utils.fold_bn import affine_of, fold
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.quant_primitives import per_channel, weight_scale

STRETCH, SHIFT = 1.2, -0.1


@dataclass(frozen=True)
class Grid:
    """The integers a layer's weights can take.

    ratio: folded weights in steps of their scale, float32 [O, ...].  scale: of the folded weights, float32 [O].
    learned: that of the layer's own weights, [O].  factor: BatchNorm's factor per channel [O], 1 without one.
    low, high: inclusive integers, numbers or [O, 1, ...].  free: bool [O, ...], weights with a choice between two
    integers; channels that are zero have none.
    """

    layer: QuantLayer
    ratio: Tensor
    scale: Tensor
    learned: Tensor
    factor: Tensor
    low: Any
    high: Any
    free: Tensor

    @property
    def nearest(self) -> Tensor:
        """The integers of ordinary rounding, float32 [O, ...]."""
        return self.ratio.round().clamp_(self.low, self.high)

    @property
    def reach(self) -> Tensor:
        """The least scale [O] at which no weight lies beyond the integers; 0 for channels of zeros."""
        weights = self.ratio * per_channel(self.scale, self.ratio)
        end = torch.where(weights > 0, torch.as_tensor(self.high), torch.as_tensor(self.low))
        return (weights / end).nan_to_num(0, 0, 0).flatten(1).amax(1)


@torch.no_grad()
def pin_grid(layer: QuantLayer) -> Grid:
    """Fix the weight scale of a layer where it stands (``layer.learned``) and return its grid.

    Evaluation with nearest rounding stays as it is, up to the last bit of the scale, but for weights that were clipped
    to the second lowest integer: the lowest takes part from here on.
    """
    weight, layer.narrow_range = layer.module.weight, False
    factor = weight.new_ones(len(weight)) if layer.bn is None else affine_of(layer.bn)[0].detach()
    unfolded = layer.integer_weights().scale / factor.abs()
    usable = torch.isfinite(unfolded) & (factor != 0)
    fallback = weight_scale(weight, layer.bits)
    layer.learned = nn.Parameter(torch.where(usable, unfolded, fallback))
    ratio = fold(weight, None, layer.bn)[0] * per_channel(layer.integer_weights().scale.reciprocal(), weight)
    return _grid(layer, torch.where(per_channel(usable, ratio), ratio, torch.zeros_like(ratio)), factor)


@torch.no_grad()
def with_scale(grid: Grid, scale: Tensor) -> Grid:
    """The same weights in other steps, [O] of the folded weights; the layer takes them over (``layer.learned``)."""
    changed = (grid.factor != 0) & (scale != grid.scale)
    grid.layer.learned = nn.Parameter(torch.where(changed, scale / grid.factor.abs(), grid.learned))
    ratio = grid.ratio * per_channel(grid.scale / grid.layer.integer_weights().scale, grid.ratio)
    return _grid(grid.layer, ratio, grid.factor)


def _grid(layer: QuantLayer, ratio: Tensor, factor: Tensor) -> Grid:
    """The grid of a layer as its learned scale says."""
    assert layer.learned is not None
    low, high = layer.integer_range()
    below = ratio.floor()
    alive = per_channel(ratio.flatten(1).round().abs().amax(1) > 0, ratio)
    free = alive & (below >= low) & (below < high) & (below != ratio)
    scale, learned = layer.integer_weights().scale, layer.learned.detach().clone()
    return Grid(layer, ratio, scale, learned, factor, low, high, free)


@torch.no_grad()
def write_integers(grid: Grid, integers: Tensor) -> None:
    """Put chosen integers [O, ...] into the layer's float weights; channels where none is free keep theirs.

    ``layer.integer_weights()`` gives exactly these integers afterwards.
    """
    weight = grid.layer.module.weight
    alive = grid.free.flatten(1).any(1) & (grid.factor != 0)
    step = per_channel(grid.scale / torch.where(alive, grid.factor, torch.ones_like(grid.factor)), weight)
    weight.copy_(torch.where(per_channel(alive, weight), integers.to(weight) * step, weight))


class SoftRounding:
    """Weights between two integers, moved by a variable per weight.

    ``alpha`` (float32 [O, ...]) starts where the soft weights equal the float weights.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.below = grid.ratio.floor()
        share = grid.ratio - self.below
        self.alpha = nn.Parameter(-torch.log(STRETCH / (share - SHIFT) - 1))
        self.free = grid.free.to(share.dtype)
        # Weights without a choice stay at the nearest integer: two integers apart there is nothing to learn.
        self.fixed = torch.where(grid.free, torch.zeros_like(share), grid.nearest)
        self.base = torch.where(grid.free, self.below, self.fixed)
        self.scale = per_channel(grid.scale, share)

    def weights(self, beta: float, regulariser: float) -> Tensor:
        """Real folded weights; their gradient to ``alpha`` includes the regulariser's (0: none)."""
        weights: Tensor = _Soft.apply(self.alpha, self.base, self.scale, self.free, beta, regulariser)
        return weights

    @torch.no_grad()
    def integers(self) -> Tensor:
        """The rounding as it now stands: up where h is at least a half."""
        return self.base + self.free * (self.alpha >= 0)

    @torch.no_grad()
    def undecided(self) -> float:
        """Share of the free weights whose h is more than 0.01 away from 0 and 1."""
        h = torch.sigmoid(self.alpha) * STRETCH + SHIFT
        return float((((h > 0.01) & (h < 0.99)) * self.free).sum() / self.free.sum().clamp_min(1))


class _Soft(Function):
    """``scale * (base + free * h(alpha))`` with the gradient of h and of ``regulariser * sum(1 - |2h - 1|^beta)``."""

    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, base: Tensor, scale: Tensor, free: Tensor, beta: float, regulariser: float
    ) -> Tensor:
        sigmoid = torch.sigmoid(alpha)
        h = (sigmoid * STRETCH).add_(SHIFT).clamp_(0, 1)
        ctx.save_for_backward(sigmoid, h, scale, free)
        ctx.beta, ctx.regulariser = beta, regulariser
        return torch.addcmul(base, free, h).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        sigmoid, h, scale, free = ctx.saved_tensors
        slope = grad * scale
        if ctx.regulariser:
            side = h.mul(2).sub_(1)
            slope.sub_(side.abs().pow_(ctx.beta - 1).mul_(side.sign_()), alpha=2 * ctx.beta * ctx.regulariser)
        inside = (h > 0) & (h < 1)
        return slope.mul_(sigmoid.mul(1 - sigmoid)).mul_(free * inside).mul_(STRETCH), None, None, None, None, None
