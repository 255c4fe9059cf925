"""Cost of evaluating the integer graph with the torch engine, relative to the float model; measured interleaved.

python -m benchmarks.engine_speed [--archs resnet18 ...] [--rounds 7] [--output runs/bench/engine_speed.csv]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from utils.data_utils import normalize
from utils.integer_graph.torch_engine import TorchEngine
from utils.provenance import write_csv
from utils.random_networks import calibrated, random_images

CASES = {"resnet20_cifar10": 128, "resnet18": 16, "resnet50": 16, "mobilenetv2_w1": 16, "inceptionv3": 8}


def _time(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@torch.inference_mode()
def measure(arch: str, scheme: str, batch: int, rounds: int) -> dict[str, object]:
    """One row of medians; both sides start from the same uint8 batch."""
    experiment = calibrated(arch, scheme)
    engine = TorchEngine(experiment.convert(()))
    images = random_images(experiment.preprocess.input_shape, batch)
    module = experiment.info.module.eval()

    def run_float() -> object:
        return module(normalize(images, experiment.preprocess))

    run_float(), engine(images)
    times = [(_time(run_float), _time(lambda: engine(images))) for _ in range(rounds)]
    return {
        "arch": arch,
        "scheme": scheme,
        "batch": batch,
        "float_ms": round(1e3 * statistics.median(f for f, _ in times), 1),
        "integer_ms": round(1e3 * statistics.median(i for _, i in times), 1),
        "ratio": round(statistics.median(i / f for f, i in times), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=["uniform8", "uniform4"], metavar="SCHEME")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/engine_speed.csv"), metavar="FILE")
    args = parser.parse_args()
    rows = []
    for arch in args.archs:
        for scheme in args.schemes:
            rows.append(measure(arch, scheme, CASES.get(arch, 8), args.rounds))
            print(rows[-1], flush=True)
    write_csv(args.output, rows)


if __name__ == "__main__":
    main()
