"""Which bit widths the layers of a network may have, and what each costs: size, BOPS, latency, mean bits.

A layer's bits are those of its weights and of the tensor it reads.  What ``prepare`` builds from a scheme is true to
these costs only where layers that read one tensor, and so share its quantizer, have the same bits; calls of one module
share its weights.  Both are ties of the search.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bit_config import Rule, Scheme, implicit_reason
from utils.errors import UserError
from utils.layer_latency import read_layer_latency
from utils.quantization_utils.bit_width_problem import Budget, Option, Problem, SearchLayer
from utils.quantization_utils.cost_model import Layer, LayerBits, bops_g, size_mib
from utils.quantization_utils.ilp_tables import latency_of_tables

Damage = Mapping[str, Mapping[int, float]]  # layer -> bits -> damage
Latency = Mapping[str, Mapping[int, float]]  # layer -> bits -> milliseconds
_ENDS = Scheme("search", (Rule(".*", 8),))


def ties_of(layers: Sequence[Layer]) -> tuple[tuple[str, ...], ...]:
    """Groups of layers that must have the same bits: those that read one tensor, and the calls of one module."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        groups.setdefault(("tensor", layer.reads), []).append(layer.name)
        groups.setdefault(("module", layer.name.partition("#")[0]), []).append(layer.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def fixed_layers(layers: Sequence[Layer], rules: Sequence[Rule] = ()) -> dict[str, tuple[int, str]]:
    """Layer -> its bits and why, for the layers that are not searched.

    rules: the user's, the first that matches a layer counts; they may free the first and the last layer from 8 bits,
    but not standalone BN.  Raises UserError for a rule that matches no layer, or only standalone BN at other bits, and
    for one with different bits for weights and activation.
    """
    found: dict[str, tuple[int, str]] = {}
    for layer in layers:
        if (reason := implicit_reason(_ENDS, layer)) is not None:
            found[layer.name] = (8, f"fixed: {reason}")
    by_user: set[str] = set()
    for rule in rules:
        names = [layer.name for layer in layers if re.search(rule.pattern, layer.name)]
        if not names:
            raise UserError(f"--search-fix {rule.pattern!r} occurs in no layer name, such as {layers[0].name!r}")
        if not isinstance(rule.bits, int):
            raise UserError(f"--search-fix {rule.pattern!r} has the bits {rule.bits}, expected one number")
        searched = [layer.name for layer in layers if layer.name in names and layer.kind != "affine"]
        if not searched and rule.bits != 8:
            raise UserError(f"--search-fix {rule.pattern!r} only matches standalone BN, which always has 8 bits")
        for name in searched:
            if name not in by_user:
                found[name] = (rule.bits, f"fixed by '{rule.pattern}'")
        by_user.update(searched)
    return found


def read_latency(path: Path, arch: str, layers: Sequence[Layer]) -> dict[str, dict[int, float]]:
    """Milliseconds by layer and bits from a file of ``tvm_benchmark --layer-latency`` or the original's JSON tables.

    Raises UserError for a file that cannot be used.
    """
    if path.suffix == ".json":
        return latency_of_tables(path, arch, [layer.name for layer in layers])
    return read_layer_latency(path)


def build_problem(
    layers: Sequence[Layer],
    damage: Damage,
    widths: Sequence[int],
    budgets: Sequence[Budget],
    *,
    fixed: Mapping[str, int],
    latency: Latency | None = None,
    allow_useless_bits: bool = False,
) -> Problem:
    """The search over the layers of a network, in their order.

    widths: candidates, 2..8.  fixed: layer -> bits.  A fixed layer without damage or latency counts as 0 there.
    Raises UserError for a searched layer without damage or latency, and for a tie of layers fixed to different bits.
    """
    ties = ties_of(layers)
    tied_to = {name: [other for tie in ties if name in tie for other in tie] for name in (x.name for x in layers)}
    weights = sum(layer.weights for layer in layers) or 1
    found = []
    for layer in layers:
        decided = {fixed[name] for name in (layer.name, *tied_to[layer.name]) if name in fixed}
        options = [
            Option(
                bits,
                _known(damage, layer.name, bits, "damage", searched=not decided),
                {
                    **_costs(layer, bits, weights),
                    **({"latency": _known(latency, layer.name, bits, "latency", not decided)} if latency else {}),
                },
            )
            for bits in sorted(decided or set(widths))
        ]
        found.append(SearchLayer(layer.name, tuple(options)))
    return Problem(tuple(found), tuple(budgets), ties, dict(fixed), allow_useless_bits)


def _costs(layer: Layer, bits: int, weights: int) -> dict[str, float]:
    """What one layer adds to the sums of the uniform convention."""
    assigned = {layer.name: LayerBits(bits, bits, "searched")}
    return {
        "size": size_mib([layer], assigned),
        "bops": bops_g([layer], assigned),
        "mean_bits": layer.weights * bits / weights,
    }


def _known(table: Damage | Latency, name: str, bits: int, what: str, searched: bool) -> float:
    value = table.get(name, {}).get(bits)
    if value is not None:
        return value
    if searched:
        raise UserError(f"there is no {what} of the layer {name!r} at {bits} bits; measure again, or leave out {bits}")
    return 0.0
