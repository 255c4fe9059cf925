"""Which bit widths a file of the original was made with: they are not recorded, but its integers show them."""

from collections.abc import Mapping, Sequence

import bit_config
from utils.errors import UserError
from utils.hawq.files import HawqFile
from utils.hawq.names import WEIGHTS, float_layer
from utils.quantization_utils.cost_model import Layer, LayerBits

Resolved = Mapping[str, LayerBits]
RESIDUAL_BITS = 16  # of block outputs in the original, whatever the scheme


def choose_scheme(file: HawqFile, arch: str, layers: Sequence[Layer], name: str | None) -> str:
    """The scheme the user named, or else the one that the file's integers fit.

    Raises UserError naming the first entry that disagrees and the schemes that would fit.
    """
    shown = shown_bits(file)
    if name is None:
        fitting = _fitting(shown, arch, layers) if shown else []
        if not fitting:
            known = ", ".join(bit_config.PUBLISHED.get(arch, {})) or "none is published"
            reason = "holds bit widths that fit no" if shown else "does not show its bit widths, which may be any"
            raise UserError(f"{file.path} {reason} published scheme of {arch} ({known}); give --quant-scheme")
        return fitting[0]
    difference = _first_disagreement(shown, bits_of(name, arch, layers))
    if difference is not None:
        raise UserError(f"{file.path} was not made with the scheme {name}: {difference}; {advice(file, arch, layers)}")
    return name


def advice(file: HawqFile, arch: str, layers: Sequence[Layer]) -> str:
    """The published schemes that a file's integer weights fit, in words."""
    fitting = ", ".join(_fitting(shown_bits(file), arch, layers))
    return f"it fits {fitting}" if fitting else f"no published scheme of {arch} fits it"


def bits_of(name: str, arch: str, layers: Sequence[Layer]) -> dict[str, LayerBits]:
    """Bits of every layer under a scheme the user names.

    Raises UserError for schemes that do not fit the layers, or that the original cannot compute.
    """
    scheme = bit_config.load_scheme(name, arch)
    if scheme.residual_bits != RESIDUAL_BITS:
        got = scheme.residual_bits
        raise UserError(f"the scheme {name} has residual_bits {got}, files of the original always {RESIDUAL_BITS}")
    return bit_config.resolve(scheme, layers)


def shows_bits(file: HawqFile) -> bool:
    """Whether the file has integer weights that a forward has filled in."""
    return bool(shown_bits(file))


def shown_bits(file: HawqFile) -> dict[str, int]:
    """Entry -> bits of its integer weights, without those that are all zero.

    The scale is chosen so that the greatest weight is 2^(bits-1) - 1; percentiles clamp at -2^(bits-1).
    """
    entries = {key: tensor for key, tensor in file.tensors.items() if key.rpartition(".")[2] == WEIGHTS}
    greatest = {key: int(tensor.float().abs().max()) for key, tensor in entries.items() if tensor.numel()}
    return {key: (value - 1).bit_length() + 1 if value > 1 else 2 for key, value in greatest.items() if value}


def _fitting(shown: Mapping[str, int], arch: str, layers: Sequence[Layer]) -> list[str]:
    """Published schemes of an architecture that agree with shown bits."""
    names = bit_config.PUBLISHED.get(arch, {})
    return [name for name in names if _first_disagreement(shown, bits_of(name, arch, layers)) is None]


def _first_disagreement(shown: Mapping[str, int], bits: Resolved) -> str | None:
    """The first entry that other bits must have made, in words; None where all agree (or show nothing)."""
    for key, got in shown.items():
        path = float_layer(key.removesuffix(f".{WEIGHTS}"), bits)
        if path is not None and got != bits[path].weight:
            return f"{key} has {got} bits there, {bits[path].weight} in the scheme"
    return None
