"""Whether networks compiled through TVM give the integer graph's integers, compared by equality.

    python -m benchmarks.tvm_equality [--archs resnet18 ...] [--schemes uniform8 ...] [--targets auto avx2 ...]
        [--weights DIR] [--output FILE]

Every network runs with one image a call and with eight, with one thread and with two: all logits of 32 images are held
to the torch engine's.  On two images every tensor that the compiled network stores is held to the interpreter's.
Weights are random, and random images calibrate; --weights DIR has the trained weights that ``TRAINED`` names.  Each
network runs in a process of its own.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tvm_benchmark import runtime
from tvm_benchmark.artifact import CompiledModel
from tvm_benchmark.compile import compile_graph, require_tools
from tvm_benchmark.equality import difference
from tvm_benchmark.isa import choose, runs_here
from utils.data_utils import normalize
from utils.errors import UserError, command_line
from utils.experiment import Experiment
from utils.integer_graph import interpreter
from utils.integer_graph.ir import Graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.preprocess import IMAGENET_MEAN, IMAGENET_STD
from utils.provenance import write_csv
from utils.quantization_utils.calibrate import calibrate
from utils.random_networks import calibrated, random_images

CASES = {
    "resnet18": ("uniform8", "uniform4", "bops_0.5"),
    "resnet50": ("uniform8", "uniform4", "bops_0.5"),
    "resnet101": ("uniform8", "uniform4", "w4a8"),
    "mobilenetv2_w1": ("uniform8", "uniform4", "bops_0.5"),
    "inceptionv3": ("uniform8", "uniform4", "w4a8"),
    "resnet20_cifar10": ("uniform8",),
    "resnet56_cifar10": ("uniform8",),
    "densenet121": ("uniform8",),
    "shufflenetv2_w1": ("uniform8",),
    "efficientnet_b0": ("uniform8",),
    "regnetx006": ("uniform8",),
    "torchvision/googlenet": ("uniform8",),
    "torchvision/squeezenet1_1": ("uniform8",),
}
# Network -> file of trained weights below the folder of --weights, mean and standard deviation of its pixels.
TRAINED = {
    "resnet20_cifar10": ("cifar10_weights/pytorchcv_resnet20_cifar10_jpegft.pth", IMAGENET_MEAN, IMAGENET_STD),
    "resnet56_cifar10": ("cifar10_weights/pytorchcv_resnet56_cifar10_bncal.pth", IMAGENET_MEAN, IMAGENET_STD),
    "mobilenetv2_w1": ("imagenet_weights/mobilenetv2_w1.pth", (0.5,) * 3, (0.5,) * 3),
}
BATCHES, THREADS = (1, 8), (1, 2)
IMAGES, KEPT_IMAGES = 32, 2


@dataclass
class Counts:
    """tensors: stored ones compared.  integers: of them and of the logits, ``different`` of which are not equal.
    first: the first tensor that differs, in the order of the graph.  compile_s: seconds for each batch size."""

    tensors: int = 0
    integers: int = 0
    different: int = 0
    first: str = ""
    compile_s: tuple[float, ...] = ()

    def add(self, name: str, compared: int, different: int) -> None:
        self.integers += compared
        self.different += different
        if different and not self.first:
            self.first = name


def compare(graph: Graph, images: Tensor, target: str, batches: Sequence[int] = BATCHES) -> Counts:
    """Compile a graph for every batch size and compare, with every number of threads.

    images: uint8 [N, C, H, W].  The first batch size is compiled once more so that stored tensors can be read (memory
    is then used once only); they are compared on ``KEPT_IMAGES`` of the images.  Raises UserError.
    """
    counts, expected = Counts(), TorchEngine(graph)(images).numpy()
    with tempfile.TemporaryDirectory() as folder:
        compile_graph(graph, folder, batch=batches[0], target=target, keep=True)
        model = CompiledModel(folder, THREADS[-1])
        _compare_tensors(counts, graph, model, images[: max(batches[0], KEPT_IMAGES)].numpy())
    for batch in batches:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            compile_graph(graph, folder, batch=batch, target=target)
            counts.compile_s += (time.perf_counter() - start,)
            for threads in THREADS:
                model = CompiledModel(folder, threads)
                found = difference(model.predict(images.numpy()), expected)
                counts.add(f"logits (batch {batch}, {threads} threads)", found.logits, found.different)
    return counts


def _compare_tensors(counts: Counts, graph: Graph, model: CompiledModel, images: np.ndarray) -> None:
    """Hold every stored tensor to the interpreter's, batch by batch (whole ones)."""
    expected = interpreter.run(graph, images, keep=True)
    stored = [node.name for node in graph.nodes if node.name in model.info["tensors"]]
    counts.tensors = len(stored)
    for start in range(0, len(images) - model.batch + 1, model.batch):
        part = slice(start, start + model.batch)
        model(images[part])
        for name in stored:
            got = model.tensor(name)
            wrong = np.count_nonzero(got != expected[name][part].reshape(got.shape))
            counts.add(name, got.size, int(wrong))


@torch.inference_mode()
def measure(arch: str, scheme: str, target: str, weights: Path | None) -> dict[str, object]:
    """One row.  weights: folder of trained weights.  Raises UserError."""
    file = TRAINED[arch][0] if weights is not None and arch in TRAINED else None
    graph = _experiment(arch, scheme, weights).convert(())
    counts = compare(graph, random_images(graph.nodes[0].type.shape, IMAGES, seed=2), target)
    seconds = {f"compile_{n}_s": round(s, 1) for n, s in zip(BATCHES, counts.compile_s, strict=True)}
    return {
        "arch": arch,
        "scheme": scheme,
        "weights": Path(file).name if file else "random",
        "target": choose(target).name,
        "tensors": counts.tensors,
        "integers": counts.integers,
        "different": counts.different,
        "first_different": counts.first,
        **seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def _experiment(arch: str, scheme: str, weights: Path | None) -> Experiment:
    """A network calibrated on random images, with trained weights where the folder has them."""
    if weights is None or arch not in TRAINED:
        return calibrated(arch, scheme)
    file, mean, std = TRAINED[arch]
    info = create_model(arch, weights=weights / file)
    preprocess = replace(info.preprocess, mean=mean, std=std)
    experiment = Experiment(info, preprocess, scheme, torch.device("cpu"))
    calibrate(experiment.model, [normalize(random_images(preprocess.input_shape, 8), preprocess)])
    return experiment


def rows_of(cases: Sequence[tuple[str, str, str]], weights: Path | None) -> Iterator[dict[str, object]]:
    """Rows of (network, scheme, target), one process each."""
    context = multiprocessing.get_context("spawn")
    with tqdm(cases, unit="network", disable=None) as bar:
        for case in bar:
            bar.set_description(" ".join(case))
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                yield pool.submit(measure, *case, weights).result()


def cases_of(archs: Sequence[str], schemes: Sequence[str] | None, targets: Sequence[str]) -> list[tuple[str, str, str]]:
    """(network, scheme, target) of every row.  Raises UserError for a target that is unknown or does not run here."""
    for target in targets:
        if not runs_here(choose(target)):
            raise UserError(f"got the target {target}, which this machine does not run; leave it out")
    return [
        (arch, scheme, target)
        for arch in archs
        for scheme in schemes or CASES.get(arch, ("uniform8",))
        for target in targets
    ]


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 where an integer differs, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME", help="default: those of each network in CASES")
    parser.add_argument("--targets", nargs="+", default=["auto"], metavar="NAME")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of trained weights; default: random ones")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/tvm_equality.csv"), metavar="FILE")
    args = parser.parse_args(argv)
    os.environ.setdefault(runtime.POOL_SIZE, str(max(THREADS)))
    rows: list[dict[str, object]] = []
    require_tools()
    for row in rows_of(cases_of(args.archs, args.schemes, args.targets), args.weights):
        rows.append(row)
        tqdm.write(str(row))
        write_csv(args.output, rows)
    return int(any(row["different"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
