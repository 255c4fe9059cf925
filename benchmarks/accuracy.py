"""Accuracy of quantized networks on real images, one row per run of ``quant_train.py``.

    python benchmarks/accuracy.py --weights DIR [--cifar DIR] [--imagenet DIR] [--only TEXT] [--output FILE]

DIR of --weights holds the float weights named in ``CASES``; --cifar has train/ and val/ of CIFAR-10 as images,
--imagenet a val/ folder.  Every row is a complete run with its own command; rows already in the output with the same
name are replaced, others are kept.
"""

import argparse
import csv
import json
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quant_train
from utils.provenance import provenance, write_csv

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

# Name -> data set, flags.  One epoch of CIFAR-10 at batch 128 is 390 steps.
CASES = {
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


def measure(name: str, data: Path, flags: str, weights: Path) -> dict[str, object]:
    """One complete run; the row holds what its report says, and its command with folders by their roles."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = flags.format(weights=weights)
        arguments = [*shlex.split(command), "--data", str(data), "--save-path", folder, "--report", str(report)]
        code = quant_train.main(arguments)
        if code != 0:
            raise SystemExit(code)
        found = json.loads(report.read_text())
    values = {key: "" if found.get(key) is None else round(found[key], 2) for key in KEYS}
    shown = flags.format(weights="WEIGHTS")
    cost = {"size_mib": round(found["size_mib"], 3), "bops_g": round(found["bops_g"], 3)}
    row = {"run": name, "images": found["images"], **values, **cost, "seconds": found["seconds"]}
    return {**row, "commit": provenance()["commit"], "command": f"python quant_train.py {shown} --data DATA"}


def _old_rows(path: Path) -> dict[str, dict[str, object]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {row["run"]: dict(row) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cifar", type=Path, metavar="DIR")
    parser.add_argument("--imagenet", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this text")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/accuracy.csv"), metavar="FILE")
    args = parser.parse_args()
    rows = _old_rows(args.output)
    for name, (dataset, flags) in CASES.items():
        data = args.cifar if dataset == "cifar" else args.imagenet
        if data is None or args.only not in name:
            continue
        rows[name] = measure(name, data, flags, args.weights)
        fields = list(rows[name])
        write_csv(args.output, [{key: rows[run].get(key, "") for key in fields} for run in CASES if run in rows])


if __name__ == "__main__":
    main()
