"""Files of measured layer latencies: one CSV per network and machine, for the choice of bit widths."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from utils.errors import UserError
from utils.provenance import provenance, read_csv, write_csv

FOLDER = Path("runs/latency")
COLUMNS = ["layer", "bits", "ms"]
# Bits of a scheme -> bits of the kernel that computes them.
EXECUTED = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
MEASURED = (8, 4)


def latency_path(arch: str) -> Path:
    """Where the file of a network lies for this machine's CPU."""
    return FOLDER / f"{_plain(arch)}_{_plain(provenance()['cpu'])}.csv"


def _plain(name: str) -> str:
    """A name as part of a file name.

    >>> _plain("Intel(R) Xeon(R) Processor")
    'Intel_R_Xeon_R_Processor'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def write_layer_latency(path: Path, measured: Mapping[str, Mapping[int, float]]) -> None:
    """Write layer -> kernel bits (4, 8) -> milliseconds with its provenance.  Raises UserError where it cannot."""
    rows = [
        {"layer": layer, "bits": bits, "ms": f"{ms:.6f}"}
        for layer, times in measured.items()
        for bits, ms in sorted(times.items())
    ]
    write_csv(path, rows)


def read_layer_latency(path: Path) -> dict[str, dict[int, float]]:
    """Layer -> bits of a scheme (2..8) -> milliseconds of the kernel that runs them.

    A layer that was measured with 8-bit kernels alone (it always has 8 bits) has 5 to 8 only.  Raises UserError,
    naming file and row, for a file that cannot be read or is no such table.
    """
    _, rows = read_csv(path)
    if not rows or list(rows[0]) != COLUMNS:
        got = ", ".join(rows[0]) if rows else "no rows"
        raise UserError(f"{path} is no table of layer latencies: got {got}, expected {', '.join(COLUMNS)}; {_AGAIN}")
    measured: dict[str, dict[int, float]] = {}
    for number, row in enumerate(rows, 1):
        bits, ms = _numbers(path, number, row)
        times = measured.setdefault(row["layer"], {})
        if bits in times:
            raise UserError(f"{path} has the layer {row['layer']} at {bits} bits twice; {_AGAIN}")
        times[bits] = ms
    return {layer: _for_schemes(times) for layer, times in measured.items()}


_AGAIN = "measure again with python -m tvm_benchmark.layer_latency"


def _numbers(path: Path, number: int, row: Mapping[str, str | None]) -> tuple[int, float]:
    """Kernel bits and milliseconds of a row."""
    try:
        bits, ms = int(row["bits"] or ""), float(row["ms"] or "")
    except ValueError:
        bits, ms = 0, math.nan
    if bits not in MEASURED or not (math.isfinite(ms) and ms > 0):
        got = f"bits {row['bits']!r} and ms {row['ms']!r}"
        raise UserError(f"row {number} of {path} has {got}, expected 4 or 8 and a positive number; {_AGAIN}")
    return bits, ms


def _for_schemes(times: Mapping[int, float]) -> dict[int, float]:
    """Every width of a scheme whose kernel was measured.

    >>> _for_schemes({8: 2.0, 4: 1.0})
    {2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0}
    """
    return {bits: times[kernel] for bits, kernel in EXECUTED.items() if kernel in times}
