"""Data movement as integer-graph nodes.

A chain of views, transposes, slices, splits and pads only copies elements.  Conversion runs the chain on element
numbers instead of values: an index array says which element of the source each element of the result is, and -1
stands for a padded zero.  The pattern in that array picks the nodes.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from utils.integer_graph.ir import Node
from utils.integer_graph.ops import make_node
from utils.quantization_utils.dyadic import dyadic

Emit = Callable[[Node], Node]


def materialise(source: Node, index: np.ndarray, name: str, emit: Emit) -> Node:
    """Nodes that turn ``source`` into the tensor ``index`` describes.

    index: int64, shape of one result image, entries in [-1, source elements).  ``emit`` registers a node.
    """
    identity = np.arange(int(np.prod(source.type.shape)), dtype=np.int64)
    if np.array_equal(index.ravel(), identity):
        return _reshape(source, index.shape, name, emit)
    if len(source.type.shape) == 1 or source.type.shape[1:] == (1, 1):
        return _vector(source, index, name, emit)
    found = _spatial(source, index, name, emit) if index.ndim == 3 else None
    return found or _grouped(source, index, name, emit) or _blocks(source, index, name, emit)


def _vector(source: Node, index: np.ndarray, name: str, emit: Emit) -> Node:
    """Any selection from a vector, or from an image of one pixel: a gather between two changes of shape."""
    flat = _reshape(source, (source.type.shape[0],), f"{name}.flat", emit)
    plain = _repeated_pixels(flat, index, name, emit) if index.ndim == 3 else None
    if plain is not None:
        return plain
    last = index.ndim == 1
    selected = emit(_gather(name if last else f"{name}.elements", flat, index.ravel()))
    return _reshape(selected, index.shape, name, emit)


def _repeated_pixels(flat: Node, index: np.ndarray, name: str, emit: Emit) -> Node | None:
    """A vector spread over images whose pixels are all alike."""
    _, height, width = index.shape
    if height * width == 1 or (index != index[:, :1, :1]).any():
        return None
    pixel = materialise(flat, index[:, :1, :1], f"{name}.pixel", emit)
    return pixel and emit(make_node(name, "upsample", [pixel], attrs={"scale": [height, width]}))


def _blocks(source: Node, index: np.ndarray, name: str, emit: Emit) -> Node:
    """Any movement at all: a gather of channels of the source reshaped to one block of elements per channel.

    A block is the longest run of consecutive elements that the movement keeps together everywhere; in a transposition
    it is a single element, and the gather's index as long as the tensor.
    """
    flat, size = index.ravel(), int(np.prod(source.type.shape))
    length = _block_length(flat, size)
    starts = flat[::length]
    shape = (size // length,) if length == 1 else (size // length, length, 1)
    blocks = _reshape(source, shape, f"{name}.blocks", emit)
    chosen = emit(_gather(f"{name}.elements", blocks, np.where(starts < 0, -1, starts // length)))
    return _reshape(chosen, index.shape, name, emit)


def _grouped(source: Node, index: np.ndarray, name: str, emit: Emit) -> Node | None:
    """Channels that take different rows and columns (space to depth): each kind on its own, then all concatenated."""
    if index.ndim != 3:
        return None
    pixels = int(np.prod(source.type.shape[1:]))
    filled = np.flatnonzero((index >= 0).any(axis=(1, 2)))
    patterns = np.where(index < 0, -1, index % pixels).reshape(len(index), -1)[filled]
    kinds, kind_of = np.unique(patterns, axis=0, return_inverse=True)
    if not 1 <= len(kinds) <= MAX_KINDS:
        return None
    members = [filled[kind_of.ravel() == kind] for kind in range(len(kinds))]
    parts = [_spatial(source, index[channels], f"{name}.kind{i}", emit) for i, channels in enumerate(members)]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    place = np.full(len(index), -1)
    place[np.concatenate(members)] = np.arange(len(filled))
    return emit(_gather(name, _concat(found, f"{name}.kinds", emit), place))


MAX_KINDS = 16


def _concat(parts: list[Node], name: str, emit: Emit) -> Node:
    """Parts of one scale side by side; their multipliers are exactly 1."""
    m, e = dyadic(1.0)
    arrays: dict[str, np.ndarray] = {}
    for i in range(len(parts)):
        arrays |= {f"multiplier{i}": np.array([m], np.int32), f"shift{i}": np.array([e], np.uint8)}
    kind = parts[0].type
    attrs = {"rounding": "up", "lo": None, "hi": None, "bits": kind.bits, "signed": kind.signed}
    return emit(make_node(name, "concat", parts, attrs=attrs, arrays=arrays, scale=parts[0].scale))


def _block_length(flat: np.ndarray, source_size: int) -> int:
    """The greatest length that divides both sizes and every start of a run of consecutive numbers (or of zeros)."""
    breaks = np.flatnonzero(np.where(flat[:-1] < 0, flat[1:] != -1, flat[1:] != flat[:-1] + 1)) + 1
    filled = flat[np.concatenate([[0], breaks])]
    return int(np.gcd.reduce([len(flat), source_size, *breaks.tolist(), *filled[filled > 0].tolist()]))


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
    if not filled.any() and index.shape[1:] == (height, width):
        return emit(_gather(name, source, index[:, 0, 0]))
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
    if kinds == {"resize"}:
        return _resized(node, row, col, name, emit)
    return None


def _resized(node: Node, row: Any, col: Any, name: str, emit: Emit) -> Node:
    """Nearest resizing from n to m elements: each repeated m times, then every n-th taken."""
    (row_times, row_step), (col_times, col_step) = row or (1, 1), col or (1, 1)
    wide = emit(make_node(f"{name}.wide", "upsample", [node], attrs={"scale": [row_times, col_times]}))
    return _strided(wide, (0, row_step), (0, col_step), name, emit)


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
    """``same``, ``pad`` (before, after; negative crops), ``repeat`` (times), ``stride`` (first, step), ``resize``
    (times, step) or ``other``."""
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
    count = len(positions)
    if np.array_equal(positions, np.arange(count) * size // count):
        divisor = math.gcd(size, count)
        return "resize", (count // divisor, size // divisor)
    return "other", None
