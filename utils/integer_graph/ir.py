"""The integer graph as data: frozen nodes with numpy arrays, in topological order.

A graph is a list of nodes; the first turns images into integers, the last turns the classifier's accumulators into
float32 logits, and everything between them is integer arithmetic (float islands, op ``float_op``, are the one
exception and are named in every report).  What an op means is one row of the table in ``ops.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FORMAT_VERSION = 1
FLOAT_BITS = 0
ACCUMULATOR_BITS = 32


@dataclass(frozen=True)
class TensorType:
    """The type of one image's tensor (no batch axis).

    shape: (C, H, W) or (C,).  bits: storage width, 1..16 for activations, 32 for accumulators, 0 for float32.
    signed: whether the storage integers are two's complement.  lo, hi: proven inclusive bounds of the integers
    (0, 0 for float32).
    """

    shape: tuple[int, ...]
    bits: int
    signed: bool
    lo: int
    hi: int


@dataclass(frozen=True)
class Node:
    """One operation.  ``attrs`` holds JSON values only, ``arrays`` numpy arrays, both as the op's row demands.

    scale: the real value of one integer step where it is one number per tensor (activations), None for accumulators.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    type: TensorType
    attrs: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    scale: float | None = None


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order: the first takes the images, the last gives the logits.

    meta: JSON values that describe the graph (arch, scheme, input_size [C, H, W], classes, bits of each layer ...).
    """

    nodes: tuple[Node, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def node(self, name: str) -> Node:
        """The node called ``name``; raises KeyError."""
        return {node.name: node for node in self.nodes}[name]

    def consumers(self) -> dict[str, list[Node]]:
        """Name of every node -> the nodes that read it, in topological order (an empty list for the logits)."""
        users: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return users

    def last_uses(self) -> list[tuple[str, ...]]:
        """For each node, the names whose values nobody reads after it (what an engine may free)."""
        last = {name: index for index, node in enumerate(self.nodes) for name in node.inputs}
        return [tuple(n for n, i in last.items() if i == index) for index in range(len(self.nodes))]


def int_range(bits: int, signed: bool) -> tuple[int, int]:
    """Inclusive range of an integer type.

    >>> int_range(8, True), int_range(4, False)
    ((-128, 127), (0, 15))
    """
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
