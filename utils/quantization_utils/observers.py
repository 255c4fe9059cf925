"""Ranges of activations: what a batch says, and how batches are combined during calibration.

An observer sees a tensor per batch and answers with a real range ``(x_min, x_max)``.  ``calibrators`` has those that
search.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Range = tuple[Tensor, Tensor]  # x_min, x_max: 0-d float tensors


def batch_range(x: Tensor, percentile: float = 0.0) -> Range:
    """Minimum and maximum of a tensor, or its two-sided percentile (p in (50, 100]); 0-d float32 tensors.

    The percentile p of N elements is the round(N*p/100)-th smallest, and its mirror at the low end (HAWQ's
    ``--act-percentile``).
    """
    x = x.detach()
    if percentile == 0:
        low, high = torch.aminmax(x)
        return low, high
    flat = x.reshape(-1)
    tail = max(1, flat.numel() - round(flat.numel() * percentile / 100) + 1)
    return -(-flat).topk(tail).values[-1], flat.topk(tail).values[-1]


class Observer(Protocol):
    """Accumulates batches; ``result`` is the calibrated range."""

    def update(self, x: Tensor) -> None: ...

    def result(self) -> Range: ...


class MinMax:
    """Running minimum and maximum over all batches, and zero."""

    def __init__(self) -> None:
        self.low = self.high = torch.zeros(())

    def update(self, x: Tensor) -> None:
        low, high = batch_range(x)
        self.low, self.high = (
            torch.minimum(self.low.to(low.device), low),
            torch.maximum(self.high.to(high.device), high),
        )

    def result(self) -> Range:
        return self.low, self.high


class Ema:
    """Exponential moving average of batch ranges: the first batch sets them, then ``keep * old + (1-keep) * new``.

    range_of: the range of one batch.  The result depends on the order and the size of the batches.
    """

    def __init__(self, range_of: Callable[[Tensor], Range] = batch_range, keep: float = 0.9) -> None:
        self.range_of, self.keep = range_of, keep
        self.range: Range | None = None

    def update(self, x: Tensor) -> None:
        new = self.range_of(x)
        old = self.range or new
        low, high = (self.keep * o + (1 - self.keep) * n for o, n in zip(old, new, strict=True))
        self.range = low, high

    def result(self) -> Range:
        assert self.range is not None
        return self.range


def is_finite(x_min: Tensor, x_max: Tensor) -> bool:
    """Whether a calibrated range can become a scale."""
    return math.isfinite(float(x_min)) and math.isfinite(float(x_max))
