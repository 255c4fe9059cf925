"""Accuracy of post-training quantization on real images, one row per run of ``quant_train.py --ptq``.

    python -m benchmarks.ptq --weights DIR [--cifar DIR] [--imagenet DIR] [--only TEXT] [--output FILE]

Arguments as of ``benchmarks.accuracy``.  Calibration takes 256 images: of CIFAR-10 from train/, of a folder with val/
alone from there, and then the accuracy on the other images is a column of its own.
"""

import sys
from pathlib import Path

from benchmarks.accuracy import MOBILENET, RESNET20, RESNET56, Cases, run

NETWORKS = {
    "MobileNetV2": ("imagenet", MOBILENET),
    "ResNet-20": ("cifar", RESNET20),
    "ResNet-56": ("cifar", RESNET56),
}
LINEAR = ("MobileNetV2",)  # networks with linear streams
CALIBRATORS = ("minmax", "ema", "ema_quantile", "mse", "ema_mse", "percentile", "kl")
RECIPES = (
    *(("w8a8", calibrator) for calibrator in CALIBRATORS),
    ("w4a8", "minmax"),
    ("w4a8", "mse"),
    ("w4a8", "mse+equalize+bias"),
    ("w4a8", "mse+descent"),
    ("w4a8", "mse+balance+descent"),
    ("w4a8", "mse+balance+affine+descent"),
    ("w4a8", "mse+adaround"),
    ("w4a8", "mse+balance+adaround"),
    ("w4a8", "mse+balance+affine+adaround"),
    ("w4a4", "mse"),
    ("w4a4", "mse+descent"),
    ("w4a4", "mse+balance+descent"),
    ("w4a4", "mse+affine+descent"),
    ("w4a4", "mse+balance+affine+descent"),
    ("w4a4", "mse+adaround"),
    ("w4a4", "mse+block"),
)
CASES: Cases = {
    f"{network} {scheme} {recipe}": (data, f"{flags} --quant-scheme {scheme} --ptq {recipe} --calib-images 256")
    for scheme, recipe in RECIPES
    for network, (data, flags) in NETWORKS.items()
    if "affine" not in recipe or network in LINEAR
} | {
    "MobileNetV2 w4a8, published setting of mse+adaround": (
        "imagenet",
        f"{MOBILENET} --quant-scheme w4a8 --ptq mse+adaround --ptq-setting published --calib-images 256",
    )
}
KEYS = (
    "top1_float",
    "top1_integer",
    "images_unseen",
    "top1_float_unseen",
    "top1_integer_unseen",
    "agreement_top1",
    "rounding_seconds",
    "threads",
)


if __name__ == "__main__":
    sys.exit(run(str(__doc__), CASES, KEYS, Path("runs/bench/ptq.csv")))
