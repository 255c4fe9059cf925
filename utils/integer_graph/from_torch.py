"""Convert a calibrated or trained quantized model into the integer graph.

The only module that knows both sides.  BatchNorms are folded, weights become integers, real ratios become dyadic
multipliers, and whatever accumulators cannot hold is refused.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.integer_graph.converted import Pending, Value, element_numbers, live, moved, stored_shape, value_of_shape
from utils.integer_graph.input_table import pixel_table
from utils.integer_graph.ir import FORMAT_VERSION, Graph, Node
from utils.integer_graph.movement import materialise
from utils.integer_graph.ops import make_node, verify
from utils.preprocess import Preprocess
from utils.quantization_utils.dyadic import dyadic, dyadic16, dyadic_array
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer

MIN_RATIO = 2.0**-61
INT32_LIMIT = 2**31 - 1


class _Converter:
    def __init__(self, model: QuantizedModel, preprocess: Preprocess) -> None:
        self.model, self.preprocess = model, preprocess
        self.ops = {op.name: op for op in model.ops}
        self.nodes: list[Node] = []
        self.values: dict[str, Any] = {}
        self.movements: dict[tuple[Any, ...], Node] = {}
        self.labels: Counter[str] = Counter()

    def emit(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def convert(self) -> list[Node]:
        for op in self.model.ops:
            try:
                self.values[op.name] = _HANDLERS[op.kind](self, op)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"the {op.kind} {op.name!r} in {_where(op)} cannot be converted: {error}") from error
        return self.nodes

    def value(self, name: str) -> Value:
        """A finished input of an operator, its data movement carried out, in the shape the graph stores."""
        value = self.values[name]
        assert isinstance(value, Value), f"{name} has no quantizer"
        return value if value.index is None else self.moved(value, value.index, name)

    def moved(self, value: Value, index: np.ndarray, name: str) -> Value:
        """``value`` with its elements rearranged; made once for each name and arrangement."""
        index = index.reshape(stored_shape(index.shape))
        key = (value.node.name, index.shape, index.tobytes())
        if key not in self.movements:
            again = name == value.node.name or self.labels[name] > 0
            self.labels[name] += 1
            label = f"{name}.move{self.labels[name]}" if again else name
            self.movements[key] = materialise(value.node, index, label, self.emit)
        return Value(self.movements[key], value.scale)

    def inputs(self, op: Op) -> list[Value]:
        return [self.value(name) for name in op.inputs if self.ops[name].kind != "host"]


def _where(op: Op) -> str:
    return f"module {op.path!r}" if op.path else "the model's forward"


def _scalar(scale: Tensor) -> float:
    return float(scale)


def _clamp(quantizer: Quantizer) -> dict[str, Any]:
    lo, hi = quantizer.bounds()
    return {"lo": lo, "hi": hi, "bits": quantizer.bits, "signed": quantizer.signed}


def _rounded(quantizer: Quantizer) -> dict[str, Any]:
    return {"rounding": "up", **_clamp(quantizer)}


def _ratios(source: Value, quantizer: Quantizer) -> np.ndarray:
    return np.maximum(source.scale / _scalar(quantizer.scale), MIN_RATIO)


def _multipliers(source: Value, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Multiplier int32 and shift uint8, one per entry of the source's scale; 15-bit ones for 16-bit operands."""
    ratios = _ratios(source, quantizer)
    if 8 < source.node.type.bits <= 16:
        pairs = [dyadic16(float(r)) for r in ratios]
        return np.array([m for m, _ in pairs], np.int32), np.array([e for _, e in pairs], np.uint8)
    return dyadic_array(ratios, output_bits=quantizer.bits)


# ---- one handler per kind of operator ------------------------------------------------------------------------------


def _input(c: _Converter, op: Op) -> Pending:
    def finish(name: str, quantizer: Quantizer) -> Node:
        table = pixel_table(c.preprocess, float(quantizer.scale.cpu().reciprocal()), *quantizer.bounds())
        attrs = {"shape": list(op.shape), "bits": quantizer.bits, "signed": quantizer.signed}
        return make_node(name, "image", attrs=attrs, arrays={"table": table}, scale=_scalar(quantizer.scale))

    return Pending(finish)


def _layer(c: _Converter, op: Op) -> Value:
    source = c.inputs(op)[0]
    if op.kind == "affine" and len(op.shape) == 1:
        shape = {"shape": [*op.shape, 1, 1]}
        source = Value(c.emit(make_node(f"{op.name}.pixel", "reshape", [source.node], attrs=shape)), source.scale)
    layer: Any = op.module
    parts = layer.integer_weights()
    scale = parts.scale.double().cpu().numpy() * float(source.scale[0])
    bias = np.rint(parts.bias.double().cpu().numpy() / scale)
    if not np.isfinite(bias).all() or not np.isfinite(scale).all():
        raise UserError(f"the weights of layer {op.attrs['layer']!r} are not finite; check them for NaN or infinity")
    if np.abs(bias).max() > INT32_LIMIT:
        raise UserError(
            f"the bias of layer {op.attrs['layer']!r} does not fit 32 bits at its scale; use more bits there"
        )
    arrays = {"weight": parts.weight.cpu().numpy(), "bias": bias.astype(np.int32)}
    attrs = {"weight_bits": layer.bits, "layer": op.attrs["layer"], **_geometry(op, layer)}
    name = "linear" if op.kind == "linear" else "conv2d"
    try:
        node = make_node(op.attrs["layer"], name, [source.node], attrs=attrs, arrays=arrays)
    except ValueError as error:
        raise UserError(f"layer {op.attrs['layer']!r} cannot be converted: {error}") from error
    return value_of_shape(c.emit(node), scale, op.shape)


def _geometry(op: Op, layer: Any) -> dict[str, Any]:
    if op.kind == "linear":
        return {}
    if op.kind == "affine":
        unit = [1, 1]
        return {"stride": unit, "padding": [0] * 4, "dilation": unit, "groups": op.shape[0], "affine": True}
    conv = layer.module
    return {
        "stride": list(conv.stride),
        "padding": _padding(conv),
        "dilation": list(conv.dilation),
        "groups": conv.groups,
    }


def _padding(conv: torch.nn.Conv2d) -> list[int]:
    """[top, bottom, left, right]; ``same`` puts the odd element behind, ``valid`` pads nothing."""
    if isinstance(conv.padding, str):
        totals = [
            d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    (rows, cols) = conv.padding
    return [rows, rows, cols, cols]


def _quantize(c: _Converter, op: Op) -> Value:
    quantizer = op.module
    assert isinstance(quantizer, Quantizer)
    source = c.values[op.inputs[0]]
    if isinstance(source, Pending):
        node = source.finish(op.name, quantizer)
    else:
        value = c.value(op.inputs[0])
        multiplier, shift = _multipliers(value, quantizer)
        arrays = {"multiplier": multiplier, "shift": shift}
        scale = _scalar(quantizer.scale)
        node = make_node(op.name, "requantize", [value.node], attrs=_rounded(quantizer), arrays=arrays, scale=scale)
    return value_of_shape(c.emit(node), np.array([_scalar(quantizer.scale)]), op.shape)


def _joined(kind: str) -> Callable[[_Converter, Op], Pending]:
    """Sums and concats: every branch has its own multipliers."""

    def handler(c: _Converter, op: Op) -> Pending:
        order = op.attrs.get("order", range(len(op.inputs)))
        sources = [c.value(op.inputs[i]) for i in order] * op.attrs.get("repeat", 1)

        def finish(name: str, quantizer: Quantizer) -> Node:
            arrays: dict[str, np.ndarray] = {}
            for i, source in enumerate(sources):
                arrays[f"multiplier{i}"], arrays[f"shift{i}"] = _multipliers(source, quantizer)
            nodes = [source.node for source in sources]
            return make_node(
                name, kind, nodes, attrs=_rounded(quantizer), arrays=arrays, scale=_scalar(quantizer.scale)
            )

        return Pending(finish)

    return handler


def _mul(c: _Converter, op: Op) -> Pending:
    left, right = ([_factor(c, op, name) for name in op.inputs] * op.attrs.get("repeat", 1))[:2]

    def finish(name: str, quantizer: Quantizer) -> Node:
        ratio = max(float(left.scale[0] * right.scale[0]) / _scalar(quantizer.scale), MIN_RATIO)
        m, e = dyadic(ratio, output_bits=quantizer.bits)
        arrays: dict[str, np.ndarray] = {"multiplier": np.array([m], np.int32), "shift": np.array([e], np.uint8)}
        nodes = [left.node, right.node]
        return make_node(name, "mul", nodes, attrs=_rounded(quantizer), arrays=arrays, scale=_scalar(quantizer.scale))

    return Pending(finish)


def _factor(c: _Converter, op: Op, name: str) -> Value:
    """One factor of a product; with more than three axes, those that the graph merges must be equally long."""
    value = c.values[name]
    if len(op.shape) < 4 or value.index is None:
        return c.value(name)
    index = np.broadcast_to(value.index, (*op.shape[:-2], *value.index.shape[-2:]))
    return c.moved(value, index, name)


def _avg_pool(c: _Converter, op: Op) -> Pending:
    source = c.inputs(op)[0]
    windows = op.attrs["windows"]

    def finish(name: str, quantizer: Quantizer) -> Node:
        ratio = float(_ratios(source, quantizer)[0])
        area = windows.area[:1, :1] if (windows.area == windows.area.flat[0]).all() else windows.area
        multiplier, shift = dyadic_array(ratio / area, output_bits=quantizer.bits)
        arrays: dict[str, np.ndarray] = {
            "multiplier": multiplier.reshape(area.shape),
            "shift": shift.reshape(area.shape),
        }
        sides = ("row_start", "row_stop", "col_start", "col_stop")
        attrs: dict[str, Any] = {**{s: list(getattr(windows, s)) for s in sides}, **_rounded(quantizer)}
        scale = _scalar(quantizer.scale)
        return make_node(name, "avg_pool", [source.node], attrs=attrs, arrays=arrays, scale=scale)

    return Pending(finish)


def _function(c: _Converter, op: Op) -> Pending:
    source = c.inputs(op)[0]

    def finish(name: str, quantizer: Quantizer) -> Node:
        kind = source.node.type
        steps = torch.arange(kind.lo, kind.hi + 1, dtype=torch.float32) * float(source.scale[0])
        spatial = (1,) * (len(op.shape) - 1)
        probe = steps.reshape(-1, 1, *spatial).expand(-1, op.shape[0], *spatial)
        with torch.no_grad():
            device = quantizer.x_min.device
            result = op.run(probe.to(device).contiguous()).reshape(len(steps), op.shape[0]).cpu()
        lo, hi = quantizer.bounds()
        table = (result * quantizer.scale.cpu().reciprocal()).round().clamp(lo, hi).to(torch.int16).numpy().T
        table = table[0] if (table == table[:1]).all() else table
        attrs = {"offset": kind.lo, "bits": quantizer.bits, "signed": quantizer.signed}
        scale = _scalar(quantizer.scale)
        return make_node(name, "lookup", [source.node], attrs=attrs, arrays={"table": table}, scale=scale)

    return Pending(finish)


def _island(c: _Converter, op: Op) -> Pending:
    source = c.inputs(op)[0]

    def finish(name: str, quantizer: Quantizer) -> Node:
        attrs = {
            "function": op.attrs["function"],
            **op.attrs["parameters"](),
            "input_scale": float(np.float32(source.scale[0])),
            "inverse_scale": float(quantizer.scale.reciprocal()),
            **_clamp(quantizer),
        }
        return make_node(name, "float_op", [source.node], attrs=attrs, scale=_scalar(quantizer.scale))

    return Pending(finish)


def _clip(c: _Converter, op: Op) -> Value:
    source = c.inputs(op)[0]
    limits = {}
    for side, fallback in (("lo", source.node.type.lo), ("hi", source.node.type.hi)):
        real = op.attrs[side]
        bound = np.full(1, fallback) if real is None else np.rint(real / source.scale)
        limits[side] = np.clip(bound, source.node.type.lo, source.node.type.hi).astype(np.int32)
    limits["lo"], limits["hi"] = (a.copy() for a in np.broadcast_arrays(limits["lo"], limits["hi"]))
    return Value(c.emit(make_node(op.name, "clip", [source.node], arrays=limits)), source.scale)


def _max_pool(c: _Converter, op: Op) -> Value:
    source = c.inputs(op)[0]
    attrs = {k: op.attrs[k] for k in ("kernel", "stride", "padding", "dilation", "ceil_mode")}
    return Value(c.emit(make_node(op.name, "max_pool", [source.node], attrs=attrs)), source.scale)


def _scale(c: _Converter, op: Op) -> Value:
    source = c.inputs(op)[0]
    return Value(source.node, source.scale * op.attrs["factor"])


def _identity(c: _Converter, op: Op) -> Any:
    return c.values[op.inputs[0]]


def _host(c: _Converter, op: Op) -> Any:
    """Arithmetic on the batch size, carried out for the images that data movement is traced with."""
    arguments = [c.values[i] for i in op.inputs]
    return op.run(*[element_numbers(a) if isinstance(a, Value | Pending) else a for a in arguments])


def _move(c: _Converter, op: Op) -> Any:
    """Run data movement on element numbers; it stays pending until an operator reads its result."""
    values = [c.values[i] for i in op.inputs if c.ops[i].kind != "host"]
    source = values[0]
    if isinstance(source, list):  # one part of a split
        return op.run(source)
    if any(value.node is not source.node for value in values):
        raise ValueError("it joins tensors of different scales")
    numbers = [element_numbers(c.values[i]) if c.ops[i].kind != "host" else c.values[i] for i in op.inputs]
    return moved(source, op.run(*numbers))


def _output(c: _Converter, op: Op) -> Value:
    source = c.inputs(op)[0]
    scale = source.scale.astype(np.float32)
    return Value(c.emit(make_node("logits", "logits", [source.node], arrays={"scale": scale})), source.scale)


_HANDLERS: Mapping[str, Callable[[_Converter, Op], Any]] = {
    "input": _input,
    **dict.fromkeys(("conv", "linear", "affine"), _layer),
    "quantize": _quantize,
    "add": _joined("add"),
    "concat": _joined("concat"),
    "mul": _mul,
    "avg_pool": _avg_pool,
    "function": _function,
    "island": _island,
    "clip": _clip,
    "max_pool": _max_pool,
    "scale": _scale,
    "identity": _identity,
    "host": _host,
    "move": _move,
    "output": _output,
}


@torch.no_grad()
def from_torch(
    model: QuantizedModel,
    preprocess: Preprocess,
    *,
    meta: Mapping[str, Any] | None = None,
    strict_integer: bool = False,
) -> Graph:
    """The integer graph of a quantized model whose activation ranges are set.

    preprocess: how uint8 pixels become the model's input; becomes the graph's input table.  meta: what to record
    besides (arch, scheme, classes).  Raises UserError naming the layer whose accumulator cannot be proved to fit 32
    bits, whose weights are not finite, or (``strict_integer``) the operators that stay in float.
    """
    if strict_integer and model.islands():
        raise UserError(f"--strict-integer: these operators stay in float: {', '.join(model.islands())}")
    model.eval()
    nodes = _Converter(model, preprocess).convert()
    graph = Graph(tuple(live(nodes)), _meta(model, preprocess, meta or {}))
    verify(graph)
    return graph


def _meta(model: QuantizedModel, preprocess: Preprocess, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "input_size": list(model.input_shape),
        "preprocess": preprocess.as_dict(),
        "layers": [
            [layer.name, model.bits[layer.name].weight, model.bits[layer.name].activation]
            for layer in model.layer_table
        ],
        "islands": model.islands(),
        **extra,
    }
