"""Channel balancing: activations' channels get the sizes with which their readers' weights round best.

Dividing channel j of a tensor by c_j and multiplying the weights that read it by c_j changes nothing, as in
:mod:`equalize`; where tensors are added, all of them share their c.  The layers that make the tensor have a weight
scale per output channel, so their rounding does not feel it.  A layer that reads it does: its step s_o follows its
largest weights w_oj c_j, and each weight's rounding error, s_o^2 / 12 in the mean, meets an input of the size 1 / c_j.
What is made smallest is, summed over the readers and each as a share of its output's variance,

    sum over o of  s_o^2 / 12  sum over j of V_j / c_j^2   +   q^2 / 12  sum over o, j of (w_oj c_j)^2

with q the step of the activations and V_j what the other channels do not foretell of channel j, 1 / (G^-1)_jj of their
covariance G: for the rest, least squares make up.  With a power mean in place of the largest weight this is convex in
log c (Boyd et al. 2007, A tutorial on geometric programming).  Columns are scaled before rounding by AWQ,
arXiv 2306.00978, too, by another rule.

Behind a ceiling (ReLU6) only channels that hardly reach it are scaled, and only so far that they still do not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log10

import torch
from torch import Tensor

from utils.errors import UserError
from utils.quantization_utils.bias_correction import limited
from utils.quantization_utils.equalize import by_input, ceiling_of, commutes, parameter_uses, scale_outputs, why_fixed
from utils.quantization_utils.execution import channel_rows, run_ops
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.quant_primitives import int_range

IMAGES = 128
EIGHT_BITS = 8  # from which on the rounding of weights hardly counts
POWER = 8  # of the mean that stands for the largest weight of a row
STEP = 1.4  # best step times the largest integer and a half, over that mean: of normal weights at 4 bits
LARGEST = 8.0  # factor up or down
AT_CEILING, HARDLY = 0.9999, 0.001  # a value there, and the share of them that may be lost
STEPS, RATE = 200, 0.05  # of Adam on log c
DAMPING = 1e-6  # of the covariance's diagonal
TINY = 1e-12


@dataclass(frozen=True)
class Balanced:
    """groups: of tensors that share their factors; decibels: by how much the objective fell, on average."""

    groups: int
    decibels: float


@dataclass(eq=False)
class Group:
    """Tensors that must be scaled alike: who makes them, who reads them, the ceilings behind them, their channels.

    fixed: something else makes or reads one of them.
    """

    makers: list[Op] = field(default_factory=list)
    readers: list[Op] = field(default_factory=list)
    ceilings: list[tuple[str, float]] = field(default_factory=list)
    channels: set[int] = field(default_factory=set)
    fixed: bool = False


@dataclass
class Seen:
    """The values of a tensor [C, values]: how many, sums float64 [C] and [C, C], largest, and how many at a ceiling."""

    count: int
    total: Tensor
    products: Tensor
    largest: Tensor
    clipped: Tensor

    @classmethod
    def of(cls, rows: Tensor, ceiling: float | None) -> "Seen":
        """From values float32 [C, values]."""
        top = torch.inf if ceiling is None else AT_CEILING * ceiling
        largest, clipped = rows.abs().amax(1).double(), (rows >= top).sum(1)
        return cls(rows.shape[1], rows.sum(1).double(), (rows @ rows.T).double(), largest, clipped)

    def with_more(self, other: "Seen") -> "Seen":
        """Together with the values of other images."""
        largest = torch.maximum(self.largest, other.largest)
        total, products = self.total + other.total, self.products + other.products
        return Seen(self.count + other.count, total, products, largest, self.clipped + other.clipped)

    def covariance(self) -> Tensor:
        """Float64 [C, C], a little of the diagonal added so that it has an inverse."""
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean
        diagonal = covariance.diagonal()
        return covariance + torch.diag(DAMPING * diagonal.clamp_min(0) + TINY * (1 + diagonal.mean()))


@torch.no_grad()
def balance(model: QuantizedModel, batches: Iterable[Tensor]) -> Balanced:
    """Scale channels of the float network in place; its function stays, but for what a ceiling no longer cuts off.

    batches: normalised float32 [N, C, H, W] on the model's device, of which the first 128 images count.  Calibrate
    afterwards.  Raises UserError for values that are not finite.
    """
    groups = find_groups(model)
    seen = _observe(model, batches, groups)
    bad = next((name for name, values in seen.items() if not bool(torch.isfinite(values.products).all())), None)
    if bad is not None:
        raise UserError(
            f"balancing met values that are not finite at {bad!r}; check the weights and the images for NaN or infinity"
        )
    gains = []
    for group in groups:
        factors, gain = best_factors(group, seen)
        gains.append(gain)
        for layer in _layers(group.makers):
            scale_outputs(layer, (1 / factors).to(layer.module.weight))
        for layer in _layers(group.readers):
            columns = by_input(layer.module)
            columns.mul_(_by_group(factors, columns).to(columns))
    return Balanced(len(groups), sum(gains) / max(1, len(gains)))


def find_groups(model: QuantizedModel) -> list[Group]:
    """The groups that may be scaled and of which a reader gains, in order."""
    group_of: dict[str, Group] = {}
    uses, ops = parameter_uses(model), {op.name: op for op in model.ops}
    for op in model.ops:
        read = [group_of[name] for name in op.inputs]
        if op.kind == "add":
            group = _joined(read, group_of)
        elif op.inputs and commutes(ops[op.inputs[0]], op):
            group = read[0]
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
    return [g for g in groups if not g.fixed and len(g.channels) == 1 and _gaining(g)]


def _joined(parts: Sequence[Group], group_of: dict[str, Group]) -> Group:
    """One group in place of several."""
    result = Group()
    for part in dict.fromkeys(parts):
        result.makers += part.makers
        result.readers += part.readers
        result.ceilings += part.ceilings
        result.channels |= part.channels
        result.fixed |= part.fixed
    group_of.update({name: result for name, group in group_of.items() if group in parts})
    return result


def _layers(ops: Iterable[Op]) -> list[QuantLayer]:
    return [op.module for op in ops if isinstance(op.module, QuantLayer)]


def _gaining(group: Group) -> list[tuple[str, QuantLayer]]:
    """The readers to whose rounding the sizes of input channels matter, with the tensor each reads.

    They do not matter to a depthwise layer's.
    """
    layers = [(op.inputs[0], layer) for op in group.readers for layer in _layers([op])]
    return [(name, layer) for name, layer in layers if layer.bits < EIGHT_BITS and by_input(layer.module).shape[2] > 1]


def _by_group(channels: Tensor, columns: Tensor) -> Tensor:
    """Values [I] of input channels beside weights [groups, O / groups, I / groups, positions]."""
    return channels.reshape(columns.shape[0], 1, -1, 1)


def _observe(model: QuantizedModel, batches: Iterable[Tensor], groups: Sequence[Group]) -> dict[str, Seen]:
    """What the float network has at the inputs of readers that gain, and at ceilings."""
    wanted = {name for group in groups for name, _ in _gaining(group)}
    ceilings = dict(ceiling for group in groups for ceiling in group.ceilings)
    seen: dict[str, Seen] = {}
    left = IMAGES
    model.eval()
    for batch in batches if groups else ():
        for part in limited(model, [batch[:left]]):
            for op, (output,) in run_ops(model, [part], quantized=False):
                if op.name in wanted or op.name in ceilings:
                    found = Seen.of(channel_rows(op, output), ceilings.get(op.name))
                    seen[op.name] = seen[op.name].with_more(found) if op.name in seen else found
        left -= len(batch)
        if left <= 0:
            break
    return seen


class _Noise:
    """Noise of a reader's output behind its rounding and that of its input, as a share of the output's variance."""

    def __init__(self, layer: QuantLayer, seen: Seen) -> None:
        weight, _ = fold(layer.module.weight, None, layer.bn)
        self.columns = by_input(layer.module, weight).double()
        covariance = seen.covariance()
        self.unforetold = 1 / torch.linalg.inv(covariance).diagonal()
        self.most = int_range(layer.bits, True)[1] + 0.5
        self.largest, self.source = seen.largest, layer.source
        groups, _, size, _ = self.columns.shape
        own = torch.stack([covariance[i : i + size, i : i + size] for i in range(0, groups * size, size)])
        self.power = torch.einsum("goip,gij,gojp->", self.columns, own, self.columns).clamp_min(TINY)

    def __call__(self, factors: Tensor) -> Tensor:
        """For factors [I] of the weights' columns."""
        scaled = self.columns * _by_group(factors, self.columns)
        positions = scaled.shape[3]
        peaks = scaled.abs().pow(POWER).mean((2, 3)).clamp_min(TINY**POWER).pow(1 / POWER)  # rows may be all zero
        inputs = _by_group(self.unforetold / factors.square(), self.columns).sum((1, 2, 3)) * positions
        rounding = (STEP / self.most * peaks).square().sum(1) @ inputs
        return (rounding + self._step(factors).square() * scaled.square().sum()) / 12 / self.power

    def _step(self, factors: Tensor) -> Tensor:
        """Of the layer's input."""
        if self.source is None or self.source.bits > EIGHT_BITS:
            return factors.new_zeros(())
        return (self.largest / factors).amax() / int_range(self.source.bits, self.source.signed)[1]


@torch.no_grad()
def best_factors(group: Group, seen: dict[str, Seen]) -> tuple[Tensor, float]:
    """Factors float64 [C] of the weights that read a group, and by how many decibels they lower the noise."""
    noises = [_Noise(layer, seen[name]) for name, layer in _gaining(group)]
    held, least = _limits(group, seen, noises[0].largest)
    logs = torch.zeros_like(least, requires_grad=True)
    optimiser = torch.optim.Adam([logs], lr=RATE)

    def factors() -> Tensor:
        return torch.where(held, 1.0, torch.maximum(logs.exp(), least).clamp(1 / LARGEST, LARGEST))

    def noise() -> Tensor:
        return torch.stack([each(factors()) for each in noises]).sum()

    before = float(noise())
    with torch.enable_grad():
        for _ in range(STEPS):
            optimiser.zero_grad()
            noise().log().backward()
            optimiser.step()
    return factors(), 10 * log10(before / float(noise()))


def _limits(group: Group, seen: dict[str, Seen], like: Tensor) -> tuple[Tensor, Tensor]:
    """Channels [C] that must stay, as a ceiling cuts them off often, and the least factors of the others."""
    held, least = torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like)
    for name, ceiling in group.ceilings:
        values = seen[name]
        held |= values.clipped > HARDLY * values.count
        least = torch.maximum(least, values.largest / ceiling)
    return held, least
