"""One operator of the captured network, and the small vocabulary of kinds it has.

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

``float_rows`` holds one row per PyTorch module and function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.errors import UserError
from utils.quantization_utils.capture import Captured


@dataclass
class Op:
    """One operator.  ``run(*inputs)`` evaluates it in float; ``shape`` excludes the batch axis.

    attrs by kind: ``layer`` (conv, linear, affine), ``lo``/``hi`` (clip), ``factor`` (scale), ``nonnegative``
    (function), ``windows`` (avg_pool), the arguments of max_pool, ``order`` of a concat's parts, ``repeat`` of an only
    operand, ``function`` and ``parameters`` of an island.
    """

    name: str
    kind: str
    inputs: list[str]
    run: Callable[..., Any]
    shape: tuple[int, ...]
    path: str = ""
    module: nn.Module | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Slot:
    """Place of the tensor argument number ``index``."""

    index: int


class Constant:
    """A value that depends on parameters, buffers and numbers only; computed anew at each call, so it trains."""

    def __init__(self, model: nn.Module, node: fx.Node) -> None:
        self.node, self.model = node, model

    def __call__(self) -> Any:
        return _constant(self.node, self.model)

    def stored(self) -> list[Tensor]:
        """The parameters and buffers it is computed from."""
        nodes, found = [self.node], []
        for node in nodes:
            found += [node.meta["value"]] if node.op == "get_attr" else []
            nodes += [source for source in node.all_input_nodes if source not in nodes]
        return found


def _constant(argument: Any, model: nn.Module) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    if argument.op == "get_attr":
        return argument.meta["value"]
    args: Any = fx.node.map_aggregate(argument.args, lambda a: _constant(a, model))
    kwargs: Any = fx.node.map_aggregate(argument.kwargs, lambda a: _constant(a, model))
    return _call(argument, model, args, kwargs)


def _call(node: fx.Node, model: nn.Module, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return (model.get_submodule(target) if node.op == "call_module" else target)(*args, **kwargs)


class Replay:
    """Calls an fx node's target again, its tensor arguments taken from the call."""

    def __init__(self, node: fx.Node, model: nn.Module) -> None:
        self._node, self._model = node, model
        self._inputs = [n.name for n in sources(node)]
        self._args = fx.node.map_aggregate(node.args, self._slot)
        self._kwargs = fx.node.map_aggregate(node.kwargs, self._slot)

    def _slot(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument.meta["constant"]:
            return Constant(self._model, argument)
        return _Slot(self._inputs.index(argument.name))

    def __call__(self, *values: Any) -> Any:
        device = next((v.device for v in values if isinstance(v, Tensor)), None)

        def fill(argument: Any) -> Any:
            if isinstance(argument, _Slot):
                return values[argument.index]
            if not isinstance(argument, Constant):
                return argument
            value = argument()
            return value.to(device) if isinstance(value, Tensor) else value

        args: Any = fx.node.map_aggregate(self._args, fill)
        kwargs: Any = fx.node.map_aggregate(self._kwargs, fill)
        return _call(self._node, self._model, args, kwargs)


class Clip:
    """``min(max(x, lo), hi)``, never in place."""

    def __init__(self, lo: float | None, hi: float | None) -> None:
        self.lo, self.hi = lo, hi

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.lo == 0 and self.hi is None else torch.clamp(x, self.lo, self.hi)


Computed = Callable[[], Tensor]


class ComputedConv(nn.Module):
    """A convolution whose weight and bias are computed at each call, with the attributes of an ``nn.Conv2d``."""

    def __init__(
        self, weight: Computed, bias: Computed | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> None:
        super().__init__()
        self._weight, self._bias = (weight,), (bias,)
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.groups = groups
        self.kernel_size = tuple(self.weight.shape[2:])

    def stored(self) -> list[Tensor]:
        """The parameters and buffers that weight and bias are computed from, as far as that is known."""
        parts = [*self._weight, *self._bias]
        return [tensor for part in parts if isinstance(part, Constant) for tensor in part.stored()]

    @property
    def weight(self) -> Tensor:
        """[O, I/groups, kh, kw]."""
        return self._weight[0]()

    @property
    def bias(self) -> Tensor | None:
        """[O] or None."""
        return None if self._bias[0] is None else self._bias[0]()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Builder:
    """Translates the nodes of one captured graph into operators; ``ops`` holds those made so far by name."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.model = captured.model
        self.ops: dict[str, Op] = {}
        self._calls: dict[str, int] = {}

    def module(self, node: fx.Node) -> nn.Module:
        """The module a call_module node calls."""
        return self.model.get_submodule(str(node.target))

    def op(self, node: fx.Node, kind: str, run: Callable[..., Any] | None = None, **attrs: Any) -> Op:
        """The operator of a node; ``run`` replays the node unless given."""
        replay = Replay(node, self.model) if run is None else run
        inputs = [n.name for n in sources(node)]
        return Op(node.name, kind, inputs, replay, tuple(node.meta.get("shape", ())), self.path(node), attrs=attrs)

    def step(
        self, node: fx.Node, suffix: str, kind: str, inputs: list[str], run: Callable[..., Any], **more: Any
    ) -> Op:
        """One of several operators a node becomes.  more: ``shape`` and attributes; suffix "" makes it the last."""
        shape = tuple(more.pop("shape", node.meta.get("shape", ())))
        name = f"{node.name}_{suffix}" if suffix else node.name
        return Op(name, kind, inputs, run, shape, self.path(node), attrs=more)

    def path(self, node: fx.Node) -> str:
        """Path of the module a node runs in."""
        return str(node.target) if node.op == "call_module" else str(node.meta.get("path", ""))

    def layer(self, node: fx.Node, kind: str, module: nn.Module) -> Op:
        """A module with weights, named by its path; a second call of the same module gets ``#2``."""
        path = self.path(node)
        self._calls[path] = self._calls.get(path, 0) + 1
        op = self.op(node, kind, module)
        op.inputs = [sources(node)[0].name]
        op.module = module
        op.attrs["layer"] = path if self._calls[path] == 1 else f"{path}#{self._calls[path]}"
        return op

    def refuse(self, node: fx.Node, why: str) -> UserError:
        """The error that names a node's operator and module."""
        if node.op == "output":
            return UserError(f"the model {type(self.model).__name__} cannot be quantized: {why}")
        what = type(self.module(node)).__name__ if node.op == "call_module" else target_name(node)
        path = self.path(node)
        where = f"module {path!r}" if path else "the model's forward"
        return UserError(f"the operator {what} in {where} cannot be quantized: {why}")


# A row makes one operator of a node, or several of which the last bears the node's name.
Row = Callable[[Builder, fx.Node, Any], Op | list[Op]]
Rows = Mapping[str, Row]


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node takes at run time; constants are not among them."""
    return [n for n in node.all_input_nodes if not n.meta["constant"]]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor without the batch axis."""
    return tuple(node.meta["shape"])


def target_name(node: fx.Node) -> str:
    """Name of the function or method a node calls."""
    target: Any = node.target
    return target if isinstance(target, str) else target.__name__


def pair(value: Any) -> tuple[int, int]:
    """(rows, columns) of a number, or of a sequence of one or two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1] if len(value) > 1 else value[0]))


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, wherever it was given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
