"""Cost of calibrating a network relative to the plain float passes over the same images; measured interleaved.

    python -m benchmarks.calibration_cost [--arch resnet50] [--methods ema mse] [--images 256] [--rounds 5]

Takes random weights and smooth random images (the time does not depend on their values), one thread count for all.
In every round the float network runs over all images, then each method calibrates on them; a ratio is the median over
rounds of method over plain passes.  Goals: at most 1.5 for ema, at most 4 for mse.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data_utils import normalize
from utils.errors import UserError, command_line
from utils.experiment import Experiment
from utils.models import create_model
from utils.preprocess import Preprocess
from utils.provenance import write_csv
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.calibrators import METHODS
from utils.quantization_utils.weight_ranges import calibrate_weights
from utils.random_networks import random_images, spread_statistics

PLAIN, WEIGHTS = "plain passes", "mse weights"
STATISTICS_IMAGES = 4


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@torch.inference_mode()
def plain_passes(module: nn.Module, images: Sequence[Tensor], preprocess: Preprocess) -> None:
    """What calibration cannot do without: every image once through the float network."""
    for batch in images:
        module(normalize(batch, preprocess))


def jobs(arch: str, methods: Sequence[str], images: int, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; all read the same uint8 batches."""
    torch.manual_seed(0)
    info = create_model(arch)
    preprocess = info.preprocess
    batches = random_images(preprocess.input_shape, images).split(batch)
    spread_statistics(info.module, normalize(batches[0][:STATISTICS_IMAGES], preprocess))
    experiment = Experiment(info, preprocess, "uniform8", torch.device("cpu"))

    def calibrate_by(method: str) -> None:
        calibrate(experiment.model, (normalize(b, preprocess) for b in batches), method)

    found: dict[str, Callable[[], object]] = {PLAIN: partial(plain_passes, info.module, batches, preprocess)}
    found |= {method: partial(calibrate_by, method) for method in methods}
    return {**found, WEIGHTS: partial(calibrate_weights, experiment.model, "mse")}


def measure(arch: str, methods: Sequence[str], images: int, batch: int, rounds: int) -> list[dict[str, object]]:
    """One row for every job: median seconds, and the median of its ratios to the plain passes of the same round."""
    timed = jobs(arch, methods, images, batch)
    timed[PLAIN]()
    times: list[dict[str, float]] = []
    for _ in tqdm(range(rounds), desc=arch, unit="round", disable=None):
        times.append({name: _seconds(function) for name, function in timed.items()})
    return [
        {
            "arch": arch,
            "job": name,
            "images": images,
            "batch": batch,
            "rounds": rounds,
            "seconds": round(statistics.median(t[name] for t in times), 3),
            "ratio": round(statistics.median(t[name] / t[PLAIN] for t in times), 3),
        }
        for name in timed
    ]


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=["ema", "mse"], choices=METHODS)
    parser.add_argument("--images", type=int, default=256, metavar="N")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/calibration_cost.csv"), metavar="FILE")
    args = parser.parse_args(argv)
    for name in ("images", "batch", "rounds"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name} is {vars(args)[name]}, give at least 1")
    rows = measure(args.arch, args.methods, args.images, args.batch, args.rounds)
    write_csv(args.output, rows)
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
