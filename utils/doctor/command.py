"""``quant_train.py --explain RUN``: examine a finished run, print the report, keep it as text and HTML."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.atomic_file import write_text
from utils.checkpoint import checked_checkpoint
from utils.data_utils import make_loader, normalize, open_dataset, subset
from utils.doctor.advice import advise
from utils.doctor.document import Document
from utils.doctor.examine import examine
from utils.doctor.outcomes import Images
from utils.doctor.report import report
from utils.errors import UserError
from utils.evaluation import evaluation_batch
from utils.experiment import Experiment, scheme_of
from utils.flag_checks import check_outputs
from utils.layer_latency import latency_path
from utils.models import create_model
from utils.preprocess import Preprocess
from utils.quantization_utils.layer_costs import read_latency
from utils.quantization_utils.training import configure
from utils.run_log import log
from utils.run_state import CHECKPOINT
from utils.torch_file import read_torch_file

TEXT, HTML = "explain.txt", "explain.html"
BATCH = 64
SHOWN = 10  # rows of each table on the terminal; the files have all


def explain(args: argparse.Namespace, device: torch.device) -> Document:
    """Examine the run ``args.explain``, print the report and write both files into its folder (or --save-path).

    args: parsed and checked; ``save_path`` is filled in.  Raises UserError for what is no finished
    run of a quantized network, and images that are missing or do not fit.
    """
    path = checkpoint_of(args.explain)
    args.save_path = args.save_path or path.parent
    check_outputs(args)
    saved = checked_checkpoint(read_torch_file(path), path)
    experiment = _experiment(saved, path, device)
    latency = _latency(args.layer_latency, experiment)
    images, source = _images(args, saved, experiment)
    log.info("%s: examining %d images", path, images.count)
    found = examine(experiment.model, experiment.residual_bits, images, latency)
    name = f"{experiment.info.name}, scheme {experiment.scheme_name}"
    document = report(found, advise(found), name=name, source=source)
    write_text(args.save_path / TEXT, document.text())
    write_text(args.save_path / HTML, document.html())
    log.info("%s", document.text(SHOWN))
    log.info("all rows: %s, %s", args.save_path / TEXT, args.save_path / HTML)
    return document


def checkpoint_of(run: Path) -> Path:
    """The checkpoint of a run's folder, or the file itself.  Raises UserError for anything else."""
    if run.is_dir():
        if not (run / CHECKPOINT).is_file():
            raise UserError(f"{run} is no run: it has no {CHECKPOINT}; give the --save-path of a finished run")
        return run / CHECKPOINT
    if not run.exists():
        raise UserError(f"{run} does not exist; give the --save-path of a finished run, or its {CHECKPOINT}")
    return run


def _experiment(saved: Mapping[str, Any], path: Path, device: torch.device) -> Experiment:
    """The network as it was saved, with its ranges."""
    try:
        info = create_model(saved["arch"], saved["num_classes"])
        preprocess = Preprocess.from_dict(saved["preprocess"])
        experiment = Experiment(info, preprocess, scheme_of(saved), device)
        enabled, flags = saved["quantizers"]["enabled"], saved["arguments"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold a whole run; it was changed after saving, use another file") from error
    if experiment.is_float or not enabled:
        raise UserError(
            f"{path} holds a float network; --explain examines quantized ones, give a run of another scheme"
        )
    experiment.load_state(saved, str(path))
    configure(
        experiment.model,
        weight_percentile=float(flags.get("weight_percentile", 0)),
        channel_wise=flags.get("channel_wise", "True") == "True",
    )
    return experiment


def _latency(path: Path | None, experiment: Experiment) -> dict[str, dict[int, float]] | None:
    """Of the file given, or else of this machine's where it has been measured."""
    arch = experiment.info.name
    if path is None:
        path = latency_path(arch)
        if not path.is_file():
            return None
    times = read_latency(path, arch, experiment.layers)
    if not any(layer.name in times for layer in experiment.layers):
        raise UserError(f"{path} has no layer of {arch}; measure with python -m tvm_benchmark.layer_latency -a {arch}")
    return times


def _images(args: argparse.Namespace, saved: Mapping[str, Any], experiment: Experiment) -> tuple[Images, str]:
    """A fixed random part of the validation images, decoded once, and where they come from in words."""
    location = args.data or saved["arguments"].get("data", "")
    preprocess = experiment.preprocess
    try:
        dataset = open_dataset(location, "val", preprocess, seed=args.seed)
        if len(dataset.classes) != experiment.info.num_classes:
            raise UserError(f"{location} has {len(dataset.classes)} classes, the run {experiment.info.num_classes}")
    except UserError as error:
        if args.data is not None:
            raise
        raise UserError(f"{error} (the --data of the run; give --data where the images are now)") from error
    chosen = subset(dataset, count=args.calib_images, seed=args.seed)
    loader = make_loader(chosen, evaluation_batch(BATCH, preprocess.input_size), train=False, workers=args.workers)
    device = experiment.device
    batches = [(images.to(device), labels.to(device)) for images, labels in loader]
    name = location if location == str(location).strip("/") else Path(location).name
    return Images(batches, partial(normalize, preprocess=preprocess)), f"{name}, validation"
