"""Splits a product of integers into float32 pieces that are proved exact.

float32 holds every integer up to 2**24, so a sum of products computed by multiplications and additions alone, in
whatever order, is exact when every sum of some of the products stays within 2**24.  ``type_rules.accumulator_bounds``
bounds those sums from the actual weights.  Where one piece cannot be proved, the reduction is cut into chunks of input
channels, or the weights into nibbles; the pieces are summed in float64.  Only numpy here.
"""

from dataclasses import dataclass

import numpy as np

from utils.integer_graph.type_rules import FLOAT32_LIMIT, accumulator_bounds

CHUNK_COST = 0.1  # a further chunk costs about a tenth of the whole product: a slice, a launch, a sum
FLOAT64_COST = 3.0  # of one float32 product


@dataclass(frozen=True)
class Piece:
    """Part of a product: `weight` times input channels [start, stop) (of each group), the result times `factor`."""

    start: int
    stop: int
    weight: np.ndarray
    factor: int


def is_exact(weight: np.ndarray, x_lo: int, x_hi: int) -> bool:
    """Whether float32 holds every partial sum of weight [O, ...] times inputs in [x_lo, x_hi]."""
    lo, hi = accumulator_bounds(weight.reshape(len(weight), -1), x_lo, x_hi)
    return max(-int(lo.min()), int(hi.max())) <= FLOAT32_LIMIT


def split(weight: np.ndarray, x_lo: int, x_hi: int, groups: int = 1) -> list[Piece] | None:
    """The cheapest exact pieces of a product, or None where float64 is cheaper.

    weight: integers [O, I/groups, ...] within 8 bits.  The sum over pieces of factor * (piece of the product) is the
    whole product.
    """
    nibbles = _nibbles(weight)
    plans = [_chunks(weight, x_lo, x_hi, groups, 1), _both(nibbles, x_lo, x_hi, groups)]
    costs = [(FLOAT64_COST if plan is None else _cost(plan, weight.shape[1])) for plan in plans]
    best = int(np.argmin(costs))
    return plans[best] if costs[best] < FLOAT64_COST else None


def _nibbles(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight = 16 * high + low with low in [-8, 7] and high in [-8, 8]."""
    wide = weight.astype(np.int16)
    low = ((wide + 8) & 15) - 8
    return (wide - low) >> 4, low


def _both(nibbles: tuple[np.ndarray, np.ndarray], x_lo: int, x_hi: int, groups: int) -> list[Piece] | None:
    high, low = (_chunks(w, x_lo, x_hi, groups, f) for w, f in zip(nibbles, (16, 1), strict=True))
    return None if high is None or low is None else high + low


def _cost(plan: list[Piece], channels: int) -> float:
    return sum((p.stop - p.start) / channels for p in plan) + CHUNK_COST * (len(plan) - 1)


def _chunks(weight: np.ndarray, x_lo: int, x_hi: int, groups: int, factor: int) -> list[Piece] | None:
    """As few chunks of consecutive input channels as are proved; None where one channel is already too much."""
    channels = weight.shape[1]
    if is_exact(weight, x_lo, x_hi):
        return [Piece(0, channels, weight, factor)]
    if groups > 1:
        return None
    flat = weight.reshape(*weight.shape[:2], -1).astype(np.int64)
    sums = np.stack([np.maximum(flat, 0).sum(2), np.maximum(-flat, 0).sum(2)]).cumsum(2)
    lo, hi = min(x_lo, 0), max(x_hi, 0)
    pieces, start = [], 0
    while start < channels:
        positive, negative = sums[:, :, start:] - (sums[:, :, start - 1 : start] if start else 0)
        reach = np.maximum(hi * positive - lo * negative, hi * negative - lo * positive).max(0)
        count = int((reach <= FLOAT32_LIMIT).sum())
        if count == 0:
            return None
        pieces.append(Piece(start, start + count, weight[:, start : start + count], factor))
        start += count
    return pieces
