"""Reports of tvm_benchmark.benchmark as Markdown tables and a picture.

    python -m tvm_benchmark.report resnet50.json mobilenet.json --markdown latency.md --picture latency.png

Without --markdown the tables are printed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.atomic_file import write_text
from utils.errors import UserError, command_line
from utils.plots import LatencyBar, plot_latency
from utils.tables import Rows, markdown_table, plain_table

Report = Mapping[str, Any]
KEYS = ("equal", "compared", "rows", "speedup_over_best_fp32", "speedup_over_openvino_int8", "size_mib", "bops_g")
MORE = ("arch", "scheme", "compile_s", "target", "weight_bytes", "space_bytes", "provenance", "missing")
PARTS = ("steps", "peaks_gops", "median_speedup_over_best_fp32", "median_speedup_over_openvino_int8")
KIB, MIB = 1 << 10, 1 << 20
NONE = "-"


def read_report(path: Path) -> Report:
    """A report that ``benchmark --report`` wrote.  Raises UserError for another file, and for one without times."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the report {path}: {error}; give a file that benchmark --report wrote") from error
    if not isinstance(report, dict) or not set(KEYS) <= set(report):
        raise UserError(f"{path} is not a report of the benchmark; give a file that benchmark --report wrote")
    if not report["equal"]:
        raise UserError(f"{path} has no times: the compiled model was not equal to the graph; measure again")
    missing = sorted({*MORE, *PARTS} - set(report))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; measure again with this version")
    return report


def title(report: Report) -> str:
    """What was measured, in one line."""
    row = report["rows"][0]
    batch, threads = (_count(row[key], noun) for key, noun in (("batch", "image"), ("threads", "thread")))
    return f"{report['arch']}, {report['scheme']}: {batch}, {threads}, {report['provenance']['cpu']}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _latency_rows(report: Report) -> Rows:
    return [
        {
            "engine": row["engine"],
            "precision": row["precision"],
            **{f"{key} ms": _number(row[f"{key}_ms"], 3) for key in ("min", "median", "p95")},
            "images/s": NONE if row["min_ms"] is None else _number(1e3 * row["batch"] / row["min_ms"], 1),
        }
        for row in report["rows"]
    ]


def _step_rows(report: Report) -> Rows:
    """One row per step, and all together."""
    steps, batch = report["steps"], report["rows"][0]["batch"]
    ms, macs = (sum(step[key] for step in steps) for key in ("ms", "macs"))
    rows = [
        {
            "step": step["name"],
            "kind": step["kind"],
            "W": str(step["weight_bits"] or NONE),
            "M MACs": _number(step["macs"] / 1e6 if step["macs"] else None, 2),
            "ms": _number(step["ms"], 4),
            "GOP/s": _number(step["gops"], 1),
            "of peak": NONE if step["peak_share"] is None else f"{100 * step['peak_share']:.1f}%",
            "weights KiB": _number(step["weight_bytes"] / KIB, 1),
            "in KiB": _number(step["input_bytes"] / KIB, 1),
            "out KiB": _number(step["output_bytes"] / KIB, 1),
        }
        for step in steps
    ]
    nothing, speed = dict.fromkeys(rows[0], ""), 2 * batch * macs / ms / 1e6
    return [*rows, nothing | {"step": "sum", "M MACs": f"{macs / 1e6:.2f}", "ms": f"{ms:.4f}", "GOP/s": f"{speed:.1f}"}]


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _facts(report: Report) -> list[str]:
    peaks = ", ".join(f"{name} {gops:.0f}" for name, gops in report["peaks_gops"].items())
    fp32, int8 = report["speedup_over_best_fp32"], report["speedup_over_openvino_int8"]
    medians = report["median_speedup_over_best_fp32"], report["median_speedup_over_openvino_int8"]
    return [
        f"logits equal to the integer graph's on {report['compared']} images",
        f"speed-up over the best fp32: {_times(fp32, medians[0])}",
        f"speed-up over OpenVINO int8: {_times(int8, medians[1])}",
        f"size {report['size_mib']:.2f} MiB, {report['bops_g']:.2f} G bit operations an image; in memory: weights "
        f"{report['weight_bytes'] / MIB:.2f} MiB, activations {report['space_bytes'] / MIB:.2f} MiB",
        f"target {report['target']}, compiled in {report['compile_s']:.1f} s; measured peaks in GOP/s: {peaks}",
        *(f"without {m['engine']} ({m['precision']}): {m['reason']}" for m in report["missing"]),
    ]


def _times(minimum: float | None, median: float | None) -> str:
    return "not measured" if minimum is None else f"{minimum:.2f}x by minima, {median:.2f}x by medians"


def _text(report: Report, table: Callable[[Rows], str], heading: str, bullet: str) -> str:
    facts = "\n".join(bullet + fact for fact in _facts(report))
    return "\n\n".join([heading + title(report), table(_latency_rows(report)), facts, table(_step_rows(report))])


def as_text(report: Report) -> str:
    """Both tables and the facts between them, for a terminal."""
    return _text(report, plain_table, "", "")


def as_markdown(reports: Sequence[Report]) -> str:
    """A section per report."""
    sections = [_text(report, markdown_table, "## ", "* ") for report in reports]
    origin = [_origin(report) for report in reports]
    return "\n\n".join(f"{section}\n\n{line}" for section, line in zip(sections, origin, strict=True)) + "\n"


def _origin(report: Report) -> str:
    return "; ".join(f"{key} {value}" for key, value in report["provenance"].items() if key != "cpu")


def write_picture(path: Path, reports: Sequence[Report]) -> None:
    """One panel of bars per report.  Raises UserError where the file cannot be written."""
    plot_latency(path, {title(report): _bars(report) for report in reports})


def _bars(report: Report) -> list[LatencyBar]:
    """Fastest first."""
    rows = [row for row in report["rows"] if row["min_ms"] is not None]
    ours = report["rows"][0]["engine"]
    return [
        LatencyBar(
            f"{row['engine']}, {row['precision']}",
            *(row["min_ms"], row["median_ms"], row["p95_ms"]),
            row["engine"] == ours,
        )
        for row in sorted(rows, key=lambda row: float(row["min_ms"]))
    ]


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tvm_benchmark.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", type=Path, nargs="+", metavar="FILE.json", help="what benchmark --report wrote")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the tables here")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="write bars of the latencies here")
    args = parser.parse_args(argv)
    reports = [read_report(path) for path in args.report]
    text = as_markdown(reports)
    if args.markdown:
        write_text(args.markdown, text)
    else:
        print(text, end="")
    if args.picture:
        write_picture(args.picture, reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
