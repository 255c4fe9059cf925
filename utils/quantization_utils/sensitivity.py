"""Sensitivities: the damage that quantization does, by layer and bit width, for the search of bit widths.

Metrics, all on the same few images, all above the float network (with BatchNorms folded):

* ``trace`` (default): mean Hessian trace of the layer's folded weights times the squared error of those weights, as
  in HAWQ-V2 and V3.  ``trace+activations``: plus the same product of the tensor the layer reads.
* ``fisher``: the empirical Fisher's diagonal instead of the Hessian, weight by weight.
* ``loss``, ``kl``, ``sqnr``: what happens to the loss, to the output distribution (Kullback-Leibler divergence), and
  to the logits (noise over signal) when this layer alone is quantized, its weights and the tensor it reads.

``trace`` and ``fisher`` speak of weights, so layers that share an activation quantizer need no special care; what the
others, ``trace+activations`` among them, say of a shared tensor is about one reader at a time.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.atomic_file import write_text
from utils.errors import UserError
from utils.quantization_utils.hessian_trace import hessian_traces, input_name, new_sums
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quantization_errors import activation_errors, ranges_at, weight_errors
from utils.quantization_utils.sensitivity_images import compare_outputs, fisher, new_values, summarise
from utils.quantization_utils.sensitivity_state import Labelled, Progress, Settings, digest, settings_given
from utils.quantization_utils.single_layer import Ranges, require_calibrated, sites, untouched

__all__ = ["METRICS", "Sensitivities", "Settings", "measure"]

TRACE, TRACE_ACTIVATIONS = "trace", "trace+activations"
TRACES = (TRACE, TRACE_ACTIVATIONS)
METRICS = (*TRACES, "fisher", "loss", "kl", "sqnr")
FORMAT, VERSION = "hawq sensitivities", 1
BITS = range(2, 9)
Table = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Sensitivities:
    """Expected damage of every quantizable layer at every bit width; additive over layers, lower is better.

    metric: one of ``METRICS``.  images: number it was measured on.  damage, standard_error: by layer name and bits.
    The error of the traces is that of their probes for these very images, of the others that of the images as a sample.
    """

    metric: str
    arch: str
    images: int
    damage: Table
    standard_error: Table

    def save(self, path: Path) -> None:
        """Write JSON, atomically; raises UserError where that is not possible."""
        write_text(path, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Sensitivities":
        """Read what :meth:`save` wrote; raises UserError, naming the file, for anything else."""
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the sensitivities {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{path} is not a JSON file: {error}; give a file of sensitivities") from error
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise UserError(f"{path} does not hold sensitivities; give a file that a search or measurement saved")
        if contents.get("version") != VERSION:
            raise UserError(f"{path} has version {contents.get('version')}, this program reads {VERSION}; measure anew")
        problem = _problem(contents)
        if problem is not None:
            raise UserError(f"{path} is damaged: {problem}; measure the sensitivities anew")
        tables = (_table(contents[key]) for key in ("damage", "standard_error"))
        return cls(contents["metric"], contents["arch"], contents["images"], *tables)


def _problem(contents: Mapping[str, Any]) -> str | None:
    """What is wrong with the contents of a file, in words."""
    images = contents.get("images")
    if contents.get("metric") not in METRICS:
        return f"metric is {contents.get('metric')!r}, expected one of {', '.join(METRICS)}"
    if not isinstance(contents.get("arch"), str) or type(images) is not int or images < 1:
        return "arch must be a name and images a number above 0"
    for key, least in (("damage", -math.inf), ("standard_error", 0.0)):
        table = contents.get(key)
        if not isinstance(table, dict) or not table:
            return f"{key} is missing or empty"
        for layer, row in table.items():
            if not isinstance(row, dict) or not row or any(bits not in map(str, BITS) for bits in row):
                return f"{key} of {layer!r} must have bits from 2 to 8"
            if not all(_is_number(value) and value >= least for value in row.values()):
                return f"{key} of {layer!r} must be finite numbers{' of at least 0' if least == 0 else ''}"
    if _shape(contents["damage"]) != _shape(contents["standard_error"]):
        return "damage and standard_error must have the same layers and bits"
    return None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _shape(table: Mapping[str, Mapping[str, float]]) -> dict[str, set[str]]:
    return {layer: set(row) for layer, row in table.items()}


def _table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    return {layer: {int(bits): float(value) for bits, value in row.items()} for layer, row in rows.items()}


def measure(
    model: QuantizedModel,
    batches: Iterable[Labelled],
    metric: str = TRACE,
    widths: Sequence[int] = (4, 8),
    settings: Settings = Settings(),  # noqa: B008  frozen
    state: Path | None = None,
) -> Sensitivities:
    """Measure the damage of every layer of a calibrated model at every width; the model is left as it was.

    batches: normalised float32 images [N, C, H, W] with int64 labels [N], on the model's device, kept in memory.
    widths: 2..8.  At a width that is not the model's own, weights take the range of their largest value and activations
    are calibrated anew.  A standalone BatchNorm has 8 bits in every scheme: its damage is the same at every width.
    state: file to go on from after an interruption; the result is the same as without one.  Same seed, same result
    on the same number of threads.

    Raises UserError for an unknown metric or width, fewer than two images (except for the traces), a model that is not
    calibrated, a loss that is not finite, and a state file of another measurement.
    """
    if metric not in METRICS:
        raise UserError(f"the sensitivity metric is {metric!r}, expected one of {', '.join(METRICS)}")
    widths = sorted(set(widths))
    if not widths or not set(widths) <= set(BITS):
        raise UserError(f"the widths are {', '.join(map(str, widths)) or 'none'}, expected some of 2 to 8")
    require_calibrated(model)
    kept = [(images, labels) for images, labels in batches if len(images)]
    count = sum(len(images) for images, _ in kept)
    least = 1 if metric in TRACES else 2
    if count < least:
        raise UserError(f"sensitivities ({metric}) got {count} images, expected at least {least}")
    given, inputs = settings_given(settings, metric, widths), digest(model, kept) if state else ""
    with untouched(model):
        activations = metric == TRACE_ACTIVATIONS
        fresh = new_sums(count, model, activations) if metric in TRACES else new_values(model, widths, count)
        progress = Progress(state, given, inputs, fresh, settings.save_seconds)
        ranges = ranges_at(model, [images for images, _ in kept], widths, settings.calibration)
        job = _Job(model, kept, widths, ranges, progress)
        damage, error = _trace(job, settings, activations) if metric in TRACES else _by_image(job, metric)
    return Sensitivities(metric, settings.arch, count, damage, error)


@dataclass(frozen=True)
class _Job:
    """What every metric is measured with."""

    model: QuantizedModel
    batches: Sequence[Labelled]
    widths: Sequence[int]
    ranges: Ranges
    progress: Progress


def _trace(job: _Job, settings: Settings, activations: bool) -> tuple[Table, Table]:
    model, widths = job.model, job.widths
    traces = hessian_traces(model, job.batches, settings, job.progress, activations)
    errors: dict[str, dict[int, float]] = {
        name: {bits: float(error.square().sum(dtype=torch.float64)) for bits, error in row.items()}
        for name, row in weight_errors(model, widths, job.ranges).items()
    }
    if activations:
        inputs = activation_errors(model, [images for images, _ in job.batches], widths, job.ranges)
        errors |= {input_name(name): row for name, row in inputs.items()}
    damage: Table = {name: dict.fromkeys(widths, 0.0) for name in sites(model)}
    standard_error: Table = {name: dict.fromkeys(widths, 0.0) for name in sites(model)}
    for layer in damage:
        for part in (layer, input_name(layer)):
            if part in traces:
                for bits in widths:  # both parts come from the same probes: their errors add up at worst
                    factor = errors[part][bits] / traces[part].elements
                    damage[layer][bits] += traces[part].value * factor
                    standard_error[layer][bits] += traces[part].error * factor
    return damage, standard_error


def _by_image(job: _Job, metric: str) -> tuple[Table, Table]:
    model, widths, progress = job.model, job.widths, job.progress
    if metric == "fisher":
        fisher(model, job.batches, widths, weight_errors(model, widths, job.ranges), progress)
    else:
        compare_outputs(model, job.batches, metric, widths, job.ranges, progress)
    damage, error = summarise(progress.values, metric)
    return _named(model, widths, damage), _named(model, widths, error)


def _named(model: QuantizedModel, widths: Sequence[int], values: Tensor) -> Table:
    rows = zip(sites(model), values.tolist(), strict=True)
    return {name: dict(zip(widths, row, strict=True)) for name, row in rows}
