"""The parts of a post-training quantization as ``--ptq`` names them: ``mse+equalize+bias``, ``minmax/ema+adaround``."""

from dataclasses import dataclass

from utils.errors import UserError
from utils.quantization_utils.calibrators import METHODS, MSE_METHODS

WEIGHT_METHODS = ("minmax", "mse")
EQUALIZE, BALANCE, AFFINE, BIAS = "equalize", "balance", "affine", "bias"
DESCENT, ADAROUND, BLOCK = "descent", "adaround", "block"
LEARNED = (ADAROUND, BLOCK)
ROUNDINGS = (DESCENT, *LEARNED)
AROUND = (EQUALIZE, BALANCE, AFFINE, BIAS)  # what can be done in front of or behind rounding
CORRECTIONS = (*AROUND, *ROUNDINGS)
POWER, ROUNDING_POWER = 2.0, 2.4  # of the mse searches, alone and in front of learned rounding (MQBench's settings)


@dataclass(frozen=True)
class PtqRecipe:
    """weights: ``minmax`` or ``mse``; activations: one of ``calibrators.METHODS``; rounding: one of ``ROUNDINGS``."""

    weights: str
    activations: str
    equalize: bool = False
    balance: bool = False
    affine: bool = False
    bias: bool = False
    rounding: str | None = None

    @property
    def power(self) -> float:
        """p of the searches for the least mean ``|x_hat - x| ** p``."""
        return POWER if self.rounding is None else ROUNDING_POWER


def parse_recipe(text: str) -> PtqRecipe:
    """Read parts joined by ``+`` in any order: one calibrator and any of ``CORRECTIONS``.

    A calibrator ``mse`` or ``ema_mse`` is for weights and activations, others leave the weights at ``minmax``; W/A
    names both.  Raises UserError for anything else.

    >>> parse_recipe("mse+bias")
    PtqRecipe(weights='mse', activations='mse', equalize=False, balance=False, affine=False, bias=True, rounding=None)
    """
    parts = text.split("+")
    calibrators = [part for part in parts if part not in CORRECTIONS]
    unknown = next((part for part in calibrators if not _is_calibrator(part)), None)
    rounding = [part for part in parts if part in ROUNDINGS]
    if unknown is not None:
        raise _refusal(text, f"does not know the part {unknown!r}")
    if len(calibrators) != 1:
        raise _refusal(text, f"has {len(calibrators)} calibrators")
    if len(set(parts)) < len(parts) or len(rounding) > 1:
        twice = len(set(rounding)) < 2
        raise _refusal(text, "names a part twice" if twice else f"has both {rounding[0]} and {rounding[1]}")
    if AFFINE in parts and not rounding:
        raise _refusal(text, f"has {AFFINE} without a rounding that it prepares for")
    weights, _, activations = calibrators[0].rpartition("/")
    weights = weights or ("mse" if activations in MSE_METHODS else "minmax")
    around = {part: part in parts for part in AROUND}
    return PtqRecipe(weights, activations, **around, rounding=rounding[0] if rounding else None)


def _is_calibrator(part: str) -> bool:
    weights, slash, activations = part.rpartition("/")
    return activations in METHODS and (not slash or weights in WEIGHT_METHODS)


def _refusal(text: str, why: str) -> UserError:
    return UserError(
        f"--ptq {text!r} {why}; give one calibrator ({', '.join(METHODS)}, or W/A with W {' or '.join(WEIGHT_METHODS)}"
        f") and any of {', '.join(AROUND)} and one of {', '.join(ROUNDINGS)}, joined by +"
    )
