"""What a run measured: the stable keys of ``--report``, the same as text, and JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from utils.atomic_file import write_atomically

# Always present, None where a value was not measured.  Percent, MiB, 1e9 bit operations, seconds.
REPORT_KEYS = (
    "arch",
    "scheme",
    "images",
    "top1_float",
    "top1_integer",
    "top5_integer",
    "size_mib",
    "bops_g",
    "agreement_top1",
    "agreement_activations",
    "seconds",
    "commit",
    "command",
)
# Present where they were measured: top1_simulation only with --fixed-point-quantization, same_class_as_float (percent
# of images to which the integer graph and the float network it came from give one class) where the run began with that.
# images_per_second: of the last evaluation, with loading and comparing.
SAME, TOP1_SIMULATION = "same_class_as_float", "top1_simulation"
EXTRA_KEYS: tuple[str, ...] = (
    "agreement_narrow",
    "agreement_images",
    "float_islands",
    "device",
    "threads",
    "epochs",
    "best_top1",
)
EXTRA_KEYS += (SAME, TOP1_SIMULATION, "engine", "images_per_second")
# Only with --ptq: the recipe, whose quantization, the signal to quantization noise by layer, what adaround or block
# did to each part; only where validation images calibrated: how many did not, and top-1 on those (of integers or of a
# simulation).
PTQ_KEYS = ("ptq", "ptq_backend", "sqnr_db", "rounding", "rounding_seconds")
UNSEEN_KEYS = ("images_unseen", "top1_float_unseen", "top1_integer_unseen", "top1_simulation_unseen")


def format_report(report: Mapping[str, Any], folder: Path) -> str:
    """The lines a run ends with.  report: a value for each of ``REPORT_KEYS``; folder: where the files are."""
    lines = [
        f"{report['arch']} {report['scheme']}: {report['images']} images, {report['seconds']} s",
        f"  top-1 float        {_percent(report['top1_float'])}",
    ]
    same = [f"  same class         {_percent(report[SAME])} as the float network"] if SAME in report else []
    if report["top1_integer"] is not None:
        lines += [
            f"  top-1 integer      {_percent(report['top1_integer'])}   top-5 {_percent(report['top5_integer'])}",
            f"  simulation agrees  {_percent(report['agreement_top1'])} of predictions, "
            f"{_percent(report['agreement_activations'])} of activation integers, "
            f"{_percent(report['agreement_narrow'])} of those of at most 8 bits ({report['agreement_images']} images)",
            *same,
            f"  float islands      {', '.join(report['float_islands']) or 'none'}",
        ]
    if TOP1_SIMULATION in report:
        lines.append(f"  top-1 simulation   {_percent(report[TOP1_SIMULATION])}")
    if "images_unseen" in report:
        kind = "integer" if "top1_integer_unseen" in report else "simulation"
        lines.append(
            f"  without those calibrated on: float {_percent(report['top1_float_unseen'])}, "
            f"{kind} {_percent(report[f'top1_{kind}_unseen'])} of {report['images_unseen']} images"
        )
    if "engine" in report:
        lines.append(f"  engine             {report['engine']}, {report['images_per_second']:.0f} images/s in all")
    lines.append(f"  size {report['size_mib']:.3f} MiB, {report['bops_g']:.3f} GBOPS, files in {folder}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON, atomically; raises UserError where the file cannot be written."""

    def write(file: BinaryIO) -> None:
        file.write((json.dumps(values, indent=2, default=str) + "\n").encode())

    write_atomically(path, write)
