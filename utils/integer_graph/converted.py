"""What the operators of a quantized model became during conversion: nodes, with data movement still pending.

Data movement (views, slices, splits, pads ...) is run on element numbers instead of values; ``movement`` then finds
the nodes that do the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.integer_graph.ir import Node
from utils.quantization_utils.quant_modules import Quantizer

TRACE_BATCH = 2


@dataclass(frozen=True)
class Value:
    """A node, and the real value of its integers' steps.

    scale: float64 [1] or [C].  index: int64, pending data movement on the node's elements (see ``movement``), in the
    shape of the operator's result; None where the node's own shape is that.
    """

    node: Node
    scale: np.ndarray
    index: Any = None


@dataclass(frozen=True)
class Pending:
    """An operator whose result waits for the scale its quantizer gives it."""

    finish: Callable[[str, Quantizer], Node]


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The (C,) or (C, H, W) in which the graph keeps a tensor of any rank: leading axes are merged, one is added.

    >>> stored_shape((5,)), stored_shape((2, 5)), stored_shape((2, 3, 4, 4))
    ((5,), (2, 5, 1), (6, 4, 4))
    """
    if len(shape) == 2:
        return (*shape, 1)
    return shape if len(shape) < 4 else (int(np.prod(shape[:-2])), *shape[-2:])


def value_of_shape(node: Node, scale: np.ndarray, shape: tuple[int, ...]) -> Value:
    """A node seen as an operator's result of ``shape``, which may have another rank than the graph stores."""
    if node.type.shape == shape:
        return Value(node, scale)
    return Value(node, scale, np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape))


def element_numbers(value: Value | Pending) -> Tensor:
    """float64 [2, *shape]: every element of two images its own number from 1 on, so that padded zeros show."""
    if isinstance(value, Pending):  # only asked for its batch size
        return torch.zeros(TRACE_BATCH, 1)
    size = int(np.prod(value.node.type.shape))
    index = value.index if value.index is not None else np.arange(size).reshape(value.node.type.shape)
    images = [np.where(index < 0, 0, index + 1 + size * image) for image in range(TRACE_BATCH)]
    return torch.from_numpy(np.stack(images)).double()


def moved(source: Value, result: Any) -> Any:
    """The pending value (or list of values) that a movement of ``element_numbers(source)`` gave.

    Raises ValueError where elements of different images meet, or where channels with scales of their own move.
    """
    if isinstance(result, tuple | list):
        return [moved(source, part) for part in result]
    numbers = result.numpy().round().astype(np.int64)
    size = int(np.prod(source.node.type.shape))
    if len(numbers) != TRACE_BATCH or (numbers[1] != np.where(numbers[0] > 0, numbers[0] + size, 0)).any():
        raise ValueError("it moves elements from one image to another")
    value = Value(source.node, source.scale, numbers[0] - 1)
    if source.scale.size > 1 and not _keeps_channels(value):
        raise ValueError("it works on accumulators, whose channels have scales of their own")
    return value


def _keeps_channels(value: Value) -> bool:
    """Whether only axes of length 1 come or go, as when the logits of a convolution lose theirs."""
    size = int(np.prod(value.node.type.shape))
    return value.index.shape[:1] == value.scale.shape and np.array_equal(value.index.ravel(), np.arange(size))


def live(nodes: Sequence[Node]) -> list[Node]:
    """Nodes the logits depend on, in order."""
    needed = {nodes[-1].name}
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return [node for node in nodes if node.name in needed]
