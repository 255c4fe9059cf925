"""Runs a graph in numpy int64: slow, clear, the definition of correct that every other engine is held to."""

from typing import Literal, overload

import numpy as np

from utils.errors import UserError
from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import OPS

INPUT_DTYPES = {"image": np.dtype(np.uint8), "quantize": np.dtype(np.float32)}


@overload
def run(graph: Graph, images: np.ndarray, keep: Literal[False] = False) -> np.ndarray: ...
@overload
def run(graph: Graph, images: np.ndarray, keep: Literal[True]) -> dict[str, np.ndarray]: ...
def run(graph: Graph, images: np.ndarray, keep: bool = False) -> np.ndarray | dict[str, np.ndarray]:
    """Logits of a batch, float32 [N, classes]; with `keep` the value of every node by name (int64, logits float32).

    images: uint8 [N, C, H, W] of RGB pixels, or float32 where the graph starts with ``quantize``.
    The graph is trusted: ``ops.verify`` has passed.  Raises UserError for images that do not fit it.
    """
    check_images(graph.nodes[0], images.shape, str(images.dtype))
    values: dict[str, np.ndarray] = {}
    for node, dead in zip(graph.nodes, graph.last_uses(), strict=True):
        inputs = [values[name] for name in node.inputs] if node.inputs else [images]
        values[node.name] = OPS[node.op].compute(inputs, node)
        if not keep:
            for name in dead:
                del values[name]
    return values if keep else values[graph.nodes[-1].name]


def check_images(first: Node, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse a batch that does not fit the first node.  Raises UserError (got, expected)."""
    expected = INPUT_DTYPES[first.op]
    if len(shape) < 1 or tuple(shape[1:]) != first.type.shape or shape[0] < 1 or dtype != str(expected):
        wanted = ", ".join(str(n) for n in first.type.shape)
        raise UserError(f"got images {dtype} {list(shape)}, expected {expected} [N, {wanted}] with N >= 1")
