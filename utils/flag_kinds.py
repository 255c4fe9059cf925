"""How the values of command line flags are read: kinds of flags, shared by the tables of flags."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """How the value of a flag is read. choices: the only values; options: further arguments of ``add_argument``."""

    parse: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[Any, ...] | None = None
    options: tuple[tuple[str, Any], ...] = ()


def number(kind: Callable[[str], float], zero: bool = False) -> Callable[[str], float]:
    """Parser of a positive (or with ``zero``, non-negative) finite number."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise argparse.ArgumentTypeError(f"{text} is not a {'non-negative' if zero else 'positive'} number")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse quotes it
    return parse


def percentile(text: str) -> float:
    """Parser of a percentile: 0 (off), or in (50, 100]."""
    value = float(text)
    if value != 0 and not 50 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a percentile; give 0 (off) or more than 50 and at most 100")
    return value


def one_of(*choices: Any) -> Kind:
    """A flag with few values."""
    return Kind(type(choices[0]), None, choices)


NAME, FILE, FOLDER, ANY = Kind(str, "NAME"), Kind(Path, "FILE"), Kind(Path, "DIR"), Kind(int, "N")
COUNT, COUNT0 = Kind(number(int), "N"), Kind(number(int, zero=True), "N")
REAL, REAL0, SIGNED = Kind(number(float), "X"), Kind(number(float, zero=True), "X"), Kind(float, "X")
REALS = Kind(float, "X", options=(("nargs", "+"),))
PERCENTILE = Kind(percentile, "P")
SWITCH = Kind(options=(("action", "store_true"),))
YES_NO = Kind(options=(("action", argparse.BooleanOptionalAction),))

# Names (the attribute is the first long one in lower case), kind, default, help.
Row = tuple[str, Kind, Any, str]
