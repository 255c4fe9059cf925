"""Tensors whose channels must be scaled or mixed alike, with the layers that make and read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from utils.quantization_utils.equalize import by_input, ceiling_of, commutes, parameter_uses, why_fixed
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer, QuantLayer
from utils.quantization_utils.quant_primitives import EIGHT_BITS


@dataclass(eq=False)
class Group:
    """Tensors that must be changed alike: who makes them, who reads them, the ceilings behind them, their channels.

    fixed: something else makes or reads one of them.  linear: all that lies between makers and readers commutes with
    a product with any matrix, not only with positive factors of channels.
    """

    makers: list[Op] = field(default_factory=list)
    readers: list[Op] = field(default_factory=list)
    ceilings: list[tuple[str, float]] = field(default_factory=list)
    channels: set[int] = field(default_factory=set)
    fixed: bool = False
    linear: bool = True

    @property
    def mixable(self) -> bool:
        """Whether the channels may be multiplied by a matrix: every layer must make or read all of them together."""
        modules = [layer.module for layer in layers_of([*self.makers, *self.readers])]
        return self.linear and not any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in modules)

    def gaining(self) -> list[tuple[str, QuantLayer]]:
        """The readers to whose rounding their input channels matter, with the tensor each reads.

        They do not matter to a depthwise layer's.
        """
        layers = [(op.inputs[0], layer) for op in self.readers for layer in layers_of([op])]
        return [(name, x) for name, x in layers if x.bits < EIGHT_BITS and by_input(x.module).shape[2] > 1]


def find_groups(model: QuantizedModel) -> list[Group]:
    """The groups that may be changed and of which a reader gains, in order."""
    group_of: dict[str, Group] = {}
    uses, ops = parameter_uses(model), {op.name: op for op in model.ops}
    for op in model.ops:
        read = [group_of[name] for name in op.inputs]
        if op.kind == "add":
            group = _joined(read, group_of)
        elif op.inputs and commutes(ops[op.inputs[0]], op):
            group = read[0]
            group.linear &= _is_linear(op)
        else:
            group = Group(makers=[op], fixed=why_fixed(op, uses) is not None)
            for part in read if op.kind != "host" else ():
                part.readers.append(op)
                part.fixed |= why_fixed(op, uses, reads=True) is not None
        group_of[op.name] = group
        group.channels.add(op.shape[0] if op.shape else 0)
        ceiling = ceiling_of(op)
        group.ceilings += [] if ceiling is None else [(op.name, ceiling)]
    groups = dict.fromkeys(group_of.values())
    return [g for g in groups if not g.fixed and len(g.channels) == 1 and g.gaining()]


def _is_linear(op: Op) -> bool:
    """Of operators that commute with positive factors of channels."""
    if isinstance(op.module, Quantizer):
        return not op.module.relu and op.module.ceiling is None
    return op.kind in ("identity", "move", "avg_pool")


def _joined(parts: Sequence[Group], group_of: dict[str, Group]) -> Group:
    """One group in place of several."""
    result = Group()
    for part in dict.fromkeys(parts):
        result.makers += part.makers
        result.readers += part.readers
        result.ceilings += part.ceilings
        result.channels |= part.channels
        result.fixed |= part.fixed
        result.linear &= part.linear
    group_of.update({name: result for name, group in group_of.items() if group in parts})
    return result


def layers_of(ops: Iterable[Op]) -> list[QuantLayer]:
    """The layers with weights among operators."""
    return [op.module for op in ops if isinstance(op.module, QuantLayer)]


def layer_of(op: Op) -> QuantLayer:
    """The layer of an operator that has one."""
    assert isinstance(op.module, QuantLayer)
    return op.module


def by_group(channels: Tensor, columns: Tensor) -> Tensor:
    """Values [I] of input channels beside weights [groups, O / groups, I / groups, positions]."""
    return channels.reshape(columns.shape[0], 1, -1, 1)
