"""A quantized model run operator by operator, for what has to look at or change tensors on the way."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.prepare import QuantizedModel, steps


@torch.no_grad()
def run_ops(model: QuantizedModel, batches: Sequence[Tensor], quantized: bool) -> Iterator[tuple[Op, list[Any]]]:
    """Yield every operator in order with its outputs, one per batch, before anybody reads them.

    batches: float32 [N, C, H, W] each.  quantized: False runs the float network.  Outputs may be changed in place and
    live until their last reader has run: keep copies, some operators overwrite what they read.  The model must be in
    eval mode; quantization is left switched as given.
    """
    values: dict[str, list[Any]] = {}
    for op, run, dead in steps(model.ops):
        model.enable(quantized)
        inputs = [values[name] for name in op.inputs] or [list(batches)]
        values[op.name] = [run(*arguments) for arguments in zip(*inputs, strict=True)]
        for name in dead:
            del values[name]
        del inputs
        yield op, values[op.name]


def live_elements(ops: Sequence[Op]) -> int:
    """The most elements per image that are alive at once while operators run in order."""
    sizes = {op.name: torch.Size(op.shape).numel() for op in ops}
    alive: set[str] = set()
    most = 0
    for op, _, dead in steps(ops):
        alive.add(op.name)
        most = max(most, sum(sizes[name] for name in alive))
        alive.difference_update(dead)
    return most


def channel_means(op: Op, outputs: Sequence[Tensor]) -> Tensor:
    """Mean of a layer's outputs per channel over batches and positions, float64 [O]."""
    rows = [channel_rows(op, output) for output in outputs]
    total = torch.stack([row.sum(1, dtype=torch.float64) for row in rows]).sum(0)
    return total / sum(row.shape[1] for row in rows)


def channel_rows(op: Op, output: Tensor) -> Tensor:
    """A layer's output as [O, values]."""
    return output.movedim(-1 if op.kind == "linear" else 1, 0).flatten(1)
