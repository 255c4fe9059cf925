"""How an image becomes the input of a network; stored in every file that depends on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocess:
    """Steps from a decoded image to the normalised input [C, input_size, input_size].

    mean, std: one value per channel, for pixels scaled to 0..1.
    resize: shortest edge in pixels before the centre crop; None: the image must have the input size already.
    input_size: edge of the square input in pixels.
    rotate180: turn the cropped image upside down (for weights made for rotated images).
    channels: 3 (RGB) or 1 (grey).
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: int | None = 256
    input_size: int = 224
    rotate180: bool = False
    channels: int = 3
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or not all(math.isfinite(value) for value in values):
                raise UserError(f"{name} is {list(values)}, expected {self.channels} finite numbers, one per channel")
        if min(self.std) <= 0:
            raise UserError(f"std is {list(self.std)}, expected positive numbers")
        if self.channels not in (1, 3):
            raise UserError(f"got {self.channels} image channels, expected 1 (grey) or 3 (RGB)")
        if self.input_size < 1:
            raise UserError(f"the input size is {self.input_size}, expected at least 1 pixel")
        if self.resize is not None and self.resize < self.input_size:
            raise UserError(f"resize is {self.resize}, expected at least the input size {self.input_size}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        return (self.channels, self.input_size, self.input_size)

    def override(
        self,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize: int | None = None,
        input_size: int | None = None,
        rotate180: bool | None = None,
        interpolation: str | None = None,
    ) -> Preprocess:
        """A copy with the given values; None keeps the old one.

        mean and std may be one number for all channels. resize=0 means no resize. A new input_size without a resize
        scales the old resize along. Raises UserError for values that make no sense.

        >>> Preprocess().override(input_size=112, mean=[0.5])
        Preprocess(mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225), resize=128, input_size=112, rotate180=False, \
channels=3, interpolation='bilinear')
        """
        size = self.input_size if input_size is None else input_size
        return dataclasses.replace(
            self,
            mean=self.mean if mean is None else _per_channel(mean, self.channels),
            std=self.std if std is None else _per_channel(std, self.channels),
            resize=self._scaled_resize(size) if resize is None else (resize or None),
            input_size=size,
            rotate180=self.rotate180 if rotate180 is None else rotate180,
            interpolation=self.interpolation if interpolation is None else interpolation,
        )

    def _scaled_resize(self, input_size: int) -> int | None:
        return None if self.resize is None else math.ceil(self.resize * input_size / self.input_size)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON headers and checkpoints; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return values | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Inverse of `as_dict`. Raises UserError for missing, unknown or senseless entries."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise UserError(f"preprocessing has the entries {sorted(values)}, expected {sorted(names)}")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) * channels if len(values) == 1 else tuple(values)
