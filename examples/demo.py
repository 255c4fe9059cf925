"""The whole tool chain on 8x8 digits in under a minute: float training, calibration, QAT, integers, one table.

    python -m examples.demo [--save-path runs/demo]

Trains a small residual network from random weights, quantizes it under several schemes, by calibration alone and by
quantization-aware training, and evaluates each integer graph on 360 held-out images.  Writes table.md, table.csv,
demo.png and report.json into the save folder; each run's checkpoint and integer graph are in a folder of its own there.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import quant_train
from utils.atomic_file import write_atomically
from utils.checkpoint import load_checkpoint
from utils.errors import command_line
from utils.plots import SchemePoint, plot_schemes
from utils.provenance import provenance, write_csv
from utils.run_report import write_json
from utils.tables import markdown_table, plain_table

MIXED = Path(__file__).with_name("mixed.yaml")
SCHEMES = ("uniform8", str(MIXED), "uniform4", "uniform2")
FLOAT_EPOCHS, QAT_EPOCHS = 20, 10
CALIBRATION, TRAINING = "calibration", "QAT"
CHECKPOINT = "checkpoint.pth.tar"
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One scheme: reports of the calibrated and of the trained run, and layer -> (weight bits, activation bits)."""

    scheme: str
    calibrated: Report
    trained: Report
    bits: dict[str, tuple[int, int]]


class RunFailed(Exception):
    """A run of quant_train ended with this exit code, having said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"quant_train.py ended with code {code}")
        self.code = code


def quantize(folder: Path, *flags: str) -> Report:
    """Run quant_train.py on the digits with ``flags``, saving in ``folder``; returns its report.  Raises RunFailed."""
    report = folder / "report.json"
    everything = ["--data", "digits", "--float-epochs", "0", "--threads", "1"]  # too small a network for more threads
    with contextlib.redirect_stdout(io.StringIO()):
        code = quant_train.main([*everything, "--save-path", str(folder), "--report", str(report), *flags])
    if code:
        raise RunFailed(code)
    return dict(json.loads(report.read_text()))


def train_float(folder: Path, epochs: int) -> Report:
    """The float network, from random weights."""
    schedule = ("--epochs", str(epochs), "--lr", "0.1", "--lr-schedule", "cosine")
    return quantize(folder, "--quant-scheme", "float", *schedule)


def run_scheme(scheme: str, folder: Path, epochs: int) -> Outcome:
    """Calibrate the float network saved in ``folder``/float, then train that quantized network for ``epochs``."""
    name = Path(scheme).stem
    calibrated, trained = folder / f"{name}_calibrated", folder / f"{name}_qat"
    weights = str(folder / "float" / CHECKPOINT)
    before = quantize(calibrated, "--quant-scheme", scheme, "--weights", weights, "--epochs", "0")
    start = ("--resume", str(calibrated / CHECKPOINT))
    schedule = ("--epochs", str(epochs), "--lr", "0.02", "--lr-schedule", "cosine")
    after = quantize(trained, "--quant-scheme", scheme, *start, *schedule)
    saved = load_checkpoint(trained / CHECKPOINT)["bits"]
    return Outcome(name, before, after, {layer: (weight, act) for layer, (weight, act) in saved.items()})


def table(float_report: Report, outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """One row for the float network and two for each scheme, numbers as printed.

    size: of the weights (float: all parameters), KiB of 1024 bytes.  MBOPS: 1e6 bit operations of one image.
    simulation agrees: share of predictions that fake quantization and the integer graph have in common.
    """
    rows = [_row("float", "training", float_report, float_report)]
    for outcome in outcomes:
        rows.append(_row(outcome.scheme, CALIBRATION, outcome.calibrated, float_report))
        rows.append(_row(outcome.scheme, TRAINING, outcome.trained, float_report))
    return rows


def _row(scheme: str, how: str, report: Report, float_report: Report) -> dict[str, str]:
    return {
        "scheme": scheme,
        "how": how,
        "top-1 float %": f"{float_report['top1_float']:.2f}",
        "top-1 integer %": _percent(report["top1_integer"]),
        "size KiB": f"{report['size_mib'] * 1024:.1f}",
        "compression": f"{float_report['size_mib'] / report['size_mib']:.2f}x",
        "MBOPS": f"{report['bops_g'] * 1000:.1f}",
        "simulation agrees %": _percent(report["agreement_top1"]),
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_results(folder: Path, float_report: Report, outcomes: Sequence[Outcome]) -> None:
    """table.md, table.csv, demo.png and report.json.  Raises UserError where they cannot be written."""
    rows = table(float_report, outcomes)
    write_csv(folder / "table.csv", rows)
    text = markdown_table(rows) + "\n"
    write_atomically(folder / "table.md", lambda file: _write_text(file, text))
    everything = {
        "provenance": provenance(),
        "float": float_report,
        "schemes": {o.scheme: {"calibration": o.calibrated, "qat": o.trained, "bits": o.bits} for o in outcomes},
    }
    write_json(folder / "report.json", everything)
    images = float_report["images"]
    plot_schemes(
        folder / "demo.png",
        [_point(outcome) for outcome in outcomes],
        {outcome.scheme: outcome.bits for outcome in outcomes},
        float_top1=float_report["top1_float"],
        images=images,
        title=f"Digits: accuracy of integer graphs on {images} images",
    )


def _point(outcome: Outcome) -> SchemePoint:
    report = outcome.trained
    return SchemePoint(
        outcome.scheme,
        calibrated=outcome.calibrated["top1_integer"],
        trained=report["top1_integer"],
        size=report["size_mib"] * 1024,
        bops=report["bops_g"] * 1000,
    )


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def run(folder: Path, float_epochs: int, qat_epochs: int) -> None:
    """The demo; ``folder`` receives everything.  Raises RunFailed and UserError."""
    started = time.perf_counter()
    print(f"digits: training the float network for {float_epochs} epochs from random weights", flush=True)
    float_report = train_float(folder / "float", float_epochs)
    outcomes = []
    for scheme in SCHEMES:
        print(f"{Path(scheme).stem}: calibrating, then {qat_epochs} epochs of QAT", flush=True)
        outcomes.append(run_scheme(scheme, folder, qat_epochs))
    write_results(folder, float_report, outcomes)
    print(f"\n{plain_table(table(float_report, outcomes))}\n")
    print(f"{float_report['images']} validation images; one image is {100 / float_report['images']:.2f} %.")
    print(f"Table, picture and reports are in {folder} ({time.perf_counter() - started:.0f} s).")


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or that of the run that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save-path", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--float-epochs", type=int, default=FLOAT_EPOCHS, metavar="N", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=QAT_EPOCHS, metavar="N", help="of QAT; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        run(args.save_path, args.float_epochs, args.epochs)
    except RunFailed as error:
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
