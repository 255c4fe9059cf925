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

from collections.abc import Iterable
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor

from utils.quantization_utils.channel_groups import Group, by_group, find_groups, layers_of
from utils.quantization_utils.channel_statistics import Seen, input_step, observe, output_power, weight_steps
from utils.quantization_utils.equalize import by_input, scale_outputs
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer

LARGEST = 8.0  # factor up or down
HARDLY = 0.001  # share of values at a ceiling that may be lost
STEPS, RATE = 200, 0.05  # of Adam on log c


@dataclass(frozen=True)
class Balanced:
    """groups: of tensors that share their factors; decibels: by how much the objective fell, on average."""

    groups: int
    decibels: float


@torch.no_grad()
def balance(model: QuantizedModel, batches: Iterable[Tensor]) -> Balanced:
    """Scale channels of the float network in place; its function stays, but for what a ceiling no longer cuts off.

    batches: normalised float32 [N, C, H, W] on the model's device, of which the first 128 images count.  Calibrate
    afterwards.  Raises UserError for values that are not finite.
    """
    groups = find_groups(model)
    wanted: dict[str, float | None] = {name: None for group in groups for name, _ in group.gaining()}
    seen = observe(
        model, batches, wanted | dict(ceiling for group in groups for ceiling in group.ceilings), "balancing"
    )
    gains = []
    for group in groups:
        factors, gain = best_factors(group, seen)
        gains.append(gain)
        for layer in layers_of(group.makers):
            scale_outputs(layer, (1 / factors).to(layer.module.weight))
        for layer in layers_of(group.readers):
            columns = by_input(layer.module)
            columns.mul_(by_group(factors, columns).to(columns))
    return Balanced(len(groups), sum(gains) / max(1, len(gains)))


class _Noise:
    """Noise of a reader's output behind its rounding and that of its input, as a share of the output's variance."""

    def __init__(self, layer: QuantLayer, seen: Seen) -> None:
        weight, _ = fold(layer.module.weight, None, layer.bn)
        self.columns = by_input(layer.module, weight).double()
        covariance = seen.covariance()
        self.unforetold = 1 / torch.linalg.inv(covariance).diagonal()
        self.largest, self.source, self.bits = seen.largest, layer.source, layer.bits
        self.power = output_power(self.columns, covariance)

    def __call__(self, factors: Tensor) -> Tensor:
        """For factors [I] of the weights' columns."""
        scaled = self.columns * by_group(factors, self.columns)
        positions = scaled.shape[3]
        inputs = by_group(self.unforetold / factors.square(), self.columns).sum((1, 2, 3)) * positions
        rounding = weight_steps(scaled, self.bits).square().sum(1) @ inputs
        step = input_step((self.largest / factors).amax(), self.source)
        return (rounding + step.square() * scaled.square().sum()) / 12 / self.power


@torch.no_grad()
def best_factors(group: Group, seen: dict[str, Seen]) -> tuple[Tensor, float]:
    """Factors float64 [C] of the weights that read a group, and by how many decibels they lower the noise."""
    noises = [_Noise(layer, seen[name]) for name, layer in group.gaining()]
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
