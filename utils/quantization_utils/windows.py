"""Average-pooling windows: every kind of average pool as explicit rows x columns of input coordinates."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AvgWindows:
    """Output (i, j) averages input rows [row_start[i], row_stop[i]) and columns [col_start[j], col_stop[j]).

    Windows are clipped to the image.  ``area`` int64 [Ho, Wo] is the divisor, which differs from the window's own
    size where padding is counted or a divisor is prescribed.
    """

    row_start: tuple[int, ...]
    row_stop: tuple[int, ...]
    col_start: tuple[int, ...]
    col_stop: tuple[int, ...]
    area: np.ndarray


def _axis(size: int, out: int, kernel: int, stride: int, padding: int) -> tuple[list[int], list[int], list[int]]:
    """Clipped starts and stops, and the unclipped lengths (padding counted), of one axis."""
    starts = [i * stride - padding for i in range(out)]
    stops = [min(start + kernel, size + padding) for start in starts]
    lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
    return [max(start, 0) for start in starts], [min(stop, size) for stop in stops], lengths


def pool_windows(
    source: tuple[int, ...],
    target: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    count_include_pad: bool,
    divisor: int | None,
) -> AvgWindows:
    """Windows of ``nn.AvgPool2d`` from (H, W) ``source`` to (Ho, Wo) ``target`` (which tells the ceil mode)."""
    r0, r1, rows = _axis(source[0], target[0], kernel[0], stride[0], padding[0])
    c0, c1, cols = _axis(source[1], target[1], kernel[1], stride[1], padding[1])
    area = np.outer(rows, cols) if count_include_pad else np.outer(np.subtract(r1, r0), np.subtract(c1, c0))
    if divisor is not None:
        area = np.full_like(area, divisor)
    return AvgWindows(tuple(r0), tuple(r1), tuple(c0), tuple(c1), area.astype(np.int64))


def adaptive_windows(source: tuple[int, ...], target: tuple[int, ...]) -> AvgWindows:
    """Windows of adaptive average pooling: [floor(i*H/Ho), ceil((i+1)*H/Ho))."""
    r0, r1 = _adaptive_axis(source[0], target[0])
    c0, c1 = _adaptive_axis(source[1], target[1])
    area = np.outer(np.subtract(r1, r0), np.subtract(c1, c0)).astype(np.int64)
    return AvgWindows(tuple(r0), tuple(r1), tuple(c0), tuple(c1), area)


def _adaptive_axis(size: int, out: int) -> tuple[list[int], list[int]]:
    return [i * size // out for i in range(out)], [math.ceil((i + 1) * size / out) for i in range(out)]
