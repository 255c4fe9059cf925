"""The images of one run of ``quant_train.py``: what is trained on, calibrated with, evaluated."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data_utils import (
    ImageDataset,
    Loader,
    check_classes,
    check_same_classes,
    make_loader,
    normalize,
    open_dataset,
    subset,
)
from utils.errors import UserError
from utils.evaluation import evaluation_batch
from utils.preprocess import Preprocess

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class DataFlags:
    """location: folder, CIFAR folder or "digits"; share: part of the training images, in (0, 1]."""

    location: str
    batch_size: int
    workers: int
    seed: int
    share: float = 1.0


@dataclass(frozen=True)
class Data:
    """Loaders of one run; ``train`` and ``calibration`` are absent where nothing is trained or calibrated.

    lacks_train: calibration has to use the validation images.
    """

    val: Loader
    train: Loader | None
    calibration: Loader | None
    lacks_train: bool = False

    def unseen(self) -> Tensor | None:
        """Which validation images calibration does not use, bool [N]; None where it uses none or all of them."""
        if not self.lacks_train or self.calibration is None:
            return None
        mask = ~torch.isin(*(torch.from_numpy(loader.dataset.members) for loader in (self.val, self.calibration)))
        return mask if bool(mask.any()) else None

    def sizes(self) -> str:
        """How many images there are, for people."""
        loaders = (("train", self.train), ("validation", self.val), ("calibration", self.calibration))
        return ", ".join(f"{len(loader.dataset)} {name}" for name, loader in loaders if loader)


def load_data(flags: DataFlags, preprocess: Preprocess, num_classes: int, *, train: bool, calibration: int) -> Data:
    """Open what is needed.  train: whether there is training; calibration: number of images, 0 for none.

    Raises UserError for images that are missing or do not fit the network.
    """
    val = open_dataset(flags.location, "val", preprocess, seed=flags.seed)
    check_classes(val, num_classes, flags.location)
    batch = evaluation_batch(flags.batch_size, preprocess.input_size)
    source = train_loader = calibration_loader = calibration_source = None
    if train:
        source = open_dataset(flags.location, "train", preprocess, augment=True, seed=flags.seed)
        check_same_classes(source, val, flags.location)
        source = _share(source, flags)
        train_loader = make_loader(source, flags.batch_size, train=True, workers=flags.workers)
    if calibration:
        calibration_source = _calibration_source(flags, source, val)
        images = subset(calibration_source, count=calibration, seed=flags.seed)
        batch_size = min(batch, CALIBRATION_BATCH)
        calibration_loader = make_loader(images, batch_size, train=False, workers=flags.workers)
    val_loader = make_loader(val, batch, train=False, workers=flags.workers)
    return Data(val_loader, train_loader, calibration_loader, lacks_train=calibration_source is val)


def _share(train: ImageDataset, flags: DataFlags) -> ImageDataset:
    return subset(train, fraction=flags.share, seed=flags.seed) if flags.share < 1 else train


def _calibration_source(flags: DataFlags, train: ImageDataset | None, val: ImageDataset) -> ImageDataset:
    """Training images without augmentation; validation images only where there is no train/ at all."""
    if train is not None:
        return ImageDataset(train.source, train.preprocess, False, flags.seed, train.members)
    try:
        return _share(open_dataset(flags.location, "train", val.preprocess, seed=flags.seed), flags)
    except UserError:
        if (Path(flags.location) / "train").exists():
            raise
        return val


def inputs(loader: Loader, count: int, preprocess: Preprocess, device: torch.device, label: str) -> Iterator[Tensor]:
    """Normalised float32 images of the first ``count`` batches on the device, with a progress bar."""
    bar = tqdm(islice(loader, count), desc=label, total=count, unit="batch", leave=False, disable=None)
    for images, _ in bar:
        yield normalize(images.to(device), preprocess)
