"""How our own entries are trained, read from ``recipes.yaml``."""

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

FILE = Path(__file__).with_name("recipes.yaml")
FLOAT, DIGITS = "float", "digits"
SHORT, FULL = "short", "full"
FOLDERS = "folders"


@dataclass(frozen=True)
class Dataset:
    """Images to train on. layout: "digits", "folders" (train/ and val/) or the folder that marks CIFAR's own files.

    form: the same in words; train, val: numbers of images; text: what they are, for the manifest.
    """

    name: str
    layout: str
    form: str
    train: int
    val: int
    text: str


@dataclass(frozen=True)
class Recipe:
    """One run of ``quant_train.py``.

    start: the float recipe whose weights it starts from, None for random ones. control: the float recipe of equal
    training, for quantized ones. is_entry: whether the zoo ships the result. profiles: profile -> flags.
    """

    name: str
    arch: str
    scheme: str
    datasets: tuple[Dataset, ...]
    profiles: Mapping[str, str]
    start: str | None
    control: str | None
    is_entry: bool

    def flags(self, profile: str) -> list[str]:
        """Flags of ``quant_train.py`` that decide the result, without the files to read and write."""
        chosen = self.profiles.get(profile, self.profiles[SHORT])
        return ["-a", self.arch, "--quant-scheme", self.scheme, *shlex.split(chosen)]

    def dataset(self, location: str) -> Dataset:
        """What is in a folder (or "digits"), told by its layout.  Raises UserError where it is none of the recipe's."""
        folder = Path(location)
        for dataset in self.datasets:
            if dataset.layout == location == DIGITS or (dataset.layout != FOLDERS and _holds(folder, dataset.layout)):
                return dataset
            if dataset.layout == FOLDERS and (folder / "train").is_dir() and (folder / "val").is_dir():
                return dataset
        raise UserError(f"--data {location} does not hold the images of {self.name}; expected {self.forms()}")

    def forms(self) -> str:
        """What ``--data`` may be, in words."""
        return " or ".join(dataset.form for dataset in self.datasets)


def _holds(folder: Path, name: str) -> bool:
    return folder.name == name or (folder / name).is_dir()


def load() -> dict[str, Recipe]:
    """All recipes by name, in the order of the file, float ones before those that start from them."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    datasets = {name: Dataset(name, **values) for name, values in content["datasets"].items()}
    recipes: dict[str, Recipe] = {}
    for name, row in content["recipes"].items():
        recipes[name] = _recipe(name, row, recipes, datasets)
    return recipes


def _recipe(name: str, row: Mapping[str, Any], done: Mapping[str, Recipe], datasets: Mapping[str, Dataset]) -> Recipe:
    """A recipe says only what differs from its control, and that only what differs from its start."""
    base = done.get(row.get("control") or row.get("from") or "")
    control = row.get("control")
    own = {profile: row[profile] for profile in (SHORT, FULL) if profile in row}
    return Recipe(
        name=name,
        arch=row["arch"] if base is None else base.arch,
        scheme=row["scheme"],
        datasets=tuple(datasets[key] for key in row["datasets"]) if base is None else base.datasets,
        profiles=done[control].profiles if control else own,
        start=done[control].start if control else row.get("from"),
        control=control,
        is_entry=row.get("entry", True),
    )


def find(name: str) -> Recipe:
    """The recipe of an entry or control.  Raises UserError with the closest names."""
    recipes = load()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=3, cutoff=0) or list(recipes)
        raise UserError(f"there is no recipe {name!r}; did you mean {', '.join(close)}?")
    return recipes[name]


def profile_text(profile: str) -> str:
    """What a profile is meant for."""
    return str(yaml.safe_load(FILE.read_text(encoding="utf-8"))["profiles"][profile])
