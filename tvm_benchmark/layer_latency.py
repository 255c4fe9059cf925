"""Time of every layer of a network with 8-bit and with 4-bit weights, as compiled here, for the choice of bit widths.

The network is compiled twice, with all layers at 8 and at 4 bits (weights random, which makes no difference), and each
step is timed inside it, so that weights come from where they come from in the whole network.  What is fused into a
layer (rescaling, residual sums, clamps) is part of its time.  Where one step computes two layers, a residual branch's
last convolution and the shortcut convolution that is added, they share its time by their multiply-adds.  Schemes with
2 or 3 bits run the 4-bit kernels, those with 5 to 7 the 8-bit ones; layers that always have 8 bits get no row for 4.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bit_config import Rule, Scheme
from tvm_benchmark.artifact import CompiledModel
from tvm_benchmark.compile import compile_graph
from tvm_benchmark.equality import compare
from tvm_benchmark.subject import Subject, layer_bits, layer_macs, load_subject
from utils.errors import UserError, command_line
from utils.layer_latency import MEASURED, latency_path, write_layer_latency

EPILOG = """\
examples:
  python -m tvm_benchmark.layer_latency -a resnet50
  python -m tvm_benchmark.layer_latency -a mobilenetv2_w1 --threads 2 --output mobilenet.csv

The file has the columns layer, bits (4 or 8) and ms; utils.layer_latency reads it.
exit status: 0 measured, 1 a compiled model is not equal to its graph, 2 the input cannot be used."""
PASSES, ROUNDS = 5, 20


class NotEqual(Exception):
    """A compiled model that differs from its graph; the message is for people."""


def measure(arch: str, threads: int = 1, target: str = "auto") -> dict[str, dict[int, float]]:
    """Layer -> kernel bits (8 and 4) -> milliseconds for one image, the minimum of many runs.

    Raises UserError for an unknown network, thread count or target, NotEqual for a model that is wrong.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        subjects, models = {}, {}
        for bits in tqdm(MEASURED, desc="compiling", unit="network"):
            subjects[bits] = _subject(arch, bits)
            models[bits] = _compiled(subjects[bits], Path(folder) / str(bits), threads, target)
        times = _step_seconds(models)
    measured: dict[str, dict[int, float]] = {}
    for bits, model in models.items():
        graph = subjects[bits].graph
        found, macs = layer_bits(graph), layer_macs(graph)
        for step, seconds in zip(model.info["steps"], times[bits], strict=True):
            for layer, share in _shares(step["layers"], macs).items():
                if found[layer].weight == bits:  # standalone BatchNorm always has 8
                    measured.setdefault(layer, {})[bits] = 1e3 * seconds * share
    return measured


def _shares(layers: Sequence[str], macs: Mapping[str, int]) -> dict[str, float]:
    """Layer -> its share of the step that computes these layers.

    >>> _shares(["conv2", "shortcut"], {"conv2": 900, "shortcut": 100})
    {'conv2': 0.9, 'shortcut': 0.1}
    """
    total = sum(macs[layer] for layer in layers)
    return {layer: macs[layer] / total for layer in layers}


def _subject(arch: str, bits: int) -> Subject:
    """All layers at these bits, the first and the last too."""
    return load_subject(arch, Scheme(f"all {bits} bit", (Rule(".*", bits),), ends="free"))


def _compiled(subject: Subject, folder: Path, threads: int, target: str) -> CompiledModel:
    """Compiled for one image, compared with its graph, ready to be timed."""
    compile_graph(subject.graph, folder, target=target, steps=True)
    model = CompiledModel(folder, threads)
    equality = compare(model, subject.graph, subject.images(4, seed=2), progress=False)
    if equality.different:
        raise NotEqual(equality.sentence)
    return model


def _step_seconds(models: dict[int, CompiledModel]) -> dict[int, list[float]]:
    """Minimum of each step, the models in turns."""
    passes: dict[int, list[list[float]]] = {bits: [] for bits in models}
    for _ in tqdm(range(PASSES), desc="timing", unit="pass"):
        for bits, model in models.items():
            passes[bits].append(model.step_times(ROUNDS))
    return {bits: [min(times) for times in zip(*found, strict=True)] for bits, found in passes.items()}


def run(arch: str | None, threads: int, target: str, output: Path | None) -> int:
    """Measure and write the file; returns the exit status 0 or 1.  Raises UserError as :func:`measure`."""
    if arch is None:
        raise UserError("layer latencies are measured on an architecture with random weights; give one with -a")
    try:
        measured = measure(arch, threads, target)
    except NotEqual as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = output or latency_path(arch)
    write_layer_latency(path, measured)
    both = [times for times in measured.values() if len(times) == len(MEASURED)]
    sums = ", ".join(f"{sum(times[bits] for times in both):.3f} ms at {bits} bits" for bits in MEASURED)
    print(f"{path}: {len(measured)} layers; those with both widths take {sums}")
    return 0


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tvm_benchmark.layer_latency",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-a", "--arch", required=True, metavar="NAME", help="PyTorchCV or torchvision name")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the compiled model (default 1)")
    parser.add_argument("--target", default="auto", metavar="NAME", help="kind of CPU (default: this one's best)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: runs/latency/ARCH_CPU.csv")
    args = parser.parse_args(argv)
    return run(args.arch, args.threads, args.target, args.output)


if __name__ == "__main__":
    sys.exit(main())
