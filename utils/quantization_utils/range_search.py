"""Searches for the range a tensor is quantized with: least error of shrunk ranges, least divergence, a quantile.

Ranges are symmetric around zero or begin there, so one number, the reach, says everything: the scale is
``reach / hi``.  Values come as they are (weights) or as the points and counts of a histogram (activations).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils.quantization_utils.quant_primitives import MIN_WEIGHT_SCALE

SHRINK = 0.01
TENSOR_CANDIDATES, CHANNEL_CANDIDATES = 95, 80


# A factor of the whole range -> scale, and the inclusive multiples of it that can be had: [R, 1] or numbers.
Steps = Callable[[float], tuple[Tensor, tuple[Any, Any]]]


def best_factor(values: Tensor, steps: Steps, candidates: int, power: float, counts: Tensor | None = None) -> Tensor:
    """The factor ``1 - 0.01 i`` [R] of each row's range with the least ``sum(counts * |x_hat - x| ** power)``.

    values: float [R, L], with counts [R, L] where a value stands for several.  Candidates are tried from the widest on
    and must be strictly better.  A row of zeros, or with NaN, keeps its range.
    """
    best, least = values.new_ones(len(values)), values.new_full((len(values),), torch.inf)
    error = torch.empty_like(values)
    for i in range(candidates):
        factor = 1 - SHRINK * i
        scale, bounds = steps(factor)
        torch.mul(values, scale.reciprocal(), out=error).round_().clamp_(*bounds).mul_(scale).sub_(values)
        powered = error.square_() if power == 2 else error.abs_().pow_(power)
        total = (powered if counts is None else powered.mul_(counts)).sum(1)
        best = torch.where(total < least, factor, best)
        least = torch.where(total < least, total, least)
    return best


def least_error(
    values: Tensor, reach: Tensor, bounds: tuple[int, int], candidates: int, power: float, counts: Tensor | None = None
) -> Tensor:
    """The shrunk reach [R] of each row that quantizes best, see :func:`best_factor`.

    reach: [R], the largest magnitude of a row.  bounds: inclusive integers, the upper one belongs to the reach.
    """

    def steps(factor: float) -> tuple[Tensor, tuple[Any, Any]]:
        return (reach * factor / bounds[1]).clamp_min(MIN_WEIGHT_SCALE).unsqueeze(1), bounds

    return reach * best_factor(values, steps, candidates, power, counts)


def least_divergence(counts: Tensor, levels: int) -> float:
    """The number of bins (plus a half) that a range should reach by the entropy method, as TensorRT defines it.

    counts: float64 [B], histogram of magnitudes.  For every length i from ``levels`` to B: P is the first i bins, what
    lies beyond is added to the last of them; Q merges those bins, without the addition, into ``levels`` groups and
    spreads each group evenly over its bins that are not empty.  The first i with the least divergence KL(P || Q) wins.
    The first bin counts as much as the second: it holds the zeros of a ReLU, which any range represents.
    """
    counts = counts.clone()
    counts[0] = counts[1]
    lengths = torch.arange(levels, len(counts) + 1, device=counts.device)
    groups = torch.arange(levels + 1, device=counts.device)
    edges = (groups * lengths.unsqueeze(1) + levels - 1) // levels  # the first bin of every group, [lengths, levels+1]
    sums, filled = (_prefix(values)[edges].diff(dim=1) for values in (counts, (counts > 0).to(counts.dtype)))
    inside = _prefix(counts)[lengths]
    beyond = counts.sum() - inside
    last = counts[lengths - 1]
    p_log_p = _prefix(torch.xlogy(counts, counts))[lengths - 1] + torch.xlogy(last + beyond, last + beyond)
    q = sums / (filled.clamp_min(1) * inside.clamp_min(1).unsqueeze(1))
    p = sums.clone()
    p[:, -1] += beyond
    divergence = p_log_p - torch.xlogy(p, q).sum(1)  # times the number of values, and but for a constant
    impossible = (inside == 0) | ((last == 0) & (beyond > 0))
    return int(lengths[divergence.masked_fill(impossible, torch.inf).argmin()]) + 0.5


def _prefix(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... elements, [B + 1]."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def quantile_bin(counts: Tensor, share: float) -> int:
    """The first bin at which at least ``share`` of all counts has been seen."""
    seen = counts.cumsum(0)
    return min(int(torch.searchsorted(seen, share * seen[-1])), len(counts) - 1)
