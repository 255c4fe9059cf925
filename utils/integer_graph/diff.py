"""Where two graphs differ: the first node whose description differs, and the first value they compute differently."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.integer_graph.interpreter import INPUT_DTYPES, run
from utils.integer_graph.ir import Graph, Node

FIELDS = ("name", "op", "inputs", "type", "scale")
SEED = 0


def first_difference(a: Graph, b: Graph) -> str | None:
    """One sentence about the first node that differs in structure, attributes or arrays; None for equal graphs."""
    for number, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=False)):
        difference = next(_node_differences(x, y), None)
        if difference is not None:
            return f"node {number} ({x.name}): {difference}"
    if len(a.nodes) != len(b.nodes):
        return f"the first has {len(a.nodes)} nodes, the second {len(b.nodes)}"
    return None


def _node_differences(x: Node, y: Node) -> Iterator[str]:
    pairs = ((x.name, y.name), (x.op, y.op), (x.inputs, y.inputs), (x.type, y.type), (x.scale, y.scale))
    for field, (p, q) in zip(FIELDS, pairs, strict=True):
        if p != q:
            yield f"{field} is {p} in the first and {q} in the second"
    for key in dict.fromkeys((*x.attrs, *y.attrs)):
        p, q = x.attrs.get(key), y.attrs.get(key)
        if p != q:
            yield f"attribute {key} is {p} in the first and {q} in the second"
    for key in dict.fromkeys((*x.arrays, *y.arrays)):
        if key not in x.arrays or key not in y.arrays:
            yield f"array {key} is in the {'first' if key in x.arrays else 'second'} only"
        else:
            yield from _array_difference(f"array {key}", x.arrays[key], y.arrays[key])


def _array_difference(what: str, p: np.ndarray, q: np.ndarray) -> Iterator[str]:
    """The first value, in row-major order, that differs."""
    if p.shape != q.shape or p.dtype != q.dtype:
        yield f"{what} is {p.dtype} {list(p.shape)} in the first and {q.dtype} {list(q.shape)} in the second"
        return
    different = p != q
    if different.any():
        place = np.unravel_index(int(different.argmax()), p.shape)
        where, count = [int(i) for i in place], int(different.sum())
        values = f"is {p[place]} in the first and {q[place]} in the second"
        yield f"{what} differs in {count} of {p.size} values; {where} {values}"


def first_value_difference(a: Graph, b: Graph, images: np.ndarray) -> str | None:
    """Run both and say which node of equal name first differs, and its first value; None where all are equal.

    Raises UserError for images that do not fit one of the graphs.
    """
    first, second = run(a, images, keep=True), run(b, images, keep=True)
    common = [node.name for node in a.nodes if node.name in second]
    for name in common:
        difference = next(_array_difference("its value", first[name], second[name]), None)
        if difference is not None:
            return f"{name}: {difference} (place: image, channel, row, column)"
    if a.nodes[-1].name not in second:
        last = _array_difference("the logits", first[a.nodes[-1].name], second[b.nodes[-1].name])
        return next(last, None)
    return None


def random_images(graph: Graph, count: int) -> np.ndarray:
    """Seeded random inputs: uint8 pixels, or float32 normal values where the graph takes floats."""
    rng, shape = np.random.default_rng(SEED), (count, *graph.nodes[0].type.shape)
    if INPUT_DTYPES[graph.nodes[0].op] == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape, np.float32)


def read_images(path: Path) -> np.ndarray:
    """The array of an .npy file.  Raises UserError for a file that is missing or no such array."""
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: expected an array saved with numpy.save ({error})") from error
    if not isinstance(images, np.ndarray):
        raise UserError(f"{path} holds several arrays, expected one saved with numpy.save")
    return images
