"""The best bit widths under budgets, with proof: an integer program that SciPy's HiGHS solves.

One binary variable per group of layers and width, of which exactly one is chosen per group; damage is minimised and
each budget is one row.  The solver works in floating point, so whatever it returns is summed again here: a choice
that breaks a limit by the solver's tolerance is excluded and the program solved once more.
"""

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from tqdm import tqdm

from utils.errors import UserError
from utils.quantization_utils.bit_width_problem import (
    UNITS,
    Budget,
    Group,
    Problem,
    UselessWidth,
    fits,
    groups_of,
    limits_of,
    total,
)

# Damages and costs are spread over 0..SCALE, which makes the solver's absolute tolerances (1e-6) small beside them.
SCALE = 1e4
SECONDS = 60.0
RELAXED = 1.05
# Below SMALL a cost is shown in another unit: so many of them are one of ``UNITS``.
SMALL, SMALL_UNITS = 0.1, {"size": ("KiB", 1024.0), "bops": ("M", 1000.0)}
PROVED = 1e-9  # a gap below this is rounding


@dataclass(frozen=True)
class Solution:
    """The best choice found.

    bits: by layer.  damage: its sum.  use: every known cost, by kind in ``UNITS``.  limits: of the budgets.
    gap: how much smaller, as a part of the damage, the optimum could be; 0 is a proof that this is the optimum.
    seconds: of the solver.  dropped: widths that were not offered.
    """

    bits: dict[str, int]
    damage: float
    use: dict[str, float]
    limits: dict[str, float]
    gap: float
    seconds: float
    dropped: tuple[UselessWidth, ...]


@dataclass(frozen=True)
class Price:
    """What a budget costs: the least damage with its limit 5 % higher, and without it."""

    kind: str
    relaxed: float
    removed: float


def solve(problem: Problem, seconds: float = SECONDS) -> Solution:
    """The choice of least damage that keeps every budget; the same for the same problem.

    seconds: after which the best choice so far is taken, with its gap.  Raises UserError where no choice keeps the
    budgets, naming the nearest that can be kept, and where none was found in time.
    """
    started = time.perf_counter()
    groups, dropped = groups_of(problem)
    limits = limits_of(problem)
    _check_feasible(groups, limits)
    choice, bound = _best(groups, limits, seconds)
    damage = total(groups, choice, lambda group: group.damage)
    gap = (damage - bound) / abs(damage) if damage else 0.0
    known = [kind for kind in UNITS if all(kind in group.costs for group in groups)]
    return Solution(
        bits=_bits(problem, groups, choice),
        damage=damage,
        use={kind: _use(groups, choice, kind) for kind in known},
        limits=limits,
        gap=gap if gap > PROVED else 0.0,
        seconds=time.perf_counter() - started,
        dropped=tuple(dropped),
    )


def require_feasible(problem: Problem) -> None:
    """Raise UserError, with the nearest limits that can be kept, where no choice keeps all budgets."""
    groups, _ = groups_of(problem)
    _check_feasible(groups, limits_of(problem))


def _check_feasible(groups: Sequence[Group], limits: dict[str, float]) -> None:
    least = {kind: math.fsum(min(group.costs[kind]) for group in groups) for kind in limits}
    impossible = [kind for kind, limit in limits.items() if not fits(least[kind], limit)]
    if impossible:
        parts = [
            f"{shown(kind, limits[kind])} is asked and {shown(kind, least[kind], up=True)} is the least that "
            "these widths can have"
            for kind in impossible
        ]
        raise UserError(
            f"no choice of bits keeps the budgets: {'; '.join(parts)}; raise the budget or allow other widths"
        )
    if len(limits) < 2:
        return
    excess, choice = _least_excess(groups, limits)
    if not all(fits(_use(groups, choice, kind), limit) for kind, limit in limits.items()):
        nearest = ", ".join(shown(kind, limit * (1 + excess), up=True) for kind, limit in limits.items())
        raise UserError(
            f"no choice of bits keeps all budgets, though each can be kept alone: raised alike, they must be "
            f"{100 * excess:.2g} % higher, as in {nearest}"
        )


def prices(problem: Problem) -> list[Price]:
    """For every budget, the least damage with this limit 5 % higher, and without this budget; widths as they are."""
    limits = limits_of(problem)
    offered = _offered(problem)
    found = []
    for kind, limit in limits.items():
        others = tuple(Budget(other, limits[other]) for other in limits if other != kind)
        relaxed = solve(replace(offered, budgets=(*others, Budget(kind, limit * RELAXED))))
        without = solve(replace(offered, budgets=others))
        found.append(Price(kind, relaxed.damage, without.damage))
    return found


def pareto(problem: Problem, kind: str, points: int) -> list[Solution]:
    """The front of damage against one kind of cost, the other budgets kept: ascending in cost, none dominated.

    points: number of limits of this kind that are tried, evenly from the least reachable to where the damage is the
    least that the other budgets allow.  Raises UserError where those cannot be kept, or the cost is not known.
    """
    others = tuple(budget for budget in problem.budgets if budget.kind != kind)
    groups, _ = groups_of(replace(problem, budgets=(*others, Budget(kind, 1, fraction=True))))
    low = _least_use(groups, limits_of(replace(problem, budgets=others)), kind)
    most = Budget(kind, math.fsum(max(group.costs[kind]) for group in groups))
    last = solve(replace(problem, budgets=(*others, most)))
    limits = np.linspace(low, last.use[kind], max(points, 2))[:-1]
    found = [
        solve(replace(problem, budgets=(*others, Budget(kind, float(limit)))))
        for limit in tqdm(limits, desc=f"front of {kind}", leave=False, disable=None)
    ]
    return _undominated([*found, last], kind)


def shown(kind: str, value: float, up: bool = False) -> str:
    """A cost with its unit, four digits; rounded ``up`` where it is proposed as a limit.

    >>> shown("size", 2.71828, up=True), shown("mean_bits", 4.0), shown("bops", 0.0123)
    ('size 2.719 MiB', 'bits 4', 'bops 12.3 M')
    """
    if kind == "mean_bits":
        return f"bits {_four_digits(value, up)}"
    unit, factor = SMALL_UNITS[kind] if kind in SMALL_UNITS and value < SMALL else (UNITS[kind], 1.0)
    return f"{kind} {_four_digits(value * factor, up)} {unit}"


def _four_digits(value: float, up: bool) -> str:
    if up and value > 0:
        step = 10.0 ** (math.floor(math.log10(value)) - 3)
        value = math.ceil(value / step - 1e-6) * step
    return f"{value:.4g}"


def _offered(problem: Problem) -> Problem:
    """The problem with the dropped widths taken out for good, so that other budgets offer no others."""
    _, dropped = groups_of(problem)
    gone = {(name, useless.bits) for useless in dropped for name in useless.names}
    layers = tuple(
        replace(layer, options=tuple(o for o in layer.options if (layer.name, o.bits) not in gone))
        for layer in problem.layers
    )
    return replace(problem, layers=layers, allow_useless_bits=True)


def _undominated(solutions: Sequence[Solution], kind: str) -> list[Solution]:
    kept: list[Solution] = []
    for solution in sorted(solutions, key=lambda s: (s.use[kind], s.damage)):
        if not kept or solution.damage < kept[-1].damage:
            kept.append(solution)
    return kept


def _use(groups: Sequence[Group], choice: Sequence[int], kind: str) -> float:
    return total(groups, choice, lambda group: group.costs[kind])


def _bits(problem: Problem, groups: Sequence[Group], choice: Sequence[int]) -> dict[str, int]:
    chosen = {name: group.bits[i] for group, i in zip(groups, choice, strict=True) for name in group.names}
    return {layer.name: chosen[layer.name] for layer in problem.layers}


# --- The integer program -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One linear row over all variables, its values spread over 0..SCALE: ``sum(values * x) <= limit``."""

    values: np.ndarray
    limit: float


def _spread(rows: Sequence[Sequence[float]], limit: float = math.inf) -> _Row:
    """Values of all groups above each group's least, times SCALE over what they can reach together."""
    lows = [min(row) for row in rows]
    reach = math.fsum(max(row) - low for row, low in zip(rows, lows, strict=True)) or 1.0
    values = np.array([(v - low) * SCALE / reach for row, low in zip(rows, lows, strict=True) for v in row])
    return _Row(values, (limit - math.fsum(lows)) * SCALE / reach)


def _one_hot(groups: Sequence[Group], extra: int = 0) -> LinearConstraint:
    sizes = [len(group.bits) for group in groups]
    matrix = np.zeros((len(groups), sum(sizes) + extra))
    for i, (start, size) in enumerate(zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)):
        matrix[i, start : start + size] = 1
    return LinearConstraint(matrix, 1, 1)


def _choice(groups: Sequence[Group], x: np.ndarray) -> list[int]:
    ends = np.cumsum([len(group.bits) for group in groups])
    return [int(np.argmax(part)) for part in np.split(x[: ends[-1]], ends[:-1])]


def _chosen_row(groups: Sequence[Group], choice: Sequence[int]) -> np.ndarray:
    """1 at the variables of a choice."""
    return np.concatenate([np.eye(len(group.bits))[i] for group, i in zip(groups, choice, strict=True)])


def _best(groups: Sequence[Group], limits: dict[str, float], seconds: float) -> tuple[list[int], float]:
    """The best choice and a lower bound of the damage."""
    objective = _spread([group.damage for group in groups])
    rows = {kind: _spread([group.costs[kind] for group in groups], limit) for kind, limit in limits.items()}
    constraints = [_one_hot(groups)]
    constraints += [LinearConstraint(row.values[None], -np.inf, row.limit + SCALE * 1e-9) for row in rows.values()]
    least = math.fsum(min(group.damage) for group in groups)
    reach = math.fsum(max(group.damage) - min(group.damage) for group in groups) or 1.0
    while True:
        result = _milp(objective.values, constraints, seconds)
        choice = _choice(groups, result.x)
        if all(fits(_use(groups, choice, kind), limit) for kind, limit in limits.items()):
            return choice, least + float(result.mip_dual_bound or 0.0) * reach / SCALE
        constraints.append(LinearConstraint(_chosen_row(groups, choice)[None], -np.inf, len(groups) - 1))


def _milp(objective: np.ndarray, constraints: Sequence[LinearConstraint], seconds: float, reals: int = 0) -> Any:
    """HiGHS on binaries, the last ``reals`` variables real and not negative."""
    count = len(objective)
    upper = np.ones(count)
    upper[count - reals :] = np.inf
    kinds = np.ones(count)
    kinds[count - reals :] = 0
    with _silent():
        result = milp(
            objective,
            integrality=kinds,
            bounds=Bounds(0, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": seconds},
        )
    if result.x is None:
        raise UserError(f"no choice of bits was found in {seconds:g} s: {result.message}; relax a budget")
    return result


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing on the standard output of the process: HiGHS prints notes there that no option turns off."""
    sys.stdout.flush()
    library = ctypes.CDLL(None)
    library.fflush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _least_use(groups: Sequence[Group], limits: dict[str, float], kind: str) -> float:
    """The least cost of one kind that the other limits allow."""
    _check_feasible(groups, limits)
    swapped = [replace(group, damage=group.costs[kind]) for group in groups]
    choice, _ = _best(swapped, limits, SECONDS)
    return _use(groups, choice, kind)


def _least_excess(groups: Sequence[Group], limits: dict[str, float]) -> tuple[float, list[int]]:
    """The least t such that some choice keeps all limits times (1 + t), and that choice."""
    constraints = [_one_hot(groups, extra=1)]
    for kind, limit in limits.items():
        values = np.concatenate([group.costs[kind] for group in groups])
        constraints.append(LinearConstraint(np.append(values / limit, -1.0)[None] * SCALE, -np.inf, SCALE))
    objective = np.zeros(sum(len(group.bits) for group in groups) + 1)
    objective[-1] = SCALE
    choice = _choice(groups, _milp(objective, constraints, SECONDS, reals=1).x)
    return max(0.0, *(_use(groups, choice, kind) / limit - 1 for kind, limit in limits.items())), choice
