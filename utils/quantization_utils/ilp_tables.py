"""Reader of the original HAWQ-V3's search tables: traces, quantization errors, costs and T4 latencies per layer.

A JSON file with one entry per network (``archs``), made from the constants in the original's ILP notebook.  Its layers
have the original's names and are all convolutions but the first; widths are 4 and 8.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.hawq.names import float_layer
from utils.layer_latency import EXECUTED
from utils.quantization_utils.bit_width_problem import Budget, Option, Problem, SearchLayer
from utils.quantization_utils.cost_model import MIB

WIDTHS = (4, 8)
_COLUMNS = ("hutchinson_trace", "delta_sq_4", "delta_sq_8", "params", "macs", "latency_ms_int4", "latency_ms_int8")


def read_tables(path: Path, arch: str) -> dict[str, Any]:
    """The entry of a network.  Raises UserError for a file that is no such table and a network that is not in it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["archs"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the search tables {path}: {error}; give another file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no search tables: expected JSON with the entry 'archs'") from error
    if arch not in entries:
        raise UserError(f"{path} has no tables of {arch}; it has {', '.join(entries)}")
    entry: dict[str, Any] = entries[arch]
    wrong = [key for key in _COLUMNS if len(entry.get(key, ())) != len(entry["layers"])]
    if wrong:
        raise UserError(f"{path}: the column {wrong[0]!r} of {arch} must have {len(entry['layers'])} numbers")
    return entry


def problem_of_tables(path: Path, arch: str, budgets: Sequence[Budget]) -> Problem:
    """The original's own search: damage is the trace times the squared quantization error of the weights.

    Layers have the original's names.  Raises UserError as :func:`read_tables`.
    """
    entry = read_tables(path, arch)
    weights = sum(entry["params"])
    layers = tuple(
        SearchLayer(name, tuple(_option(entry, i, bits, weights) for bits in WIDTHS))
        for i, name in enumerate(entry["layers"])
    )
    names = entry["layers"]
    return Problem(layers, tuple(budgets), tuple((names[i], names[j]) for i, j in entry["tied"]))


def _option(entry: Mapping[str, Any], i: int, bits: int, weights: int) -> Option:
    params = entry["params"][i]
    costs = {
        "size": params * bits / 8 / MIB,
        "bops": entry["macs"][i] * bits**2 / 1e9,
        "latency": entry[f"latency_ms_int{bits}"][i],
        "mean_bits": params * bits / weights,
    }
    return Option(bits, entry["hutchinson_trace"][i] * entry[f"delta_sq_{bits}"][i], costs)


def is_tables(path: Path) -> bool:
    """Whether a file looks like these tables and not like other JSON; False for one that cannot be read."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(contents, dict) and "archs" in contents


def damage_of_tables(path: Path, arch: str, layers: Sequence[str]) -> dict[str, dict[int, float]]:
    """Layer -> 4 or 8 bits -> the original's damage.  layers, errors: as of :func:`latency_of_tables`."""
    original = problem_of_tables(path, arch, ())
    named = {float_layer(layer.name, layers): layer.options for layer in original.layers}
    return {name: {o.bits: o.damage for o in options} for name, options in named.items() if name is not None}


def latency_of_tables(path: Path, arch: str, layers: Sequence[str]) -> dict[str, dict[int, float]]:
    """Layer -> bits of a scheme (2..8) -> milliseconds of the kernel that runs them on the original's T4.

    layers: names of the network's layers; those outside the tables get no entry.
    """
    entry = read_tables(path, arch)
    found = {}
    for i, original in enumerate(entry["layers"]):
        name = float_layer(original, layers)
        if name is not None:
            found[name] = {bits: float(entry[f"latency_ms_int{kernel}"][i]) for bits, kernel in EXECUTED.items()}
    return found
