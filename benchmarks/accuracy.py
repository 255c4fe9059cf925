"""Accuracy of quantized networks on real images, one row per run of ``quant_train.py``.

    python -m benchmarks.accuracy --weights DIR [--cifar DIR] [--imagenet DIR] [--only TEXT] [--output FILE]

DIR of --weights holds the float weights named in ``CASES``; --cifar has train/ and val/ of CIFAR-10 as images,
--imagenet a val/ folder.  Every row is a complete run with its own command; rows already in the output with the same
name are replaced, others are kept.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import quant_train
from utils.provenance import provenance, read_csv, write_csv

CIFAR = "--mean .485 .456 .406 --std .229 .224 .225"
RESNET20 = f"-a resnet20_cifar10 --weights {{weights}}/cifar10_weights/pytorchcv_resnet20_cifar10_jpegft.pth {CIFAR}"
RESNET56 = f"-a resnet56_cifar10 --weights {{weights}}/cifar10_weights/pytorchcv_resnet56_cifar10_bncal.pth {CIFAR}"
MOBILENET = "-a mobilenetv2_w1 --weights {weights}/imagenet_weights/mobilenetv2_w1.pth --mean .5 --std .5 --rotate180"
ONE_EPOCH = "--epochs 1 --lr 0.01 --lr-schedule cosine"
DISTILLED = (
    "--epochs 1 --lr 0.02 --lr-schedule cosine --fix-BN --distill-method KD_naive --distill-alpha 0.5 --temperature 2 "
    "--teacher-arch resnet20_cifar10 "
    "--teacher-weights {weights}/cifar10_weights/pytorchcv_resnet20_cifar10_jpegft.pth"
)

Cases = dict[str, tuple[str, str]]  # name -> data set (cifar or imagenet), flags of quant_train.py

# One epoch of CIFAR-10 at batch 128 is 390 steps.
CASES: Cases = {
    "ResNet-20 W8A8, calibration": ("cifar", f"{RESNET20} --quant-scheme uniform8 --epochs 0"),
    "ResNet-56 W8A8, calibration": ("cifar", f"{RESNET56} --quant-scheme uniform8 --epochs 0"),
    "ResNet-20 W4A4, calibration": ("cifar", f"{RESNET20} --quant-scheme uniform4 --epochs 0"),
    "ResNet-20 FP32, 390 steps (control)": ("cifar", f"{RESNET20} --quant-scheme float {ONE_EPOCH}"),
    "ResNet-20 W4A4, 390 steps": ("cifar", f"{RESNET20} --quant-scheme uniform4 {ONE_EPOCH}"),
    "ResNet-20 W4A4, 390 steps, frozen BN, distilled": ("cifar", f"{RESNET20} --quant-scheme uniform4 {DISTILLED}"),
    "ResNet-20 W4A4, 390 steps, EMA ranges": (
        "cifar",
        f"{RESNET20} --quant-scheme uniform4 {ONE_EPOCH} --act-range-momentum 0.99",
    ),
    "ResNet-20 W3A3, 390 steps": ("cifar", f"{RESNET20} --quant-scheme uniform3 {ONE_EPOCH}"),
    "ResNet-20 W2A2, 390 steps": ("cifar", f"{RESNET20} --quant-scheme uniform2 {ONE_EPOCH}"),
    "MobileNetV2 W8A8, calibration": ("imagenet", f"{MOBILENET} --quant-scheme uniform8 --epochs 0"),
}
KEYS = (
    "top1_float",
    "top1_integer",
    "same_class_as_float",
    "agreement_top1",
    "agreement_activations",
    "agreement_narrow",
)


def measure(name: str, data: Path, flags: str, weights: Path, keys: Sequence[str]) -> dict[str, object]:
    """One complete run; the row holds the ``keys`` of its report, and its command with folders by their roles."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = flags.format(weights=weights)
        arguments = [*shlex.split(command), "--data", str(data), "--save-path", folder, "--report", str(report)]
        code = quant_train.main(arguments)
        if code != 0:
            raise SystemExit(code)
        found = json.loads(report.read_text())
    values = {key: "" if found.get(key) is None else round(found[key], 2) for key in keys}
    shown = flags.format(weights="WEIGHTS")
    cost = {"size_mib": round(found["size_mib"], 3), "bops_g": round(found["bops_g"], 3)}
    row = {"run": name, "images": found["images"], **values, **cost, "seconds": found["seconds"]}
    return {**row, "commit": provenance()["commit"], "command": f"python quant_train.py {shown} --data DATA"}


def run(description: str, cases: Cases, keys: Sequence[str], output: Path, argv: Sequence[str] | None = None) -> int:
    """The command line of a table of runs; what is measured is in ``output`` after every run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cifar", type=Path, metavar="DIR")
    parser.add_argument("--imagenet", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this text")
    parser.add_argument("--missing", action="store_true", help="runs that the output has no row of")
    parser.add_argument("--output", type=Path, default=output, metavar="FILE")
    args = parser.parse_args(argv)
    old = read_csv(args.output)[1] if args.output.exists() else []
    rows: dict[str, dict[str, object]] = {row["run"]: dict(row) for row in old}
    for name, (dataset, flags) in cases.items():
        data = args.cifar if dataset == "cifar" else args.imagenet
        if data is None or args.only not in name or (args.missing and name in rows):
            continue
        rows[name] = measure(name, data, flags, args.weights, keys)
        fields = list(rows[name])
        write_csv(args.output, [{key: rows[run].get(key, "") for key in fields} for run in cases if run in rows])
    return 0


if __name__ == "__main__":
    sys.exit(run(str(__doc__), CASES, KEYS, Path("runs/bench/accuracy.csv")))
