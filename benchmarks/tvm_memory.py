"""Peak memory of a process that loads a network and runs it once: compiled here, and by OpenVINO.

    python -m benchmarks.tvm_memory [--archs resnet50 ...] [--output results/tvm_memory.csv]

Weights are random, the batch is one image, one thread.  Each engine runs in a new process that cannot import torch (a
package of TVM imports it where it is installed); "none" is such a process with numpy alone.  peak_mib: the most
memory that the system counted for it (VmHWM); files_mib: what it loads from the disk.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tvm_benchmark.compile import compile_graph
from tvm_benchmark.peers import Workload, openvino_int8_model, openvino_model
from tvm_benchmark.subject import Subject, load_subject
from utils.errors import UserError, command_line
from utils.provenance import write_csv

ROOT = Path(__file__).resolve().parent.parent
BEGIN = """
import sys
sys.modules["torch"] = None
import numpy as np
"""
END = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
OPENVINO = """
import openvino
options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
model = openvino.Core().compile_model(sys.argv[1] + "/model.xml", "CPU", options)
model(np.zeros(model.inputs[0].shape, np.float32))
"""
# Engine -> what its process does with the folder that is its argument.
PROGRAMS = {
    "none": "",
    "hawq-tvm": """
from tvm_benchmark.artifact import CompiledModel
model = CompiledModel(sys.argv[1])
model(np.zeros((model.batch, *model.info["input_shape"]), np.uint8))
""",
    "openvino": OPENVINO,
}


def peak_mib(engine: str, folder: Path) -> float:
    """Peak memory in MiB of a new process that runs the engine's program on the folder's files."""
    program = BEGIN + PROGRAMS[engine] + END
    done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the process of {engine} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1]) / 1024


def measure(arch: str) -> Iterator[dict[str, Any]]:
    """Rows arch, engine, precision, files_mib, peak_mib.  Raises UserError for what cannot be compiled or run."""
    subject = load_subject(arch, "uniform8")
    with tempfile.TemporaryDirectory() as name:
        folders = {key: Path(name, "_".join(key)) for key in _write(subject, Path(name))}
        for (engine, precision), folder in {("none", "-"): Path(name, "none"), **folders}.items():
            size = sum(file.stat().st_size for file in folder.glob("*")) / 2**20
            peak = peak_mib(engine, folder)
            row = {"arch": arch, "engine": engine, "precision": precision}
            yield row | {"files_mib": round(size, 1), "peak_mib": round(peak, 1)}


def _write(subject: Subject, folder: Path) -> list[tuple[str, str]]:
    """Files of every engine in folders engine_precision; returns engines and precisions."""
    assert subject.network is not None, "networks with random weights have their float network"
    ours = ("hawq-tvm", "uniform8")
    compile_graph(subject.graph, folder / "_".join(ours))
    images = subject.images(8, seed=0)
    work = Workload(subject.network.module, subject.network.preprocess, images[:1], images, 1)
    try:
        import openvino

        models = {"int8": openvino_int8_model(work), "fp32": openvino_model(work, 1)}
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hawq[peers]'") from error
    for precision, model in models.items():
        openvino.save_model(model, folder / f"openvino_{precision}" / "model.xml", compress_to_fp16=False)
    return [ours, *(("openvino", precision) for precision in models)]


@torch.no_grad()
@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet50"], metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/tvm_memory.csv"), metavar="FILE")
    args = parser.parse_args(argv)
    rows = []
    for arch in args.archs:
        for row in measure(arch):
            rows.append(row)
            print(row, flush=True)
    write_csv(args.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
