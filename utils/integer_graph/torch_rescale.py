"""Requantization of float tensors that hold integers, exact, in pieces that stay in the processor's cache.

The rules are those of ``dyadic.ROUNDING``; here ``floor((acc * m + 2**(e-1)) / 2**e)`` (rounding "down": without the
half) is computed in float64, which is exact under one of two proofs, chosen per branch when the engine is built:

- one product: |acc| * m + 2**(e-1) <= 2**53, so acc * (m / 2**e) + 1/2 is a float64 without rounding;
- two limbs, m = 2**16 * mh + ml: floor((A * 2**16 + B) / 2**e) = floor((A + floor(B / 2**16)) / 2**(e-16)), where A
  and B stay below 2**53 for every |acc| < 2**31 and every e > 16.

Otherwise int64 is used as in the definition.  Ties to even need the first proof, or that no tie can occur.
Tensors are laid out [N, H, W, C]; a piece is some rows of the [rows, width] view whose width is a multiple of C.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.quantization_utils.dyadic import ROUNDING, tie_is_impossible

FLOAT64_LIMIT = 1 << 53
LIMB = 16
CPU_PIECE = 1 << 18  # elements per thread: 2 MB of float64
GPU_PIECE = 1 << 24
ROW = 4096  # elements of a row that short channel vectors are repeated to, so that loops are long enough


@dataclass(frozen=True)
class Accumulator:
    """The value sum(part * factor) + bias of a convolution, not yet added up.

    parts: float32 or float64 tensors [N, H, W, O] or [N, O].  bias: float64 [O].
    """

    parts: tuple[torch.Tensor, ...]
    factors: tuple[int, ...]
    bias: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The accumulators as one float64 tensor."""
        total = self.parts[0].double() * self.factors[0]
        for part, factor in zip(self.parts[1:], self.factors[1:], strict=True):
            total.add_(part, alpha=factor)
        return total.add_(self.bias)


Value = torch.Tensor | Accumulator


def dense(value: Value) -> torch.Tensor:
    """One tensor, whatever the value was."""
    return value.dense() if isinstance(value, Accumulator) else value


@dataclass(frozen=True)
class Source:
    """What is proved about a value when the engine is built.

    bound: int64 [C] or [1], the greatest |value - bias|.  bias: int64 [C], only of accumulators.
    """

    bound: np.ndarray
    bias: np.ndarray | None = None


class Scratch:
    """Two float64 buffers that all rescaling steps of an engine share, grown while it is built."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.piece = CPU_PIECE * torch.get_num_threads() if device.type == "cpu" else GPU_PIECE
        self._buffers: list[torch.Tensor] = []

    def buffers(self, count: int, rows: int, width: int) -> list[torch.Tensor]:
        """`count` float64 buffers [rows, width], the same memory at every call."""
        size = rows * width
        while len(self._buffers) < count:
            self._buffers.append(torch.empty(0, dtype=torch.float64, device=self.device))
        for i, buffer in enumerate(self._buffers[:count]):
            if buffer.numel() < size:
                self._buffers[i] = torch.empty(size, dtype=torch.float64, device=self.device)
        return [buffer[:size].view(rows, width) for buffer in self._buffers[:count]]


Apply = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Dyadic:
    """The multipliers of one input of a node, and what is proved about that input; int64 [width] each.

    width: length of a row of the piecewise view.  bound: greatest |acc - bias|.
    """

    multiplier: np.ndarray
    shift: np.ndarray
    bias: np.ndarray
    bound: np.ndarray
    rounding: str


@dataclass(frozen=True)
class Branch:
    """Rescales one input: apply(acc, spare) turns rows [rows, width] of float64 integers into the result, in place."""

    width: int
    apply: Apply


def plan_branch(dyadic: Dyadic, device: torch.device) -> Branch:
    """Choose the cheapest arithmetic that is proved exact for one input."""
    distinct = np.unique(np.stack([dyadic.bound, dyadic.bias, dyadic.multiplier, dyadic.shift], axis=1), axis=0)
    rows = [(r + abs(b), m, e) for r, b, m, e in distinct.tolist()]  # Python integers: the proof cannot overflow
    reach = max(bound * m + (1 << (e - 1)) for bound, m, e in rows)
    apply: Apply
    floors = dyadic.rounding != "even" or all(tie_is_impossible(m, e, bound) for bound, m, e in rows)
    if all(m == 1 << e for _, m, e in rows) and not dyadic.bias.any():
        apply = _identity
    elif reach <= FLOAT64_LIMIT:
        apply = _one_product(dyadic, floors, device)
    elif floors and all(e > LIMB for _, _, e in rows):
        apply = _two_limbs(dyadic, device)
    else:
        apply = _int64(dyadic, device)
    return Branch(len(dyadic.multiplier), apply)


def _identity(acc: torch.Tensor, spare: torch.Tensor) -> None:
    """m == 2**e and no bias: the integers stay."""


def _scaled(integers: np.ndarray, shift: np.ndarray | int, device: torch.device) -> torch.Tensor:
    """integers / 2**shift as float64 [width], exact for |integers| <= 2**53."""
    return torch.from_numpy(np.ldexp(integers.astype(np.float64), -shift)).to(device)


def _added(dyadic: Dyadic) -> np.ndarray:
    """What acc * m is increased by before the floor: the bias and, but for rounding "down", the half; int64 [width]."""
    half = (1 << (dyadic.shift - 1)) if dyadic.rounding != "down" else 0
    total: np.ndarray = dyadic.bias * dyadic.multiplier + half
    return total


def _one_product(dyadic: Dyadic, floors: bool, device: torch.device) -> Apply:
    constant = _added(dyadic) if floors else dyadic.bias * dyadic.multiplier
    m = _scaled(dyadic.multiplier, dyadic.shift, device)
    c = _scaled(constant, dyadic.shift, device)

    def apply(acc: torch.Tensor, spare: torch.Tensor) -> None:
        torch.addcmul(c, acc, m, out=acc)
        if floors:
            acc.floor_()
        else:
            acc.round_()

    return apply


def _two_limbs(dyadic: Dyadic, device: torch.device) -> Apply:
    constant = _added(dyadic)
    low_mask, rest = (1 << LIMB) - 1, dyadic.shift - LIMB
    m_low = _scaled(dyadic.multiplier & low_mask, LIMB, device)
    c_low = _scaled(constant & low_mask, LIMB, device)
    m_high = _scaled(dyadic.multiplier >> LIMB, rest, device)
    c_high = _scaled(constant >> LIMB, rest, device)
    unit = _scaled(np.ones_like(rest), rest, device)

    def apply(acc: torch.Tensor, spare: torch.Tensor) -> None:
        torch.addcmul(c_low, acc, m_low, out=spare)
        spare.floor_()
        torch.addcmul(c_high, acc, m_high, out=acc)
        acc.addcmul_(spare, unit)
        acc.floor_()

    return apply


def _int64(dyadic: Dyadic, device: torch.device) -> Apply:
    m, e, bias = (torch.from_numpy(a).to(device) for a in (dyadic.multiplier, dyadic.shift, dyadic.bias))
    rule = ROUNDING[dyadic.rounding]

    def apply(acc: torch.Tensor, spare: torch.Tensor) -> None:
        acc.copy_(rule(acc.long() + bias, m, e))

    return apply


def repeats(positions: int, channels: int) -> int:
    """Positions in one row of the piecewise view: a divisor of `positions` that gives about ROW elements."""
    return max(d for d in range(1, positions + 1) if positions % d == 0 and (d == 1 or d * channels <= ROW))


def load(buffer: torch.Tensor, value: Value, start: int) -> None:
    """Fill `buffer` [rows, width] (float64) with rows from `start` of a value, without its bias."""
    rows, width = buffer.shape
    parts, factors = (value.parts, value.factors) if isinstance(value, Accumulator) else ((value,), (1,))
    for i, (part, factor) in enumerate(zip(parts, factors, strict=True)):
        piece = part.view(-1, width)[start : start + rows]
        if i == 0:
            buffer.copy_(piece)
            if factor != 1:
                buffer.mul_(factor)
        else:
            buffer.add_(piece, alpha=factor)


def batch_size(value: Value) -> int:
    """Number of images of a value, without adding it up."""
    return len(value.parts[0] if isinstance(value, Accumulator) else value)


def rescale_sum(
    values: Sequence[Value],
    branches: Sequence[Branch],
    scratch: Scratch,
    clamp: tuple[int | None, int | None],
    out: torch.Tensor,
) -> None:
    """out[rows, channels] = clamp(sum of the rescaled values).

    out: float32 or float64, 2-D, perhaps a slice of channels of a wider tensor; all values have as many elements.
    """
    width = branches[0].width
    total, channels = out.shape[0] * out.shape[1] // width, out.shape[1]
    per_row = width // channels
    step = max(1, scratch.piece // width)
    for start in range(0, total, step):
        rows = min(step, total - start)
        first, spare, other = scratch.buffers(3, rows, width)
        load(first, values[0], start)
        branches[0].apply(first, spare)
        for value, branch in zip(values[1:], branches[1:], strict=True):
            load(other, value, start)
            branch.apply(other, spare)
            first.add_(other)
        if clamp != (None, None):
            first.clamp_(*clamp)
        out[start * per_row : (start + rows) * per_row].copy_(first.view(-1, channels))
