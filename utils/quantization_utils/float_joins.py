"""Rows of operators on several tensors: sums, differences, products, concatenations, stacks."""

from typing import Any

import torch
from torch import Tensor, fx

from utils.quantization_utils.float_ops import Builder, Op, Rows, argument, shape_of, sources, target_name


def _checked(b: Builder, node: fx.Node) -> list[fx.Node]:
    """The tensor operands; refuses constants and values that are not tensors."""
    if any(n.meta["constant"] for n in node.all_input_nodes):
        raise b.refuse(node, "an operand is a parameter or a constant tensor")
    if any(n.meta["holds"] != "tensor" for n in sources(node)):
        raise b.refuse(node, "its operands are not all tensors of the network")
    return sources(node)


def _summands(b: Builder, node: fx.Node) -> list[fx.Node]:
    """The operands of a sum or difference; refuses a factor ``alpha`` of the second one."""
    if argument(node, 2, "alpha", 1) != 1:
        raise b.refuse(node, "a factor alpha is not supported, multiply the operand instead")
    return _checked(b, node)


def _add(b: Builder, node: fx.Node, _: Any) -> list[Op]:
    operands = _summands(b, node)
    if len(operands) == 1:  # x + x
        return [b.op(node, "add", repeat=2)]
    shape = shape_of(node)
    expanded = [b.ops[n.name] if shape_of(n) == shape else _expanded(b, node, n) for n in operands]
    added = [op for op in expanded if op.name not in b.ops]
    return [*added, b.step(node, "", "add", [op.name for op in expanded], torch.add)]


def _expanded(b: Builder, node: fx.Node, operand: fx.Node) -> Op:
    """A smaller operand spread over the shape of the result."""
    shape = shape_of(node)

    def spread(x: Tensor) -> Tensor:
        return x.expand(x.shape[0], *shape)

    if len(shape_of(operand)) != len(shape):
        raise b.refuse(node, f"an operand of shape {shape_of(operand)} does not fit {shape}")
    return b.step(node, f"spread_{operand.name}", "move", [operand.name], spread, shape=shape)


def _sub(b: Builder, node: fx.Node, _: Any) -> list[Op]:
    """``x - y`` as ``x + (-y)``."""
    operands = _summands(b, node)
    if len(operands) != 2 or shape_of(operands[0]) != shape_of(operands[1]):
        raise b.refuse(node, "only the difference of two tensors of one shape has an integer form")
    minus = b.step(node, "negative", "function", [operands[1].name], torch.neg, nonnegative=False)
    return [minus, b.step(node, "", "add", [operands[0].name, minus.name], torch.add)]


def _mul(b: Builder, node: fx.Node, _: Any) -> Op:
    operands = _checked(b, node)
    if len({len(shape_of(n)) for n in operands}) != 1:
        raise b.refuse(node, f"factors of shapes {[shape_of(n) for n in operands]} differ in their number of axes")
    return b.op(node, "mul", repeat=2) if len(operands) == 1 else b.op(node, "mul")


def _cat(b: Builder, node: fx.Node, _: Any) -> Op:
    axis = argument(node, 1, "dim", 0)
    parts: Any = argument(node, 0, "tensors", ())
    if any(n.meta["constant"] for n in parts):
        raise b.refuse(node, "a part is a constant tensor")
    if _one_source(b, [n.name for n in parts]) and axis not in (1, -len(shape_of(node))):
        return b.op(node, "move")
    if axis not in (1, -len(shape_of(node))):
        raise b.refuse(node, f"only channels (dim 1) can be concatenated, this is dim {axis}")
    op = b.op(node, "concat")
    op.attrs["order"] = [op.inputs.index(n.name) for n in parts]
    return op


def _stack(b: Builder, node: fx.Node, _: Any) -> Op | list[Op]:
    """Parts of one tensor are moved; others are concatenated along a new axis behind the batch."""
    parts: Any = argument(node, 0, "tensors", ())
    axis = argument(node, 1, "dim", 0)
    _checked(b, node)
    if axis == 0 and all(_reduces_stack(user) for user in node.users):
        return b.op(node, "host", lambda *values: values[0])  # the reduction reads the parts
    if _one_source(b, [n.name for n in parts]) and axis != 0:
        return b.op(node, "move")
    if axis != 1:
        raise b.refuse(node, f"tensors can only be stacked in front of the channels (dim 1), not in dim {axis}")
    names = list(dict.fromkeys(n.name for n in parts))
    order = [names.index(n.name) for n in parts]
    count, shape = len(parts), shape_of(parts[0])
    joined = b.step(node, "parts", "concat", names, _Concat(order), shape=(count * shape[0], *shape[1:]), order=order)
    return [joined, b.step(node, "", "move", [joined.name], lambda x: x.reshape(-1, count, *shape))]


def _reduces_stack(user: fx.Node) -> bool:
    """Whether a reader of tensors stacked along axis 0 adds or averages them, or only asks for their number."""
    return user.meta["holds"] == "host" or (
        target_name(user) in ("sum", "mean") and argument(user, 1, "dim", None) == 0
    )


def stacked_parts(node: fx.Node) -> list[fx.Node] | None:
    """The tensors a reduction over axis 0 combines, where its operand is a stack along axis 0."""
    operand = sources(node)[0]
    if argument(node, 1, "dim", None) != 0 or operand.op != "call_function" or target_name(operand) != "stack":
        return None
    parts: Any = argument(operand, 0, "tensors", ())
    return list(parts)


def add_parts(b: Builder, node: fx.Node, parts: list[fx.Node], suffix: str) -> Op:
    """The sum of some tensors, each of them once."""
    names = [n.name for n in parts]
    if len(names) == 1:
        return b.step(node, suffix, "identity", names, lambda x: x)
    if len(set(names)) != len(names):
        raise b.refuse(node, "the tensors it combines are not all different")
    return b.step(node, suffix, "add", names, _total)


class _Concat:
    """Concatenates its arguments along the channels in a given order."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __call__(self, *values: Tensor) -> Tensor:
        return torch.cat([values[i] for i in self.order], 1)


def _one_source(b: Builder, names: list[str]) -> bool:
    """Whether values are all copies of elements of one tensor."""
    found = set()
    for name in names:
        op = b.ops[name]
        while op.kind in ("move", "identity"):
            op = next(b.ops[i] for i in op.inputs if b.ops[i].kind != "host")
        found.add(op.name)
    return len(found) == 1


def _sum(b: Builder, node: fx.Node, _: Any) -> list[Op]:
    """A sum over a short axis: its slices are added up."""
    operand = sources(node)[0]
    if (parts := stacked_parts(node)) is not None:
        return [add_parts(b, node, parts, "")]
    source, dim = shape_of(operand), argument(node, 1, "dim", None)
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if not isinstance(dim, int) or dim % (len(source) + 1) == 0:
        raise b.refuse(node, f"a sum over dimensions {dim} has no integer form, one over a single axis of images has")
    axis, keep = dim % (len(source) + 1), bool(argument(node, 2, "keepdim", False))
    count, shape = source[axis - 1], shape_of(node)
    if count > MAX_SUMMANDS:
        raise b.refuse(node, f"a sum over {count} slices is too long, at most {MAX_SUMMANDS} can be added")
    if count == 1:
        return [b.step(node, "", "move", [operand.name], _Slice(axis, 0, keep), shape=shape)]
    slices = [
        b.step(node, f"slice{i}", "move", [operand.name], _Slice(axis, i, keep), shape=shape) for i in range(count)
    ]
    return [*slices, b.step(node, "", "add", [op.name for op in slices], _total)]


MAX_SUMMANDS = 32


class _Slice:
    """``x.select(axis, index)``, the axis kept as a single element on request."""

    def __init__(self, axis: int, index: int, keep: bool) -> None:
        self.axis, self.index, self.keep = axis, index, keep

    def __call__(self, x: Tensor) -> Tensor:
        part = x.select(self.axis, self.index)
        return part.unsqueeze(self.axis) if self.keep else part


def _total(*values: Tensor) -> Tensor:
    return torch.stack(values).sum(0)


FUNCTIONS: Rows = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "sum": _sum,
}
