"""Compile a quantized network through TVM, check that it is exact, and measure it beside the best runtimes."""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tvm_benchmark import layer_latency, report
from tvm_benchmark.artifact import CompiledModel
from tvm_benchmark.compile import compile_graph
from tvm_benchmark.equality import compare, whole_batches
from tvm_benchmark.machine_peak import machine_peaks
from tvm_benchmark.peers import OPENVINO_INT8, UINT8_INPUT, Engine, Missing, Workload, build_peers, without_network
from tvm_benchmark.subject import Subject, cost, load_subject
from tvm_benchmark.timing import Times, interleaved
from utils.atomic_file import write_atomically
from utils.errors import UserError, command_line
from utils.provenance import provenance, write_csv

EPILOG = """\
What happens, in this order: the network is compiled; its logits on random images are compared with the integer
graph's, and a difference ends the program; then it is timed, in turns with the peers where --peers is given.

The network is a graph file, a checkpoint of quant_train.py, or an architecture with random weights, which are as fast
as trained ones.  Peers run the float network that the graph was made from: OpenVINO in fp32 and, quantized by NNCF, in
int8 (fed floats, and fed uint8 pixels as the compiled model is), ONNX Runtime, PyTorch and torch.compile in fp32.
A speed-up is the ratio of the minima: over the fastest fp32 engine and over the faster of OpenVINO's two int8 forms.

examples:
  python -m tvm_benchmark.benchmark -a resnet50 --quant-scheme bops_0.5 --peers
  python -m tvm_benchmark.benchmark --graph runs/resnet18/model.safetensors --batch-size 8 --threads 2
  python -m tvm_benchmark.benchmark -a mobilenetv2_w1 --peers --report runs/bench/mobilenet.json
  python -m tvm_benchmark.report runs/bench/mobilenet.json --picture runs/bench/mobilenet.png
  python -m tvm_benchmark.benchmark -a resnet50 --layer-latency

exit status: 0 measured, 1 the compiled model is not equal to the graph, 2 the input cannot be used."""
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "openvino", "nncf", "onnxruntime")
OURS = "hawq-tvm"


class CompiledEngine:
    """The compiled model on the images of its last call."""

    name = OURS

    def __init__(self, model: CompiledModel, precision: str) -> None:
        self.precision = precision
        self.run = model.run


def speedup(rows: Sequence[dict[str, Any]], names: Sequence[str] | None, precision: str, key: str) -> float | None:
    """How much longer the fastest of other engines takes than ours, by ``key`` of the rows; None without others.

    names: of those engines, None for all.
    """
    ours = next(row[key] for row in rows if row["engine"] == OURS)
    others = [
        row[key]
        for row in rows
        if row["precision"] == precision and row[key] is not None and (names is None or row["engine"] in names)
    ]
    return round(min(others) / ours, 3) if others else None


def _engines(args: argparse.Namespace, subject: Subject, model: CompiledModel) -> tuple[list[Engine], list[Missing]]:
    """Ours first, having run on one batch; then the peers, on the same batch."""
    images = subject.images(args.batch_size, seed=3)
    model(images.numpy())
    ours = CompiledEngine(model, subject.scheme)
    if not args.peers:
        return [ours], []
    if subject.network is None:
        return [ours], without_network(subject.reason)
    calibration = subject.images(8, seed=0)
    work = Workload(subject.network.module, subject.network.preprocess, images, calibration, args.threads)
    peers, missing = build_peers(work)
    return [ours, *peers], missing


def latency_rows(
    engines: Sequence[Engine], times: Sequence[Times], missing: Sequence[Missing], batch: int, threads: int
) -> list[dict[str, Any]]:
    """engine, precision, batch, threads, min_ms, median_ms, p95_ms of each engine; None as times of missing peers."""
    common = {"batch": batch, "threads": threads}
    rows = []
    for engine, t in zip(engines, times, strict=True):
        milliseconds = {"min_ms": t.min_ms, "median_ms": t.median_ms, "p95_ms": t.p95_ms}
        rounded = {key: round(value, 4) for key, value in milliseconds.items()}
        rows.append({"engine": engine.name, "precision": engine.precision, **common, **rounded})
    nothing = dict.fromkeys(("min_ms", "median_ms", "p95_ms"))
    return rows + [{"engine": m.name, "precision": m.precision, **common, **nothing} for m in missing]


def _steps(model: CompiledModel, peak: float) -> list[dict[str, Any]]:
    """One entry per step: what it is, what it moves, its minimum, GOP/s and share of the peak (None without MACs)."""
    seconds = model.step_times(rounds=50)
    steps = []
    for step, time_ in zip(model.info["steps"], seconds, strict=True):
        gops = 2 * step["macs"] * model.batch / time_ / 1e9 if step["macs"] else None
        speed = {
            "ms": round(1e3 * time_, 5),
            "gops": None if gops is None else round(gops, 1),
            "peak_share": None if gops is None else round(gops / peak, 4),
        }
        steps.append({**step, **speed})
    return steps


def _measure(args: argparse.Namespace, subject: Subject, model: CompiledModel) -> dict[str, Any]:
    """The part of the report that is made of times."""
    engines, missing = _engines(args, subject, model)
    for peer in missing:
        print(f"without {peer.name} ({peer.precision}): {peer.reason}", file=sys.stderr)
    times = interleaved([engine.run for engine in engines], args.seconds)
    rows = latency_rows(engines, times, missing, args.batch_size, args.threads)
    peaks = machine_peaks(args.threads)
    openvino = (OPENVINO_INT8, UINT8_INPUT)
    return {
        "rows": rows,
        "speedup_over_best_fp32": speedup(rows, None, "fp32", "min_ms"),
        "speedup_over_openvino_int8": speedup(rows, openvino, "int8", "min_ms"),
        "median_speedup_over_best_fp32": speedup(rows, None, "fp32", "median_ms"),
        "median_speedup_over_openvino_int8": speedup(rows, openvino, "int8", "median_ms"),
        "missing": [{"engine": m.name, "precision": m.precision, "reason": m.reason} for m in missing],
        "peaks_gops": {name: round(gops, 1) for name, gops in peaks.items()},
        "steps": _steps(model, peaks[model.info["target"]]),
    }


def _default_output(result: dict[str, Any]) -> Path:
    row = result["rows"][0]
    name = f"{result['arch']}_{result['scheme']}_b{row['batch']}_t{row['threads']}.csv"
    return Path("runs/bench/tvm") / name.replace("/", "_")


NOT_MEASURED: dict[str, Any] = {"rows": [], "speedup_over_best_fp32": None, "speedup_over_openvino_int8": None}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def _folder(artifact: Path | None) -> Iterator[Path]:
    """Where the compiled model goes: the user's folder, or one that is removed afterwards."""
    if artifact is not None:
        yield artifact
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile, compare, measure; returns the report.  Raises UserError for what cannot be used."""
    torch.set_num_threads(args.threads)
    subject = load_subject(args.arch, args.quant_scheme, args.graph, args.checkpoint)
    costs = cost(subject.graph)
    with _folder(args.artifact) as folder:
        start = time.perf_counter()
        options = {"batch": args.batch_size, "target": args.target, "tune": args.tune}
        compile_graph(subject.graph, folder, **options, steps=True)
        seconds = time.perf_counter() - start
        model = CompiledModel(folder, args.threads)
        images = subject.images(whole_batches(args.images, args.batch_size), seed=2)
        equality = compare(model, subject.graph, images)
        print(equality.sentence, file=sys.stdout if equality.different == 0 else sys.stderr)
        measured = NOT_MEASURED if equality.different else _measure(args, subject, model)
    return {
        "equal": equality.different == 0,
        "compared": equality.images,
        **measured,
        "size_mib": round(costs.size_mib, 4),
        "bops_g": round(costs.bops_g, 4),
        "arch": subject.arch,
        "scheme": subject.scheme,
        "compile_s": round(seconds, 2),
        **{key: model.info[key] for key in ("target", "graph_hash", "weight_bytes", "space_bytes")},
        "provenance": provenance() | {"threads": str(args.threads)} | _versions(),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tvm_benchmark.benchmark",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("network")
    what.add_argument("-a", "--arch", metavar="NAME", help="PyTorchCV or torchvision name, with random weights")
    what.add_argument("--quant-scheme", metavar="SCHEME", help="of -a alone (default uniform8)")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--graph", type=Path, metavar="FILE", help="integer graph, as quant_train.py saves it")
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="checkpoint of quant_train.py")
    how = parser.add_argument_group("compilation")
    how.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="images per call (default 1)")
    how.add_argument("--threads", type=_positive, default=1, metavar="N", help="of every engine (default 1)")
    how.add_argument("--target", default="auto", metavar="NAME", help="kind of CPU (default: this one's best)")
    tuning = "search the tiling of every layer, once for each CPU (default: fixed tilings)"
    how.add_argument("--tune", action=argparse.BooleanOptionalAction, default=False, help=tuning)
    how.add_argument("--artifact", type=Path, metavar="DIR", help="keep the compiled model here")
    measured = parser.add_argument_group("measurement")
    measured.add_argument("--images", type=_positive, default=32, metavar="N", help="images to compare (default 32)")
    measured.add_argument("--peers", action="store_true", help="measure the other runtimes in the same run")
    measured.add_argument("--seconds", type=_seconds, default=5.0, metavar="S", help="for each engine (default 5)")
    measured.add_argument("--report", type=Path, metavar="FILE.json", help="everything, for tvm_benchmark.report")
    measured.add_argument("--output", type=Path, metavar="FILE", help="latencies as CSV (default: in runs/bench/tvm)")
    measured.add_argument("--layer-latency", action="store_true", help="instead: each layer at 4 and 8 bits, for -a")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small, give at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds; give more than 0 and at most 3600")
    return value


_positive.__name__, _seconds.__name__ = "positive integer", "number"  # argparse's "invalid ... value"


def _refuse_flags_without_use(args: argparse.Namespace) -> None:
    given = [name for name in ("quant_scheme", "graph", "checkpoint", "peers", "report", "tune") if getattr(args, name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"--layer-latency has no use for {flags}; give -a, and --threads, --target or --output")


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.layer_latency:
        _refuse_flags_without_use(args)
        return layer_latency.run(args.arch, args.threads, args.target, args.output)
    result = run(args)
    if args.report:
        write_json(args.report, result)
    if not result["equal"]:
        return 1
    print(report.as_text(result))
    write_csv(args.output or _default_output(result), result["rows"])
    return 0


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically.  Raises UserError where the file cannot be written."""

    def write(file: BinaryIO) -> None:
        file.write((json.dumps(value, indent=1) + "\n").encode())

    write_atomically(path, write)


if __name__ == "__main__":
    sys.exit(main())
