"""The published table of post-training quantization, ``published_ptq.json``, with its source."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("published_ptq.json")
ALIASES = {"regnetx_600m": "regnetx006", "regnetx_800m": "regnetx008"}  # the table's names -> those of ``create_model``


@dataclass(frozen=True)
class Published:
    """Top-1 in percent of the float network and of the quantized one."""

    float_top1: float
    top1: float


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def networks() -> tuple[str, ...]:
    """The networks of the table under its names."""
    return tuple(_table()["networks"])


def source() -> str:
    """Where the figures are from, and how to read them."""
    return f"{_table()['source']}: {_table()['note']}"


def combinations(backend: str) -> list[tuple[str, str]]:
    """Calibrators and bits that are published for a backend; those of ``academic`` where the table has none."""
    rows = _table()["rows"]
    known = backend if any(row["backend"] == backend for row in rows) else "academic"
    return [(row["calibrator"], row["bits"]) for row in rows if row["backend"] == known]


def published(arch: str, backend: str, bits: str, calibrator: str) -> Published | None:
    """What the table says; None for anything that is not in it.

    arch: the table's name or that of :func:`create_model`.

    >>> published("regnetx006", "academic", "w4a8", "minmax/ema")
    Published(float_top1=73.6, top1=60.37)
    """
    column = {name: i for i, known in enumerate(networks()) for name in (known, ALIASES.get(known, known))}.get(arch)
    key = {"backend": backend, "bits": bits, "calibrator": calibrator}
    row = next((row for row in _table()["rows"] if key.items() <= row.items()), None)
    if row is None or column is None:
        return None
    return Published(_table()["float"][backend][column], row["top1"][column])
