"""Prepare: fold BatchNorms, swap in quantized layers, place activation quantizers, set bits.

Placement.  Values made by arithmetic (convolution, add, concat, average pool, table, product) are *roots*; clips,
max pools, data movement and the like pass their integers on.  Every root gets one quantizer of its own, behind a
ReLU it absorbs, as wide as its most demanding reader: ``residual_bits`` for sums and for what sums and concats
read, the reading layer's activation bits otherwise.  Narrower readers share one more quantizer per width.  An
accumulator that only one sum or concat reads needs none: the sum rescales it directly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.quantization_utils.capture import Captured
from utils.quantization_utils.cost_model import Layer, LayerBits
from utils.quantization_utils.float_graph import float_graph
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.quant_modules import QuantBatchNorm, Quantizer, QuantLayer, RoundedAdd, RoundedClip

LAYER_KINDS = ("conv", "linear", "affine")
PASSING = ("clip", "max_pool", "move", "identity", "scale")
STREAM_READERS = ("add", "concat")
WIDE_READERS = (*STREAM_READERS, "avg_pool", "output")  # take a tensor as wide as it comes
TABLE_BITS = 8
STREAM_BITS = 16
# Producers whose backward does not read their output: their quantizer may work in place.
_OVERWRITABLE = ("conv", "affine", "add", "concat", "avg_pool", "mul")


@dataclass
class Network:
    """A float graph after folding, with who reads what (arithmetic on the batch size does not count as reading)."""

    ops: list[Op]
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.by_name = {op.name: op for op in self.ops}
        self.readers: dict[str, list[Op]] = {op.name: [] for op in self.ops}
        for op in self.ops:
            for source in op.inputs if op.kind != "host" else ():
                self.readers[source].append(op)

    def tensor_input(self, op: Op) -> Op:
        """The one tensor a layer or passing operator reads (data movement may read batch sizes besides)."""
        return next(self.by_name[i] for i in op.inputs if self.by_name[i].kind != "host")

    def root(self, op: Op) -> Op:
        """The arithmetic a value comes from."""
        while op.kind in PASSING:
            op = self.tensor_input(op)
        return op


def fold_network(captured: Captured) -> Network:
    """Translate a captured graph and merge every BatchNorm into the convolution or linear layer only it reads."""
    network = Network(float_graph(captured), captured.input_shape)
    merged: dict[str, str] = {}
    for op in network.ops:
        source = network.by_name[op.inputs[0]] if op.inputs else op
        if op.kind == "affine" and source.kind in ("conv", "linear") and len(network.readers[source.name]) == 1:
            source.attrs["bn"] = op.module
            merged[op.name] = source.name
    ops = [replace(op, inputs=[merged.get(i, i) for i in op.inputs]) for op in network.ops if op.name not in merged]
    return Network(ops, captured.input_shape)


def describe_layers(network: Network) -> list[Layer]:
    """The layers a scheme gives bits to, in execution order, with the ties between those that read one tensor."""
    logits = network.root(network.by_name[network.ops[-1].inputs[0]])
    counted: set[int] = set()
    layers = []
    for op in network.ops:
        if op.kind not in LAYER_KINDS:
            continue
        source = network.tensor_input(op)
        weights = 0 if id(op.module) in counted else _weights(op)
        counted.add(id(op.module))
        layers.append(
            Layer(
                name=op.attrs["layer"],
                kind=op.kind,
                weights=weights,
                macs=_macs(op),
                channels=op.shape[0],
                reads=source.name,
                first=network.root(source).kind == "input",
                last=op.name in _last_layers(network, logits),
            )
        )
    return layers


def _last_layers(network: Network, root: Op) -> set[str]:
    """The layers whose accumulators the logits are: found backwards through pools when no layer is the last root."""
    frontier, found = [root], set()
    while frontier:
        op = frontier.pop()
        if op.kind in ("conv", "linear"):
            found.add(op.name)
        elif op.kind in ("avg_pool", "add", "concat"):
            frontier += [network.root(network.by_name[i]) for i in op.inputs if network.by_name[i].kind != "host"]
    return found


def _module(op: Op) -> Any:
    assert op.module is not None
    return op.module


def _weights(op: Op) -> int:
    return op.shape[0] if op.kind == "affine" else int(_module(op).weight.numel())


def _macs(op: Op) -> int:
    positions = 1
    for size in op.shape[1:] if op.kind != "linear" else op.shape[:-1]:
        positions *= size
    return _weights(op) * positions


class Placement:
    """Decides where quantizers go and how wide they are."""

    def __init__(self, network: Network, bits: Mapping[str, LayerBits], residual_bits: int) -> None:
        self.network, self.bits, self.residual_bits = network, bits, residual_bits

    def request(self, reader: Op) -> int | None:
        """Width a direct reader wants its tensor in; None for one that passes integers on or takes anything."""
        if reader.kind in LAYER_KINDS:
            return self.bits[reader.attrs["layer"]].activation
        if reader.kind in STREAM_READERS:
            return self.residual_bits
        if reader.kind in ("avg_pool", "function", "mul", "island"):
            return TABLE_BITS
        return STREAM_BITS if reader.kind == "output" else None

    def requests(self, op: Op) -> list[int]:
        """Widths wanted by everybody who reads this value, through passing operators too."""
        widths: list[int] = []
        for reader in self.network.readers[op.name]:
            width = self.request(reader)
            if reader.kind in PASSING:
                widths += self.requests(reader)
            elif width is not None:
                widths.append(width)
        return widths

    def own_width(self, op: Op) -> int | None:
        """Width of the quantizer right behind a root; None where the accumulator itself is used."""
        if op.kind in ("input", "island"):
            return TABLE_BITS
        if op.kind in LAYER_KINDS and self._accumulator_is_taken(op):
            return None
        widths = self.requests(op)
        if op.kind == "add":
            return max([self.residual_bits, *(w for w in widths if w <= TABLE_BITS)])
        return max(widths, default=TABLE_BITS)

    def _accumulator_is_taken(self, op: Op) -> bool:
        """Whether one sum, one concat or the logits are all that reads a layer, straight or through clips."""
        while True:
            readers = self.network.readers[op.name]
            if len(readers) != 1:
                return False
            if readers[0].kind not in ("clip", "identity", "move") or (
                readers[0].kind == "move" and not self._flattens(readers[0])
            ):
                once = readers[0].inputs.count(op.name) == 1 and readers[0].attrs.get("repeat", 1) == 1
                return readers[0].kind == "output" or (readers[0].kind in STREAM_READERS and once)
            op = readers[0]

    def _flattens(self, op: Op) -> bool:
        """Whether data movement only drops 1x1 axes, as in front of the logits of a convolutional classifier."""
        return len(op.shape) == 1 and self.network.tensor_input(op).shape[0] == op.shape[0]

    def absorbed_clip(self, op: Op) -> Op | None:
        """The ReLU (or ReLU6) behind a root that its quantizer can take over."""
        readers = self.network.readers[op.name]
        if len(readers) == 1 and readers[0].kind == "clip" and readers[0].attrs["lo"] == 0:
            return readers[0]
        return None

    def nonnegative(self, op: Op) -> bool:
        """Whether the graph shows that a value is never below zero."""
        if op.kind == "clip":
            return (op.attrs["lo"] is not None and op.attrs["lo"] >= 0) or self.nonnegative(
                self.network.tensor_input(op)
            )
        if op.kind == "function":
            return bool(op.attrs["nonnegative"])
        if op.kind == "island":
            keeps_sign = op.attrs["function"] != "instance_norm"
            return op.attrs["function"] == "softmax" or (keeps_sign and self.nonnegative(self.network.tensor_input(op)))
        if op.kind in (*PASSING, "avg_pool", "concat", "add", "mul"):
            sources = [self.network.by_name[i] for i in op.inputs if self.network.by_name[i].kind != "host"]
            return all(self.nonnegative(source) for source in sources)
        return False


@dataclass
class _Rewriter:
    """Emits the quantized operators in order; ``where`` maps float values to what now stands for them."""

    network: Network
    place: Placement
    out: list[Op]
    where: dict[str, str]
    narrow: dict[tuple[str, int], str]
    quantizers: dict[str, Quantizer]

    def emit(self, op: Op) -> None:
        inputs = [self._input(op, i) for i in op.inputs]
        if op.name in self.where:  # a clip its producer's quantizer took over
            return
        new = replace(op, inputs=inputs, attrs=dict(op.attrs))
        self.out.append(new)
        self.where[op.name] = op.name
        if op.kind in LAYER_KINDS:
            self._swap_layer(new)
        if op.kind == "add":
            new.run = RoundedAdd()
        if op.kind == "clip":
            source, factor = self._find_quantizer(inputs[0])
            new.run = op.run if source is None else RoundedClip(op.attrs["lo"], op.attrs["hi"], source, factor)
        if op.kind not in (*PASSING, "host", "output"):
            self._own_quantizer(op, new)

    def _input(self, reader: Op, name: str) -> str:
        """What an operator reads for a float value: the value's quantizer, or a narrower one of its own width."""
        source = self.network.by_name[name]
        width = self.place.request(reader)
        current = self.where[name]
        if width is None or source.kind == "host" or reader.kind in WIDE_READERS:
            return current
        root_width = self.place.own_width(self.network.root(source))
        if root_width is None or width >= root_width:
            return current
        key = (current, width)
        if key not in self.narrow:
            quantizer = Quantizer(width, signed=not self.place.nonnegative(source))
            self.narrow[key] = self._quantize(current, quantizer, source.shape)
        return self.narrow[key]

    def _swap_layer(self, op: Op) -> None:
        bits = self.place.bits[op.attrs["layer"]]
        if op.kind == "affine":
            layer: QuantLayer | QuantBatchNorm = QuantBatchNorm(_module(op))
        else:
            layer = QuantLayer(_module(op), op.attrs.get("bn"), bits.weight)
        layer.attach(self._quantizer_of(op.inputs[0]))
        op.module = layer
        op.run = layer

    def _quantizer_of(self, name: str) -> Quantizer:
        """The quantizer a value got its integers from."""
        quantizer, _ = self._find_quantizer(name)
        assert quantizer is not None, name
        return quantizer

    def _find_quantizer(self, name: str) -> tuple[Quantizer | None, float]:
        """The quantizer a value got its integers from (None for accumulators), and its factor since then."""
        factor = 1.0
        while name not in self.quantizers:
            op = self.network.by_name[name]
            if op.kind not in PASSING:
                return None, factor
            factor *= op.attrs.get("factor", 1.0)
            name = self.where[self.network.tensor_input(op).name]
        return self.quantizers[name], factor

    def _own_quantizer(self, op: Op, emitted: Op) -> None:
        width = self.place.own_width(op)
        if width is None:
            return
        clip = self.place.absorbed_clip(op)
        relu = clip is not None
        nonnegative = self.place.nonnegative(clip or op)
        signed = not nonnegative or width > TABLE_BITS  # 16-bit streams are int16
        quantizer = Quantizer(width, signed, relu, clip.attrs["hi"] if clip else None)
        quantizer.in_place = op.kind in _OVERWRITABLE and len(self.network.readers[op.name]) == 1
        if isinstance(emitted.run, RoundedAdd):
            emitted.run.attach(quantizer)
        self.where[op.name] = self._quantize(emitted.name, quantizer, op.shape)
        if clip is not None:
            self.where[clip.name] = self.where[op.name]

    def _quantize(self, source: str, quantizer: Quantizer, shape: tuple[int, ...]) -> str:
        name = f"{source}_q{quantizer.bits}"
        self.out.append(Op(name, "quantize", [source], quantizer, shape, module=quantizer))
        self.quantizers[name] = quantizer
        return name


class QuantizedModel(nn.Module):
    """A float model with quantization around it: run it like the float model, train it, convert it.

    ``model`` is the float model itself, with its own names; ``ops`` is the quantized network in execution order.
    Input float32 [N, C, H, W] (normalised), output float32 [N, classes].
    """

    def __init__(
        self,
        model: nn.Module,
        ops: list[Op],
        layers: Sequence[Layer],
        bits: Mapping[str, LayerBits],
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.model = model
        self.ops = ops
        self.layer_table = tuple(layers)
        self.bits = dict(bits)
        self.input_shape = input_shape
        self.quantizers = nn.ModuleDict({op.name: op.module for op in ops if op.kind == "quantize" and op.module})
        self.layers = nn.ModuleDict({op.name: op.module for op in ops if op.kind in LAYER_KINDS and op.module})
        self._steps = steps(ops)

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Any] = {}
        for op, run, dead in self._steps:
            arguments = [values[i] for i in op.inputs] if op.inputs else [images]
            values[op.name] = run(*arguments)
            arguments.clear()
            for name in dead:
                del values[name]
        return values[self.ops[-1].name]

    @torch.no_grad()
    def activation_integers(self, images: Tensor) -> dict[str, Tensor]:
        """The integers (int32) behind every fake-quantized tensor, and the logits under ``logits``; eval mode."""
        assert not self.training
        kept: dict[str, Tensor] = {}
        hooks = [q.register_forward_hook(_keeper(kept, name, q)) for name, q in self.activation_quantizers().items()]
        try:
            kept["logits"] = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """Quantizers by the name of the operator that applies them."""
        return {name: q for name, q in self.quantizers.items() if isinstance(q, Quantizer)}

    def weight_layers(self) -> dict[str, QuantLayer | QuantBatchNorm]:
        """Quantized layers by their full module path in the float model."""
        found = {op.attrs["layer"]: op.module for op in self.ops if op.kind in LAYER_KINDS}
        return {name: m for name, m in found.items() if isinstance(m, (QuantLayer, QuantBatchNorm))}

    def enable(self, on: bool = True) -> None:
        """Switch all fake quantization on or off; off is the float network (with BatchNorms folded in eval mode)."""
        for module in (*self.activation_quantizers().values(), *self.weight_layers().values()):
            module.enabled = on

    def freeze_bn(self, on: bool = True) -> None:
        """Fold BatchNorms with running statistics in training too (``--fix-BN``), or let them live again."""
        for layer in self.weight_layers().values():
            layer.frozen = on

    def islands(self) -> list[str]:
        """Operators that stay in float, by the path of their module."""
        return [f"{op.path or op.name} ({op.attrs['function']})" for op in self.ops if op.kind == "island"]


def _keeper(kept: dict[str, Tensor], name: str, quantizer: Quantizer) -> Callable[..., None]:
    def keep(module: nn.Module, arguments: Any, result: Tensor) -> None:
        kept[name] = quantizer.integers(result)

    return keep


def steps(ops: Sequence[Op]) -> list[tuple[Op, Callable[..., Any], list[str]]]:
    """Each operator with what evaluates it and the values nobody reads after it."""
    last = {name: i for i, op in enumerate(ops) for name in op.inputs}
    dead: list[list[str]] = [[] for _ in ops]
    for name, i in last.items():
        dead[i].append(name)
    return [(op, op.run, names) for op, names in zip(ops, dead, strict=True)]


def prepare(
    captured: Captured, network: Network, bits: Mapping[str, LayerBits], residual_bits: int = STREAM_BITS
) -> QuantizedModel:
    """Build the quantized model of a folded network.

    bits: per layer name, see :func:`describe_layers`.  residual_bits: 16 or 8.  Quantization is off until
    calibration or :meth:`QuantizedModel.enable`.
    """
    rewriter = _Rewriter(network, Placement(network, bits, residual_bits), [], {}, {}, {})
    for op in network.ops:
        rewriter.emit(op)
    return QuantizedModel(captured.model, rewriter.out, describe_layers(network), bits, captured.input_shape)
