"""``quant_train.py --zoo NAME``: what it means in other flags, and the manifest's accuracy beside the measured one."""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.run_log import log
from zoo import manifest, store
from zoo.manifest import FLOAT, Entry, Own

GRAPH_SUFFIX = ".safetensors"


@contextmanager
def zoo_entry(args: argparse.Namespace) -> Iterator[None]:
    """Fill in the flags that ``--zoo`` stands for; after an evaluation say what the manifest has.

    args: as parsed; changed in place.  Raises UserError for an unknown entry, for flags that contradict it, and for a
    file that cannot be had.
    """
    if args.zoo is None:
        if args.zoo_dir is not None:
            raise UserError("--zoo-dir says where --zoo keeps its downloads; give --zoo NAME with it")
        yield
        return
    entry = manifest.find(args.zoo)
    _check(args, entry)
    _fill_in(args, entry, store.fetch(entry.name, args.zoo_dir))
    with tempfile.TemporaryDirectory() as folder:
        report = args.report or Path(folder) / "report.json"
        args.report = report if args.evaluate else args.report
        yield
        if args.evaluate and report.is_file():
            log.info(comparison(entry, json.loads(report.read_text(encoding="utf-8"))))


def _is_graph(entry: Entry) -> bool:
    return isinstance(entry, Own) and entry.file.endswith(GRAPH_SUFFIX)


def _check(args: argparse.Namespace, entry: Entry) -> None:
    """Before anything is downloaded."""
    for flag in ("resume", "weights", "pretrained"):
        if vars(args)[flag]:
            raise UserError(f"--zoo {entry.name} and --{flag} both say where the weights are; leave one out")
    if args.arch is not None and args.arch != entry.arch:
        raise UserError(f"--zoo {entry.name} is a network {entry.arch}, not {args.arch}; leave out -a")
    if entry.scheme != FLOAT and args.quant_scheme not in (None, entry.scheme):
        raise UserError(
            f"--zoo {entry.name} has the scheme {entry.scheme}, not {args.quant_scheme}; leave out --quant-scheme, or "
            "start from a float entry"
        )
    if _is_graph(entry) and not args.evaluate:
        raise UserError(
            f"{entry.name} is an integer graph, which can be evaluated (-e) but not trained; to train, give --zoo with "
            f"a float entry of {entry.arch}, and --quant-scheme"
        )


def _fill_in(args: argparse.Namespace, entry: Entry, file: Path) -> None:
    args.save_path = args.save_path or Path("runs") / entry.name  # not the folder of the file, as --resume has it
    if _is_graph(entry):
        args.resume, args.arch, args.quant_scheme = file, None, None  # the graph says both
        return
    args.arch = entry.arch
    args.quant_scheme = args.quant_scheme or entry.scheme
    if entry.scheme == FLOAT:
        args.weights = file
    else:
        args.resume, args.resume_quantize = file, True


def comparison(entry: Entry, report: Mapping[str, Any]) -> str:
    """One line: the entry's accuracy in the manifest, and what was measured now.

    report: of ``quant_train.py``.
    """
    integer = report["top1_integer"]
    measured = report["top1_float"] if integer is None else integer
    now = f"measured now, scheme {report['scheme']}: {measured:.2f} % on {report['images']} images"
    if isinstance(entry, Own):
        then = f"{entry.top1:.2f} % on {entry.images} images ({entry.machine}, commit {entry.commit})"
        return f"zoo entry {entry.name}: recorded top-1 {then}; {now}"
    return f"zoo entry {entry.name}: published top-1 {entry.top1:.2f} %, on ImageNet, not measured here; {now}"
