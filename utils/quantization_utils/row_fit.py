"""Brings a single layer's output near the float network's, on single output positions: a product of matrices.

Output channels do not depend on each other, so each keeps what is best for it on images that nothing was learned from.
A layer with more weights a channel than there are positions to learn from, as a classifier has, could else learn the
images by heart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.quantization_utils.adaround import Grid, SoftRounding, with_scale
from utils.quantization_utils.blocks import Unit
from utils.quantization_utils.least_squares import FEW_STARTS, STARTS, TRUSTS, Quadratic, solve
from utils.quantization_utils.output_scales import ROWS, best_scales
from utils.quantization_utils.quant_modules import evaluated_bias
from utils.quantization_utils.quant_primitives import EIGHT_BITS, per_channel
from utils.quantization_utils.reconstruction_fit import Found, Patience, Report, Settings, adam
from utils.quantization_utils.rows import Rows, draw_positions, inputs_at, together
from utils.quantization_utils.side_by_side import SideBySide, passes_in_float, run_unit

PROBE_ROWS = 1 << 14
CLEARLY = 0.97  # share of the error of least squares that learned rounding may leave at most to replace them


def rows_of(unit: Unit, walk: SideBySide, grid: Grid, images: range, seed: int) -> Rows:
    """Output positions of a unit's only layer, what it reads there in the quantized network, and what it should answer.

    The layer's weights must still be the float network's.
    """
    module, (name,) = grid.layer.module, unit.inputs
    shape = walk.floating.shape(unit.target)[:-1]
    index = draw_positions(module, shape, images, seed)
    floats = Rows(inputs_at(module, (walk.floating, name), index, shape), torch.empty(0))
    answers = floats.product(_weights(grid), slice(None)) + grid.layer.integer_weights().bias[:, None]
    del floats
    targets = walk.floating.rows(unit.target, index).T.contiguous()
    lacking = walk.lacking(unit, lambda cache, branch: cache.rows(branch, index).T)
    if lacking is not None:
        targets += lacking
        if all(passes_in_float(op) for op in unit.ops if op not in unit.layers):
            answers += lacking
    return Rows(inputs_at(module, (walk.quantized, name), index, shape), targets, answers)


def _weights(grid: Grid) -> Tensor:
    """The float weights, folded."""
    return grid.ratio * per_channel(grid.scale, grid.ratio)


class _Error:
    """How far a unit's only layer leaves the unit's output from where it should be, on rows."""

    def __init__(self, unit: Unit, rows: Rows) -> None:
        self.unit, self.rows, self.name = unit, rows, unit.layers[0].name

    def __call__(self, weights: Tensor, bias: Tensor, columns: slice) -> Tensor:
        """Squared errors [O, r] with some weights [O, ...] and bias [O]."""
        product = self.rows.product(weights, columns) + bias[:, None]
        values = run_unit(self.unit, dict.fromkeys(self.unit.inputs), {self.name: lambda x: product})
        return (values[self.unit.target] - self.rows.targets[:, columns]).square()

    @torch.no_grad()
    def probe(self, weights: Tensor, bias: Tensor, most: int = PROBE_ROWS) -> Tensor:
        """Mean squared error by channel [O] on the first rows."""
        return self(weights, bias, slice(0, most)).mean(1)


@dataclass
class _Best:
    """The best found so far for every channel: bias and scale [O], integers [O, ...], their error [O].

    number: [O], of the option it is; -1: of none.
    """

    scale: Tensor
    integers: Tensor
    bias: Tensor
    losses: Tensor
    number: Tensor

    def offer(
        self, error: _Error, scale: Tensor, integers: Tensor, bias: Tensor, channels: Tensor, number: int = -1
    ) -> None:
        """Take over what leaves less error, of these channels (bool [O])."""
        losses = error.probe(integers * per_channel(scale, integers), bias)
        better = channels & (losses < self.losses)
        self.take(scale, integers, bias, better)
        self.losses = torch.where(better, losses, self.losses)
        self.number = torch.where(better, number, self.number)

    def take(self, scale: Tensor, integers: Tensor, bias: Tensor, channels: Tensor) -> None:
        """Take over some channels."""
        self.integers = torch.where(per_channel(channels, integers), integers, self.integers)
        self.scale, self.bias = torch.where(channels, scale, self.scale), torch.where(channels, bias, self.bias)


def fit_rows(
    unit: Unit, rows: Rows, others: Rows, grid: Grid, settings: Settings, report: Report, shifts: bool = False
) -> Found:
    """Scales, integers and, where it ``shifts``, biases for a unit's only layer.

    others: rows of images that are not learned from.  First by least squares where every channel can have a scale of
    its own, then, for ``settings.steps``, by learned rounding in the steps that were found.  That looks at the other
    rows often and keeps the best look, so it must beat least squares clearly.  Channels for which least squares stay
    are solved once more, in the way that was best for them, with all rows.
    """
    error, other_error, own = _Error(unit, rows), _Error(unit, others), evaluated_bias(grid.layer)
    grid = with_scale(grid, best_scales(grid, lambda weights: other_error.probe(weights, own, ROWS)))
    losses = other_error.probe(grid.nearest * per_channel(grid.scale, grid.ratio), own)
    best = _Best(grid.scale, grid.nearest, own, losses, torch.full_like(losses, -1, dtype=torch.int64))
    solvable = _is_solvable(rows, grid)
    if solvable:
        channels = grid.free.flatten(1).any(1) & (grid.factor != 0)
        for number, option in enumerate(_options(rows, grid, own, shifts, FEW_STARTS)):
            best.offer(other_error, *option, channels, number)
    learned = replace(best, number=torch.full_like(best.number, -1))
    steps = _learn(error, other_error, with_scale(grid, best.scale), learned, settings, report)
    clearly = learned.losses < (CLEARLY if solvable else 1.0) * best.losses
    best.take(learned.scale, learned.integers, learned.bias, clearly)
    if solvable:
        best.number = torch.where(clearly, -1, best.number)
        for number, option in enumerate(_options(together(rows, others), grid, own, shifts, STARTS, best.number)):
            best.take(*option, best.number == number)
    layer = unit.layers[0].name
    biases = {layer: best.bias} if shifts and solvable else {}
    return Found({layer: best.integers}, {layer: best.scale}, biases, {}, steps)


def _is_solvable(rows: Rows, grid: Grid) -> bool:
    """Whether least squares apply: answers are known, integers few and the same in all rows, a scale per channel."""
    alike = not isinstance(grid.high, Tensor)
    return rows.answers is not None and alike and grid.layer.bits < EIGHT_BITS and grid.layer.per_channel


@torch.no_grad()
def _options(
    rows: Rows, grid: Grid, own: Tensor, shifts: bool, starts: Sequence[float], chosen: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scales [O], integers [O, ...] and biases [O] of every solution, with the layer's own bias and the best one.

    chosen: number [O] of the one option that is asked for, by channel; all unless given.
    """
    assert rows.answers is not None
    quadratic = Quadratic.of(rows.inputs, rows.answers)
    weights, scales, bounds = _weights(grid).flatten(1).double(), grid.scale.double(), (grid.low, grid.high)
    biases = 2 if shifts else 1
    for number, trust in enumerate((None, *TRUSTS)):
        channels = None if chosen is None else chosen.div(biases, rounding_mode="floor") == number
        integers, scale, bias = solve(quadratic, weights, scales, bounds, trust, starts, channels)
        for choice in (own, bias.to(own))[:biases]:
            yield scale.to(own), integers.to(own).reshape(grid.ratio.shape), choice


def _learn(error: _Error, other_error: _Error, grid: Grid, best: _Best, settings: Settings, report: Report) -> int:
    """Learned rounding in the steps of the grid; returns the steps taken."""
    soft, patience, step = SoftRounding(grid), Patience(settings), -1
    optimiser = adam([soft.alpha], settings.lr)
    every = torch.ones_like(best.losses, dtype=torch.bool)
    bias, count = best.bias, error.rows.targets.shape[1]
    width = min(settings.positions, count)
    for step in range(settings.steps):
        first = min(step * width % count, count - width)
        loss = error(soft.weights(*settings.schedule(step)), bias, slice(first, first + width)).sum() / width
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if patience.due(step) or step + 1 == settings.steps:
            best.offer(other_error, grid.scale, soft.integers(), bias, every)
            report(step + 1, float(best.losses.sum()))
            if patience.over(step, float(best.losses.sum())):
                break
    return step + 1
