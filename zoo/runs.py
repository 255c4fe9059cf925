"""Runs of ``quant_train.py`` by the recipes: where each lives, what it starts from, how it is continued."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.run_state import CHECKPOINT, SCRIPT
from utils.train_flags import build_parser
from zoo import manifest
from zoo.manifest import FLOAT, Own
from zoo.recipes import DIGITS, Recipe, find

REPORT = "report.json"


@dataclass(frozen=True)
class Runs:
    """The runs of one profile. folder: absolute, of all profiles; location: folder with images, None where not given.

    A run is finished when its report is there, which quant_train.py writes last.
    """

    folder: Path
    profile: str
    location: str | None

    def of(self, recipe: Recipe) -> Path:
        """Folder of a run."""
        return self.folder / self.profile / recipe.name

    def images(self, recipe: Recipe) -> str:
        """What ``--data`` of its run is.  Raises UserError where the images are missing or not the recipe's."""
        location = DIGITS if recipe.arch == DIGITS else self.location
        if location is None:
            raise UserError(f"--data is missing: {recipe.name} is trained on CIFAR-10; give {recipe.forms()}")
        recipe.dataset(location)
        return location

    def report(self, recipe: Recipe) -> dict[str, Any] | None:
        """What a finished run measured; None for one that is not finished."""
        path = self.of(recipe) / REPORT
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; delete it, the run then evaluates once more") from error

    def weights(self, recipe: Recipe) -> Path | None:
        """Float weights of a finished run, else of the shipped entry of the same profile; None where neither is."""
        if self.report(recipe) is not None:
            return self.of(recipe) / CHECKPOINT
        for entry in manifest.load():
            if isinstance(entry, Own) and entry.recipe == label(recipe, self.profile) and entry.path.is_file():
                return entry.path
        return None

    def check_flags(self, recipe: Recipe) -> None:
        """Raises UserError for a run, finished or begun, that was made with other flags than the recipe has now."""
        checkpoint = self.of(recipe) / CHECKPOINT
        if not checkpoint.is_file():
            return
        made = load_checkpoint(checkpoint, recipe.arch)["arguments"]
        wanted = vars(build_parser().parse_args(recipe.flags(self.profile)))
        for key, value in wanted.items():
            if value is not None and made.get(key, str(value)) != str(value):
                raise UserError(
                    f"the run in {checkpoint.parent} was made with {key} {made[key]}, the recipe {recipe.name} has "
                    f"{value}; delete that folder to train again"
                )

    def arguments(self, recipe: Recipe) -> list[str]:
        """Flags of ``quant_train.py`` for what is left of a run: all of it, or on from its last checkpoint."""
        folder = self.of(recipe)
        files = ["--data", self.images(recipe), "--save-path", str(folder), "--report", str(folder / REPORT)]
        return [*recipe.flags(self.profile), *self._start(recipe), *files]

    def _start(self, recipe: Recipe) -> list[str]:
        checkpoint = self.of(recipe) / CHECKPOINT
        if checkpoint.is_file():
            return ["--resume", str(checkpoint)]
        if recipe.start is None:
            return []
        weights = self.weights(find(recipe.start))
        if weights is None:
            raise UserError(f"{recipe.name} starts from {recipe.start}, which is not trained yet; train that first")
        return ["--weights", str(weights)]


def label(recipe: Recipe, profile: str) -> str:
    """How the manifest calls a recipe and its profile."""
    return f"{recipe.name}, profile {profile}"


def top1(recipe: Recipe, report: dict[str, Any]) -> float:
    """Percent, of the float network or the integer graph."""
    return float(report["top1_float" if recipe.scheme == FLOAT else "top1_integer"])


def quant_train(arguments: Sequence[str]) -> int:
    """Run ``quant_train.py`` from the project's folder, sharing the terminal; returns its exit code.

    Ctrl-C reaches it too and it saves, so it is waited for; SIGTERM is passed on.
    """
    with (
        subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=SCRIPT.parent) as process,
        _passing_on(process),
    ):
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@contextmanager
def _passing_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        process.terminate()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
