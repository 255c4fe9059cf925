"""Data movement as integer-graph nodes.

A chain of views, transposes, slices, splits and pads only copies elements.  Conversion runs the chain on element
numbers instead of values: an index array says which element of the source each element of the result is, and -1
stands for a padded zero.  The pattern in that array picks the nodes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node

Emit = Callable[[Node], Node]


def materialise(source: Node, index: np.ndarray, name: str, emit: Emit) -> Node | None:
    """Nodes that turn ``source`` into the tensor ``index`` describes, or None where no node can.

    index: int64, shape of one result image, entries in [-1, source elements).  ``emit`` registers a node.
    """
    identity = np.arange(int(np.prod(source.type.shape)), dtype=np.int64)
    if np.array_equal(index.ravel(), identity):
        return _reshape(source, index.shape, name, emit)
    if len(source.type.shape) == 1 and index.ndim == 1:
        return emit(_gather(name, source, index))
    if len(source.type.shape) != 3:
        return None
    if index.ndim == 1 and source.type.shape[1:] == (1, 1):
        selected = emit(_gather(f"{name}.channels", source, index))
        return _reshape(selected, index.shape, name, emit)
    return _spatial(source, index, name, emit) if index.ndim == 3 else None


def _reshape(source: Node, shape: tuple[int, ...], name: str, emit: Emit) -> Node:
    if source.type.shape == shape:
        return source
    return emit(make_node(name, "reshape", [source], attrs={"shape": list(shape)}))


def _gather(name: str, source: Node, channels: np.ndarray) -> Node:
    return make_node(name, "gather", [source], arrays={"index": channels.astype(np.int32)})


def _spatial(source: Node, index: np.ndarray, name: str, emit: Emit) -> Node | None:
    """Channel selection, then rows and columns: cropped, padded, repeated or strided."""
    _, height, width = source.type.shape
    filled = index >= 0
    channels = _along(np.where(filled, index // (height * width), -1), (1, 2))
    rows = _along(np.where(filled, index // width % height, -1), (0, 2))
    cols = _along(np.where(filled, index % width, -1), (0, 1))
    expected = (channels[:, None, None] * height + rows[None, :, None]) * width + cols[None, None, :]
    outside = (channels < 0)[:, None, None] | (rows < 0)[None, :, None] | (cols < 0)[None, None, :]
    if not np.array_equal(np.where(outside, -1, expected), index):
        return None
    node = source
    if not np.array_equal(channels, np.arange(source.type.shape[0])):
        node = emit(_gather(f"{name}.channels", node, channels))
    return _axes(node, rows, cols, name, emit)


def _along(values: np.ndarray, others: tuple[int, int]) -> np.ndarray:
    """The coordinate each position of one axis has, -1 where it has none anywhere."""
    highest: np.ndarray = values.max(axis=others)
    return highest


def _axes(node: Node, rows: np.ndarray, cols: np.ndarray, name: str, emit: Emit) -> Node | None:
    _, height, width = node.type.shape
    (row_kind, row), (col_kind, col) = _axis_pattern(rows, height), _axis_pattern(cols, width)
    kinds = {row_kind, col_kind} - {"same"}
    if not kinds:
        return node
    if kinds == {"pad"}:
        return emit(make_node(name, "pad2d", [node], attrs={"padding": [*(row or (0, 0)), *(col or (0, 0))]}))
    if kinds == {"repeat"}:
        return emit(make_node(name, "upsample", [node], attrs={"scale": [row or 1, col or 1]}))
    if kinds == {"stride"}:
        return _strided(node, row, col, name, emit)
    return None


def _strided(node: Node, row: Any, col: Any, name: str, emit: Emit) -> Node:
    """Every s-th element: a max pool over single elements, behind a crop to the first one."""
    (row_from, row_step), (col_from, col_step) = row or (0, 1), col or (0, 1)
    if row_from or col_from:
        crop = {"padding": [-row_from, 0, -col_from, 0]}
        node = emit(make_node(f"{name}.crop", "pad2d", [node], attrs=crop))
    attrs = {
        "kernel": [1, 1],
        "stride": [row_step, col_step],
        "padding": [0, 0],
        "dilation": [1, 1],
        "ceil_mode": False,
    }
    return emit(make_node(name, "max_pool", [node], attrs=attrs))


def _axis_pattern(positions: np.ndarray, size: int) -> tuple[str, Any]:
    """``same``, ``pad`` (before, after; negative crops), ``repeat`` (times), ``stride`` (first, step) or ``other``."""
    if np.array_equal(positions, np.arange(size)):
        return "same", None
    inside = positions[positions >= 0]
    if len(inside) and np.array_equal(inside, np.arange(inside[0], inside[0] + len(inside))):
        before = int(np.argmax(positions >= 0))
        after = len(positions) - before - len(inside)
        return "pad", (before - int(inside[0]), after - int(size - 1 - inside[-1]))
    times, rest = divmod(len(positions), size)
    if rest == 0 and np.array_equal(positions, np.repeat(np.arange(size), times)):
        return "repeat", times
    step = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    if step > 1 and np.array_equal(positions, np.arange(positions[0], size, step)):
        return "stride", (int(positions[0]), step)
    return "other", None
