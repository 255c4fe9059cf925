"""Activations of all calibration images at named tensors, small and exact.

Outputs of activation quantizers are kept as their integers (1 or 2 bytes) and come back bit for bit; everything else is
float32.  Maps [N, C, H, W] are kept channels last, so that a position of an image is a row.
"""

import torch
from torch import Tensor

from utils.quantization_utils.quant_modules import Quantizer


class TensorCache:
    """Named tensors of ``count`` images."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._stored: dict[str, tuple[Tensor, Tensor | None]] = {}  # values or integers, and their scale

    def put(self, name: str, index: slice, value: Tensor, quantizer: Quantizer | None = None) -> None:
        """Keep the values [B, ...] of the images ``index``; ``quantizer``: the one whose output they are."""
        value = channels_last(value)
        if name not in self._stored:
            dtype = torch.float32 if quantizer is None else _TYPES[bytes_per_value(quantizer), quantizer.signed]
            memory = torch.empty((self.count, *value.shape[1:]), dtype=dtype, device=value.device)
            self._stored[name] = memory, None if quantizer is None else quantizer.scale.clone()
        self._stored[name][0][index] = value if quantizer is None else quantizer.integers(value)

    def alias(self, name: str, source: str) -> None:
        """Let a second name stand for the same values."""
        self._stored[name] = self._stored[source]

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def drop(self, name: str) -> None:
        """Forget a name."""
        del self._stored[name]

    def fetch(self, name: str, index: slice | Tensor) -> Tensor:
        """The values [B, ...] of some images, float32 in memory of their own."""
        memory, scale = self._stored[name]
        chosen = memory[index].to(torch.float32, copy=True)
        if scale is not None:
            chosen *= scale
        return chosen.movedim(-1, 1) if memory.dim() == 4 else chosen

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows float32 [R, C] of the tensor seen as [images * positions, C]."""
        memory, scale = self._stored[name]
        chosen = memory.reshape(-1, memory.shape[-1])[index].float()
        return chosen if scale is None else chosen.mul_(scale)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one image's values, maps channels last."""
        return tuple(self._stored[name][0].shape[1:])


def channels_last(value: Tensor) -> Tensor:
    """A map [N, C, H, W] as [N, H, W, C]; other tensors as they are."""
    return value.movedim(1, -1) if value.dim() == 4 else value


def bytes_per_value(quantizer: Quantizer | None) -> int:
    """Memory that the cache takes for one value behind a quantizer; None: any other value."""
    if quantizer is None:
        return 4
    lo, hi = quantizer.bounds()
    least, most = (-128, 127) if quantizer.signed else (0, 255)
    return 1 if least <= lo and hi <= most else 2


# Wider than 8 bits, or with a zero point inside, is always signed.
_TYPES = {(1, False): torch.uint8, (1, True): torch.int8, (2, True): torch.int16}
