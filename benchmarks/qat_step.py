"""Cost of a QAT training step relative to the float step of the same network, measured interleaved in one process.

    python -m benchmarks.qat_step [--arch resnet18 --batch 16 --size 224] [--rounds 7]

Prints, per network and BatchNorm mode, the median step times, the median of the per-round ratios and the ratio of
peak memory; writes ``runs/bench/qat_step.csv``.  The float step with frozen BatchNorm evaluates its BNs in eval mode.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import bit_config
from utils.models import create_model
from utils.provenance import write_csv
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.capture import capture
from utils.quantization_utils.prepare import QuantizedModel, describe_layers, fold_network, prepare
from utils.quantization_utils.training import configure, freeze_float_bn

CASES = (("resnet18", 16, 224), ("resnet20_cifar10", 128, 32))


def quantized(model: nn.Module, arch: str, images: Tensor, act_range: str, frozen: bool) -> QuantizedModel:
    """A calibrated uniform4 model in training mode."""
    captured = capture(copy.deepcopy(model), images[:1])
    network = fold_network(captured)
    layers = describe_layers(network)
    scheme = bit_config.load_scheme("uniform4", arch)
    result = prepare(captured, network, bit_config.resolve(scheme, layers), scheme.residual_bits)
    calibrate(result, [images[:2]])
    configure(result, act_range=act_range, act_range_momentum=0.99)
    result.train()
    result.freeze_bn(frozen)
    return result


class Step:
    """One optimisation step, repeated on the same batch."""

    def __init__(self, model: nn.Module, images: Tensor, classes: int) -> None:
        self.model, self.images = model, images
        self.labels = torch.arange(len(images)) % classes
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> float:
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        return time.perf_counter() - begin


def build(arch: str, batch: int, size: int, which: str, frozen: bool) -> Step:
    """The float step (``which`` = float) or the quantized one (``ema`` or ``lsq`` ranges)."""
    torch.manual_seed(0)
    model = create_model(arch).module
    images = torch.randn(batch, 3, size, size)
    classes = 10 if "cifar10" in arch else 1000
    if which != "float":
        return Step(quantized(model, arch, images, which, frozen), images, classes)
    model.train()
    if frozen:
        freeze_float_bn(model)
    return Step(model, images, classes)


def high_water_mib() -> float:
    """Largest resident memory of this process so far, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def peak_mib(arch: str, batch: int, size: int, which: str, frozen: bool) -> float:
    """Peak resident memory of three steps in a process of its own, less what its imports take, in MiB."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from benchmarks.qat_step import build, high_water_mib\n"
        "before = high_water_mib()\n"
        f"step = build({arch!r}, {batch}, {size}, {which!r}, {frozen})\n"
        "[step() for _ in range(3)]\n"
        "print(high_water_mib() - before)\n"
    )
    root = Path(__file__).resolve().parent.parent
    return float(
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    )


def measure(arch: str, batch: int, size: int, rounds: int) -> list[dict[str, object]]:
    """Rows for live and frozen BatchNorm and both kinds of range."""
    rows = []
    for frozen in (False, True):
        kinds = ("float", "ema", "lsq")
        steps = {which: build(arch, batch, size, which, frozen) for which in kinds}
        for step in steps.values():
            step()
        times = [{which: steps[which]() for which in kinds} for _ in range(rounds)]
        float_peak = peak_mib(arch, batch, size, "float", frozen)
        for which in kinds[1:]:
            rows.append(
                {
                    "arch": arch,
                    "batch": batch,
                    "bn": "frozen" if frozen else "live",
                    "ranges": which,
                    "float_ms": round(1e3 * statistics.median(t["float"] for t in times), 1),
                    "qat_ms": round(1e3 * statistics.median(t[which] for t in times), 1),
                    "ratio": round(statistics.median(t[which] / t["float"] for t in times), 3),
                    "peak_ratio": round(peak_mib(arch, batch, size, which, frozen) / float_peak, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help="measure this network alone")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cases: tuple[tuple[str, int, int], ...] = ((args.arch, args.batch, args.size),) if args.arch else CASES
    rows = [row for case in cases for row in measure(*case, args.rounds)]
    write_csv(Path("runs/bench/qat_step.csv"), rows)


if __name__ == "__main__":
    main()
