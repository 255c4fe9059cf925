"""Capture a float model as a torch.fx graph whose batch size stays symbolic.

The tracer carries a real value on every proxy, computed eagerly in eval mode, so shape arithmetic, comparisons,
loops over split tensors and ``int(...)`` in a model's forward work as they do eagerly.  Channel and spatial sizes
become Python integers, the batch size stays a graph value.  Module objects, their names and the model itself are
untouched: the captured graph refers to them by path.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.errors import UserError

# Modules kept whole: one-input functions and random-depth units whose insides would need pattern matching, and a
# matrix square root that cannot be traced.  They are named by class so that no model library is imported here.
LEAF_CLASSES = frozenset({"HSwish", "HSigmoid", "Swish", "GhostHSigmoid", "StochasticDepth", "iSQRTCOVPool"})
REVERSIBLE = "ReversibleBlock"
TRACE_BATCH = 2
REASON_LENGTH = 200  # characters of somebody else's exception in a message


@dataclass(frozen=True)
class Captured:
    """A captured model.

    ``graph`` nodes carry ``meta``: ``path`` of the module they run in, ``shape`` (without batch, tensors only),
    ``holds`` (tensor, tensors or host), ``constant`` (does not depend on the image) and, on get_attr nodes, ``value``.
    ``guards`` lists the Python decisions that were fixed while tracing.
    """

    model: nn.Module
    graph: fx.Graph
    input_shape: tuple[int, ...]
    guards: tuple[str, ...] = field(default=())


class _ValueProxy(fx.Proxy):
    """A proxy that knows the value the traced expression has on the example input."""

    value: Any = None

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return _symbolic_shape(self)
        if name in ("dtype", "device", "ndim", "is_cuda", "requires_grad"):
            return getattr(self.value, name)
        return super().__getattr__(name)

    def _concrete(self, kind: str) -> Any:
        tracer: Any = self.tracer
        tracer.guards.append(f"{kind}({self.node.format_node()}) was {self.value!r}")
        return self.value

    def __int__(self) -> int:
        return int(self._concrete("int"))

    def __index__(self) -> int:
        return int(self._concrete("index"))

    def __float__(self) -> float:
        return float(self._concrete("float"))

    def __len__(self) -> int:
        return len(self.value)


def _symbolic_shape(proxy: _ValueProxy) -> tuple[Any, ...]:
    """The shape of a proxy's tensor: batch as a graph value, the rest as integers (all of a constant's)."""
    if proxy.node.meta["constant"]:
        return tuple(proxy.value.shape)
    batch = proxy.tracer.create_proxy("call_method", "size", (proxy, 0), {})
    return (batch, *proxy.value.shape[1:])


class _Tracer(fx.Tracer):
    """fx tracer that evaluates every node as it is recorded."""

    def __init__(self, example: Tensor) -> None:
        super().__init__(param_shapes_constant=True)
        self.example = example
        self.guards: list[str] = []
        self.path: list[str] = []
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in LEAF_CLASSES or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder, whatever else forward takes stays at its default."""
        image = self.create_proxy("placeholder", "input", (), {})
        return root_fn, [self.root, image, *_default_arguments(self.root)]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        if type(m).__name__ == REVERSIBLE:
            forward = _reversible(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # left in place by an exception: the error message names it
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> _ValueProxy:
        return _ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if kind == "call_method" and isinstance(args[0], _ValueProxy):
            shortcut = self._shape_method(target, args[0], args[1:], kwargs)
            if shortcut is not None:
                return shortcut
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        proxy.value = self._evaluate(kind, target, args, kwargs)
        meta = proxy.node.meta
        meta["path"] = self.path[-1] if self.path else ""
        meta["holds"] = _holds(proxy.value)
        sources = proxy.node.all_input_nodes
        meta["constant"] = kind == "get_attr" or (bool(sources) and all(n.meta["constant"] for n in sources))
        if isinstance(proxy.value, Tensor):
            meta["shape"] = tuple(proxy.value.shape[1:])
        return proxy

    def create_node(self, kind: str, target: Any, *rest: Any, **options: Any) -> fx.Node:
        """Constants met in arguments become get_attr nodes without a proxy, so these are described here."""
        node = super().create_node(kind, target, *rest, **options)
        if kind == "get_attr":
            value = self._evaluate(kind, target, (), {})
            node.meta.update(path="", holds=_holds(value), constant=True, value=value)
        return node

    def _shape_method(self, name: str, proxy: _ValueProxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "dim":
            return proxy.value.dim()
        if name != "size" or not isinstance(proxy.value, Tensor):
            return None
        dims = args or tuple(kwargs.values())
        if not dims:
            return _symbolic_shape(proxy)
        is_batch = dims[0] in (0, -proxy.value.dim()) and not proxy.node.meta["constant"]
        return None if is_batch else proxy.value.shape[dims[0]]

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        values = fx.node.map_aggregate(args, _value_of)
        named = fx.node.map_aggregate(kwargs, _value_of)
        self._computing = True
        try:
            if kind == "placeholder":
                return self.example
            if kind == "get_attr":
                return _attribute(self.root, target)
            if kind == "call_module":
                return self.root.get_submodule(target).forward(*values, **named)
            if kind == "call_method":
                return _method(values[0], target)(*values[1:], **named)
            return target(*values, **named)
        finally:
            self._computing = False

    def to_bool(self, obj: fx.Proxy) -> bool:
        assert isinstance(obj, _ValueProxy)
        return bool(obj._concrete("bool"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        assert isinstance(obj, _ValueProxy)
        return iter([operator.getitem(obj, i) for i in range(len(obj.value))])


def _holds(value: Any) -> str:
    """What a graph value is: a ``tensor``, a tuple of ``tensors`` or a ``host`` value such as the batch size."""
    if isinstance(value, Tensor):
        return "tensor"
    several = isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(v, Tensor) for v in value)
    return "tensors" if several else "host"


def _value_of(argument: Any) -> Any:
    return argument.value if isinstance(argument, _ValueProxy) else argument


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _method(value: Any, name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(value, name)
    return method


def capture(model: nn.Module, example_input: Tensor) -> Captured:
    """Trace ``model`` in eval mode.

    example_input: float32 [N, C, H, W], N >= 1; H and W are fixed by it, N is not.  The model is put into eval mode
    and not changed otherwise.  Raises UserError naming the operator and the module that cannot be captured.

    >>> captured = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    >>> [node.op for node in captured.graph.nodes], captured.input_shape
    (['placeholder', 'call_module', 'call_module', 'output'], (3, 8, 8))
    """
    model.eval()
    parameter = next(model.parameters(), None)
    device = example_input.device if parameter is None else parameter.device
    example = example_input[:1].detach().to(device).repeat(TRACE_BATCH, *([1] * (example_input.dim() - 1)))
    tracer = _Tracer(example)
    before = set(vars(model))
    try:
        with torch.no_grad():
            graph = tracer.trace(model)
    except Exception as error:
        raise _refusal(model, tracer, error) from error
    finally:
        for name in set(vars(model)) - before:  # fx stores constants on the model; the graph's nodes hold them too
            delattr(model, name)
    return Captured(model, graph, tuple(example.shape[1:]), tuple(tracer.guards))


def _refusal(model: nn.Module, tracer: _Tracer, error: Exception) -> UserError:
    path = tracer.path[-1] if tracer.path else ""
    where = f"module {path!r} ({_class_name(model, path)})" if path else f"the model ({type(model).__name__})"
    reason = " ".join(str(error).split())[:REASON_LENGTH]
    return UserError(
        f"cannot capture {where} for an input of shape {tuple(tracer.example.shape[1:])}: {type(error).__name__}: "
        f"{reason}; check the input size, or rewrite that forward with plain tensor operators"
    )


def _reversible(m: Any) -> Callable[[Any], Any]:
    """What PyTorchCV's ReversibleBlock computes; its own forward is a custom autograd function that frees its input."""

    def forward(x: Any) -> Any:
        x1, x2 = torch.chunk(x, chunks=2, dim=1)
        y1 = x1 + m.fm(x2.contiguous())
        return torch.cat((y1, x2 + m.gm(y1)), dim=1)

    return forward


def _default_arguments(model: nn.Module) -> list[Any]:
    """Every argument of forward but the first, fixed at its default (``only_last=False`` and the like)."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return [p.default for p in parameters if p.default is not inspect.Parameter.empty]


def _class_name(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__
