"""Cuts the quantized network into the pieces that reconstruction works on: single layers, or blocks.

A *layer* is a convolution or linear layer with the element-by-element operators behind it, up to the next one, a sum
or a fork.  A *block* lies between two tensors through which everything flows.  Residual blocks are such pieces;
layers in a straight row are joined to groups of at most ``most`` layers, cut where the fewest numbers flow (of a
MobileNetV2 these are its inverted bottlenecks).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from utils.quantization_utils.float_ops import Op

WEIGHTED = ("conv", "linear")
ELEMENTWISE = ("quantize", "clip", "scale", "function", "identity")
JOINS = ("add", "concat")
MOST_LAYERS = 3
LARGEST_BLOCK = 12


@dataclass(frozen=True)
class Unit:
    """Operators that run together.

    ops: in execution order.  inputs: tensors of earlier units that they read.  outputs: tensors that later units read.
    target: the output whose error counts.  layers: its convolutions and linear layers.
    """

    name: str
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    target: str
    layers: tuple[Op, ...]


class _Graph:
    """Who reads which tensor; arithmetic on the batch size counts as reading the tensor whose size it takes."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = [op for op in ops if op.kind not in ("host", "input")]
        self.by_name = {op.name: op for op in ops}
        self.order = {op.name: i for i, op in enumerate(ops)}
        self.readers: dict[str, list[Op]] = {op.name: [] for op in ops}
        for op in self.ops:
            for name in self.tensors(op):
                self.readers[name].append(op)

    def tensors(self, op: Op) -> list[str]:
        """Tensors an operator needs, each once."""
        found: list[str] = []
        for name in op.inputs:
            source = self.by_name[name]
            found += self.tensors(source) if source.kind == "host" else [name]
        return list(dict.fromkeys(found))

    def host(self, op: Op) -> Iterator[Op]:
        """The arithmetic on batch sizes that an operator needs, in order."""
        for name in op.inputs:
            source = self.by_name[name]
            if source.kind == "host":
                yield from self.host(source)
                yield source

    def unit(self, group: Sequence[Op], target: str | None = None) -> Unit:
        """The unit of some operators; ``target``: its last operator unless given."""
        own = {op.name for op in group}
        ops = {found.name: found for op in group for found in (*self.host(op), op)}
        reads = [name for op in group for name in self.tensors(op) if name not in own]
        last = self.ops[-1].name
        outputs = [n for n in own if n == last or any(r.name not in own for r in self.readers[n])]
        layers = tuple(op for op in group if op.kind in WEIGHTED)
        name = layers[0].attrs["layer"] if layers else group[0].name
        return Unit(
            name if len(layers) < 2 else f"{name} ... {layers[-1].attrs['layer']}",
            tuple(ops.values()),
            tuple(dict.fromkeys(reads)),
            tuple(sorted(outputs, key=self.order.__getitem__)),
            target or group[-1].name,
            layers,
        )


def layer_units(ops: Sequence[Op]) -> list[Unit]:
    """Units of one layer each; what lies between them makes units without a layer.  ops: ``QuantizedModel.ops``."""
    graph = _Graph(ops)
    return [graph.unit(group) for group in _layer_groups(graph, graph.ops)]


def block_units(ops: Sequence[Op], most: int = MOST_LAYERS) -> list[Unit]:
    """Units of whole blocks.  Parts with more than 12 layers and no place to cut are taken layer by layer."""
    graph = _Graph(ops)
    units: list[Unit] = []
    row: list[list[Op]] = []
    for part in (*_segments(graph), []):
        straight = bool(part) and _count(part) <= most and not any(op.kind in JOINS for op in part)
        if straight:
            row.append(part)
            continue
        units += [graph.unit(group) for group in _joined(row, most)]
        row = []
        if _count(part) > LARGEST_BLOCK:
            units += [graph.unit(group) for group in _layer_groups(graph, part)]
        elif part:
            units.append(graph.unit(part))
    return units


def _count(group: Sequence[Op]) -> int:
    return sum(op.kind in WEIGHTED for op in group)


def _layer_groups(graph: _Graph, ops: Sequence[Op]) -> list[list[Op]]:
    groups: list[list[Op]] = []
    between: list[Op] = []
    taken: set[str] = set()
    own = {op.name for op in ops}
    for op in ops:
        if op.name in taken:
            continue
        if op.kind not in WEIGHTED:
            between.append(op)
            continue
        if between:
            groups.append(between)
            between = []
        chain = [op]
        while (follower := _only_follower(graph, chain[-1])) is not None and follower.name in own:
            chain.append(follower)
        taken |= {link.name for link in chain}
        groups.append(chain)
    return [*groups, between] if between else groups


def _only_follower(graph: _Graph, op: Op) -> Op | None:
    """The element-by-element operator that alone reads a tensor."""
    readers = graph.readers[op.name]
    return readers[0] if len(readers) == 1 and readers[0].kind in ELEMENTWISE else None


def _segments(graph: _Graph) -> Iterator[list[Op]]:
    """The network cut wherever one tensor alone goes on, and not into its own quantizer or activation."""
    last_read = {
        name: max((graph.order[r.name] for r in readers), default=-1) for name, readers in graph.readers.items()
    }
    live = {op.name for op in graph.by_name.values() if op.kind == "input"}
    part: list[Op] = []
    for op in graph.ops:
        part.append(op)
        live = {name for name in (*live, op.name) if last_read[name] > graph.order[op.name]}
        if live == {op.name} and _only_follower(graph, op) is None:
            yield part
            part = []
    if part:
        yield part


def _joined(row: Sequence[list[Op]], most: int) -> list[list[Op]]:
    """Join neighbours: as few groups of at most ``most`` layers as possible, cut where the fewest numbers flow."""
    best: list[tuple[tuple[int, int], list[int]]] = [((0, 0), [])]  # for the first n parts: cost and cuts
    for end in range(1, len(row) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            layers = sum(_count(part) for part in row[start:end])
            if layers > most and start < end - 1:
                break
            (groups, flow), cuts = best[start]
            through = prod(row[start - 1][-1].shape) if start else 0
            options.append(((groups + (layers > 0), flow + through), [*cuts, start]))
        best.append(min(options))
    cuts = [*best[-1][1], len(row)]
    return [[op for part in row[a:b] for op in part] for a, b in pairwise(cuts)]
