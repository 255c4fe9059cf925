"""Affine transformation of linear streams: activations become other combinations of their channels, which round better.

Between the layers that make a linear stream and those that read it lie only sums (or average pools), as in inverted
residual blocks.  There any invertible matrix T may come in: the makers' output channels are multiplied by T, their
readers' input channels by its inverse, and the float network stays the same.  What changes is the noise of rounding.
Summed over the readers r, each as a share of its output's variance, and over the makers m in front of each, it is
foretold as

    sum over o of  s_ro^2 / 12  D(T G T')   +   q^2 / 12  |W_r T^-1|^2   +   sum over o of  s_mo^2 / 12  D_m  S_oo

with W_r the reader's weights, s_ro and s_mo the steps of the rows of W_r T^-1 and T W_m, G the covariance of the stream
and q the step it is quantized with, D what least squares can not make up for (the sum of the variances that each
channel has left when those before it are known), D_m the same of the maker's inputs, and S = T^-1' W_r' W_r T^-1 what
an error of an output of m costs.  Channels of equal variance that do not foretell each other, and rows of equal size,
make it small; factors of channels alone (:mod:`balance`) reach neither.  It is not convex in T; Adam starts from
channels of equal variance.

Sources: AffineQuant, arXiv 2403.12544, and FlatQuant, arXiv 2410.09426, learn such matrices for the linear layers of
transformers, from the error of quantized blocks; orthogonal ones: QuaRot, arXiv 2404.00456.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor
from tqdm import tqdm

from utils.quantization_utils.channel_groups import Group, find_groups, layer_of
from utils.quantization_utils.channel_statistics import POWER, Seen, input_step, observe, output_power, weight_steps
from utils.quantization_utils.equalize import by_input
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.quant_primitives import EIGHT_BITS

STEPS, RATE = 200, 0.01  # of Adam on the matrix, in units of the channels' standard deviations
SMALL = 1e-3  # least standard deviation of a channel, as a share of the largest


@dataclass(frozen=True)
class Transformed:
    """streams: how many; decibels: by how much the noise foretold fell, on average."""

    streams: int
    decibels: float


@torch.no_grad()
def transform_streams(model: QuantizedModel, batches: Iterable[Tensor]) -> Transformed:
    """Transform the linear streams of the float network in place; its function stays, but for float rounding.

    batches: normalised float32 [N, C, H, W] on the model's device, of which the first 128 images count.  Calibrate
    afterwards.  BatchNorms of the makers get the statistics of their new outputs, as seen on these images, so that
    training may go on.  Raises UserError for values that are not finite.
    """
    groups = [group for group in find_groups(model) if group.mixable]
    wanted = {name for group in groups for op in group.makers for name in (op.name, op.inputs[0])}
    wanted |= {op.inputs[0] for group in groups for op in group.readers}
    seen = observe(model, batches, dict.fromkeys(wanted), "the affine transformation")
    gains = []
    for group in tqdm(groups, "affine transformation", unit="stream", leave=False, disable=None):
        matrix, gain = best_matrix(group, seen, _contained(model, group))
        gains.append(gain)
        for op in group.makers:
            _multiply_outputs(layer_of(op), matrix, seen[op.name])
        inverse = torch.linalg.inv(matrix)
        for op in group.readers:
            columns = by_input(layer_of(op).module)[0]
            columns.copy_(torch.einsum("oip,ij->ojp", columns.double(), inverse))
    return Transformed(len(groups), sum(gains) / max(1, len(gains)))


def _contained(model: QuantizedModel, group: Group) -> dict[str, set[str]]:
    """The makers whose outputs a tensor of the group has added up, all by operator name."""
    found = {op.name: {op.name} for op in group.makers}
    for op in model.ops:
        if op.name not in found and op not in group.readers and any(name in found for name in op.inputs):
            found[op.name] = set().union(*(found[name] for name in op.inputs if name in found))
    return found


@torch.no_grad()
def _multiply_outputs(layer: QuantLayer, matrix: Tensor, seen: Seen) -> None:
    """Multiply what a layer gives [O, ...] by a matrix float64 [O, O].

    seen: of its outputs before.  A BatchNorm then has their mean and variance and does nothing but add the bias.
    """
    module, bn = layer.module, layer.bn
    weight, bias = fold(module.weight, module.bias, bn)
    module.weight.copy_((matrix @ weight.double().flatten(1)).reshape(weight.shape))
    shift = None if bias is None else matrix @ bias.double()
    if bn is None:
        if module.bias is not None and shift is not None:
            module.bias.copy_(shift)
        return
    assert shift is not None
    mean = matrix @ seen.mean
    variance = ((matrix @ seen.covariance()) * matrix).sum(1)
    for value, found in ((bn.running_mean, mean - shift), (bn.running_var, variance), (bn.bias, mean)):
        assert value is not None
        value.copy_(found)
    bn.weight.copy_((variance.to(bn.weight) + bn.eps).sqrt())
    if module.bias is not None:
        module.bias.zero_()


def unforetold(covariance: Tensor) -> Tensor:
    """The sum of the variances that channels have left when those before them are known, of a covariance [C, C]."""
    return torch.linalg.cholesky(covariance).diagonal().square().sum()


class _Reader:
    """A layer that reads the stream, after its seen input."""

    def __init__(self, layer: QuantLayer, seen: Seen) -> None:
        weight, _ = fold(layer.module.weight, None, layer.bn)
        columns = by_input(layer.module, weight).double()
        self.columns, self.covariance = columns[0], seen.covariance()
        self.power = output_power(columns, self.covariance)
        self.bits, self.source = layer.bits, layer.source
        self.crest = seen.largest.amax() / self.covariance.diagonal().amax().sqrt()

    def cost(self) -> Tensor:
        """What errors of the stream's channels cost, [C, C]."""
        return torch.einsum("oip,ojp->ij", self.columns, self.columns) / self.power

    def noise(self, matrix: Tensor, inverse: Tensor) -> Tensor:
        """Of its own rounding and of the stream's."""
        columns = torch.einsum("oip,ij->ojp", self.columns, inverse)
        covariance = matrix @ self.covariance @ matrix.T
        largest = self.crest * covariance.diagonal().pow(POWER).mean().pow(1 / POWER).sqrt()
        total = input_step(largest, self.source).square() * columns.square().sum()
        if self.bits < EIGHT_BITS:
            steps = weight_steps(columns, self.bits)
            total = total + steps.square().sum() * unforetold(covariance) * columns.shape[2]
        return total / 12 / self.power


class _Maker:
    """A layer that makes part of the stream, after its seen input and what its errors cost."""

    def __init__(self, layer: QuantLayer, seen: Seen, cost: Tensor) -> None:
        weight, _ = fold(layer.module.weight, None, layer.bn)
        self.columns, self.bits, self.cost = by_input(layer.module, weight)[0].double(), layer.bits, cost
        covariance = seen.covariance()
        order = covariance.diagonal().argsort()
        self.inputs = unforetold(covariance[order][:, order]) * self.columns.shape[2]

    def noise(self, matrix: Tensor, inverse: Tensor) -> Tensor:
        """Of its rounding, in the readers."""
        steps = weight_steps(torch.einsum("oi,ikp->okp", matrix, self.columns), self.bits)
        return (steps.square() * ((self.cost @ inverse) * inverse).sum(0)).sum() * self.inputs / 12


@torch.no_grad()
def best_matrix(group: Group, seen: Mapping[str, Seen], contained: Mapping[str, set[str]]) -> tuple[Tensor, float]:
    """The matrix float64 [C, C] for what a group's makers give, and by how many decibels it lowers the noise.

    contained: which makers a tensor has added up, by operator name.  The unit matrix where nothing is gained.
    """
    readers = [(op, _Reader(layer_of(op), seen[op.inputs[0]])) for op in group.readers]
    rounded = [op for op in group.makers if layer_of(op).bits < EIGHT_BITS]
    makers = [_Maker(layer_of(op), seen[op.inputs[0]], _cost(op, readers, contained)) for op in rounded]
    parts: list[_Maker | _Reader] = [*makers, *(reader for _, reader in readers)]
    spread = torch.stack([seen[op.name].covariance().diagonal() for op in group.makers]).amax(0).sqrt()
    unit = torch.eye(len(spread)).to(spread)
    start = unit / spread.clamp_min(SMALL * float(spread.amax()))
    change = unit.clone().requires_grad_()
    optimiser = torch.optim.Adam([change], lr=RATE)

    def noise(matrix: Tensor) -> Tensor:
        inverse = torch.linalg.inv(matrix)
        return torch.stack([part.noise(matrix, inverse) for part in parts]).sum()

    with torch.enable_grad():
        for step in range(STEPS):
            optimiser.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimiser.zero_grad()
            noise(change @ start).log().backward()
            optimiser.step()
    gain = 10 * log10(float(noise(unit)) / float(noise(change @ start)))
    return (change @ start, gain) if gain > 0 else (unit, 0.0)


def _cost(maker: Op, readers: list[tuple[Op, _Reader]], contained: Mapping[str, set[str]]) -> Tensor:
    """What errors of a maker's outputs cost in all readers behind it, [C, C]."""
    return torch.stack([r.cost() for op, r in readers if maker.name in contained[op.inputs[0]]]).sum(0)
