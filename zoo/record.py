"""``python -m zoo train --record``: puts a finished run into the zoo, with every number measured by a program.

An entry's folder has its file (packed integer graph, or float state_dict), recipe.json and log.txt.
"""

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quant_train import LOG
from utils.atomic_file import write_atomically, write_text
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.provenance import PACKAGES, provenance
from utils.run_state import CHECKPOINT, GRAPH
from utils.train_flags import build_parser
from zoo import manifest
from zoo.manifest import FLOAT, Own
from zoo.recipes import Recipe, find, profile_text
from zoo.runs import REPORT, Runs, label, quant_train, top1

WEIGHTS, RECIPE, LOG_TEXT = "weights.pth", "recipe.json", "log.txt"
SELECTION = "the last checkpoint; nothing was selected by its accuracy on the validation images"
ABSOLUTE = re.compile(r"(?<![\w.])/(?:[^\s/,;:'\"]+/)*([^\s/,;:'\"]+)")


def record(runs: Runs, recipe: Recipe) -> Own:
    """Copy the result of a finished run, evaluate the copy, and write it into the manifest.

    Raises UserError where a run is not finished or was made with other flags than the recipe's, the copy gives another
    accuracy than the run, or the validation images are not all there.
    """
    report = _finished(runs, recipe)
    control = find(recipe.control) if recipe.control else None
    control_report = _finished(runs, control) if control else None
    dataset = recipe.dataset(runs.images(recipe))
    content = _float_weights(runs.of(recipe)) if recipe.scheme == FLOAT else _read(runs.of(recipe) / GRAPH)
    measured = _evaluated(runs, recipe, content)
    if measured["images"] != dataset.val:
        raise UserError(f"{recipe.name} was evaluated on {measured['images']} images, expected all {dataset.val}")
    accuracy = top1(recipe, measured)
    if accuracy != top1(recipe, report):
        raise UserError(
            f"{recipe.name}: the copy has top-1 {accuracy}, the run ended with {top1(recipe, report)}; "
            f"delete {runs.of(recipe) / REPORT} and run the command again, which evaluates the run once more"
        )
    control_top1 = top1(control, control_report) if control and control_report else None
    entry = _entry(runs, recipe, report, content, measured, control_top1)
    _write(runs, recipe, entry, content, report)
    manifest.record(entry)
    return entry


def _entry(
    runs: Runs,
    recipe: Recipe,
    report: Mapping[str, Any],
    content: bytes,
    measured: Mapping[str, Any],
    control_top1: float | None,
) -> Own:
    origin = provenance()
    return Own(
        name=recipe.name,
        arch=recipe.arch,
        scheme=report["scheme"],
        file=f"{recipe.name}/{WEIGHTS if recipe.scheme == FLOAT else GRAPH}",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        size_mib=round(report["size_mib"], 6),
        bops_g=round(report["bops_g"], 6),
        top1=top1(recipe, dict(measured)),
        images=measured["images"],
        trained_on=recipe.dataset(runs.images(recipe)).text,
        recipe=label(recipe, runs.profile),
        seed=build_parser().parse_args(recipe.flags(runs.profile)).seed,
        control_top1=control_top1,
        machine=_machine(report, origin["cpu"]),
        versions={"python": origin["python"], **{package: version(package) for package in PACKAGES}},
        commit=report["commit"],
        command=command(runs, recipe),
        log=f"{recipe.name}/{LOG_TEXT}",
    )


def _machine(report: Mapping[str, Any], cpu: str) -> str:
    """Of the training run, taken to be this one's."""
    if str(report["device"]).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(report["device"]))
    threads = report["threads"]
    return f"{cpu}, {threads} thread{'s' * (threads > 1)}"


def command(runs: Runs, recipe: Recipe) -> str:
    """What reproduces an entry."""
    data = [] if runs.images(recipe) == "digits" else ["--data", "DIR"]
    return " ".join(["python", "-m", "zoo", "train", recipe.name, "--profile", runs.profile, *data, "--record"])


def _write(runs: Runs, recipe: Recipe, entry: Own, content: bytes, report: Mapping[str, Any]) -> None:
    """The files of an entry; the manifest, written after them, makes them valid."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomically(entry.path, write)
    log = _read(runs.of(recipe) / LOG).decode()
    write_text(manifest.ENTRIES / entry.log, without_folders(log))
    about = {
        "name": recipe.name,
        "profile": f"{runs.profile}: {profile_text(runs.profile)}",
        "command": entry.command,
        "flags": " ".join(recipe.flags(runs.profile)),
        "starts from": recipe.start or "random initialisation",
        "trained on": entry.trained_on,
        "kept": SELECTION,
        "top1": entry.top1,
        "images": entry.images,
        "trained": {key: report[key] for key in ("epochs", "device", "threads", "commit")},
    }
    if recipe.control:
        control = find(recipe.control)
        about["control"] = {
            "what": "float network, trained from the same weights with the same flags",
            "flags": " ".join(control.flags(runs.profile)),
            "top1": entry.control_top1,
        }
        control_log = _read(runs.of(control) / LOG).decode()
        write_text(manifest.ENTRIES / f"{recipe.control}.txt", without_folders(control_log))
    write_text(entry.path.with_name(RECIPE), json.dumps(about, indent=1) + "\n")


def without_folders(text: str) -> str:
    """Absolute paths as their last part: where somebody keeps files says nothing to others.

    >>> without_folders("5 images/s, files in /home/me/runs/x")
    '5 images/s, files in x'
    """
    return ABSOLUTE.sub(r"\1", text)


def _finished(runs: Runs, recipe: Recipe) -> dict[str, Any]:
    report = runs.report(recipe)
    if report is None:
        raise UserError(f"the run {recipe.name} is not finished in {runs.of(recipe)}; train it first")
    runs.check_flags(recipe)
    return report


def _float_weights(folder: Path) -> bytes:
    """The state_dict alone, as torch saves it."""
    buffer = io.BytesIO()
    torch.save(load_checkpoint(folder / CHECKPOINT)["state_dict"], buffer)
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; train the entry again") from error


def _evaluated(runs: Runs, recipe: Recipe, content: bytes) -> dict[str, Any]:
    """Report of ``quant_train.py -e`` on what the entry will be."""
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / (WEIGHTS if recipe.scheme == FLOAT else GRAPH), Path(folder) / REPORT
        file.write_bytes(content)
        what = ["--resume", str(file)]
        if recipe.scheme == FLOAT:
            what = ["-a", recipe.arch, "--quant-scheme", FLOAT, "--weights", str(file)]
        threads = build_parser().parse_args(recipe.flags(runs.profile)).threads
        what += ["--threads", str(threads)] if threads else []
        files = ["--data", runs.images(recipe), "--save-path", folder, "--report", str(report)]
        if quant_train([*what, "-e", *files]) != 0:
            raise UserError(f"{recipe.name} could not be evaluated; nothing was recorded")
        return dict(json.loads(report.read_text(encoding="utf-8")))
