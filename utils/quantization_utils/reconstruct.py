"""Reconstruction: after calibration, round the weights so that every layer or block answers like the float network.

One pass through the network.  A unit (:mod:`blocks`) reads what the already reconstructed part in front of it gives
and is held to what the float network gives at the same place.  Nothing is ever worse than rounding to the nearest: a
unit that did not gain keeps its weights and ranges as they were.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import UserError, not_finite
from utils.quantization_utils.adaround import Grid, pin_grid, with_scale, write_integers
from utils.quantization_utils.bias_correction import bias_parameter, set_bias, shared_biases
from utils.quantization_utils.blocks import Unit, block_units, layer_units
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer, QuantLayer
from utils.quantization_utils.quant_primitives import per_channel
from utils.quantization_utils.reconstruction_fit import Found, Report, Settings, fit_images, take_scale
from utils.quantization_utils.reconstruction_state import FinishedUnits
from utils.quantization_utils.row_fit import fit_rows, rows_of
from utils.quantization_utils.rows import has_rows
from utils.quantization_utils.side_by_side import SideBySide, peak_bytes
from utils.seeded import integers as random_integers

__all__ = ["LayerResult", "Settings", "reconstruct"]

GIB = 1 << 30
TINY = 1e-30
FOUND = ("integers", "weight_scales", "biases", "scales")  # what a state file keeps of a unit


@dataclass(frozen=True)
class LayerResult:
    """What became of a unit.

    name: of its layer, or first and last layer.  loss_nearest, loss_after: squared error of its output over the square
    of the float output, with nearest rounding and in the end, on all images.  steps: taken.  flipped: share of its
    weights that are not rounded to the nearest.
    """

    name: str
    loss_nearest: float
    loss_after: float
    steps: int
    seconds: float
    flipped: float


def reconstruct(
    model: QuantizedModel,
    images: Tensor | Iterable[Tensor],
    settings: Settings = Settings(),  # noqa: B008  frozen
    progress: Callable[[LayerResult], None] | None = None,
) -> list[LayerResult]:
    """Round the weights of a calibrated model, layer by layer or block by block; returns one result per unit.

    images: normalised float32 [N, C, H, W], or batches of it, on the model's device; all are kept in memory, and of
    the activations what :class:`SideBySide` needs.  The float weights are changed: they lie on the grid afterwards,
    with its scale in ``QuantLayer.learned``; biases are moved.  Layers that run more than once, or whose weights are
    computed, are left alone.  progress: called after every unit.  The same seed and number of threads give the same
    weights.  With ``settings.state`` finished units are kept in that file, and a later call goes on from there.

    Raises UserError for a model that is not calibrated, no images, too little memory (``settings.cache_gib``), values
    that are not finite, and a state file of another run.
    """
    job = _Job(model, images, settings)
    results = []
    for position in range(len(job.units)):
        result = job.unit(position)
        if result is not None:
            results.append(result)
            if progress is not None:
                progress(result)
    return results


def most_images(model: QuantizedModel, settings: Settings) -> int:
    """How many images' activations fit into the memory that the settings allow."""
    return int(settings.cache_gib * GIB / peak_bytes(model, _units(model, settings), 1))


def _units(model: QuantizedModel, settings: Settings) -> list[Unit]:
    return (layer_units if settings.granularity == "layer" else block_units)(model.ops)


class _Job:
    """Everything that lasts from unit to unit."""

    def __init__(self, model: QuantizedModel, images: Tensor | Iterable[Tensor], settings: Settings) -> None:
        if not any(quantizer.enabled for quantizer in model.activation_quantizers().values()):
            raise UserError("the model has no activation ranges yet; call calibrate(model, batches) before reconstruct")
        self.model, self.settings = model.eval(), settings
        self.units = _units(model, settings)
        batches = [images] if isinstance(images, Tensor) else list(images)
        if sum(len(batch) for batch in batches) == 0:
            raise UserError("reconstruction got 0 images; give at least one, for example --calib-images 256")
        together = torch.cat(batches)
        self._check_memory(len(together))
        self.finished = FinishedUnits(settings, model, together)
        self.walk = SideBySide(model, self.units, together)
        self.alone = _layers_on_their_own(model)
        self.shared_biases = shared_biases(model)

    def _check_memory(self, count: int) -> None:
        most = most_images(self.model, self.settings)
        if count > most:
            needed = peak_bytes(self.model, self.units, count) / GIB
            raise UserError(
                f"the activations of {count} images take {needed:.1f} GiB, the limit is "
                f"{self.settings.cache_gib:g} GiB; give at most {most} images, or raise cache_gib"
            )

    def unit(self, position: int) -> LayerResult | None:
        """Reconstruct a unit and make what the units behind it read; None for a unit without a layer to round."""
        unit, walk = self.units[position], self.walk
        walk.float_outputs(unit)
        layers = {op.name: op.module for op in unit.layers if op.name in self.alone}
        result = None
        if layers:
            result = self._layers(position, {name: m for name, m in layers.items() if isinstance(m, QuantLayer)})
        walk.quantized_outputs(unit)
        walk.forget(position)
        return result

    def _layers(self, position: int, layers: dict[str, QuantLayer]) -> LayerResult:
        unit = self.units[position]
        known = self.finished.find(unit.name)
        if known is not None:
            found = Found(**{key: known[key] for key in FOUND}, steps=known["result"]["steps"])
            _apply(unit, {name: pin_grid(layer) for name, layer in layers.items()}, found)
            return LayerResult(**known["result"])
        started = time.perf_counter()
        trial = _Trial(self.walk, unit, layers)
        if trial.worthwhile(self.settings):
            name = f"{position + 1}/{len(self.units)} {unit.name}"
            with tqdm(desc=name, total=self.settings.steps or None, unit="step", leave=False, disable=None) as bar:
                self._improve(trial, position, partial(_show, bar, trial))
        result = trial.result(time.perf_counter() - started)
        integers = {name: values.to(torch.int16) for name, values in trial.kept.integers.items()}
        kept = {key: vars(trial.kept)[key] for key in FOUND} | {"integers": integers, "result": asdict(result)}
        self.finished.keep(unit.name, kept)
        return result

    def _improve(self, trial: "_Trial", position: int, report: Report) -> None:
        unit, settings = trial.unit, self.settings
        seed = int(random_integers(1 << 31, settings.seed, position)[0])
        grid, *others = trial.grids.values()
        single = not others and len(unit.layers) == 1 and has_rows(unit.layers[0]) and not settings.learns_scales
        first = tuple(unit.layers[0].inputs) == unit.inputs  # a block may quantize its input before that
        if single and first and settings.positions:
            learned, checked = (
                rows_of(unit, self.walk, grid, images, seed) for images in (self.walk.learned, self.walk.checked)
            )
            shifts = unit.layers[0].name not in self.shared_biases and bias_parameter(grid.layer) is not None
            found = fit_rows(unit, learned, checked, grid, settings, report, shifts)
        else:
            found = fit_images(unit, self.walk, trial.grids, settings, seed, report)
        trial.settle(found, by_channel=single)


class _Trial:
    """A unit with nearest rounding, what was found for it, and the better of both."""

    def __init__(self, walk: SideBySide, unit: Unit, layers: dict[str, QuantLayer]) -> None:
        self.walk, self.unit = walk, unit
        self.grids = {name: pin_grid(layer) for name, layer in layers.items()}
        self.power = walk.power(unit)
        self.before, self.checked = walk.errors(unit)
        self.after = self.before
        if not torch.isfinite(self.before.sum() + self.power.sum()):
            raise not_finite("reconstruction", repr(unit.name))
        self.steps = 0
        self.kept = Found({}, {}, {}, {}, 0)
        self.biases = {name: grid.layer.integer_weights().bias for name, grid in self.grids.items()}

    def worthwhile(self, settings: Settings) -> bool:
        """Whether there is an error to lower and something to choose."""
        choices = settings.learns_scales or any(bool(grid.free.any()) for grid in self.grids.values())
        return choices and self.relative(self.before) > settings.negligible

    def relative(self, errors: Tensor) -> float:
        """Errors per channel as a share of the float output's squares."""
        return float(errors.sum() / self.power.sum().clamp_min(TINY))

    def relative_loss(self, loss: float) -> float:
        """A loss of the optimiser (summed over channels, averaged over images and positions) as such a share."""
        shape = next(op.shape for op in self.unit.ops if op.name == self.unit.target)
        return loss * self.walk.count * prod(shape) / shape[0] / max(float(self.power.sum()), TINY)

    def settle(self, found: Found, by_channel: bool) -> None:
        """Keep what was found where it lowers the error: all of it, or (one layer, same ranges) channel by channel.

        It must lower the error over all images and that of the checked ones alone.
        """
        self.steps = found.steps
        weights = {name: grid.layer.module.weight.detach().clone() for name, grid in self.grids.items()}
        biases = {name: bias_parameter(grid.layer) for name, grid in self.grids.items()}
        originals = [(bias, bias.detach().clone()) for bias in biases.values() if bias is not None]
        quantizers = {op.module for op in self.unit.ops if isinstance(op.module, Quantizer)}
        ranges = {quantizer: (quantizer.x_min.clone(), quantizer.x_max.clone()) for quantizer in quantizers}
        for option in [found, replace(found, scales={})] if found.scales else [found]:
            _apply(self.unit, self.grids, option)
            kept, (errors, checked) = option, self.walk.errors(self.unit)
            if by_channel:
                better = (errors < self.before) & (checked < self.checked)
                errors, checked = torch.where(better, errors, self.before), torch.where(better, checked, self.checked)
                kept = self._mixed(option, better)
                _apply(self.unit, self.grids, kept)
            if errors.sum() < self.before.sum() and checked.sum() < self.checked.sum():
                self.kept, self.after = kept, errors
                return
            with torch.no_grad():
                for name, weight in weights.items():
                    self.grids[name].layer.module.weight.copy_(weight)
                    with_scale(self.grids[name], self.grids[name].scale)
                for bias, original in originals:
                    bias.copy_(original)
            for quantizer, (x_min, x_max) in ranges.items():
                quantizer.set_range(x_min, x_max)

    def _mixed(self, found: Found, better: Tensor) -> Found:
        """What was found for the better channels, the rest as it was."""
        ((name, integers),) = found.integers.items()
        grid, better = self.grids[name], better.to(integers.device)
        mixed = torch.where(per_channel(better, integers), integers, grid.nearest)
        scales = {key: torch.where(better, scale, grid.scale) for key, scale in found.weight_scales.items()}
        biases = {key: torch.where(better, bias, self.biases[key]) for key, bias in found.biases.items()}
        return Found({name: mixed}, scales, biases, {}, found.steps)

    def result(self, seconds: float) -> LayerResult:
        """Numbers of the unit as it stands."""
        flipped = [int((n != self.grids[name].nearest).sum()) for name, n in self.kept.integers.items()]
        weights = sum(grid.ratio.numel() for grid in self.grids.values())
        before, after = self.relative(self.before), self.relative(self.after)
        return LayerResult(self.unit.name, before, after, self.steps, seconds, sum(flipped) / weights)


def _apply(unit: Unit, grids: Mapping[str, Grid], found: Found) -> None:
    """Write integers, biases and ranges into the model."""
    quantizers = {op.name: op.module for op in unit.ops if isinstance(op.module, Quantizer)}
    for name, bias in found.biases.items():
        set_bias(grids[name].layer, bias.to(grids[name].scale))
    for name, integers in found.integers.items():
        write_integers(with_scale(grids[name], found.weight_scales.get(name, grids[name].scale)), integers)
    for name, scale in found.scales.items():
        take_scale(quantizers[name], scale)


def _show(bar: "tqdm[Any]", trial: _Trial, step: int, loss: float) -> None:
    bar.update(step - bar.n)
    bar.set_postfix(loss=f"{trial.relative_loss(loss):.2e}", nearest=f"{trial.relative(trial.before):.2e}")


def _layers_on_their_own(model: QuantizedModel) -> set[str]:
    """Layers (operator names) that run once and whose weights are parameters of nobody else."""
    layers = {op.name: op.module.module for op in model.ops if isinstance(op.module, QuantLayer)}
    uses = Counter(id(module.weight) for module in layers.values() if isinstance(module.weight, nn.Parameter))
    return {name for name, module in layers.items() if uses[id(module.weight)] == 1}
