"""One network of the board: its weights, images and float accuracy, and what a recipe makes of it under a backend."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from utils.calibration_run import SETTINGS, CalibrationImages, Granularity, learn_rounding
from utils.errors import UserError
from utils.evaluation import Accuracy, evaluate, float_predictor
from utils.experiment import Experiment
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import ModelInfo, create_model
from utils.preprocess import Preprocess
from utils.quantization_utils.backends import BACKENDS, why_not
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.ptq import quantize_after_training
from utils.quantization_utils.ptq_recipe import PtqRecipe, parse_recipe
from utils.quantization_utils.published_ptq import ALIASES
from utils.run_data import Data, DataFlags, load_data

HASH_LENGTH = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RowSettings:
    """What all rows have in common.  images: that calibrate; preprocess: values for :meth:`Preprocess.override`."""

    data: str
    weights_dir: Path | None
    images: int = 256
    seed: int = 0
    setting: str = "quick"
    batch_size: int = 64
    workers: int = 0
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    rotate180: bool = False


@dataclass(frozen=True)
class Measured:
    """Percent, images and seconds of one row, None where there is nothing; note: why there is nothing.

    kind: ``integer`` or ``simulation``.  unseen: of the validation images that did not calibrate, where some did.
    settings: hash of everything the figures depend on besides the row's own names.
    """

    kind: str | None = None
    images: int | None = None
    top1_float: float | None = None
    top1: float | None = None
    drop: float | None = None
    images_unseen: int | None = None
    top1_unseen: float | None = None
    drop_unseen: float | None = None
    seconds: float | None = None
    note: str = ""
    settings: str = ""


class BoardNetwork:
    """A network by name; weights and images are opened when the first row needs them."""

    def __init__(self, arch: str, settings: RowSettings) -> None:
        self.arch, self.settings = arch, settings
        self.name = ALIASES.get(arch, arch)

    @property
    def weights(self) -> Path | None:
        """The file of float weights, None where there is none."""
        folder = self.settings.weights_dir
        names = (self.arch, self.name)
        found = [] if folder is None else [folder / f"{name}.pth" for name in names]
        return next((path for path in found if path.is_file()), None)

    def settings_text(self) -> str:
        """Hash of weights, images and settings; empty without weights."""
        if self.weights is None:
            return ""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        assert self.weights is not None
        digest = hashlib.sha256(self.weights.read_bytes())
        free = ("weights_dir", "workers")
        given = {key: str(value) for key, value in vars(self.settings).items() if key not in free}
        digest.update(json.dumps(given, sort_keys=True).encode())
        return digest.hexdigest()[:HASH_LENGTH]

    def measure(self, backend: str, bits: str, calibrator: str, state: Path) -> Measured:
        """One row.  state: where learned rounding keeps what is finished.

        What cannot be is a row with a note.  Raises UserError for images and weights that cannot be used.
        """
        recipe = parse_recipe(calibrator)
        why = why_not(BACKENDS[backend], recipe.rounding)
        if self.weights is None:
            folder = self.settings.weights_dir
            place = "" if folder is None else f" in {folder.name}/"
            why = f"no weights: {self.arch}.pth is not{place or ' given (--weights-dir)'}"
        if why is not None:
            return Measured(note=why)
        before = self._float
        started = time.perf_counter()
        try:
            experiment = self._experiment(backend, bits)
            self._quantize(experiment, recipe, state)
            after = self._accuracy(experiment)
        except UserError as error:
            return replace(self._row(before, None), note=str(error))
        row = self._row(before, after)
        kind = "simulation" if experiment.simulates else "integer"
        return replace(row, kind=kind, seconds=time.perf_counter() - started, settings=self.settings_text())

    def _model(self) -> tuple[ModelInfo, Preprocess]:
        info = create_model(self.name, weights=self.weights)
        settings = self.settings
        return info, info.preprocess.override(**settings.preprocess, rotate180=settings.rotate180 or None)

    @cached_property
    def _data(self) -> Data:
        info, preprocess = self._model()
        settings = self.settings
        flags = DataFlags(settings.data, settings.batch_size, settings.workers, settings.seed)
        return load_data(flags, preprocess, info.num_classes, train=False, calibration=settings.images)

    @cached_property
    def _images(self) -> CalibrationImages:
        assert self._data.calibration is not None
        return CalibrationImages(self._data.calibration, self._model()[1], CPU)

    @cached_property
    def _float(self) -> Accuracy:
        info, preprocess = self._model()
        return evaluate(float_predictor(info.module, preprocess, CPU), self._data.val, f"{self.arch} float")

    def _experiment(self, backend: str, bits: str) -> Experiment:
        info, preprocess = self._model()
        return Experiment(info, preprocess, bits, CPU, BACKENDS[backend])

    def _quantize(self, experiment: Experiment, recipe: PtqRecipe, state: Path) -> None:
        rounding = partial(self._round, recipe, state)
        quantize_after_training(experiment.model, self._images, recipe, rounding=rounding, say=lambda line: None)

    def _round(self, recipe: PtqRecipe, state: Path, model: QuantizedModel) -> None:
        granularity: Granularity = "block" if recipe.rounding == "block" else "layer"
        settings = replace(SETTINGS[self.settings.setting](granularity), seed=self.settings.seed, state=state)
        learn_rounding(model, self._images, settings, lambda line: None)
        state.unlink(missing_ok=True)

    def _accuracy(self, experiment: Experiment) -> Accuracy:
        if experiment.simulates:
            predictor = float_predictor(experiment.model, experiment.preprocess, CPU)
            return evaluate(predictor, self._data.val, f"{self.arch} simulation")
        engine = TorchEngine(experiment.convert(self._data.val.classes), CPU)
        return evaluate(engine, self._data.val, f"{self.arch} integers")

    def _row(self, before: Accuracy, after: Accuracy | None) -> Measured:
        row = Measured(images=before.images, top1_float=before.top1)
        if after is None:
            return row
        row = replace(row, top1=after.top1, drop=before.top1 - after.top1)
        unseen = self._data.unseen()
        if unseen is None:
            return row
        labels = torch.from_numpy(self._data.val.dataset.labels)
        first, last = (100 * float((a.predictions == labels)[unseen].double().mean()) for a in (before, after))
        return replace(row, images_unseen=int(unseen.sum()), top1_unseen=last, drop_unseen=first - last)
