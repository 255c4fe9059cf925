"""Runs the quantized and the float network side by side, unit after unit, over all calibration images."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from utils.quantization_utils.blocks import Unit
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer
from utils.quantization_utils.tensor_cache import TensorCache, bytes_per_value, channels_last

RUN_BATCH = 32
CHECKED = 4  # one image of so many is kept for checks
Values = dict[str, Any]


def run_unit(unit: Unit, values: Values, replaced: Mapping[str, Callable[..., Any]] | None = None) -> Values:
    """Run a unit's operators; ``values`` holds its inputs and receives the rest.  replaced: by operator name."""
    for op in unit.ops:
        run = op.run if replaced is None else replaced.get(op.name, op.run)
        values[op.name] = run(*[values[name] for name in op.inputs])
    return values


class SideBySide:
    """What the units to come need of both networks.

    images: normalised float32 [N, C, H, W].  ``learned`` are those to learn from; ``checked``, the last quarter, are to
    say whether what was learned holds (of fewer than four images, the last one is both).

    The float network is the same operators with quantization off; what it makes of a unit must be computed before the
    unit's weights change.  The model is left with quantization on.
    """

    def __init__(self, model: QuantizedModel, units: Sequence[Unit], images: Tensor) -> None:
        self.model = model
        self.quantizers = model.activation_quantizers()
        self.count = images.shape[0]
        kept = self.count // CHECKED
        self.learned, self.checked = range(self.count - kept), range(self.count - max(1, kept), self.count)
        self.quantized, self.floating = TensorCache(self.count), TensorCache(self.count)
        self._last = _last_readers(units)
        self._partners = _partners(model)
        for op in model.ops:
            if op.kind == "input":
                self.quantized.put(op.name, slice(None), images)
                self.floating.put(op.name, slice(None), images)

    @torch.no_grad()
    def float_outputs(self, unit: Unit) -> None:
        """Keep what the float network makes of a unit."""
        kept, same = _distinct(unit)
        with self.in_float():
            for index in self._batches():
                values = run_unit(unit, self.float_inputs(unit, index))
                for name in kept:
                    self.floating.put(name, index, values[name])
        for name, source in same.items():
            self.floating.alias(name, source)

    @contextmanager
    def in_float(self) -> Iterator[None]:
        """Operators are the float network's meanwhile."""
        self.model.enable(False)
        try:
            yield
        finally:
            self.model.enable()

    def inputs(self, unit: Unit, index: slice | Tensor) -> Values:
        """What a unit of the quantized network reads for some images."""
        return {name: self.quantized.fetch(name, index) for name in unit.inputs}

    def float_inputs(self, unit: Unit, index: slice | Tensor) -> Values:
        """What a unit of the float network reads for some images."""
        return {name: self.floating.fetch(name, index) for name in unit.inputs}

    @torch.no_grad()
    def quantized_outputs(self, unit: Unit) -> None:
        """Keep what the quantized network makes of a unit."""
        for index in self._batches():
            values = run_unit(unit, self.inputs(unit, index))
            for name in unit.outputs:
                self.quantized.put(name, index, values[name], self.quantizers.get(name))

    def wanted(self, unit: Unit, index: slice | Tensor) -> Tensor:
        """What a unit's target should be for some images: the float network's.

        Where it goes into a sum, it makes up for the error of the sum's other branch.
        """
        target = self.floating.fetch(unit.target, index)
        lacking = self.lacking(unit, lambda cache, name: cache.fetch(name, index))
        return target if lacking is None else target.add_(lacking)

    def lacking(self, unit: Unit, read: Callable[[TensorCache, str], Tensor]) -> Tensor | None:
        """Error, with its sign turned, of the tensor that a unit's target is added to; None where there is none yet.

        read: takes images or positions of a named tensor from a cache.
        """
        name = self._partners.get(unit.target)
        if name is None or name not in self.quantized or name not in self.floating:
            return None
        return read(self.floating, name) - read(self.quantized, name)

    @torch.no_grad()
    def errors(self, unit: Unit) -> tuple[Tensor, Tensor]:
        """Squared errors of the quantized target against :meth:`wanted`, per channel, float64 [C].

        Over all images, and over the checked ones alone.
        """
        total, checked = torch.zeros(2, 1, dtype=torch.float64)
        for index in self._batches():
            values = run_unit(unit, self.inputs(unit, index))
            squares = (values[unit.target] - self.wanted(unit, index)).square_()
            total = total + _sums(squares)
            checked = checked + _sums(squares[max(0, self.checked.start - index.start) :])
        return total, checked

    @torch.no_grad()
    def power(self, unit: Unit) -> Tensor:
        """Squares of the float target, per channel, float64 [C]."""
        total = torch.zeros((), dtype=torch.float64)
        for index in self._batches():
            total = total + _sums(self.floating.fetch(unit.target, index).square_())
        return total

    def forget(self, position: int) -> None:
        """Drop what no unit after number ``position`` reads."""
        for name in [name for name, last in self._last.items() if last == position]:
            self.quantized.drop(name)
            self.floating.drop(name)

    def _batches(self) -> Iterator[slice]:
        yield from (slice(start, min(start + RUN_BATCH, self.count)) for start in range(0, self.count, RUN_BATCH))


def _last_readers(units: Sequence[Unit]) -> dict[str, int]:
    """Number of the last unit that reads a tensor (makes it, where nobody does)."""
    last = {name: i for i, unit in enumerate(units) for name in unit.outputs}
    return last | {name: i for i, unit in enumerate(units) for name in unit.inputs}


def _partners(model: QuantizedModel) -> dict[str, str]:
    """Branches of sums of two, by the other branch; a tensor that anything else reads too has none."""
    sums = [op.inputs for op in model.ops if op.kind == "add" and len(set(op.inputs)) == 2]
    found = {a: b for pair in sums for a, b in (pair, pair[::-1])}
    readers = Counter(name for op in model.ops for name in op.inputs)
    return {name: other for name, other in found.items() if readers[name] == 1}


def _sums(x: Tensor) -> Tensor:
    """By channel, float64 [C] on the CPU."""
    rows = channels_last(x)
    return rows.reshape(-1, rows.shape[-1]).sum(0, dtype=torch.float64).cpu()


def _distinct(unit: Unit) -> tuple[list[str], dict[str, str]]:
    """Outputs to keep of the float network, and those equal to one of them or to an input, with its name.

    With quantization off a quantizer without an activation in it changes nothing.
    """
    origin: dict[str, str] = {}
    for op in unit.ops:
        if passes_in_float(op):
            origin[op.name] = origin.get(op.inputs[0], op.inputs[0])
    holder = {name: name for name in unit.inputs}
    same: dict[str, str] = {}
    for name in unit.outputs:
        source = origin.get(name, name)
        if source in holder:
            same[name] = holder[source]
        else:
            holder[source] = name
    return [name for name in unit.outputs if name not in same], same


def passes_in_float(op: Op) -> bool:
    """Whether an operator is a quantizer that changes nothing with quantization off."""
    return isinstance(op.module, Quantizer) and not op.module.relu and op.module.ceiling is None


def peak_bytes(model: QuantizedModel, units: Sequence[Unit], count: int) -> int:
    """Memory of both caches at their fullest, while a unit's outputs are made, in bytes."""
    quantizers, shapes = model.activation_quantizers(), {op.name: op.shape for op in model.ops}
    last = _last_readers(units)
    live = {op.name: 8 for op in model.ops if op.kind == "input"}
    most = 0
    for position, unit in enumerate(units):
        kept, _ = _distinct(unit)
        for name in unit.outputs:
            live[name] = bytes_per_value(quantizers.get(name)) + 4 * (name in kept)
        most = max(most, sum(width * prod(shapes[name]) for name, width in live.items()))
        live = {name: width for name, width in live.items() if last.get(name, -1) > position}
    return most * count
