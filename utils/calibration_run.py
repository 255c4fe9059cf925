"""The calibration step of a run of ``quant_train.py``: ranges alone, or a ``--ptq`` recipe and what it measures."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data_utils import Loader, normalize
from utils.plots import plot_sqnr
from utils.preprocess import Preprocess
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.ptq import quantize_after_training
from utils.quantization_utils.ptq_recipe import BLOCK, DESCENT, parse_recipe
from utils.quantization_utils.reconstruct import LayerResult, Settings, most_images, reconstruct
from utils.quantization_utils.sqnr import format_worst, layer_sqnr
from utils.run_data import inputs
from utils.run_log import log
from utils.run_state import Run
from utils.train_flags import PUBLISHED, QUICK

Granularity = Literal["layer", "block"]
SQNR_PLOT, ROUNDING_STATE = "sqnr.png", "rounding.pth.tar"
SQNR_IMAGES = 64
SETTINGS: dict[str, Callable[[Granularity], Settings]] = {QUICK: Settings, PUBLISHED: Settings.published}


class CalibrationImages:
    """The images of a loader, decoded once; every pass yields them normalised, in the same batches and order."""

    def __init__(self, loader: Loader, preprocess: Preprocess, device: torch.device) -> None:
        self.preprocess, self.device = preprocess, device
        self.flippable = loader.dataset.source.flippable
        bar = tqdm(loader, desc="calibration images", unit="batch", leave=False, disable=None)
        self.batches = [images for images, _ in bar]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.batches:
            yield normalize(images.to(self.device), self.preprocess)

    def first(self, count: int) -> Iterator[Tensor]:
        """The first ``count`` images, in their batches."""
        for images in self.batches:
            if count > 0:
                yield normalize(images[:count].to(self.device), self.preprocess)
            count -= len(images)

    def with_mirrored(self) -> Iterator[Tensor]:
        """Every image and behind it its mirror image, normalised, in batches of twice the size."""
        for images in self:
            yield torch.stack((images, images.flip(-1)), 1).flatten(0, 1)


def learn_rounding(
    model: QuantizedModel, images: CalibrationImages, settings: Settings, say: Callable[[str], None]
) -> list[LayerResult]:
    """Reconstruct from the calibration images, mirrored as well where a mirrored image keeps its class and both fit.

    A few hundred images are easily learned by heart.
    """
    count = sum(map(len, images.batches))
    if not images.flippable or 2 * count > most_images(model, settings):
        return reconstruct(model, images, settings)
    say("rounding by the images and their mirror images")
    return reconstruct(model, images.with_mirrored(), settings)


def calibrate_run(job: Run, configure: Callable[[], None]) -> None:
    """Quantize the run's model on its calibration images: by ``--calibration``, or by the recipe of ``--ptq``.

    configure: sets what the flags say about training, once ranges are known.
    """
    args, loader, experiment = job.args, job.data.calibration, job.experiment
    if loader is None:
        return
    job.phase = "calibration"
    count = len(loader.dataset)
    order = f"{count} images in batches of {min(count, loader.batch_size)}, in the order of the data set"
    if args.ptq is None:
        batches = inputs(loader, len(loader), experiment.preprocess, experiment.device, "calibration")
        calibrate(experiment.model, batches, args.calibration, args.calib_percentile, args.mse_power or 2.0)
        log.info("calibrated on %s (%s)", order, args.calibration)
        configure()
        return
    log.info("post-training quantization %s on %s", args.ptq, order)
    if experiment.simulates:
        backend = experiment.backend
        log.info("%s is simulated in float and has no integer graph: %s", backend.name, backend.why)
    images = CalibrationImages(loader, experiment.preprocess, experiment.device)
    reference = _quantize(job, images)
    configure()
    values = layer_sqnr(experiment.model, images.first(SQNR_IMAGES), reference)
    log.info(format_worst(values))
    title = f"{experiment.info.name}, {experiment.scheme_name}, {args.ptq}"
    plot_sqnr(args.save_path / SQNR_PLOT, values, title=title)
    job.measured |= {"ptq": args.ptq, "ptq_backend": args.ptq_backend}
    job.measured |= {"sqnr_db": {name: round(db, 2) for name, db in values.items()}}


def _quantize(job: Run, images: CalibrationImages) -> dict[str, Tensor]:
    args = job.args
    return quantize_after_training(
        job.experiment.model,
        images,
        parse_recipe(args.ptq),
        percentile=args.calib_percentile,
        power=args.mse_power,
        per_channel=args.channel_wise,
        rounding=partial(_round, job, images),
        say=lambda line: log.info("  %s", line),
    )


def _round(job: Run, images: CalibrationImages, model: QuantizedModel) -> None:
    """``descent``, ``adaround`` or ``block``; finished parts are kept in a file until all are done."""
    args, state = job.args, job.args.save_path / ROUNDING_STATE
    rounding = parse_recipe(args.ptq).rounding
    granularity: Granularity = "block" if rounding == BLOCK else "layer"
    settings = Settings(steps=0) if rounding == DESCENT else SETTINGS[args.ptq_setting](granularity)
    settings = replace(settings, seed=args.seed, state=state)
    how = "least squares" if rounding == DESCENT else "learned rounding"
    job.phase, job.kept = how, f"finished {granularity}s are in {state}, the same command goes on"
    results = learn_rounding(model, images, settings, lambda line: log.info("  %s", line))
    seconds = sum(result.seconds for result in results)
    improved = sum(result.loss_after < result.loss_nearest for result in results)
    log.info("  %s: %d %ss in %.0f s, %d better than nearest", how, len(results), granularity, seconds, improved)
    job.measured |= {"rounding": [asdict(result) for result in results], "rounding_seconds": seconds}
    state.unlink(missing_ok=True)
    job.phase, job.kept = "calibration", "nothing was saved"


def unseen_accuracy(job: Run) -> dict[str, Any]:
    """Top-1 on the validation images that calibration did not use; empty where it used none or all of them."""
    unseen = job.data.unseen()
    simulates = job.experiment.simulates
    if unseen is None or job.last is None or not (job.graph or simulates):
        return {}
    labels = torch.from_numpy(job.data.val.dataset.labels)

    def top1(predictions: Tensor | None) -> float | None:
        return None if predictions is None else 100 * float((predictions == labels)[unseen].double().mean())

    return {
        "images_unseen": int(unseen.sum()),
        "top1_float_unseen": top1(job.float_classes),
        "top1_simulation_unseen" if simulates else "top1_integer_unseen": top1(job.last.predictions),
    }
