"""Latency of compiled networks beside the best runtimes, into one table.

    python -m benchmarks.tvm_latency [--archs resnet18 ...] [--schemes uniform8 ...] [--cases b1t1 ...]
                                     [--output results/tvm_latency.csv]

Weights and images are random, which makes no difference to the time.  For every network and case (b8t2: batches of 8,
2 threads) all schemes and all peers are timed in turns in one process, after every logit was compared with the integer
graph's; a difference ends the program.  Rows of an earlier table about other measurements are kept, so that a table
can be made in parts: each row says of which commit it is and holds the times that its ratios are made of.

Columns that need words: residual_bits, the width of residual sums.  openvino_int8_ms, the faster of OpenVINO's two int8
forms (fed floats, fed pixels); best_fp32_ms, the fastest fp32 engine, both minima; over_...: their time divided by
ours, of minima and of medians.  over_one_thread: our own minimum with one thread divided by that with this row's
threads, same run.  size_mib: weights at their bits; weight_mib: all constants, as they lie in memory while it runs.
compile_s: from the integer graph to files.

exit status: 0 measured, 1 a compiled model is not equal to its graph, 2 the input cannot be used.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bit_config import load_scheme
from tvm_benchmark.artifact import CompiledModel
from tvm_benchmark.benchmark import OURS, CompiledEngine, latency_rows, speedup
from tvm_benchmark.compile import compile_graph
from tvm_benchmark.equality import Equality, compare, whole_batches
from tvm_benchmark.peers import OPENVINO_INT8, PEERS, UINT8_INPUT, Engine, Missing, Workload, build_peers
from tvm_benchmark.subject import Subject, cost, load_subject
from tvm_benchmark.timing import interleaved
from utils.errors import UserError, command_line
from utils.provenance import provenance, read_csv, write_csv

ARCHS = ("resnet18", "resnet50", "mobilenetv2_w1", "inceptionv3")
SCHEMES = {"uniform8": ("uniform8", 16), "uniform8r8": ("uniform8", 8), "uniform4": ("uniform4", 16)}


@dataclass(frozen=True)
class Case:
    """batch: images of one call.  threads: of every engine.  fp32: whether the fp32 peers take part."""

    batch: int
    threads: int
    fp32: bool


CASES = {"b1t1": Case(1, 1, True), "b1t2": Case(1, 2, False), "b8t2": Case(8, 2, True)}
IMAGES = 32  # compared
OPENVINO = (OPENVINO_INT8, UINT8_INPUT)
# Ratio -> engines (None: all), precision and column that it is made of.
RATIOS: Mapping[str, tuple[Sequence[str] | None, str, str]] = {
    "over_openvino_int8": (OPENVINO, "int8", "min_ms"),
    "over_openvino_int8_median": (OPENVINO, "int8", "median_ms"),
    "over_best_fp32": (None, "fp32", "min_ms"),
    "over_best_fp32_median": (None, "fp32", "median_ms"),
}
MS = ("min_ms", "median_ms", "p95_ms")
KEY = ("arch", "scheme", "residual_bits", "batch", "threads", "engine", "precision")
FASTEST = ("openvino_int8_ms", "best_fp32_ms")
MEASURED = (*FASTEST, *RATIOS, "over_one_thread")
MODEL = ("size_mib", "weight_mib", "equal", "compared", "compile_s", "target")
COLUMNS = (*KEY, *MS, *MEASURED, *MODEL, "cpu", "commit")
Row = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """A network under one scheme, compiled for one batch size into ``folder`` within so many seconds."""

    subject: Subject
    folder: Path
    seconds: float
    equality: Equality


class NotEqual(Exception):
    """A compiled model that differs from its graph; the message is for people."""


def subjects(arch: str, schemes: Sequence[str]) -> list[Subject]:
    """A network under these names of ``SCHEMES``, the 8-bit residual left out where there are no residual sums.

    Raises UserError for an unknown network.
    """
    found = []
    for name in schemes:
        scheme, residual_bits = SCHEMES[name]
        subject = load_subject(arch, replace(load_scheme(scheme, arch), residual_bits=residual_bits))
        if residual_bits == 16 or any(node.op == "add" for node in subject.graph.nodes):
            found.append(subject)
    return found


def build(subject: Subject, batch: int, folder: Path) -> Built:
    """Compile and compare with the integer graph.  Raises NotEqual, and UserError where it cannot be compiled."""
    start = time.perf_counter()
    compile_graph(subject.graph, folder, batch=batch)
    seconds = time.perf_counter() - start
    images = subject.images(whole_batches(IMAGES, batch), seed=2)
    equality = compare(CompiledModel(folder), subject.graph, images, progress=False)
    if equality.different:
        raise NotEqual(f"{subject.arch} {subject.scheme}, batch {batch}: {equality.sentence}")
    return Built(subject, folder, seconds, equality)


def measure(arch: str, schemes: Sequence[str], cases: Sequence[Case], seconds: float) -> Iterator[Row]:
    """Rows of one network.  seconds: of recorded time for each engine.  Raises NotEqual and UserError."""
    networks = subjects(arch, schemes)
    for batch in sorted({case.batch for case in cases}):
        with tempfile.TemporaryDirectory() as folder:
            built = [build(subject, batch, Path(folder, str(i))) for i, subject in enumerate(networks)]
            for case in cases:
                if case.batch == batch:
                    yield from _measure_case(built, case, seconds)


def _measure_case(built: Sequence[Built], case: Case, seconds: float) -> Iterator[Row]:
    """All schemes in turns with the peers and, for several threads, with our models on one."""
    torch.set_num_threads(case.threads)
    peers, missing = _peers(built[0].subject, case)
    ours = [_engine(model, case.threads, case.batch) for model in built]
    alone = [_engine(model, 1, case.batch) for model in built] if case.threads > 1 else []
    engines: list[Engine] = [*ours, *peers, *alone]
    times = interleaved([engine.run for engine in engines], seconds)
    count = len(ours) + len(peers)
    rows = latency_rows(engines[:count], times[:count], missing, case.batch, case.threads)
    one_thread = [t.min_ms for t in times[count:]] if alone else [None] * len(ours)
    for model, row, one in zip(built, rows[: len(ours)], one_thread, strict=True):
        yield _our_row(model, row, rows[len(ours) :], one)
    arch = built[0].subject.arch
    yield from (_row(row | {"arch": arch, "scheme": row["precision"]}) for row in rows[len(ours) :])


def _peers(subject: Subject, case: Case) -> tuple[list[Engine], list[Missing]]:
    assert subject.network is not None, "networks with random weights have their float network"
    kinds = [kind for kind in PEERS if case.fp32 or kind.precision != "fp32"]
    network, images = subject.network, subject.images(case.batch, seed=3)
    work = Workload(network.module, network.preprocess, images, subject.images(8, seed=0), case.threads)
    peers, missing = build_peers(work, kinds)
    for peer in missing:
        print(f"without {peer.name} ({peer.precision}): {peer.reason}", file=sys.stderr)
    return peers, missing


def _engine(built: Built, threads: int, batch: int) -> CompiledEngine:
    """The compiled model, having run on one batch."""
    model = CompiledModel(built.folder, threads)
    model(built.subject.images(batch, seed=3).numpy())
    return CompiledEngine(model, built.subject.scheme)


def _our_row(built: Built, row: Row, peers: Sequence[Row], one_thread: float | None) -> Row:
    """row: one of ``latency_rows``.  peers: those of the same run.  one_thread: our minimum with one thread, ms."""
    graph, info = built.subject.graph, CompiledModel(built.folder).info
    ratios = {name: speedup([row, *peers], *how) for name, how in RATIOS.items()}
    return _row(
        {
            **row,
            **ratios,
            **{"arch": built.subject.arch, "scheme": built.subject.scheme},
            "residual_bits": graph.meta["residual_bits"],
            "openvino_int8_ms": _fastest(peers, "int8"),
            "best_fp32_ms": _fastest(peers, "fp32"),
            "over_one_thread": None if one_thread is None else round(one_thread / row["min_ms"], 3),
            "size_mib": round(cost(graph).size_mib, 3),
            "weight_mib": round(info["weight_bytes"] / 2**20, 3),
            "equal": True,
            "compared": built.equality.images,
            "compile_s": round(built.seconds, 2),
            "target": info["target"],
        }
    )


def _fastest(peers: Sequence[Row], precision: str) -> float | None:
    return min((row["min_ms"] for row in peers if row["precision"] == precision and row["min_ms"]), default=None)


def _row(values: Mapping[str, Any]) -> Row:
    """All columns in order, milliseconds to the microsecond; empty where there is no value."""
    origin = {key: provenance()[key] for key in ("cpu", "commit")}
    given = {key: value for key, value in {**values, **origin}.items() if value is not None}
    given |= {key: round(given[key], 3) for key in (*MS, *FASTEST) if key in given}
    return {column: given.get(column, "") for column in COLUMNS}


def merged(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Rows of an earlier table, if there is one, with these in place of those about the same, sorted by ``ARCHS``.

    Raises UserError for a file that is another table.
    """
    old: list[Row] = [dict(row) for row in read_csv(path)[1]] if path.exists() else []
    if any(tuple(row) != COLUMNS for row in old):
        got = ", ".join(old[0])
        raise UserError(f"{path} has the columns {got}, not this program's; remove it or give another --output")
    both = {_key(row): row for row in [*old, *rows]}
    return sorted(both.values(), key=_place)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in KEY)


def _place(row: Row) -> tuple[Any, ...]:
    """Networks as in ``ARCHS``, then cases, then ours before the peers."""
    arch = ARCHS.index(row["arch"]) if row["arch"] in ARCHS else len(ARCHS)
    widths = [scheme for scheme, _ in SCHEMES.values()]
    scheme = widths.index(row["scheme"]) if row["scheme"] in widths else len(widths)
    residual = -int(row["residual_bits"] or 0)
    return arch, row["arch"], int(row["batch"]), int(row["threads"]), row["engine"] != OURS, scheme, residual


@torch.no_grad()
@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tvm_latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--archs", nargs="+", default=ARCHS, metavar="NAME")
    scheme_help = "of uniform8, uniform4 and uniform8r8, which has 8-bit residual sums (default: all)"
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), help=scheme_help)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each engine (default 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/tvm_latency.csv"), metavar="FILE")
    args = parser.parse_args(argv)
    try:
        merged(args.output, [])  # another table is refused before minutes of work
        for arch in args.archs:
            rows = list(measure(arch, args.schemes, [CASES[name] for name in args.cases], args.seconds))
            write_csv(args.output, merged(args.output, rows))
            for row in rows:
                shown = (*KEY, *MS, "over_openvino_int8", "over_best_fp32")
                print(" ".join(str(row[key]) for key in shown if row[key] != ""), flush=True)
    except NotEqual as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
