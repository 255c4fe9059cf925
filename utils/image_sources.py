"""Where images come from: one folder per class, the CIFAR files as published, the digits of scikit-learn."""

import abc
import os
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from utils.errors import UserError

DIGITS = "digits"
SPLITS = ("train", "val")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
DIGITS_VAL_IMAGES = 360  # 20 % of 1797
DIGITS_SPLIT_SEED = 0  # not the user's seed: a model must never be evaluated on what it was trained on
CIFAR_FOLDERS = {
    "cifar-10-batches-py": torchvision.datasets.CIFAR10,
    "cifar-100-python": torchvision.datasets.CIFAR100,
}


class ImageSource(abc.ABC):
    """Labelled images, not yet transformed.

    classes: names, label i is classes[i]; labels: int64 [N]; flippable: whether a mirrored image keeps its label.
    """

    def __init__(self, classes: tuple[str, ...], labels: np.ndarray, flippable: bool) -> None:
        self.classes = classes
        self.labels = labels
        self.flippable = flippable

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Image number `index`, decoded. Raises UserError naming the file if it cannot be decoded."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """What to call image number `index` in a message."""


class FolderSource(ImageSource):
    """Images of a tree `folder/class/**/image`; classes and files in the order of torchvision's ImageFolder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        classes = _class_folders(folder)
        per_class = [_image_files(folder / name) for name in classes]
        self.paths = [path for paths in per_class for path in paths]
        labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in per_class])
        super().__init__(classes, labels.astype(np.int64), flippable=True)

    def read(self, index: int) -> Image.Image:
        """See ImageSource."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except Exception as error:  # PIL's decoders raise a dozen unrelated types on damaged files
            raise UserError(
                f"cannot decode the image {path}: it is damaged or no image; replace or remove it"
            ) from error

    def describe(self, index: int) -> str:
        """See ImageSource."""
        return self.paths[index]


class ArraySource(ImageSource):
    """Images in memory. pixels: uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB)."""

    def __init__(
        self, name: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], flippable: bool
    ) -> None:
        super().__init__(classes, labels.astype(np.int64), flippable)
        self.name = name
        self.pixels = pixels

    def read(self, index: int) -> Image.Image:
        """See ImageSource."""
        return Image.fromarray(self.pixels[index])

    def describe(self, index: int) -> str:
        """See ImageSource."""
        return f"{index} of {self.name}"


def open_source(location: str | Path, split: str) -> ImageSource:
    """Images of one split, "train" or "val", of `location`.

    location: "digits"; or a folder with train/ and val/ (only the one asked for is opened); or a folder with the
    published Python files of CIFAR-10 or CIFAR-100 (whose checksums are verified).

    Raises UserError, naming the path, when the folder or split is missing, a class folder is empty or holds a file
    that is no image, or the CIFAR files are incomplete.
    """
    if split not in SPLITS:
        raise ValueError(f"got the split {split!r}, expected one of {SPLITS}")
    if str(location) == DIGITS:
        return _digits(split)
    folder = Path(location)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"the image folder {folder} {kind}; give a folder with train/ and val/, or {DIGITS!r}")
    for name in CIFAR_FOLDERS:
        if folder.name == name:
            return _cifar(folder.parent, name, split)
        if (folder / name).is_dir():
            return _cifar(folder, name, split)
    if not (folder / split).is_dir():
        raise UserError(_no_split(folder, split))
    return FolderSource(folder / split)


def _no_split(folder: Path, split: str) -> str:
    message = f"{folder} has no folder {split}/, expected {folder}/{split}/CLASS/IMAGE"
    nested = [child for child in sorted(folder.iterdir()) if (child / split).is_dir()]
    return f"{message}; did you mean {nested[0]}?" if nested else f"{message}; give the folder that contains it"


def _class_folders(folder: Path) -> tuple[str, ...]:
    entries = [entry for entry in os.scandir(folder) if not _is_system_file(entry.name)]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        found = f"{len(entries)} files and no class folders" if entries else "no images"
        raise UserError(f"{folder} has {found}, expected one folder per class: {folder}/CLASS/IMAGE")
    return tuple(classes)


def _image_files(folder: Path) -> list[str]:
    """Every image below `folder`, sorted folder by folder."""
    found = []
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if _is_system_file(name):
                continue
            if not name.lower().endswith(IMAGE_SUFFIXES):
                known = " ".join(IMAGE_SUFFIXES)
                raise UserError(f"{os.path.join(root, name)} is not an image file ({known}); remove it from the folder")
            found.append(os.path.join(root, name))
    if not found:
        raise UserError(f"the class folder {folder} is empty; put images into it or remove it")
    return found


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _cifar(root: Path, name: str, split: str) -> ArraySource:
    try:
        published = CIFAR_FOLDERS[name](str(root), train=split == "train", download=False)
    except Exception as error:  # missing, incomplete or changed files: torchvision's types differ by file
        raise UserError(f"{root / name} is incomplete or damaged; unpack its archive again") from error
    labels = np.array(published.targets)
    return ArraySource(f"{root / name} ({split})", published.data, labels, tuple(published.classes), flippable=True)


def _digits(split: str) -> ArraySource:
    """1437 training and 360 validation images, stratified, grey 8x8; 0..16 becomes round(v * 255 / 16)."""
    data = load_digits()
    pixels = np.floor(data.images * 255 / 16 + 0.5).astype(np.uint8)
    parts = train_test_split(
        np.arange(len(pixels)), test_size=DIGITS_VAL_IMAGES, stratify=data.target, random_state=DIGITS_SPLIT_SEED
    )
    chosen = np.sort(parts[SPLITS.index(split)])
    classes = tuple(str(digit) for digit in data.target_names)
    return ArraySource(f"the digits ({split})", pixels[chosen], data.target[chosen], classes, flippable=False)
