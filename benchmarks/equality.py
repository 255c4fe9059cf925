"""Whether the torch engine equals the interpreter, on every tensor of every node.

    python -m benchmarks.equality [--archs resnet18 ...] [--images 8] [--output results/equality.csv]

Random weights, random images; every integer of every node and every logit is compared by equality.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from utils.integer_graph.interpreter import run
from utils.integer_graph.torch_engine import TorchEngine
from utils.provenance import write_csv
from utils.random_networks import calibrated, random_images

CASES = {
    "resnet20_cifar10": ("uniform8", "uniform4", "w4a8"),
    "resnet18": ("uniform8", "uniform4", "bops_0.5"),
    "resnet50": ("uniform8", "uniform4", "bops_0.5"),
    "mobilenetv2_w1": ("uniform8", "uniform4", "bops_0.5"),
    "inceptionv3": ("uniform8", "uniform4", "w4a8"),
}


def compare(arch: str, scheme: str, images: int) -> dict[str, object]:
    """One row: how many nodes and integers were compared and how many differ."""
    experiment = calibrated(arch, scheme)
    graph = experiment.convert(())
    batch = random_images(experiment.preprocess.input_shape, images, seed=2)
    start = time.perf_counter()
    expected = run(graph, batch.numpy(), keep=True)
    middle = time.perf_counter()
    got = TorchEngine(graph).run(batch, keep=True)
    end = time.perf_counter()
    different = {name: int(np.count_nonzero(got[name].numpy() != values)) for name, values in expected.items()}
    return {
        "arch": arch,
        "scheme": scheme,
        "images": images,
        "nodes": len(expected),
        "integers": sum(values.size for values in expected.values()),
        "different": sum(different.values()),
        "first_different_node": next((name for name, count in different.items() if count), ""),
        "interpreter_s": round(middle - start, 2),
        "torch_engine_s": round(end - middle, 2),
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--images", type=int, default=8, metavar="N")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/equality.csv"), metavar="FILE")
    args = parser.parse_args()
    rows = []
    for arch in args.archs:
        for scheme in CASES.get(arch, ("uniform8", "uniform4", "w4a8")):
            rows.append(compare(arch, scheme, args.images))
            print(rows[-1], flush=True)
    write_csv(args.output, rows)
    return int(any(row["different"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
