"""Where the integers of a network of the original come from: float weights and ranges, or its recorded integers."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from utils.errors import UserError
from utils.hawq import arithmetic
from utils.hawq.arithmetic import LayerIntegers, Options
from utils.hawq.files import HawqFile
from utils.hawq.names import ACT_SCALE, BIASES, SCALE_ENTRIES, WEIGHTS

BN_PARTS = ("weight", "bias", "running_mean", "running_var")
SAME_SCALE = 1e-3  # relative; a GPU divides by a rounded reciprocal, neighbouring widths differ by half and more
WIDTHS = (4, 8, 16, 2, 3, 5, 6, 7)  # the original's own first


class Parameters(Protocol):
    """What the graph's builder asks for, by the original's module names."""

    def layer(self, name: str, shape: tuple[int, ...], bits: int, input_scale: np.float32, eps: float | None
              ) -> LayerIntegers:  # fmt: skip
        """Integers of a layer whose weight has ``shape``; eps: of the BatchNorm folded into it, None without one."""

    def activation(self, name: str, bits: int) -> np.float32:
        """Scale of an activation quantizer, positive."""


@dataclass(frozen=True)
class Entries:
    """Entries of a file as float32 arrays, each checked against the shape it must have.

    advice: what to say after a mistake: which schemes would fit.
    """

    file: HawqFile
    advice: str

    def error(self, text: str) -> UserError:
        """To raise: what is wrong with the file, and the advice."""
        return UserError(f"{self.file.path} does not fit: {text}; {self.advice}")

    def get(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """One entry.  Raises UserError naming the first that is missing or of another shape."""
        if key not in self.file.tensors:
            raise self.error(f"{key} {list(shape)} is missing")
        array: np.ndarray = self.file.tensors[key].float().numpy()
        if array.shape != shape:
            raise self.error(f"{key} has shape {list(array.shape)}, expected {list(shape)}")
        return array

    def integers(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """One entry of whole numbers."""
        array = self.get(key, shape)
        broken = array[array != np.rint(array)]
        if broken.size:
            raise self.error(f"{key} holds {broken[0]}, expected whole numbers")
        return array

    def number(self, key: str) -> np.float32:
        """An entry of one element; the original gives it the shape [] or [1]."""
        shape = (1,) if key not in self.file.tensors or self.file.tensors[key].numel() != 1 else None
        array = self.get(key, shape or tuple(self.file.tensors[key].shape))
        return np.float32(array.reshape(()))

    def weight_scale(self, name: str, outputs: int) -> np.ndarray | None:
        """Recorded weight scale of a layer, float32 [outputs] or, of a whole tensor, [1]; None where there is none."""
        for key in (f"{name}.{entry}" for entry in SCALE_ENTRIES):
            if key in self.file.tensors:
                single = self.file.tensors[key].numel() == 1
                return np.full(1, self.number(key)) if single else self.get(key, (outputs,))
        return None


@dataclass(frozen=True)
class FromFloats:
    """Quantizes the float weights of a checkpoint anew, as every forward of the original does.

    Scales and integers that the file also holds are outputs of an earlier forward; they only show how it was made.
    """

    entries: Entries
    options: Options

    def layer(self, name: str, shape: tuple[int, ...], bits: int, input_scale: np.float32, eps: float | None
              ) -> LayerIntegers:  # fmt: skip
        """See :class:`Parameters`."""
        outputs, get, options = shape[:1], self.entries.get, self._options(name, shape)
        if eps is not None:
            gamma, beta, mean, var = (get(f"{name}.bn.{part}", outputs) for part in BN_PARTS)
            weight, bias = arithmetic.fold(get(f"{name}.conv.weight", shape), gamma, beta, mean, var, eps)
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise self.entries.error(f"{name}.bn makes weights that are not finite, from a variance of {var.min()}")
        else:
            weight = get(f"{name}.weight", shape)
            has_bias = f"{name}.bias" in self.entries.file.tensors
            bias = get(f"{name}.bias", outputs) if has_bias else np.zeros(outputs, np.float32)
        integers, scale = arithmetic.weight_integers(weight, bits, options)
        return LayerIntegers(integers, scale, arithmetic.bias_integers(bias, scale, input_scale))

    def _options(self, name: str, shape: tuple[int, ...]) -> Options:
        """What holds for one layer: a recorded scale shows whether it is one per channel."""
        options = self.options
        if len(shape) == 2:  # QuantLinear ignores the percentile
            options = replace(options, weight_percentile=0.0)
        recorded = self.entries.weight_scale(name, shape[0])
        if recorded is None or not recorded.any() or shape[0] == 1:
            return options
        per_channel = recorded.size > 1
        if per_channel and not options.channel_wise:
            raise self.entries.error(f"{name} has {recorded.size} weight scales; leave out --no-channel-wise")
        return replace(options, channel_wise=per_channel)

    def activation(self, name: str, bits: int) -> np.float32:
        """See :class:`Parameters`.  Raises UserError where the recorded scale shows another width."""
        low, high = (self.entries.number(f"{name}.{end}") for end in ("x_min", "x_max"))
        scale, key = arithmetic.activation_scale(low, high, bits), f"{name}.{ACT_SCALE}"
        recorded = float(self.entries.number(key)) if key in self.entries.file.tensors else 0.0
        if recorded > 0 and not _close(recorded, scale):
            shown = [b for b in WIDTHS if _close(recorded, arithmetic.activation_scale(low, high, b))]
            if shown:
                raise self.entries.error(f"{key} is of {shown[0]} bits there, of {bits} in the scheme")
        return scale


def _close(recorded: float, scale: np.float32) -> bool:
    return abs(recorded / float(scale) - 1) < SAME_SCALE


@dataclass(frozen=True)
class FromIntegers:
    """Takes integers and scales as a quantized_checkpoint records them."""

    entries: Entries

    def layer(self, name: str, shape: tuple[int, ...], bits: int, input_scale: np.float32, eps: float | None
              ) -> LayerIntegers:  # fmt: skip
        """See :class:`Parameters`.  Raises UserError where the original forgets to record a layer's scale."""
        outputs = shape[:1]
        weight = self.entries.integers(f"{name}.{WEIGHTS}", shape)
        scale = self.entries.weight_scale(name, shape[0])
        if scale is None:
            raise UserError(
                f"{self.entries.file.path} lacks the weight scale of {name}, which the original does not write to its "
                "quantized_checkpoint; give the checkpoint.pth.tar of that run"
            )
        if scale.min() <= 0:
            raise self.entries.error(f"the weight scales of {name} reach {scale.min()}, expected positive numbers")
        has_bias = eps is not None or len(shape) == 2  # MobileNetV2's classifier, a convolution, has none
        bias = self.entries.integers(f"{name}.{BIASES}", outputs) if has_bias else np.zeros(outputs, np.float32)
        return LayerIntegers(weight, np.broadcast_to(scale, outputs).copy(), bias)

    def activation(self, name: str, bits: int) -> np.float32:
        """See :class:`Parameters`."""
        scale = self.entries.number(f"{name}.{ACT_SCALE}")
        if scale <= 0:
            raise self.entries.error(f"{name}.{ACT_SCALE} is {scale}, expected a positive number")
        return scale


def parameters_of(file: HawqFile, options: Options, advice: str) -> Parameters:
    """What a file offers; options do not matter to integers that are recorded."""
    entries = Entries(file, advice)
    return FromIntegers(entries) if file.integers else FromFloats(entries, options)
