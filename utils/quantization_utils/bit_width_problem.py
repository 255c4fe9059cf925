"""The choice of bit widths as data: what each width of each layer costs and damages, and what may be spent.

Damage and every cost are sums over layers.  Layers that must share their bits (ties) are decided as one group; a
fixed layer has one width.  :mod:`utils.quantization_utils.bit_width_search` finds the best choice.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from utils.errors import UserError

# Kind of a budget -> unit of its costs and limits.
UNITS = {"size": "MiB", "bops": "G", "latency": "ms", "mean_bits": "bits"}
ROUNDING = 1e-9  # a limit is kept when it is exceeded by less than this part of it


@dataclass(frozen=True)
class Option:
    """One width of one layer.  costs: by kind, in ``UNITS``; lower is better, as for damage.

    Raises ValueError for numbers that are not finite and negative costs.
    """

    bits: int
    damage: float
    costs: Mapping[str, float]

    def __post_init__(self) -> None:
        if not math.isfinite(self.damage) or not all(0 <= cost < math.inf for cost in self.costs.values()):
            raise ValueError(f"damage must be finite and costs finite and not negative, got {self}")


@dataclass(frozen=True)
class SearchLayer:
    """A layer with its widths (at least one, each once)."""

    name: str
    options: tuple[Option, ...]

    def at(self, bits: int) -> Option:
        """The option of a width; StopIteration where the layer has none."""
        return next(option for option in self.options if option.bits == bits)


@dataclass(frozen=True)
class Budget:
    """The most that may be spent of one kind of cost.

    limit: in the unit of ``kind``, or with ``fraction`` the place between the least that the layers can cost (0; all
    at their lowest width, where lower is never dearer) and the cost of all at their highest width (1).
    Raises UserError for other values.
    """

    kind: str
    limit: float
    fraction: bool = False

    def __post_init__(self) -> None:
        if self.kind not in UNITS:
            raise UserError(f"there is no budget of the kind {self.kind!r}; expected one of {', '.join(UNITS)}")
        if not 0 <= self.limit < math.inf or (self.limit == 0 and not self.fraction):
            raise UserError(f"the budget {self.kind} is {self.limit:g}, expected a positive number")
        if self.fraction and self.limit > 1:
            raise UserError(f"the budget {self.kind} is the fraction {self.limit:g}, expected 0 to 1")


@dataclass(frozen=True)
class Problem:
    """Minimise the sum of damages under all budgets.

    ties: groups of layer names that share their bits; groups with a common layer are one.  fixed: layer -> bits.
    allow_useless_bits: keep widths that improve none of the budgets, see :func:`groups_of`.
    """

    layers: tuple[SearchLayer, ...]
    budgets: tuple[Budget, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    allow_useless_bits: bool = False

    def __post_init__(self) -> None:
        kinds = [budget.kind for budget in self.budgets]
        twice = [kind for kind in kinds if kinds.count(kind) > 1]
        if twice:
            raise UserError(f"the budget {twice[0]} is given twice; give it once")
        for kind in kinds:
            without = [x.name for x in self.layers if any(kind not in option.costs for option in x.options)]
            if without:
                raise UserError(
                    f"the cost {kind} of the layer {without[0]!r} is not known, but there is a budget of it"
                )


@dataclass(frozen=True)
class Group:
    """Layers that share their bits.  bits ascending; damage[i] and costs[kind][i] are sums at bits[i]."""

    names: tuple[str, ...]
    bits: tuple[int, ...]
    damage: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]

    def without(self, bits: int) -> "Group":
        """The group with one width less."""
        keep = [i for i, b in enumerate(self.bits) if b != bits]
        costs = {kind: tuple(row[i] for i in keep) for kind, row in self.costs.items()}
        return Group(self.names, tuple(self.bits[i] for i in keep), tuple(self.damage[i] for i in keep), costs)


@dataclass(frozen=True)
class UselessWidth:
    """A width that costs these layers no less, in any budget in use, than the next larger width."""

    names: tuple[str, ...]
    bits: int
    larger: int


def groups_of(problem: Problem) -> tuple[list[Group], list[UselessWidth]]:
    """The decisions of a problem in the order of its layers, and the widths that were dropped from them.

    A width that is no cheaper in any budget in use than the next larger width that stays is dropped, unless
    ``allow_useless_bits``.  Raises UserError for a tie or a fixed width that leaves some layer no width.
    """
    groups = [_group(problem, names) for names in tied_names(problem)]
    dropped: list[UselessWidth] = []
    kinds = [budget.kind for budget in problem.budgets]
    if problem.allow_useless_bits:
        return groups, dropped
    for i, group in enumerate(groups):
        for useless in _useless(group, kinds):
            groups[i] = groups[i].without(useless.bits)
            dropped.append(useless)
    return groups, dropped


def tied_names(problem: Problem) -> list[tuple[str, ...]]:
    """Names of the layers of each group, those of one layer included, in the order of the layers."""
    group_of = {layer.name: [layer.name] for layer in problem.layers}
    for tie in problem.ties:
        merged = list(dict.fromkeys(name for member in tie for name in group_of[member]))
        group_of.update(dict.fromkeys(merged, merged))
    place = {layer.name: i for i, layer in enumerate(problem.layers)}
    found = {id(names): tuple(sorted(names, key=place.__getitem__)) for names in group_of.values()}
    return list(found.values())


def limits_of(problem: Problem) -> dict[str, float]:
    """Kind -> absolute limit; see :class:`Budget` for fractions."""
    groups = [_group(problem, names) for names in tied_names(problem)]
    limits = {}
    for budget in problem.budgets:
        limits[budget.kind] = budget.limit
        if budget.fraction:
            low = math.fsum(min(group.costs[budget.kind]) for group in groups)
            high = math.fsum(group.costs[budget.kind][-1] for group in groups)
            limits[budget.kind] = low + budget.limit * (high - low)
    return limits


def fits(use: float, limit: float) -> bool:
    """Whether a use keeps a limit, apart from rounding."""
    return use <= limit * (1 + ROUNDING)


def total(groups: Iterable[Group], choice: Sequence[int], value: Callable[[Group], Sequence[float]]) -> float:
    """Sum of a quantity over groups at the chosen places of their ``bits``."""
    return math.fsum(value(group)[i] for group, i in zip(groups, choice, strict=True))


def _group(problem: Problem, names: tuple[str, ...]) -> Group:
    layers = [layer for layer in problem.layers if layer.name in names]
    widths = [{option.bits for option in layer.options} for layer in layers]
    common = set.intersection(*widths)
    asked = {name: problem.fixed[name] for name in names if name in problem.fixed}
    allowed = [bits for bits in sorted(common) if all(bits == fixed for fixed in asked.values())]
    if not allowed:
        raise UserError(_no_width(layers, asked))
    options = [[layer.at(bits) for bits in allowed] for layer in layers]
    kinds = [kind for kind in UNITS if all(kind in option.costs for row in options for option in row)]
    columns = list(zip(*options, strict=True))
    return Group(
        names,
        tuple(allowed),
        tuple(math.fsum(option.damage for option in column) for column in columns),
        {kind: tuple(math.fsum(o.costs[kind] for o in column) for column in columns) for kind in kinds},
    )


def _no_width(layers: Sequence[SearchLayer], asked: Mapping[str, int]) -> str:
    """The sentence about a group that cannot have any width."""
    has = [f"{x.name} ({asked.get(x.name) or ', '.join(str(o.bits) for o in x.options)} bit)" for x in layers]
    if len(has) == 1:
        layer = layers[0]
        widths = ", ".join(str(option.bits) for option in layer.options)
        return f"the layer {layer.name!r} is fixed to {asked[layer.name]} bits, but its widths here are {widths}"
    return f"the layers {' and '.join(has)} must share their bits and have none in common; fix them alike"


def _useless(group: Group, kinds: Sequence[str]) -> list[UselessWidth]:
    found = []
    kept = len(group.bits) - 1
    for i in range(kept - 1, -1, -1):
        if any(group.costs[kind][i] < group.costs[kind][kept] * (1 - ROUNDING) for kind in kinds):
            kept = i
        else:
            found.append(UselessWidth(group.names, group.bits[i], group.bits[kept]))
    return found
