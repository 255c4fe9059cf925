"""One row per PyTorch module, function and method: how a captured call becomes operators (``float_ops``).

Adding an operator is one row in ``MODULES`` or ``FUNCTIONS``, which name classes and functions as PyTorch does; a
subclass is found through its parents' names.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from utils.quantization_utils.float_joins import FUNCTIONS as JOINS
from utils.quantization_utils.float_ops import (
    Builder,
    Clip,
    ComputedConv,
    Constant,
    Op,
    Row,
    Rows,
    argument,
    shape_of,
    sources,
    target_name,
)
from utils.quantization_utils.float_pools import FUNCTIONS as POOL_FUNCTIONS
from utils.quantization_utils.float_pools import MODULES as POOL_MODULES

NONNEGATIVE = frozenset({"sigmoid", "hardsigmoid", "hsigmoid", "ghosthsigmoid", "softplus"})


# ---- layers --------------------------------------------------------------------------------------------------------


def _conv(b: Builder, node: fx.Node, conv: nn.Conv2d) -> Op:
    if conv.padding_mode != "zeros":
        raise b.refuse(node, f"padding mode {conv.padding_mode!r} is not supported, only 'zeros' is")
    return b.layer(node, "conv", conv)


def _f_conv(b: Builder, node: fx.Node, _: Any) -> Op:
    """A convolution whose weight is an expression of parameters (a slice, a masked or binarised weight)."""
    weight, bias = argument(node, 1, "weight", None), argument(node, 2, "bias", None)
    if not _is_constant(weight) or (bias is not None and not _is_constant(bias)) or len(shape_of(node)) != 3:
        raise b.refuse(node, "its weights depend on the image")
    settings = [argument(node, i, key, default) for i, key, default in _CONV_SETTINGS]
    computed = ComputedConv(Constant(b.model, weight), None if bias is None else Constant(b.model, bias), *settings)
    return b.layer(node, "conv", computed)


def _conv3d(b: Builder, node: fx.Node, conv: Any) -> list[Op]:
    """A convolution over the first of three axes: the other two become the columns of a picture."""
    sizes = (conv.kernel_size, conv.stride, conv.dilation)
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 1, 1)
    if any(tuple(size[1:]) != (1, 1) for size in sizes) or padding[1:] != (0, 0) or conv.padding_mode != "zeros":
        raise b.refuse(node, "only kernels over the first of the three axes have a form in two dimensions")
    channels, depth, height, width = shape_of(sources(node)[0])
    target, pixels = shape_of(node), height * width
    flat_shape, flat_target = (channels, depth, pixels), (*target[:2], pixels)
    x = sources(node)[0].name
    flat = b.step(node, "rows", "move", [x], lambda v: v.reshape(-1, *flat_shape), shape=flat_shape)
    bias = None if conv.bias is None else (lambda: conv.bias)
    settings = [(size[0], 1) for size in sizes[1:]]
    weight, pads = (lambda: conv.weight.flatten(3)), (padding[0], 0)
    layer = b.layer(node, "conv", ComputedConv(weight, bias, settings[0], pads, settings[1], conv.groups))
    layer.name, layer.inputs, layer.shape = f"{node.name}_conv", [flat.name], flat_target
    return [flat, layer, b.step(node, "", "move", [layer.name], lambda v: v.reshape(-1, *target))]


_CONV_SETTINGS = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and bool(value.meta["constant"])


def _linear(b: Builder, node: fx.Node, linear: nn.Linear) -> Op:
    if len(shape_of(node)) != 1:
        raise b.refuse(node, f"a linear layer needs vectors, this one gives {shape_of(node)} per image")
    return b.layer(node, "linear", linear)


def _norm(b: Builder, node: fx.Node, bn: nn.modules.batchnorm._BatchNorm) -> Op:
    if bn.running_mean is None:
        raise b.refuse(node, "this BatchNorm keeps no running statistics, which a converted network needs")
    return b.layer(node, "affine", bn)


# ---- element by element --------------------------------------------------------------------------------------------


def _simple(kind: str) -> Row:
    return lambda b, node, module: b.op(node, kind, module)


def _clip(lo: float | None, hi: float | None) -> Row:
    return lambda b, node, _: b.op(node, "clip", Clip(lo, hi), lo=lo, hi=hi)


def _hardtanh(b: Builder, node: fx.Node, module: nn.Hardtanh) -> Op:
    return b.op(node, "clip", Clip(module.min_val, module.max_val), lo=module.min_val, hi=module.max_val)


def _clamp(b: Builder, node: fx.Node, _: Any) -> Op:
    lo, hi = (_number(b, node, argument(node, i, key, None)) for i, key in ((1, "min"), (2, "max")))
    return b.op(node, "clip", Clip(lo, hi), lo=lo, hi=hi)


def _f_hardtanh(b: Builder, node: fx.Node, _: Any) -> Op:
    lo, hi = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return b.op(node, "clip", Clip(lo, hi), lo=lo, hi=hi)


def _number(b: Builder, node: fx.Node, bound: Any) -> float | None:
    if bound is not None and not isinstance(bound, int | float):
        raise b.refuse(node, "its bounds are tensors")
    return bound


def _function(b: Builder, node: fx.Node, module: nn.Module) -> Op:
    """An element-wise module; sigmoids and their kind are marked as never negative."""
    nonnegative = type(module).__name__.lower() in NONNEGATIVE
    return b.op(node, "function", _out_of_place(module), nonnegative=nonnegative)


def _out_of_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """``module`` on a copy: activations that work in place must not change a value others read."""
    in_place = bool(vars(module).get("inplace", False))
    return lambda x: module(x.clone() if in_place else x)


def _one_input(b: Builder, node: fx.Node, _: Any) -> Op:
    name = target_name(node).rstrip("_")
    if len(sources(node)) != 1 or any(_is_constant(n) for n in node.all_input_nodes):
        raise b.refuse(node, "it has several tensor operands and no integer form")
    replay = b.op(node, "function", nonnegative=name in NONNEGATIVE)
    run = replay.run
    replay.run = lambda x: run(x.clone())  # some of them work in place
    return replay


def _identity(b: Builder, node: fx.Node, _: Any) -> Op:
    return b.op(node, "identity", lambda x, *rest: x)


def _move(b: Builder, node: fx.Node, module: nn.Module | None) -> Op:
    return b.op(node, "move", module)


def _shaped_as(b: Builder, node: fx.Node, _: Any) -> Op:
    """``x.expand_as(y)`` and its kind: only y's shape counts."""
    shape, spread = shape_of(node), target_name(node) == "expand_as"

    def run(x: Tensor) -> Tensor:
        return x.expand(x.shape[0], *shape) if spread else x.reshape(x.shape[0], *shape)

    return b.step(node, "", "move", [sources(node)[0].name], run)


# ---- resizing and float islands ------------------------------------------------------------------------------------


def _upsample(b: Builder, node: fx.Node, module: Any) -> Op:
    mode = module.mode if module is not None else argument(node, 3, "mode", "nearest")
    source, target = shape_of(sources(node)[0]), shape_of(node)
    if mode == "nearest":
        return b.op(node, "move", module)
    align = module.align_corners if module is not None else argument(node, 4, "align_corners", None)
    if mode != "bilinear":
        raise b.refuse(node, f"interpolation mode {mode!r} from {source[1:]} to {target[1:]} has no integer form")
    parameters = {"size": list(target[1:]), "align_corners": bool(align)}
    return b.op(node, "island", module, function="interpolate", parameters=lambda: parameters)


def _softmax(b: Builder, node: fx.Node, module: Any) -> Op:
    dim = module.dim if module is not None else argument(node, 1, "dim", None)
    rank = len(shape_of(node))
    if dim not in (1, -rank) or rank > 3:
        raise b.refuse(node, f"softmax over dimension {dim} has no integer form, only channels (1) have a float one")
    return b.op(node, "island", module, function="softmax", parameters=dict)


def _instance_norm(b: Builder, node: fx.Node, module: nn.InstanceNorm2d) -> Op:
    if module.track_running_stats:
        raise b.refuse(node, "an InstanceNorm with running statistics is not supported")

    def parameters() -> dict[str, Any]:
        ones = torch.ones(module.num_features)
        weight, bias = (ones, 0 * ones) if module.weight is None else (module.weight, module.bias)
        return {"eps": module.eps, "weight": weight.tolist(), "bias": bias.tolist()}

    return b.op(node, "island", module, function="instance_norm", parameters=parameters)


def _local_response_norm(b: Builder, node: fx.Node, _: Any) -> Op:
    keys = (("size", 5), ("alpha", 1e-4), ("beta", 0.75), ("k", 1.0))
    found = {key: argument(node, 1 + i, key, default) for i, (key, default) in enumerate(keys)}
    parameters = {**{key: float(found[key]) for key in ("alpha", "beta", "k")}, "size": int(found["size"])}
    return b.op(node, "island", _lrn(parameters), function="local_response_norm", parameters=lambda: parameters)


def _lrn(p: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: F.local_response_norm(x, p["size"], p["alpha"], p["beta"], p["k"])


# ---- arithmetic with numbers ---------------------------------------------------------------------------------------


def _with_number(scaled: Callable[[Any], float | None], several: Row, commutes: bool = True) -> Row:
    """Rows of ``x * 2``, ``x / 2``, ``x + 2``: a positive factor is a scale, another number a function."""

    def row(b: Builder, node: fx.Node, module: Any) -> Op | list[Op]:
        numbers = [a for a in node.args if isinstance(a, int | float)]
        if len(node.all_input_nodes) != 1 or len(numbers) != 1:
            return several(b, node, module)
        factor = scaled(numbers[0]) if commutes or isinstance(node.args[0], fx.Node) else None
        if factor is not None and math.isfinite(factor) and factor > 0:
            return b.op(node, "scale", factor=factor)
        return _one_input(b, node, module)

    return row


def _no_division(b: Builder, node: fx.Node, _: Any) -> Op:
    raise b.refuse(node, "a division by a tensor has no integer form")


def _inverse(number: Any) -> float | None:
    return 1 / number if number else None


_times = _with_number(float, JOINS["mul"])
_plus = _with_number(lambda number: None, JOINS["add"])
_minus = _with_number(lambda number: None, JOINS["sub"])
_divide = _with_number(_inverse, _no_division, commutes=False)


MODULES: Rows = {
    **POOL_MODULES,
    "Conv2d": _conv,
    "Conv3d": _conv3d,
    "Linear": _linear,
    "BatchNorm2d": _norm,
    "BatchNorm1d": _norm,
    "ReLU": _clip(0.0, None),
    "ReLU6": _clip(0.0, 6.0),
    "Hardtanh": _hardtanh,
    "Upsample": _upsample,
    "Softmax": _softmax,
    "InstanceNorm2d": _instance_norm,
    **dict.fromkeys(("Dropout", "Dropout2d", "Identity", "StochasticDepth"), _simple("identity")),
    **dict.fromkeys(("Flatten", "ZeroPad2d", "ConstantPad2d", "ChannelShuffle", "PixelShuffle"), _move),
    **dict.fromkeys(
        (
            *("Sigmoid", "Hardsigmoid", "HSigmoid", "GhostHSigmoid", "SiLU", "Swish", "Hardswish", "HSwish", "Tanh"),
            *("LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "Mish", "Softplus", "Softsign"),
        ),
        _function,
    ),
}

FUNCTIONS: Rows = {
    **JOINS,
    **POOL_FUNCTIONS,
    "conv2d": _f_conv,
    **dict.fromkeys(
        (
            *("view", "reshape", "flatten", "transpose", "permute", "contiguous", "chunk", "split", "getitem"),
            *("squeeze", "unsqueeze", "expand", "pad", "clone", "narrow", "unbind", "channel_shuffle"),
            *("unflatten", "pixel_shuffle", "repeat", "index_select", "swapaxes", "zeros_like"),
        ),
        lambda b, node, _: _move(b, node, None),
    ),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), _shaped_as),
    **dict.fromkeys(("add", "add_", "iadd"), _plus),
    **dict.fromkeys(("sub", "sub_", "isub", "rsub"), _minus),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply"), _times),
    **dict.fromkeys(("truediv", "div", "div_"), _divide),
    **dict.fromkeys(("relu", "relu_"), _clip(0.0, None)),
    "relu6": _clip(0.0, 6.0),
    **dict.fromkeys(("clamp", "clamp_", "clip"), _clamp),
    "hardtanh": _f_hardtanh,
    **dict.fromkeys(("dropout", "dropout2d", "stochastic_depth", "detach"), _identity),
    "interpolate": lambda b, node, _: _upsample(b, node, None),
    "softmax": lambda b, node, _: _softmax(b, node, None),
    "local_response_norm": _local_response_norm,
    **dict.fromkeys(
        (
            *("sigmoid", "sigmoid_", "hardsigmoid", "silu", "hardswish", "tanh", "tanh_", "leaky_relu", "elu", "gelu"),
            *("mish", "softplus", "pow", "neg", "abs", "sqrt", "exp", "square"),
        ),
        _one_input,
    ),
}
