"""The table that turns uint8 pixels into a graph's first integers."""

import numpy as np
import torch

from utils.data_utils import normalize
from utils.preprocess import Preprocess


def pixel_table(preprocess: Preprocess, inverse_scale: float | np.float32, lo: int, hi: int) -> np.ndarray:
    """int16 [C, 256]: ``clamp(rne(fl(x * inverse_scale)), lo, hi)`` of every possible normalised pixel x.

    inverse_scale: a float32 value, ``fl(1 / scale)``.
    """
    pixels = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).expand(256, preprocess.channels, 1, 1)
    real = normalize(pixels, preprocess)[:, :, 0, 0]
    table: np.ndarray = (real * float(inverse_scale)).round().clamp(lo, hi).to(torch.int16).numpy().T
    return table
