"""The observers of ``--calibration``: extremes and averages of them, and those that search a range on a histogram.

Definitions follow MQBench's (its observers of v0.0.5); what differs is said at each.  Widths above 8 bits lose nothing
to their outliers and always take the extremes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from utils.quantization_utils.observers import Ema, MinMax, Observer, Range, batch_range
from utils.quantization_utils.quant_primitives import int_range
from utils.quantization_utils.range_search import TENSOR_CANDIDATES, least_divergence, least_error, quantile_bin

HISTOGRAM_BINS = 2048  # per side of zero
POINTS = 4  # that stand for the values of one bin in the search for the least error
QUANTILE = 0.99999
PIECE = 1 << 16  # values sorted into bins at a time: they stay in the cache


class Histogram:
    """Counts of values (two_sided) or of magnitudes in equal bins from -reach or 0 to reach, over many batches.

    The reach doubles when a batch exceeds it: neighbouring bins merge, so one pass over the data suffices and at least
    half of the bins cover the values.
    """

    def __init__(self, two_sided: bool = False) -> None:
        self.two_sided = two_sided
        self.counts = torch.zeros(HISTOGRAM_BINS * (2 if two_sided else 1), dtype=torch.float64)
        self.reach = 0.0

    def add(self, x: Tensor, reach: float) -> None:
        """Count a batch of finite values whose largest magnitude is ``reach``."""
        self._grow(reach)
        if self.reach == 0:
            return
        factor, shift = HISTOGRAM_BINS / self.reach, HISTOGRAM_BINS if self.two_sided else 0
        flat = x.detach().reshape(-1)
        for piece in flat.split(PIECE if x.device.type == "cpu" else flat.numel()):
            places = piece * factor + shift if self.two_sided else piece.abs() * factor
            bins = places.to(torch.int32).clamp_(0, len(self.counts) - 1)
            self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu()

    def _grow(self, reach: float) -> None:
        self.reach = self.reach or reach
        while 0 < self.reach < reach:
            merged = self.counts.reshape(-1, 2).sum(1)
            empty = HISTOGRAM_BINS // 2
            self.counts = torch.nn.functional.pad(merged, (empty if self.two_sided else 0, empty))
            self.reach *= 2

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.reach / HISTOGRAM_BINS

    def points(self) -> tuple[Tensor, Tensor]:
        """Values and their counts, float64 [1, bins * POINTS]: each bin's counts spread evenly over its width."""
        places = (torch.arange(len(self.counts) * POINTS, dtype=torch.float64) + 0.5) / POINTS
        values = (places - (HISTOGRAM_BINS if self.two_sided else 0)) * self.width
        return values.unsqueeze(0), self.counts.repeat_interleave(POINTS).unsqueeze(0) / POINTS


# Histogram, its largest magnitude, integer bounds -> the reach to quantize with.
Search = Callable[[Histogram, float, tuple[int, int]], float]


def search_mse(histogram: Histogram, limit: float, bounds: tuple[int, int], power: float = 2.0) -> float:
    """The least mean ``|x_hat - x| ** power`` of 95 shrunk ranges; the histogram stands for the values.

    On bell-shaped and one-sided values with outliers, the chosen range's error is within 0.5 % of what the same
    candidates give on the values themselves (tested for 2 to 8 bits).
    """
    values, counts = histogram.points()
    reach = torch.tensor([limit], dtype=torch.float64)
    return float(least_error(values, reach, bounds, TENSOR_CANDIDATES, power, counts))


def search_kl(histogram: Histogram, limit: float, bounds: tuple[int, int]) -> float:
    """The entropy method with as many levels as there are magnitudes: 128 for int8, 256 for uint8."""
    return min(limit, least_divergence(histogram.counts, bounds[1] + 1) * histogram.width)


def search_quantile(histogram: Histogram, limit: float, bounds: tuple[int, int]) -> float:
    """The middle of the bin in which the share 0.99999 of all magnitudes is reached."""
    return min(limit, (quantile_bin(histogram.counts, QUANTILE) + 0.5) * histogram.width)


@dataclass(frozen=True)
class _Method:
    """How a range is searched. two_sided: whether the search needs signs; scales: both ends shrink by one factor."""

    search: Search
    two_sided: bool
    scales: bool


class HistogramObserver:
    """Extremes and histogram of all batches together; a subclass finds the range (``result``).

    signed: whether values below zero are counted as they are, instead of as zero.
    """

    def __init__(self, two_sided: bool, signed: bool) -> None:
        self.signed = signed
        self.histogram = Histogram(two_sided)
        self.low = self.high = 0.0

    def update(self, x: Tensor) -> None:
        """Count a batch."""
        low, high = (float(v) for v in batch_range(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.low = self.high = math.nan  # stays: the range of such a tensor is refused
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.histogram.add(x if self.signed else x.clamp_min(0), max(-low, high) if self.signed else high)


class Searched(HistogramObserver):
    """The range that a search finds on the histogram of all batches together.

    MQBench searches each batch and takes the extremes of the ranges found; one histogram of all batches does not let a
    single batch decide.
    """

    def __init__(self, method: _Method, bits: int, signed: bool) -> None:
        super().__init__(method.two_sided and signed, signed)
        self.method, self.bounds = method, int_range(bits, signed)

    def result(self) -> Range:
        limit = max(-self.low, self.high) if self.signed else self.high
        if not limit > 0:  # nothing above zero, or not finite
            return torch.tensor(self.low), torch.tensor(max(self.high, 0.0))
        reach = self.method.search(self.histogram, limit, self.bounds)
        if self.method.scales:
            return torch.tensor(self.low * (reach / limit)), torch.tensor(self.high * (reach / limit))
        return torch.tensor(max(self.low, -reach)), torch.tensor(min(self.high, reach))


def ema_of(make: Callable[[], Observer]) -> Ema:
    """The moving average of the ranges that such an observer finds on each batch alone."""

    def range_of(x: Tensor) -> Range:
        observer = make()
        observer.update(x)
        return observer.result()

    return Ema(range_of)


METHODS = ("minmax", "ema", "ema_minmax", "ema_quantile", "mse", "ema_mse", "percentile", "kl")
MSE_METHODS = ("mse", "ema_mse")


def make_observer(method: str, bits: int, signed: bool, percentile: float = 99.99, power: float = 2.0) -> Observer:
    """The observer of a method of ``METHODS``; ``ema`` and ``ema_minmax`` are one.

    percentile: of each batch, for the method of that name.  power: p of the mean error ``|x_hat - x| ** p``.
    """
    if method == "minmax" or bits > 8:
        return MinMax()
    if method == "percentile":
        return Ema(partial(batch_range, percentile=percentile))
    mse = partial(Searched, _Method(partial(search_mse, power=power), two_sided=True, scales=True), bits, signed)
    kl = partial(Searched, _Method(search_kl, two_sided=False, scales=False), bits, signed)
    quantile = partial(Searched, _Method(search_quantile, two_sided=False, scales=False), bits, signed)
    made: dict[str, Callable[[], Observer]] = {
        "ema": Ema,
        "ema_minmax": Ema,
        "ema_quantile": partial(ema_of, quantile),
        "mse": mse,
        "ema_mse": partial(ema_of, mse),
        "kl": kl,
    }
    return made[method]()
