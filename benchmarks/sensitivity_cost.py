"""What the Hessian trace of a network costs, how precise it is, and whether its standard errors are true.

    python -m benchmarks.sensitivity_cost --weights FILE --data DIR [--arch resnet20_cifar10] [--images 256]

DIR has train/ with one folder of images per class.  Measures to a relative standard error of 5 % on the ten largest
layers, as a search does, and once more with all probes there are, which gives the exact trace where a network is
piecewise linear in each layer's weights.  Writes ``runs/bench/sensitivity_cost.csv``: one row per layer, with its
distance from the second measurement in standard errors of the first.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from utils.data_utils import make_loader, normalize, open_dataset, subset
from utils.errors import command_line
from utils.experiment import Experiment
from utils.float_weights import load_float_weights
from utils.models import create_model
from utils.preprocess import Preprocess
from utils.provenance import write_csv
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.sensitivity import Sensitivities, Settings, measure
from utils.quantization_utils.sensitivity_state import Labelled

BATCH = 64
WIDTHS = (2, 4, 8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(data: Path, preprocess: Preprocess, count: int, seed: int) -> list[Labelled]:
    """A fixed random part of the training images, normalised, in batches."""
    dataset = subset(open_dataset(data, "train", preprocess), count=count, seed=seed)
    loader = make_loader(dataset, BATCH, train=False)
    return [(normalize(batch, preprocess), labels) for batch, labels in loader]


def timed(model: QuantizedModel, batches: list[Labelled], settings: Settings) -> tuple[Sensitivities, float]:
    """The measurement and its wall time in seconds, calibration at each width included."""
    start = time.perf_counter()
    found = measure(model, batches, "trace", WIDTHS, settings)
    return found, time.perf_counter() - start


def rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per layer, the largest first."""
    info = create_model(args.arch)
    load_float_weights(info.module, args.weights, args.arch)
    preprocess = replace(info.preprocess, mean=MEAN, std=STD)
    experiment = Experiment(info, preprocess, "uniform8", torch.device("cpu"))
    batches = images(args.data, preprocess, args.images, args.seed)
    calibrate(experiment.model, [batch for batch, _ in batches])
    settings = Settings(arch=args.arch, seed=args.seed)
    found, seconds = timed(experiment.model, batches, settings)
    every, all_seconds = timed(experiment.model, batches, replace(settings, tolerance=1e-9, max_probes=1 << 10))
    print(f"{args.arch}: {seconds:.1f} s to 5 %, {all_seconds:.1f} s with all probes")
    bits = WIDTHS[0]
    table: list[dict[str, object]] = []
    for layer in sorted(experiment.layers, key=lambda layer: -layer.weights):
        damage, error = found.damage[layer.name][bits], found.standard_error[layer.name][bits]
        exact = every.damage[layer.name][bits]
        table.append(
            {
                "arch": args.arch,
                "images": found.images,
                "seconds": round(seconds, 1),
                "seconds_all_probes": round(all_seconds, 1),
                "layer": layer.name,
                "weights": layer.weights,
                **{f"damage_{width}": f"{found.damage[layer.name][width]:.4g}" for width in WIDTHS},
                "relative_error": round(error / abs(damage), 4) if damage else 0.0,
                "relative_error_all_probes": round(every.standard_error[layer.name][bits] / abs(exact), 4)
                if exact
                else 0.0,
                "distance_in_errors": round((damage - exact) / error, 2) if error else 0.0,
            }
        )
    return table


@command_line()
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="float weights of the network")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/")
    parser.add_argument("--arch", default="resnet20_cifar10")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/sensitivity_cost.csv"))
    args = parser.parse_args(arguments)
    table = rows(args)
    write_csv(args.output, table)
    worst = max(float(str(row["relative_error"])) for row in table[: Settings().largest])
    print(f"largest relative error of the ten largest layers: {100 * worst:.1f} %; written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
