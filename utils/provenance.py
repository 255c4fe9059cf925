"""Where a measured table comes from: hardware, versions, commit and command, written beside every result."""

import csv
import io
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.atomic_file import write_atomically
from utils.errors import UserError

PACKAGES = ("torch", "torchvision", "numpy")


def provenance() -> dict[str, str]:
    """CPU, number of torch threads, versions, commit and command of this process."""
    return {
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": " ".join(["python", *_arguments()]),
    }


def commit() -> str:
    """The project's commit as git abbreviates it, with "-dirty" for changed files; "unknown" without git."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (at least one, all with the same keys) as CSV with the provenance as ``#`` lines on top, atomically.

    Raises UserError where the file cannot be written.
    """
    text = io.StringIO(newline="")
    for key, value in provenance().items():
        text.write(f"# {key}: {value}\n")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)

    def write(file: BinaryIO) -> None:
        file.write(text.getvalue().encode())

    write_atomically(path, write)


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Provenance (empty where there is none) and rows of a file that :func:`write_csv` wrote.

    Raises UserError for a file that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the table {path}: {error}; give a CSV file") from error
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    origin = dict(line.split(": ", 1) for line in comments if ": " in line)
    return origin, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def _without_folders(argument: str) -> str:
    """An absolute path as its last part: where somebody keeps the data says nothing to others."""
    return Path(argument).name if argument.startswith("/") else argument


def _arguments() -> list[str]:
    """The command line; a program by its path below the project's folder, or by ``-m`` where it was started so."""
    root = Path(__file__).resolve().parent.parent
    program = Path(sys.argv[0]).resolve()
    shown = [program.relative_to(root).as_posix() if program.is_relative_to(root) else program.name]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == program:
        shown = ["-m", spec.name.removesuffix(".__main__")]
    return [*shown, *map(_without_folders, sys.argv[1:])]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
