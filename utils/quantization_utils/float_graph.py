"""The captured network in a small vocabulary: every fx node becomes one :class:`Op` of a known kind.

Kinds (``x`` is the input):

=========  ============================================================================================
input      the normalised image
conv       ``nn.Conv2d``                      linear   ``nn.Linear``            affine  standalone BatchNorm
clip       ReLU, ReLU6, hardtanh: ``lo <= x <= hi``     add, concat, mul  of two or more tensors
scale      x times a positive number          function any one-input function, applied element by element
max_pool   window attributes                  avg_pool windows and areas, whatever the layer was called
move       data movement (view, transpose, slice, split, pad, nearest upsampling): elements are only copied
identity   dropout and the like               host     arithmetic on the batch size
island     a float operator without an integer form                                   output  the logits
=========  ============================================================================================

Adding an operator is one row in ``MODULES`` or ``FUNCTIONS``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.errors import UserError
from utils.quantization_utils.capture import Captured
from utils.quantization_utils.windows import AvgWindows, adaptive_windows, pool_windows


@dataclass
class Op:
    """One operator.  ``run(*inputs)`` evaluates it in float; ``shape`` excludes the batch axis."""

    name: str
    kind: str
    inputs: list[str]
    run: Callable[..., Any]
    shape: tuple[int, ...]
    path: str = ""
    module: nn.Module | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


class Replay:
    """Calls an fx node's target again, its tensor arguments taken from the call."""

    def __init__(self, node: fx.Node) -> None:
        self.inputs = [n.name for n in node.all_input_nodes]
        self._args = fx.node.map_aggregate(node.args, self._slot)
        self._kwargs = fx.node.map_aggregate(node.kwargs, self._slot)
        self._is_method = node.op == "call_method"
        self._target: Any = node.target

    def _slot(self, argument: Any) -> Any:
        return _Slot(self.inputs.index(argument.name)) if isinstance(argument, fx.Node) else argument

    def __call__(self, *values: Any) -> Any:
        def fill(argument: Any) -> Any:
            return values[argument.index] if isinstance(argument, _Slot) else argument

        args: Any = fx.node.map_aggregate(self._args, fill)
        kwargs: Any = fx.node.map_aggregate(self._kwargs, fill)
        if self._is_method:
            return getattr(args[0], self._target)(*args[1:], **kwargs)
        return self._target(*args, **kwargs)


@dataclass(frozen=True)
class _Slot:
    index: int


class Clip:
    """``min(max(x, lo), hi)``, never in place."""

    def __init__(self, lo: float | None, hi: float | None) -> None:
        self.lo, self.hi = lo, hi

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.lo == 0 and self.hi is None else torch.clamp(x, self.lo, self.hi)


Row = Callable[["_Builder", fx.Node, Any], Op]


class _Builder:
    """Translates one fx graph; ``shapes`` holds what is known of every value."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.calls: dict[str, int] = {}

    def module(self, node: fx.Node) -> nn.Module:
        return self.captured.model.get_submodule(str(node.target))

    def op(self, node: fx.Node, kind: str, run: Callable[..., Any] | None = None, **attrs: Any) -> Op:
        replay = Replay(node) if run is None else run
        inputs = [n.name for n in node.all_input_nodes]
        shape = tuple(node.meta.get("shape", ()))
        return Op(node.name, kind, inputs, replay, shape, node.meta.get("path", ""), attrs=attrs)

    def layer(self, node: fx.Node, kind: str) -> Op:
        """A module with weights, named by its path; a second call of the same module gets ``#2``."""
        path = str(node.target)
        self.calls[path] = self.calls.get(path, 0) + 1
        op = self.op(node, kind, self.module(node))
        op.module = self.module(node)
        op.attrs["layer"] = path if self.calls[path] == 1 else f"{path}#{self.calls[path]}"
        return op

    def refuse(self, node: fx.Node, why: str) -> UserError:
        if node.op == "call_module":
            what, path = type(self.module(node)).__name__, str(node.target)
        else:
            target: Any = node.target
            what, path = target if isinstance(target, str) else target.__name__, node.meta.get("path", "")
        where = f"module {path!r}" if path else "the model's forward"
        return UserError(f"the operator {what} in {where} cannot be quantized: {why}")


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["shape"])


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1] if len(value) > 1 else value[0]))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# ---- modules -------------------------------------------------------------------------------------------------------


def _conv(b: _Builder, node: fx.Node, conv: nn.Conv2d) -> Op:
    if conv.padding_mode != "zeros":
        raise b.refuse(node, f"padding mode {conv.padding_mode!r} is not supported, only 'zeros' is")
    return b.layer(node, "conv")


def _norm(b: _Builder, node: fx.Node, bn: nn.modules.batchnorm._BatchNorm) -> Op:
    if bn.running_mean is None:
        raise b.refuse(node, "this BatchNorm keeps no running statistics, which a converted network needs")
    return b.layer(node, "affine")


def _simple(kind: str) -> Row:
    return lambda b, node, module: b.op(node, kind, module)


def _clip(lo: float | None, hi: float | None) -> Row:
    return lambda b, node, module: b.op(node, "clip", Clip(lo, hi), lo=lo, hi=hi)


def _hardtanh(b: _Builder, node: fx.Node, module: nn.Hardtanh) -> Op:
    return b.op(node, "clip", Clip(module.min_val, module.max_val), lo=module.min_val, hi=module.max_val)


def _function(b: _Builder, node: fx.Node, module: Any) -> Op:
    """An element-wise function; sigmoids and their kind are marked as never negative."""
    name = type(module).__name__ if module is not None else _target_name(node)
    run = _out_of_place(module) if module is not None else None
    return b.op(node, "function", run, nonnegative=name.lower() in NONNEGATIVE)


def _out_of_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """``module`` on a copy: activations that work in place must not change a value others read."""
    return lambda x: module(x.clone()) if getattr(module, "inplace", False) else module(x)


NONNEGATIVE = frozenset({"sigmoid", "hardsigmoid", "hsigmoid", "ghosthsigmoid", "softplus"})


def _max_pool_attrs(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> dict[str, Any]:
    kernel = _two(kernel)
    return {
        "kernel": kernel,
        "stride": _two(stride) if stride is not None else kernel,
        "padding": _two(padding),
        "dilation": _two(dilation),
        "ceil_mode": bool(ceil_mode),
    }


def _max_pool(b: _Builder, node: fx.Node, m: nn.MaxPool2d) -> Op:
    return b.op(node, "max_pool", m, **_max_pool_attrs(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode))


def _f_max_pool(b: _Builder, node: fx.Node, _: Any) -> Op:
    kernel, stride = _argument(node, 1, "kernel_size", None), _argument(node, 2, "stride", None)
    padding, dilation = _argument(node, 3, "padding", 0), _argument(node, 4, "dilation", 1)
    return b.op(
        node, "max_pool", **_max_pool_attrs(kernel, stride, padding, dilation, _argument(node, 5, "ceil_mode", False))
    )


def _pool_op(b: _Builder, node: fx.Node, windows: AvgWindows, run: Callable[..., Any] | None) -> Op:
    return b.op(node, "avg_pool", run, windows=windows)


def _avg_pool(b: _Builder, node: fx.Node, m: nn.AvgPool2d) -> Op:
    return _pool_op(
        b, node, _avg_windows(node, m.kernel_size, m.stride, m.padding, m.count_include_pad, m.divisor_override), m
    )


def _f_avg_pool(b: _Builder, node: fx.Node, _: Any) -> Op:
    kernel, stride = _argument(node, 1, "kernel_size", None), _argument(node, 2, "stride", None)
    include, divisor = _argument(node, 5, "count_include_pad", True), _argument(node, 6, "divisor_override", None)
    return _pool_op(
        b, node, _avg_windows(node, kernel, stride, _argument(node, 3, "padding", 0), include, divisor), None
    )


def _avg_windows(node: fx.Node, kernel: Any, stride: Any, padding: Any, include_pad: bool, divisor: Any) -> AvgWindows:
    kernel = _two(kernel)
    stride = _two(stride) if stride else kernel
    source = _shape(node.all_input_nodes[0])[-2:]
    return pool_windows(source, _shape(node)[-2:], kernel, stride, _two(padding), include_pad, divisor)


def _adaptive(b: _Builder, node: fx.Node, module: Any) -> Op:
    return _pool_op(b, node, adaptive_windows(_shape(node.all_input_nodes[0])[-2:], _shape(node)[-2:]), module)


def _mean(b: _Builder, node: fx.Node, _: Any) -> Op:
    dims = _argument(node, 1, "dim", None)
    source = _shape(node.all_input_nodes[0])
    dims = sorted(d % (len(source) + 1) for d in ([dims] if isinstance(dims, int) else dims or []))
    if len(source) != 3 or dims != [2, 3]:
        raise b.refuse(node, f"only the mean over height and width is supported, this one is over dimensions {dims}")
    return _pool_op(b, node, adaptive_windows(source[-2:], (1, 1)), None)


def _upsample(b: _Builder, node: fx.Node, module: Any) -> Op:
    mode = module.mode if module is not None else _argument(node, 3, "mode", "nearest")
    source, target = _shape(node.all_input_nodes[0]), _shape(node)
    whole = target[1] % source[1] == 0 and target[2] % source[2] == 0
    if mode == "nearest" and whole:
        return b.op(node, "move", module)
    align = module.align_corners if module is not None else _argument(node, 4, "align_corners", None)
    if mode != "bilinear":
        raise b.refuse(node, f"interpolation mode {mode!r} from {source[1:]} to {target[1:]} has no integer form")
    return b.op(node, "island", module, function="interpolate", size=list(target[1:]), align_corners=bool(align))


def _interpolation_block(b: _Builder, node: fx.Node, module: Any) -> Op:
    return _upsample(b, node, module)


# ---- functions and methods -----------------------------------------------------------------------------------------


def _scalar_operands(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and len(node.args) == 2 and node.args[0] is not node.args[1]


def _add(b: _Builder, node: fx.Node, _: Any) -> Op:
    if _scalar_operands(node):
        return b.op(node, "function", nonnegative=False)
    return _several(b, node, "add")


def _mul(b: _Builder, node: fx.Node, _: Any) -> Op:
    if not _scalar_operands(node):
        return _several(b, node, "mul")
    factor = next(a for a in node.args if not isinstance(a, fx.Node))
    return _scaled(b, node, factor)


def _div(b: _Builder, node: fx.Node, _: Any) -> Op:
    if not _scalar_operands(node) or not isinstance(node.args[0], fx.Node):
        raise b.refuse(node, "a division by a tensor has no integer form")
    divisor: Any = node.args[1]
    return _scaled(b, node, 1 / divisor)


def _scaled(b: _Builder, node: fx.Node, factor: Any) -> Op:
    if isinstance(factor, (int, float)) and math.isfinite(factor) and factor > 0:
        return b.op(node, "scale", factor=float(factor))
    return b.op(node, "function", nonnegative=False)


def _one_input(b: _Builder, node: fx.Node, _: Any) -> Op:
    if len(node.all_input_nodes) != 1:
        raise b.refuse(node, "it has several tensor inputs and no integer form")
    return b.op(node, "function", nonnegative=_target_name(node) in NONNEGATIVE)


def _several(b: _Builder, node: fx.Node, kind: str) -> Op:
    sources = node.all_input_nodes
    if any(n.op == "get_attr" for n in sources):
        raise b.refuse(node, "an operand is a parameter or a constant tensor")
    if any(n.meta.get("holds") != "tensor" for n in sources):
        raise b.refuse(node, "its operands are not all tensors of the network")
    if kind == "add" and any(_shape(n) != _shape(node) for n in sources):
        raise b.refuse(node, f"operands of shapes {[_shape(n) for n in sources]} would be broadcast")
    op = b.op(node, kind)
    if len(sources) == 1:  # x + x, x * x
        op.attrs["repeat"] = 2
    return op


def _cat(b: _Builder, node: fx.Node, _: Any) -> Op:
    axis = _argument(node, 1, "dim", 0)
    if axis not in (1, -len(_shape(node))):
        raise b.refuse(node, f"only channels (dim 1) can be concatenated, this is dim {axis}")
    parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
    if any(n.op == "get_attr" for n in parts):
        raise b.refuse(node, "a part is a constant tensor")
    op = b.op(node, "concat")
    op.attrs["order"] = [op.inputs.index(n.name) for n in parts]
    return op


def _clamp(b: _Builder, node: fx.Node, _: Any) -> Op:
    lo, hi = _argument(node, 1, "min", None), _argument(node, 2, "max", None)
    return b.op(node, "clip", Clip(lo, hi), lo=lo, hi=hi)


def _functional(kind: str) -> Row:
    return lambda b, node, _: b.op(node, kind)


def _f_clip(lo: float | None, hi: float | None) -> Row:
    return lambda b, node, _: b.op(node, "clip", Clip(lo, hi), lo=lo, hi=hi)


def _f_identity(b: _Builder, node: fx.Node, _: Any) -> Op:
    return b.op(node, "identity", lambda x, *rest: x)


def _softmax(b: _Builder, node: fx.Node, module: Any) -> Op:
    dim = module.dim if module is not None else _argument(node, 1, "dim", None)
    if dim != 1:
        raise b.refuse(node, f"softmax over dimension {dim} has no integer form, only channels (1) have a float one")
    return b.op(node, "island", module, function="softmax")


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else target.__name__


MODULES: Mapping[str, Row] = {
    "Conv2d": _conv,
    "Linear": lambda b, node, m: b.layer(node, "linear"),
    "BatchNorm2d": _norm,
    "BatchNorm1d": _norm,
    "ReLU": _clip(0.0, None),
    "ReLU6": _clip(0.0, 6.0),
    "Hardtanh": _hardtanh,
    "MaxPool2d": _max_pool,
    "AvgPool2d": _avg_pool,
    "AdaptiveAvgPool2d": _adaptive,
    "Upsample": _upsample,
    "Softmax": _softmax,
    **{name: _simple("identity") for name in ("Dropout", "Dropout2d", "Identity", "StochasticDepth")},
    **{name: _simple("move") for name in ("Flatten", "ZeroPad2d", "ConstantPad2d", "ChannelShuffle", "PixelShuffle")},
    **dict.fromkeys(
        (
            *("Sigmoid", "Hardsigmoid", "HSigmoid", "GhostHSigmoid", "SiLU", "Swish", "Hardswish", "HSwish", "Tanh"),
            *("LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "Mish", "Softplus", "Softsign"),
        ),
        _function,
    ),
}

_MOVES = (
    *("view", "reshape", "flatten", "transpose", "permute", "contiguous", "chunk", "split", "getitem", "squeeze"),
    *("unsqueeze", "expand", "expand_as", "pad", "clone", "narrow", "unbind", "channel_shuffle", "unflatten"),
    *("pixel_shuffle", "repeat", "index_select", "swapaxes"),
)
FUNCTIONS: Mapping[str, Row] = {
    **{name: _functional("move") for name in _MOVES},
    **dict.fromkeys(("add", "add_", "iadd"), _add),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply"), _mul),
    **dict.fromkeys(("truediv", "div", "div_"), _div),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("relu", "relu_"), _f_clip(0.0, None)),
    "relu6": _f_clip(0.0, 6.0),
    **dict.fromkeys(("clamp", "clip", "hardtanh"), _clamp),
    **dict.fromkeys(("dropout", "dropout2d", "stochastic_depth", "detach"), _f_identity),
    **dict.fromkeys(("max_pool2d", "_max_pool2d", "boolean_dispatch"), _f_max_pool),
    "avg_pool2d": _f_avg_pool,
    "adaptive_avg_pool2d": lambda b, node, _: _adaptive(b, node, None),
    "mean": _mean,
    "interpolate": lambda b, node, _: _upsample(b, node, None),
    "softmax": lambda b, node, _: _softmax(b, node, None),
    **dict.fromkeys(
        (
            *("sigmoid", "sigmoid_", "hardsigmoid", "silu", "hardswish", "tanh", "leaky_relu", "elu", "gelu", "mish"),
            *("softplus", "pow", "sub", "rsub", "neg", "abs", "sqrt", "exp", "square"),
        ),
        _one_input,
    ),
}


def float_graph(captured: Captured) -> list[Op]:
    """Translate a captured graph; operators in execution order, the last one of kind ``output``.

    Raises UserError naming the operator and the module that has no integer form.
    """
    builder = _Builder(captured)
    return [
        _translate(builder, node) for node in captured.graph.nodes if node.op != "get_attr" or _unused(builder, node)
    ]


def _unused(builder: _Builder, node: fx.Node) -> bool:
    if node.users:
        user = next(iter(node.users))
        raise builder.refuse(
            user, f"it works on the parameter or constant {str(node.target)!r}, not on a module's weight"
        )
    return False


def _translate(builder: _Builder, node: fx.Node) -> Op:
    if node.op == "placeholder":
        return builder.op(node, "input", lambda x: x)
    if node.op == "output":
        if len(node.all_input_nodes) != 1 or not isinstance(node.args[0], fx.Node):
            raise builder.refuse(node, "the model returns several values; a classifier returns its logits alone")
        return builder.op(node, "output", lambda x: x)
    if node.meta["holds"] == "host":
        return builder.op(node, "host")
    if node.op == "call_module":
        module = builder.module(node)
        row = next((MODULES[c.__name__] for c in type(module).__mro__ if c.__name__ in MODULES), None)
    else:
        module, row = None, FUNCTIONS.get(_target_name(node))
    if row is None:
        raise builder.refuse(node, "it has no integer form and no float island; replace it or keep that part outside")
    return row(builder, node, module)
