"""Learns roundings (and scales) that bring a unit's output near the float network's, from whole maps of images.

The loss is the squared error summed over channels and averaged over images and positions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.quantization_utils.adaround import Grid, SoftRounding
from utils.quantization_utils.blocks import Unit
from utils.quantization_utils.output_scales import rescaled
from utils.quantization_utils.quant_modules import Quantizer, evaluated_bias
from utils.quantization_utils.quant_primitives import (
    MIN_ACTIVATION_SCALE,
    FakeQuantizeLearned,
    dense,
    int_range,
)
from utils.quantization_utils.side_by_side import SideBySide, run_unit
from utils.seeded import permutation

CHECKS = 20
LEAST_IMAGES, POSITIONS_OF_MAPS = 4, 4  # of whole maps
SETTLED = 0.999  # a check that lowers the loss by less than 0.1 % found nothing new
DECIDED = 0.005
Report = Callable[[int, float], None]  # step and loss


@dataclass(frozen=True)
class Settings:
    """How to reconstruct.  The defaults suit a CPU; :meth:`published` is what papers report.

    granularity: ``layer`` (AdaRound) or ``block`` (BRECQ, arXiv 2102.05426, with the plain squared error).
    steps: of learning per unit, 0: only what needs none.  positions: output positions per step where a unit is one
    layer, drawn from all images.  Blocks take whole maps of 4 to ``batch`` images, of about four times as many
    positions, as those of an image resemble each other.  0: whole maps of ``batch`` images always.  lr: of Adam on the
    rounding variables.
    warmup: first share of the steps without regulariser; beta goes linearly from ``beta_start`` to ``beta_end`` in the
    rest.  patience: twentieths of the steps without a gain of 0.1 % before a unit is done; 0: all steps.
    learn_activation_scales: None: for blocks only.  scale_lr: of Adam on them, falling as a cosine.
    negligible: units whose relative error is not above this are left as they are.
    cache_gib: memory for activations; more is refused.  state: file that finished units are kept in.
    """

    granularity: Literal["layer", "block"] = "layer"
    steps: int = 2000
    batch: int = 32
    positions: int = 2048
    lr: float = 0.01
    seed: int = 0
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    regulariser: float = 0.01
    patience: int = 6
    learn_activation_scales: bool | None = None
    scale_lr: float = 4e-5
    negligible: float = 1e-6
    cache_gib: float = 8.0
    state: Path | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("layer", "block"):
            raise UserError(f"reconstruction by {self.granularity!r} does not exist; give 'layer' or 'block'")
        for name, least in (("steps", 0), ("batch", 1)):
            if vars(self)[name] < least:
                raise UserError(f"reconstruction got {name} {vars(self)[name]}; give at least {least}")
        if self.positions < 0:
            raise UserError(f"reconstruction got positions {self.positions}; give a positive number, or 0 for all")
        if not 0 <= self.warmup < 1:
            raise UserError(f"reconstruction got warmup {self.warmup}; give a share of the steps, from 0 to below 1")

    @classmethod
    def published(cls, granularity: Literal["layer", "block"] = "layer", state: Path | None = None) -> "Settings":
        """10,000 steps of 64 images per layer, or 20,000 steps of 32 images per block; lr 1e-3; no early stop."""
        steps, batch = (10_000, 64) if granularity == "layer" else (20_000, 32)
        return cls(granularity, steps, batch, positions=0, lr=1e-3, patience=0, state=state)

    def images(self, unit: Unit) -> int:
        """Images per step whose whole maps a unit is fitted to."""
        if self.positions == 0:
            return self.batch
        largest = max(prod(op.shape[1:]) for op in unit.ops if len(op.shape) > 1)
        return min(self.batch, max(LEAST_IMAGES, POSITIONS_OF_MAPS * self.positions // largest))

    @property
    def learns_scales(self) -> bool:
        """Whether activation scales are learned."""
        return self.granularity == "block" if self.learn_activation_scales is None else self.learn_activation_scales

    def schedule(self, step: int) -> tuple[float, float]:
        """Beta and strength of the regulariser at a step."""
        start = self.warmup * self.steps
        if step < start:
            return self.beta_start, 0.0
        share = (step - start) / max(1.0, self.steps - start)
        return self.beta_start + (self.beta_end - self.beta_start) * share, self.regulariser


class Patience:
    """Says when the loss has settled; the warm-up does not count."""

    def __init__(self, settings: Settings) -> None:
        self.every = max(1, settings.steps // CHECKS)
        self.first, self.most = settings.warmup * settings.steps, settings.patience
        self.best, self.idle = math.inf, 0

    def due(self, step: int) -> bool:
        """Whether the loss is to be looked at."""
        return (step + 1) % self.every == 0

    def over(self, step: int, loss: float) -> bool:
        """Whether learning should end, after a look at the loss."""
        if step < self.first or self.most == 0:
            return False
        self.idle = 0 if loss < SETTLED * self.best else self.idle + 1
        self.best = min(self.best, loss)
        return self.idle >= self.most


def adam(parameters: Sequence[Tensor], lr: float) -> torch.optim.Adam:
    """The optimiser of all that is learned here."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


@dataclass(frozen=True)
class Found:
    """What a search found; everything by operator name.

    integers: of layers, [O, ...].  weight_scales, biases: [O], of layers' folded weights, where they changed.  scales:
    of activation quantizers.  steps: taken.
    """

    integers: dict[str, Tensor]
    weight_scales: dict[str, Tensor]
    biases: dict[str, Tensor]
    scales: dict[str, Tensor]
    steps: int


def fit_images(
    unit: Unit, walk: SideBySide, grids: Mapping[str, Grid], settings: Settings, seed: int, report: Report
) -> Found:
    """Roundings of a unit's layers and its activation scales, all together; whole maps of ``batch`` images a step.

    grids: by operator name.  A unit is done early once its weights are decided and the loss has settled.
    """
    grids = rescaled(unit, walk, grids, seed)
    joint = _Joint(unit, walk, grids, settings)
    patience, total = Patience(settings), 0.0
    count = len(walk.learned)
    batch = min(settings.images(unit), count)
    per_epoch, order, step = count // batch, torch.empty(0), -1
    for step in range(settings.steps):
        if step % per_epoch == 0:
            order = torch.from_numpy(permutation(count, seed, step // per_epoch))
        start = step % per_epoch * batch
        total += joint.step(step, order[start : start + batch])
        if patience.due(step):
            report(step + 1, total / patience.every)
            if patience.over(step, total / patience.every) and joint.undecided() < DECIDED:
                break
            total = 0.0
    integers = {name: soft.integers() for name, soft in joint.soft.items()}
    weight_scales = {name: grid.scale for name, grid in grids.items()}
    return Found(integers, weight_scales, {}, {name: joint.limited(name).detach() for name in joint.scales}, step + 1)


class _Joint:
    """The variables of a unit and one step of their optimisers."""

    def __init__(self, unit: Unit, walk: SideBySide, grids: Mapping[str, Grid], settings: Settings) -> None:
        self.unit, self.walk, self.settings, self.grids = unit, walk, settings, grids
        self.soft = {name: SoftRounding(grid) for name, grid in grids.items()}
        self.biases = {name: evaluated_bias(grid.layer) for name, grid in grids.items()}
        self.quantizers = _learnable(unit) if settings.learns_scales else {}
        self.scales = {name: nn.Parameter(q.scale.clone()) for name, q in self.quantizers.items()}
        self.optimisers = [adam([soft.alpha for soft in self.soft.values()], settings.lr)]
        if self.scales:
            self.optimisers.append(adam(list(self.scales.values()), settings.scale_lr))
        self.channels = next(op.shape[0] for op in unit.ops if op.name == unit.target)

    def step(self, number: int, images: Tensor) -> float:
        """One step on some images; returns the loss."""
        walk, unit = self.walk, self.unit
        schedule = self.settings.schedule(number)
        replaced: dict[str, Callable[..., Tensor]] = {
            name: partial(self._layer, name, soft.weights(*schedule)) for name, soft in self.soft.items()
        }
        replaced |= {name: partial(self._quantize, name) for name in self.scales}
        values = run_unit(unit, walk.inputs(unit, images), replaced)
        error = values[unit.target] - walk.wanted(unit, images)
        loss = error.square().sum() * (self.channels / error.numel())
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        falling = (1 + math.cos(math.pi * number / self.settings.steps)) / 2
        for optimiser in self.optimisers[1:]:
            optimiser.param_groups[0]["lr"] = self.settings.scale_lr * falling
        for optimiser in self.optimisers:
            optimiser.step()
        return float(loss.detach())

    def undecided(self) -> float:
        """The largest share of weights of a layer that are still between two integers."""
        return max((soft.undecided() for soft in self.soft.values()), default=0.0)

    def limited(self, name: str) -> Tensor:
        """A learned scale, not so large that codes would lie above a ReLU6's ceiling."""
        quantizer = self.quantizers[name]
        most = None if quantizer.ceiling is None else quantizer.ceiling / _levels(quantizer)
        return self.scales[name].clamp(MIN_ACTIVATION_SCALE, most)

    def _layer(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        return self.grids[name].layer.apply_weights(x, weight, self.biases[name])

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        lo, hi = int_range(self.quantizers[name].bits, self.quantizers[name].signed)
        lo = 0 if self.quantizers[name].relu else lo
        result: Tensor = FakeQuantizeLearned.apply(dense(x), self.limited(name), lo, hi, 1.0)
        return result


def _levels(quantizer: Quantizer) -> int:
    return int_range(quantizer.bits, quantizer.signed)[1]


def _learnable(unit: Unit) -> dict[str, Quantizer]:
    """Quantizers with a scale worth learning; those of sums fix how the branches are rounded and stay."""
    kinds = {op.name: op.kind for op in unit.ops}
    return {
        op.name: op.module
        for op in unit.ops
        if isinstance(op.module, Quantizer) and _is_narrow(op.module) and kinds.get(op.inputs[0]) != "add"
    }


def _is_narrow(quantizer: Quantizer) -> bool:
    return quantizer.bits <= 8 and quantizer.learned is None and float(quantizer.x_max) > 0


def take_scale(quantizer: Quantizer, scale: Tensor) -> None:
    """Give a quantizer the range that has this scale."""
    reach = scale * _levels(quantizer)
    quantizer.set_range(-reach if quantizer.signed else torch.zeros_like(reach), reach)
