"""Integers, scales and biases of a layer by least squares on what it reads and should answer.

With ``x`` what the quantized layer reads and ``y`` what it should answer, the mean of ``|s z x + b - y|^2`` over output
positions is a quadratic of the integers ``z``.  Bias and scale have closed forms.  The integers start from rounding
column by column, each carrying the error of those before it (:func:`nearest_plane`), and then descend one coordinate at
a time, the scale following (:func:`descend`).  Correlated inputs make this far better than rounding each weight alone.

Sources: GPTQ, arXiv 2210.17323, which is Babai's nearest plane algorithm (arXiv 2507.18553); COMQ, arXiv 2403.07134
(coordinate descent with scales in closed form); GPTAQ, arXiv 2504.02692 (answers of the float network to its own
inputs as targets, in part).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

# Share of the float network's answers in the targets, and ridge: see Quadratic.near.
TRUSTS = tuple(product((0.5, 1.0), (0.02, 0.1, 0.5, 2.0)))
FEW_STARTS, STARTS = (0.85, 1.0, 1.15), (0.7, 0.775, 0.85, 0.925, 1.0, 1.075, 1.15, 1.25)  # of the scale
SWEEPS, UNSETTLED = 12, 1e-3  # most sweeps; share of integers that must change for another one
MOST_COLUMNS = 2048  # of nearest_plane, whose time grows with their cube
COLUMNS = 128  # whose changes reach the other columns together
TINY = 1e-12


@dataclass(frozen=True)
class Quadratic:
    """Squared error of a layer in its weights, by output channel; biases are those that leave no mean error.

    Float64.  gram: [G, K, K], second moments of the inputs of each group about their means (K: inputs of an output
    position).  cross: [O, K], of targets and inputs.  inputs: [G, K], targets: [O], the means.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "Quadratic":
        """From output positions: inputs [G, K, R] and targets [O, R], float32."""
        groups, _, count = inputs.shape
        mean, wanted = inputs.mean(2), targets.mean(1)
        centred = inputs - mean[:, :, None]
        rest = (targets - wanted[:, None]).reshape(groups, -1, count)
        gram, cross = (part @ centred.transpose(1, 2) / count for part in (centred, rest))
        return cls(gram.double(), cross.flatten(0, 1).double(), mean.double(), wanted.double())

    def times(self, weights: Tensor) -> Tensor:
        """Every row of weights [O, K] times the second moments of its group."""
        groups, size, _ = self.gram.shape
        return (weights.reshape(groups, -1, size) @ self.gram).reshape(weights.shape)

    def error(self, weights: Tensor) -> Tensor:
        """The squared error [O] that weights [O, K] leave, less that of zeros, with the best bias for each."""
        return ((self.times(weights) - 2 * self.cross) * weights).sum(1)

    def bias(self, weights: Tensor) -> Tensor:
        """The bias [O] without a mean error for weights [O, K]."""
        groups, size, _ = self.gram.shape
        return self.targets - (weights.reshape(groups, -1, size) @ self.inputs[:, :, None]).flatten()

    def best_scale(self, integers: Tensor, scale: Tensor) -> Tensor:
        """The scale [O] with the least error for integers [O, K]; ``scale`` where there is no positive one."""
        overlap, norm = (integers * self.cross).sum(1), (self.times(integers) * integers).sum(1)
        return torch.where((overlap > 0) & (norm > 0), overlap / norm.clamp_min(TINY), scale)

    def near(self, weights: Tensor, share: float, ridge: float) -> "Quadratic":
        """A quadratic that also holds the weights near some weights [O, K]: few images are easily learned by heart.

        share: of the targets; the rest are the answers of these weights to the same inputs.  ridge: pull on each
        weight, as a part of its own second moment.
        """
        gram = self.gram + ridge * torch.diag_embed(self._squares())
        held = replace(self, gram=gram)
        own = held.times(weights)
        return replace(held, cross=share * (self.cross + own - self.times(weights)) + (1 - share) * own)

    def part(self, channels: Tensor) -> "Quadratic":
        """Some output channels (bool [O]) of a layer of one group."""
        return replace(self, cross=self.cross[channels], targets=self.targets[channels])

    def repeated(self, count: int) -> "Quadratic":
        """Every output channel ``count`` times, one after the other."""
        cross, targets = (part.repeat_interleave(count, 0) for part in (self.cross, self.targets))
        return replace(self, cross=cross, targets=targets)

    def _squares(self) -> Tensor:
        return torch.diagonal(self.gram, dim1=1, dim2=2)


def nearest_plane(quadratic: Quadratic, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Integers [O, K] for scales [O], column after column from the one with the largest moment on.

    bounds: lowest and highest integer.  Each column is rounded where the error of those before it is made up for best.
    Only for layers of one group.
    """
    (gram,) = quadratic.gram
    order = torch.argsort(gram.diagonal())
    squares = gram.diagonal()[order]
    damped = gram[order][:, order] + torch.diag(1e-6 * squares + TINY * (1 + squares.mean()))
    upper = torch.linalg.cholesky(damped).T
    best = torch.cholesky_solve(quadratic.cross[:, order].T, upper, upper=True).T
    integers = torch.zeros_like(best)
    error = torch.zeros_like(best)  # of the weights of the columns that are done
    for k in range(len(order) - 1, -1, -1):
        wanted = best[:, k] + error[:, k + 1 :] @ upper[k, k + 1 :] / upper[k, k]
        integers[:, k] = (wanted / scale).round().clamp(*bounds)
        error[:, k] = best[:, k] - scale * integers[:, k]
    return integers[:, torch.argsort(order)]


def descend(quadratic: Quadratic, integers: Tensor, scale: Tensor, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Integers [O, K] and scales [O] from which no change of a single integer helps much.

    bounds: lowest and highest integer.  The error never rises.  It stops at 12 sweeps over all columns, or when one
    changes less than 0.1 % of the integers.
    """
    groups, size, _ = quadratic.gram.shape
    integers = integers.clone()
    squares = torch.diagonal(quadratic.gram, dim1=1, dim2=2).repeat_interleave(len(integers) // groups, 0)
    for _ in range(SWEEPS):
        before = integers.clone()
        wanted, product = quadratic.cross / scale[:, None], quadratic.times(integers)
        for start in range(0, size, COLUMNS):
            columns = slice(start, min(start + COLUMNS, size))
            _sweep(quadratic, integers, wanted, product, squares, columns, bounds)
        scale = quadratic.best_scale(integers, scale)
        if int((integers != before).sum()) <= UNSETTLED * integers.numel():
            break
    return integers, scale


def _sweep(
    quadratic: Quadratic,
    integers: Tensor,
    wanted: Tensor,
    product: Tensor,
    squares: Tensor,
    columns: slice,
    bounds: tuple[int, int],
) -> None:
    """One sweep over some columns, in place; ``product`` is kept equal to ``quadratic.times(integers)``."""
    groups = len(quadratic.gram)
    gram = quadratic.gram[:, columns, columns]
    local, old = product[:, columns].clone(), integers[:, columns].clone()
    for i, k in enumerate(range(columns.start, columns.stop)):
        square = squares[:, k]
        best = (integers[:, k] + (wanted[:, k] - local[:, i]) / square.clamp_min(TINY)).round_().clamp_(*bounds)
        best = torch.where(square > TINY, best, integers[:, k])
        change = (best - integers[:, k]).reshape(groups, -1, 1)
        local += (change * gram[:, None, i]).reshape(local.shape)
        integers[:, k] = best
    changed = (integers[:, columns] - old).reshape(groups, -1, columns.stop - columns.start)
    product += (changed @ quadratic.gram[:, columns]).reshape(product.shape)


def solve(
    quadratic: Quadratic,
    weights: Tensor,
    scale: Tensor,
    bounds: tuple[int, int],
    trust: tuple[float, float] | None,
    starts: Sequence[float] = STARTS,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [O, K], scales [O] and biases [O], float64, with the least error that any of some starts leads to.

    weights: float [O, K].  scale: [O], a good one for plain rounding; starts: factors of it.  bounds: lowest and
    highest integer.  trust: share and ridge of :meth:`Quadratic.near`; None: plain rounding with the best bias.
    channels: bool [O], those to solve for, all unless given; of the others nothing is promised.
    """
    integers, found = (weights / scale[:, None]).round().clamp(*bounds), scale
    if trust is not None:
        held = quadratic.near(weights, *trust)
        if channels is None or len(held.gram) > 1:
            integers, found = _best_start(held, weights, scale, bounds, starts)
        elif bool(channels.any()):
            found = scale.clone()
            integers[channels], found[channels] = _best_start(
                held.part(channels), weights[channels], scale[channels], bounds, starts
            )
    return integers, found, quadratic.bias(integers * found[:, None])


def _best_start(
    quadratic: Quadratic, weights: Tensor, scale: Tensor, bounds: tuple[int, int], starts: Sequence[float]
) -> tuple[Tensor, Tensor]:
    rows, size = weights.shape
    scales = (scale[:, None] * scale.new_tensor(starts)).flatten()
    held = quadratic.repeated(len(starts))
    if len(held.gram) == 1 and size <= MOST_COLUMNS:
        first = nearest_plane(held, scales, bounds)
    else:
        first = (weights.repeat_interleave(len(starts), 0) / scales[:, None]).round().clamp(*bounds)
    integers, found = descend(held, first, held.best_scale(first, scales), bounds)
    errors = held.error(integers * found[:, None]).reshape(rows, -1)
    best = errors.argmin(1) + torch.arange(rows, device=errors.device) * len(starts)
    return integers[best], found[best]
