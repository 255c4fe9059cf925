"""Ranges of activations: what a batch says, and how batches are combined during calibration.

An observer sees a tensor per batch and answers with a real range ``(x_min, x_max)``.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from utils.quantization_utils.quant_primitives import int_range

HISTOGRAM_BINS = 2048
MSE_CANDIDATES = 96


def batch_range(x: Tensor, percentile: float = 0.0) -> tuple[Tensor, Tensor]:
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

    def result(self) -> tuple[Tensor, Tensor]: ...


class MinMax:
    """Running minimum and maximum over all batches."""

    def __init__(self) -> None:
        self.low = self.high = torch.zeros(())

    def update(self, x: Tensor) -> None:
        low, high = batch_range(x)
        self.low, self.high = (
            torch.minimum(self.low.to(low.device), low),
            torch.maximum(self.high.to(high.device), high),
        )

    def result(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class Ema:
    """Exponential moving average of batch ranges: the first batch sets them, then ``keep * old + (1-keep) * new``."""

    def __init__(self, percentile: float = 0.0, keep: float = 0.9) -> None:
        self.percentile, self.keep = percentile, keep
        self.range: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        new = batch_range(x, self.percentile)
        old = self.range or new
        low, high = (self.keep * o + (1 - self.keep) * n for o, n in zip(old, new, strict=True))
        self.range = low, high

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.range is not None
        return self.range


class Mse:
    """The range that quantizes with the least squared error, searched on a histogram of |x| over all batches.

    The histogram has 2048 bins and doubles its reach when a batch exceeds it (neighbouring bins merge), so one pass
    suffices.  96 shrunk ranges are tried at once; each bin stands for its centre.
    """

    def __init__(self, bits: int, signed: bool) -> None:
        self.levels = int_range(bits, signed)[1]
        self.signed = signed
        self.counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)
        self.reach = 0.0
        self.low = self.high = 0.0

    def update(self, x: Tensor) -> None:
        low, high = (float(v) for v in batch_range(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.low = self.high = math.nan  # stays: the range of such a tensor is refused
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        values = x.detach().abs() if self.signed else x.detach()
        self._grow(max(-low, high) if self.signed else high)
        if self.reach > 0:
            self.counts += torch.histc(values.float(), HISTOGRAM_BINS, 0.0, self.reach).double().cpu()

    def _grow(self, reach: float) -> None:
        if self.reach == 0:
            self.reach = max(reach, 0.0)
        while 0 < self.reach < reach:
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([half, torch.zeros_like(half)])
            self.reach *= 2

    def result(self) -> tuple[Tensor, Tensor]:
        limit = max(-self.low, self.high) if self.signed else self.high
        if not limit > 0:  # nothing above zero, or not finite
            return torch.tensor(self.low), torch.tensor(max(self.high, 0.0))
        best = self._search(limit)
        return torch.tensor(max(self.low, -best)), torch.tensor(min(self.high, best))

    def _search(self, limit: float) -> float:
        centres = (torch.arange(HISTOGRAM_BINS, dtype=torch.float64) + 0.5) * (self.reach / HISTOGRAM_BINS)
        ranges = limit * torch.linspace(1.0, 0.05, MSE_CANDIDATES, dtype=torch.float64)
        scales = ranges[:, None] / self.levels
        error = (centres / scales).round().clamp(max=self.levels) * scales - centres
        return float(ranges[(error.square() @ self.counts).argmin()])


def make_observer(method: str, bits: int, signed: bool, percentile: float = 99.99) -> Observer:
    """The observer of ``--calibration``: ``minmax``, ``ema``, ``percentile`` or ``mse``.

    Widths above 8 bits lose nothing to their outliers and always take ``minmax``.
    """
    if method == "minmax" or bits > 8:
        return MinMax()
    if method == "mse":
        return Mse(bits, signed)
    return Ema(percentile if method == "percentile" else 0.0)


METHODS = ("minmax", "ema", "percentile", "mse")


def is_finite(x_min: Tensor, x_max: Tensor) -> bool:
    """Whether a calibrated range can become a scale."""
    return math.isfinite(float(x_min)) and math.isfinite(float(x_max))
