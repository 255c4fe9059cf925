"""The float network with one layer quantized, for every layer and width in one walk.

The part in front of a layer is float and the same for all its widths, so it runs once; only what follows is repeated.
Quantized are the layer's weights and bias and the tensor it reads, the latter for this layer alone: whoever else reads
that tensor still gets it in float.  So where layers share an activation quantizer each of them has its own share of
the damage, and the sum over layers counts nothing twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.observers import Range
from utils.quantization_utils.prepare import LAYER_KINDS, QuantizedModel
from utils.quantization_utils.quant_modules import QuantBatchNorm, Quantizer, QuantLayer

Values = dict[str, Any]
Ranges = Mapping[int, Mapping[str, Range]]  # bits -> quantizer -> its range at that width


@dataclass(frozen=True)
class Site:
    """A layer with the quantizer of the tensor it reads and the operators that only pass integers on in between.

    position: of the layer among the operators.
    """

    name: str
    position: int
    op: Op
    layer: QuantLayer | QuantBatchNorm
    source: Op
    quantizer: Quantizer
    passing: tuple[Op, ...]


def sites(model: QuantizedModel) -> dict[str, Site]:
    """Every layer of the model by name, in order."""
    by_name = {op.name: op for op in model.ops}
    found = {}
    for position, op in enumerate(model.ops):
        if op.kind in LAYER_KINDS:
            assert isinstance(op.module, (QuantLayer, QuantBatchNorm))
            name = op.attrs["layer"]
            source, passing = _source(by_name, op)
            assert isinstance(source.module, Quantizer)
            found[name] = Site(name, position, op, op.module, source, source.module, passing)
    return found


def _source(by_name: Mapping[str, Op], layer: Op) -> tuple[Op, tuple[Op, ...]]:
    passing: list[Op] = []
    op = by_name[layer.inputs[0]]
    while op.kind != "quantize":
        passing.insert(0, op)
        op = next(by_name[name] for name in op.inputs if by_name[name].kind != "host")
    return op, tuple(passing)


def require_calibrated(model: QuantizedModel) -> None:
    """Raise UserError for a model without activation ranges."""
    if not any(bool(q.x_max > q.x_min) or q.learned is not None for q in model.activation_quantizers().values()):
        raise UserError("the model has no activation ranges yet; call calibrate(model, batches) first")


@contextmanager
def untouched(model: QuantizedModel) -> Iterator[None]:
    """Puts bits, ranges, switches and the training mode back as they were.  In it: eval mode, nothing in place."""
    quantizers, layers = model.activation_quantizers().values(), model.weight_layers().values()
    ranges = [(q, q.x_min.clone(), q.x_max.clone(), q.learned) for q in quantizers]
    switches = [(q, q.bits, q.enabled, q.in_place) for q in quantizers]
    weights = [(layer, layer.bits, layer.enabled) for layer in layers]
    learned = [(layer, layer.learned) for layer in layers if isinstance(layer, QuantLayer)]
    training = model.training
    model.eval()
    for quantizer in quantizers:
        quantizer.in_place = False
    try:
        yield
    finally:
        for quantizer, x_min, x_max, scale in ranges:
            quantizer.x_min.copy_(x_min)
            quantizer.x_max.copy_(x_max)
            quantizer.learned = scale
        for quantizer, bits, enabled, in_place in switches:
            quantizer.bits, quantizer.enabled, quantizer.in_place = bits, enabled, in_place
        for layer, bits, enabled in weights:
            layer.bits, layer.enabled = bits, enabled
        for quantized, scale in learned:
            quantized.learned = scale
        model.train(training)


def set_bits(site: Site, bits: int, ranges: Ranges | None = None) -> None:
    """Give a layer and the tensor it reads a width; scales learned for another width are dropped.

    A standalone BatchNorm stays at 8 bits, as in every scheme.  ranges: of activations at widths other than their own.
    """
    quantizer, layer = site.quantizer, site.layer
    if isinstance(layer, QuantBatchNorm):
        return
    if layer.bits != bits:
        layer.bits, layer.learned = bits, None
    if quantizer.bits != bits:
        quantizer.bits, quantizer.learned = bits, None
        if ranges is not None:
            quantizer.set_range(*ranges[bits][site.source.name])


@torch.no_grad()
def logits_alone(
    model: QuantizedModel, images: Tensor, widths: Mapping[str, Sequence[int | None]], ranges: Ranges | None = None
) -> Iterator[tuple[str, int | None, Tensor]]:
    """Yield the float logits under the name "", then those with one layer quantized by layer and width.

    images: float32 [N, C, H, W], normalised.  widths: by layer name; None is the layer's own.  The model must be
    inside :func:`untouched`.
    """
    model.enable(False)
    yield "", None, model(images)
    walk = _Walk(model)
    by_position = {site.position: site for name, site in sites(model).items() if widths.get(name)}
    values: Values = {}
    for position, op in enumerate(model.ops):
        values[op.name] = walk.run(op, values, images)
        if position in by_position:
            site = by_position[position]
            for bits in widths[site.name]:
                yield site.name, bits, walk.branch(site, bits, values, ranges)
        walk.forget(position, values)


class _Walk:
    """Runs operators over values that live as long as anybody, a branch included, needs them."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model, self.ops = model, model.ops
        self.last = {name: i for i, op in enumerate(self.ops) for name in op.inputs}
        for site in sites(model).values():
            for name in (site.source.name, *(name for op in site.passing for name in op.inputs)):
                self.last[name] = max(self.last[name], site.position)

    @staticmethod
    def run(op: Op, values: Values, images: Tensor) -> Any:
        return op.run(*[values[name] for name in op.inputs] if op.inputs else [images])

    def forget(self, position: int, values: Values) -> None:
        for name in [name for name in values if self.last.get(name, len(self.ops)) <= position]:
            del values[name]

    def branch(self, site: Site, bits: int | None, values: Values, ranges: Ranges | None) -> Tensor:
        """The logits with one layer quantized; the values are left as they are."""
        output = quantized_output(self.model, site, bits, values, ranges)
        own = {name: value for name, value in values.items() if self.last.get(name, 0) > site.position}
        own[site.op.name] = output
        for position in range(site.position + 1, len(self.ops)):
            op = self.ops[position]
            own[op.name] = op.run(*[own[name] for name in op.inputs])
            self.forget(position, own)
        logits: Tensor = own[self.ops[-1].name]
        return logits


def quantized_output(
    model: QuantizedModel, site: Site, bits: int | None, values: Values, ranges: Ranges | None = None
) -> Tensor:
    """Output of a layer whose weights and input alone are quantized; ``values`` holds what the float network made."""
    with untouched(model):
        if bits is not None:
            set_bits(site, bits, ranges)
        x = quantized_input(site, values)
        site.layer.enabled = True
        output: Tensor = site.layer(x)
    return output


def quantized_input(site: Site, values: Values) -> Tensor:
    """What a layer reads once its tensor is quantized; the quantizer is left switched on."""
    site.quantizer.enabled = True
    x: Tensor = site.quantizer(values[site.source.name])
    name = site.source.name
    for op in site.passing:
        x = op.run(*[x if source == name else values[source] for source in op.inputs])
        name = op.name
    return x
