"""The result of a search of bit widths as text and as rows of tables."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.quantization_utils.bit_width_problem import UNITS, Problem, tied_names
from utils.quantization_utils.bit_width_search import Price, Solution, shown
from utils.quantization_utils.scheme_report import shorten
from utils.tables import plain_table

SHARES = ("size", "bops", "latency")  # mean bits are shared as size is
WIDTH, MIN_REASON = 120, 34
_TEXTS = ("layer", "reason")


@dataclass(frozen=True)
class Search:
    """A solved problem and what is said about it.

    fixed: layer -> why it was not searched.  damage_of: what the damage is, in words.
    """

    arch: str
    problem: Problem
    solution: Solution
    prices: Sequence[Price]
    fixed: Mapping[str, str]
    damage_of: str


def format_search(search: Search) -> str:
    """Every layer with its bits and the reason, then what each budget costs, then the proof and what was left out."""
    problem, solution = search.problem, search.solution
    widths = sorted({option.bits for layer in problem.layers for option in layer.options})
    head = f"{search.arch}: {len(problem.layers)} layers, bits {', '.join(map(str, widths))}, {search.damage_of}"
    proof = "proved to be the least" if solution.gap == 0 else f"at most {100 * solution.gap:.2g} % above the least"
    result = f"damage {solution.damage:.4g}, {proof}, in {solution.seconds:.2f} s; " + ", ".join(
        f"all layers at the {word} bits: {_uniform(problem, place):.4g}"
        for word, place in (("highest", -1), ("lowest", 0))
    )
    return "\n\n".join(
        [
            head,
            plain_table(_layer_rows(search)),
            plain_table(_budget_rows(search)),
            "\n".join([result, *_dropped_lines(search)]),
        ]
    )


def _layer_rows(search: Search) -> list[dict[str, str]]:
    """At most ``WIDTH`` wide; names and reasons too long for that lose their middle."""
    solution = search.solution
    reasons = reasons_of(search)
    kinds = [kind for kind in SHARES if kind in solution.use]
    rows = []
    for layer in search.problem.layers:
        option = layer.at(solution.bits[layer.name])
        shares = {f"{kind} %": f"{100 * option.costs[kind] / (solution.use[kind] or 1.0):.1f}" for kind in kinds}
        row = {"layer": layer.name, "bits": str(option.bits), "damage": f"{option.damage:.3g}", **shares}
        rows.append(row | {"reason": reasons[layer.name]})
    numbers = sum(2 + max(len(key), *(len(row[key]) for row in rows)) for key in rows[0] if key not in _TEXTS)
    name = min(max(len(row["layer"]) for row in rows), WIDTH - numbers - 2 - MIN_REASON)
    widths = {"layer": name, "reason": WIDTH - numbers - 2 - name}
    return [row | {key: shorten(row[key], width) for key, width in widths.items()} for row in rows]


def reasons_of(search: Search) -> dict[str, str]:
    """Layer -> why it has its bits: it was fixed, it is tied to an earlier one, or what its next lower width adds.

    That is compared with the median of the same step over all searched groups; at the lowest width it is the step down
    to it.  Of a group one layer tells the reason, for all of them together.
    """
    problem, bits = search.problem, search.solution.bits
    groups = {names: _damages(problem, names) for names in tied_names(problem)}
    free = {names: row for names, row in groups.items() if len(row) > 1}
    reasons: dict[str, str] = {}
    for names, row in groups.items():
        first = next((name for name in names if name in search.fixed), names[0])
        reasons |= dict.fromkeys(names, f"tied to {_short(first)}")
        reasons[first] = _compared(row, bits[first], list(free.values())) if names in free else "has one width"
    return reasons | dict(search.fixed)


def _damages(problem: Problem, names: tuple[str, ...]) -> dict[int, float]:
    """Bits, ascending -> damage of a group."""
    layers = [layer for layer in problem.layers if layer.name in names]
    common = set.intersection(*({option.bits for option in layer.options} for layer in layers))
    return {bits: sum(layer.at(bits).damage for layer in layers) for bits in sorted(common)}


def _compared(row: Mapping[int, float], chosen: int, rows: Sequence[Mapping[int, float]]) -> str:
    widths = list(row)
    place = widths.index(chosen)
    low, high = widths[max(place, 1) - 1 : max(place, 1) + 1]
    added = row[low] - row[high]
    median = statistics.median(other[low] - other[high] for other in rows if {low, high} <= set(other))
    verb = "adds" if low == chosen else "would add"
    return f"{low} bit {verb} {added / median:.2g} x the median" if median > 0 else f"{low} bit {verb} {added:.2g}"


def _short(layer: str) -> str:
    return layer.removeprefix("features.").removesuffix(".conv")


def _budget_rows(search: Search) -> list[dict[str, str]]:
    solution = search.solution
    return [
        {
            "budget": shown(price.kind, solution.limits[price.kind]),
            "used": shown(price.kind, solution.use[price.kind]),
            "of the limit": f"{100 * solution.use[price.kind] / solution.limits[price.kind]:.1f}%",
            "damage with 5 % more": _change(price.relaxed, solution.damage),
            "damage without this budget": _change(price.removed, solution.damage),
        }
        for price in search.prices
    ]


def _change(damage: float, now: float) -> str:
    change = f" ({100 * (damage - now) / now:+.1f} %)" if now > 0 else ""
    return f"{damage:.4g}{change}"


def _uniform(problem: Problem, place: int) -> float:
    return sum(layer.options[place].damage for layer in problem.layers)


def _dropped_lines(search: Search) -> list[str]:
    """One sentence for each pair of widths, with the layers unless it is about all that are searched."""
    by_widths: dict[tuple[int, int], list[str]] = {}
    for useless in search.solution.dropped:
        by_widths.setdefault((useless.bits, useless.larger), []).extend(useless.names)
    searched = {layer.name for layer in search.problem.layers if len(layer.options) > 1} - set(search.fixed)
    sentences = []
    for (bits, larger), names in by_widths.items():
        every = set(names) == searched
        which = f"all {len(names)} searched layers" if every else f"{len(names)} of {len(searched)} searched layers"
        text = (
            f"dropped: {bits} bit for {which}, no cheaper than {larger} bit in any budget here "
            f"(--allow-useless-bits keeps it)"
        )
        sentences.append(textwrap.fill(text if every else f"{text}: {', '.join(names)}", WIDTH, subsequent_indent="  "))
    return sentences


def layer_table(search: Search) -> list[dict[str, Any]]:
    """Rows for a CSV file: each layer with bits, damage, costs in the units of ``UNITS`` and the reason."""
    solution, reasons = search.solution, reasons_of(search)
    rows = []
    for layer in search.problem.layers:
        option = layer.at(solution.bits[layer.name])
        costs = {_column(kind): option.costs[kind] for kind in solution.use}
        rows.append(
            {
                "layer": layer.name,
                "bits": option.bits,
                "damage": option.damage,
                **costs,
                "reason": reasons[layer.name],
            }
        )
    return rows


def front_rows(fronts: Mapping[str, Sequence[Solution]]) -> list[dict[str, Any]]:
    """Rows for a CSV file: every point of every front, its bits as one word, a digit for each layer in order."""
    return [
        {
            "front": kind,
            "limit": solution.limits[kind],
            **{_column(name): value for name, value in solution.use.items()},
            "damage": solution.damage,
            "gap": solution.gap,
            "seconds": round(solution.seconds, 4),
            "bits": "".join(str(bits) for bits in solution.bits.values()),
        }
        for kind, solutions in fronts.items()
        for solution in solutions
    ]


def _column(kind: str) -> str:
    """The name of a cost's column, with its unit.

    >>> _column("size"), _column("mean_bits")
    ('size_mib', 'mean_bits')
    """
    return kind if kind == "mean_bits" else f"{kind}_{UNITS[kind].lower()}"
