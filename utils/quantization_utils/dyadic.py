"""The integer arithmetic contract: how accumulators become the next layer's integers.

Every engine rescales by one rule, :func:`requantize`, with a dyadic multiplier ``m / 2**e`` that
:func:`dyadic` chooses from a real ratio.  Nothing else in the project rounds an integer.  Checkpoints of the
original HAWQ use two other rules: halves to even, and no rounding at all in their average pools.
Source: HAWQ-V3, arXiv 2011.10680, section 3 (dyadic arithmetic); the tie rule is ours (ties up).

The functions only use ``*``, ``+``, ``>>`` and ``&``, so they hold for Python integers, numpy arrays and torch
tensors of 64-bit integers alike.
"""

import math
from typing import Any

import numpy as np

MULTIPLIER_LIMIT = 1 << 31
MAX_SHIFT = 62
CHEAP_SHIFT = 32
CHEAP_MULTIPLIER_MIN = 1 << 16


def requantize(acc: Any, multiplier: Any, shift: Any) -> Any:
    """Rescale accumulators: ``floor(acc * multiplier / 2**shift + 1/2)``, halves up.

    acc: int64, any shape, |acc| < 2**31.  multiplier: int64 in [1, 2**31), broadcasts to acc.
    shift: int64 in [1, 62], broadcasts to acc.  Returns int64 of acc's shape, not clamped.

    >>> requantize(100, 2**30, 33)  # 12.5
    13
    >>> requantize(-100, 2**30, 33)  # -12.5
    -12
    """
    return (acc * multiplier + (1 << (shift - 1))) >> shift


def requantize_even(acc: Any, multiplier: Any, shift: Any) -> Any:
    """Like :func:`requantize` with halves to even, the rule of checkpoints of the original HAWQ.

    >>> requantize_even(100, 2**30, 33), requantize_even(-100, 2**30, 33), requantize_even(108, 2**30, 33)
    (12, -12, 14)
    """
    product = acc * multiplier
    half = 1 << (shift - 1)
    floor = product >> shift
    # One below the half rounds down on even floors, the half itself rounds up on odd ones.
    return (product + half - 1 + (floor & 1)) >> shift


def requantize_down(acc: Any, multiplier: Any, shift: Any) -> Any:
    """Like :func:`requantize` without rounding: ``floor(acc * multiplier / 2**shift)``.

    >>> requantize_down(100, 2**30, 33), requantize_down(-100, 2**30, 33)
    (12, -13)
    """
    return (acc * multiplier) >> shift


ROUNDING = {"up": requantize, "even": requantize_even, "down": requantize_down}


def dyadic(ratio: float, *, output_bits: int = 8) -> tuple[int, int]:
    """Choose ``(m, e)`` with ``m / 2**e`` nearest to a real ratio, deterministically.

    ratio: float64, positive and finite, in (2**-62, 2**30).  Returns ``m`` in [1, 2**31) and ``e`` in [1, 62].
    Outputs of at most 8 bits take ``e = 32`` whenever that leaves m at least 16 significant bits (the cheapest
    kernel: the high half of a 64-bit product); otherwise m is normalised to [2**30, 2**31), and shifted down
    where e would pass 62.  Raises ValueError for a ratio that has no such form.

    >>> dyadic(0.5)
    (1073741824, 31)
    >>> dyadic(2**-10)
    (4194304, 32)
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"a requantization ratio must be positive and finite, got {ratio!r}")
    if output_bits <= 8:
        m = _round_half_up(ratio * 2.0**CHEAP_SHIFT)
        if CHEAP_MULTIPLIER_MIN <= m < MULTIPLIER_LIMIT:
            return m, CHEAP_SHIFT
    return _normalised(ratio, 31)


def dyadic16(ratio: float) -> tuple[int, int]:
    """``(m, e)`` with the nearest 15-bit m, for a 16-bit operand: the product fits a signed 32-bit lane.

    Returns m in [1, 2**15) and e in [1, 62].  Raises ValueError like :func:`dyadic`.

    >>> dyadic16(1.0)
    (16384, 14)
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"a requantization ratio must be positive and finite, got {ratio!r}")
    return _normalised(ratio, 15)


def dyadic_array(ratios: np.ndarray, *, output_bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """:func:`dyadic` of every ratio.  ratios: float64 [C].  Returns multiplier int32 [C] and shift uint8 [C]."""
    pairs = [dyadic(float(r), output_bits=output_bits) for r in np.asarray(ratios, np.float64).ravel()]
    return np.array([m for m, _ in pairs], np.int32), np.array([e for _, e in pairs], np.uint8)


def floor_dyadic(divisor: int, bound: int) -> tuple[int, int]:
    """Choose ``(m, e)``, e as small as is proved, with ``(x * m) >> e == x // divisor`` for every x in [0, bound].

    divisor: at least 1.  bound: in [0, 2**31).  Returns m in [1, 2**31) and e in [1, 62].  Raises ValueError where no
    such m is proved, which only bounds of 2**30 and more can cause.
    Source: the round-up method of Granlund and Montgomery 1994, theorem 4.2, with a sharper condition.  Proof: let
    ``m * divisor == 2**e + r`` with ``0 <= r``; then ``x * m / 2**e == (x + x * r / 2**e) / divisor``, and where
    ``bound * r < 2**e`` this adds less than 1 to x: no further multiple of the divisor is reached.

    >>> floor_dyadic(49, 49 * 32767)
    (1369569, 26)
    """
    if divisor < 1 or not 0 <= bound < MULTIPLIER_LIMIT:
        raise ValueError(f"got a divisor of {divisor} and a bound of {bound}, expected >= 1 and within [0, 2^31)")
    for e in range(1, MAX_SHIFT + 1):
        m = -(-(1 << e) // divisor)
        if m < MULTIPLIER_LIMIT and bound * (m * divisor - (1 << e)) < 1 << e:
            return m, e
    raise ValueError(f"integers up to {bound} have no multiplier below 2^31 that divides them by {divisor}")


def tie_is_impossible(multiplier: int, shift: int, bound: int) -> bool:
    """Whether no accumulator with |acc| <= bound can fall on a half: then all rounding rules agree.

    A tie needs acc * m to be an odd multiple of 2**(e-1), that is v2(acc) + v2(m) = e - 1 with acc != 0.
    """
    two_adic = (multiplier & -multiplier).bit_length() - 1
    return two_adic >= shift or two_adic + math.log2(max(bound, 1)) < shift - 1


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _normalised(ratio: float, bits: int) -> tuple[int, int]:
    fraction, exponent = math.frexp(ratio)  # ratio = fraction * 2**exponent, fraction in [0.5, 1)
    m, e = _round_half_up(fraction * 2.0**bits), bits - exponent
    if m == 1 << bits:
        m, e = m >> 1, e - 1
    if e > MAX_SHIFT:
        m, e = _round_half_up(m / 2.0 ** (e - MAX_SHIFT)), MAX_SHIFT
    if m < 1 or e < 1:
        raise ValueError(f"the requantization ratio {ratio!r} has no multiplier m / 2**e with e in [1, {MAX_SHIFT}]")
    return m, e
