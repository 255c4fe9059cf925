"""Quantize a float CNN to mixed precision, train it quantization-aware, convert it to integers and evaluate those.

Reads top to bottom: :func:`run` is the whole job.  ``python quant_train.py --help`` explains every flag.
"""

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bit_config
from utils.calibration_run import calibrate_run, unseen_accuracy
from utils.checkpoint import checked_checkpoint
from utils.doctor.command import explain
from utils.errors import Interrupted, UserError, command_line
from utils.evaluation import agreement
from utils.experiment import Experiment, scheme_of
from utils.flag_checks import check, check_outputs, fill_in
from utils.graph_evaluation import engine_maker, evaluate_graph_file, is_graph_file
from utils.hawq_run import evaluate_original, evaluates_original, read_original, start_from_original
from utils.integer_graph.serialize import save as save_graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import ModelInfo, create_model
from utils.preprocess import Preprocess
from utils.provenance import commit
from utils.quantization_utils.backends import BACKENDS
from utils.quantization_utils.training import configure, reestimate_bn
from utils.run_data import Data, DataFlags, inputs, load_data
from utils.run_log import log, log_to, logging_to_console
from utils.run_report import TOP1_SIMULATION, format_report, write_json
from utils.run_state import GRAPH, FloatPhase, Run
from utils.search_run import search
from utils.torch_file import read_torch_file
from utils.train_flags import FLOAT, TORCH, build_parser
from utils.trainer import Recipe, Trainer
from zoo.flag import zoo_entry

SIMULATION = "simulation"
SCHEME, ARGUMENTS, LOG = "scheme.yaml", "arguments.json", "log.log"
CHECKPOINT_KEYS = {"arch", "scheme", "bits", "residual_bits", "num_classes", "preprocess", "state_dict", "quantizers"}
CHECKPOINT_KEYS |= {"trainer", "best_top1", "top1_float", "arguments", "threads"}
RESUMED_FLAGS = (  # change what a resumed run computes
    *("batch_size", "lr", "momentum", "wd", "lr_schedule", "warmup_epochs", "accumulate", "seed"),
    *("act_range", "act_range_momentum", "act_percentile", "fix_bn", "data", "data_percentage"),
)


def run(args: argparse.Namespace, command: str) -> None:
    """The whole job, in order: model, data, quantization, training, integers, report."""
    started = time.perf_counter()
    if args.explain is not None:
        explain(args, _machine(args, None))
        return
    if is_graph_file(args.resume):
        evaluate_graph_file(args, command, _machine(args, None))
        return
    content = read_torch_file(args.resume) if args.resume else None
    original = read_original(content, args.resume)
    if original is not None and evaluates_original(args, original):
        evaluate_original(args, original, command, _machine(args, None))
        return
    start_from_original(args, content, original)
    resumed = _resumed(args, content)
    scheme = scheme_of(resumed) if resumed and args.quant_scheme is None else args.quant_scheme
    fill_in(args, *_inherited(resumed))
    device = _machine(args, resumed)
    if not args.summary:
        check_outputs(args)
    info, preprocess = _model(args, resumed)
    experiment = Experiment(info, preprocess, scheme or args.quant_scheme, device, BACKENDS[args.ptq_backend])
    if args.summary:
        print(experiment.table())
        return
    if args.search is not None:
        search(args, experiment)
        return
    if resumed:
        experiment.load_state(resumed, str(args.resume))
    teacher = _teacher(args, experiment)
    if experiment.is_float and args.engine != TORCH:
        raise UserError("--engine tvm runs integers, the scheme float has none; give another scheme or --engine torch")
    make_engine = engine_maker(args, device)
    data = _data(args, experiment, fresh=resumed is None)
    log_to(args.save_path / LOG)
    job = Run(args, command, experiment, data, make_engine)
    _announce(job, resumed)
    try:
        _work(job, resumed, teacher)
        job.phase = "last evaluation"
        _finish(job, started)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(job.how_to_continue()) from None
    finally:
        if job.writer is not None:
            job.writer.close()


def _work(job: Run, resumed: dict[str, Any] | None, teacher: nn.Module | None) -> None:
    """All that changes the model: float training, calibration, quantization-aware training."""
    args = job.args
    if resumed is not None:
        job.best_top1, job.top1_float = resumed["best_top1"], resumed["top1_float"]
        _configure(job)
    else:
        _train_float(job)
        accuracy = job.evaluate_float("float")
        job.top1_float, job.float_classes = accuracy.top1, accuracy.predictions
        log.info("float network: top-1 %.2f on %d images", job.top1_float, len(job.data.val.dataset))
        calibrate_run(job, partial(_configure, job))
    if not args.evaluate and args.epochs > 0:
        _train(job, resumed, teacher)


def _resumed(args: argparse.Namespace, content: Any) -> dict[str, Any] | None:
    """The checkpoint to go on from, unless there is none or it only gave its weights."""
    if args.resume is None:
        return None
    contents = checked_checkpoint(content, args.resume, args.arch)
    missing = sorted(CHECKPOINT_KEYS - set(contents))
    if missing:
        raise UserError(f"{args.resume} has no entry {missing[0]!r}; it was changed after saving, use another file")
    return contents


def _inherited(resumed: dict[str, Any] | None) -> tuple[str | None, str | None, str | None]:
    """Architecture, scheme and range mode of a checkpoint."""
    if resumed is None:
        return None, None, None
    act_range = resumed["arguments"].get("act_range") if resumed["trainer"] else None
    return resumed["arch"], resumed["scheme"], act_range


def _machine(args: argparse.Namespace, resumed: dict[str, Any] | None) -> torch.device:
    """Set threads and seed; returns the device."""
    chosen = args.device or ("" if args.gpu is None else f"cuda:{args.gpu}")
    name = chosen or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: this machine has {count} usable CUDA devices; leave it out to run anywhere")
    torch.backends.cudnn.deterministic = True  # a resumed run continues bit for bit
    if resumed and not args.evaluate and args.threads is None:
        torch.set_num_threads(min(resumed["threads"], os.cpu_count() or 1))
    elif args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return device


def _model(args: argparse.Namespace, resumed: dict[str, Any] | None) -> tuple[ModelInfo, Preprocess]:
    """The float network and how images become its input; a checkpoint brings its own weights and preprocessing."""
    if resumed is None:
        info = create_model(args.arch, args.num_classes, args.pretrained, args.weights)
        base = info.preprocess
    else:
        info = create_model(args.arch, resumed["num_classes"])
        base = Preprocess.from_dict(resumed["preprocess"])
    changed = base.override(
        mean=args.mean,
        std=args.std,
        resize=args.resize,
        input_size=args.input_size,
        rotate180=args.rotate180 or None,
    )
    return info, changed


def _teacher(args: argparse.Namespace, experiment: Experiment) -> nn.Module | None:
    """The float teacher of ``--distill-method``, checked before hours of training."""
    if args.distill_method == "None" or args.evaluate or args.epochs == 0:
        return None
    classes, weights = experiment.info.num_classes, args.teacher_weights
    teacher = create_model(args.teacher_arch, classes, weights is None, weights)
    if teacher.preprocess.channels != experiment.preprocess.channels:
        raise UserError(
            f"the teacher {args.teacher_arch} takes images of {teacher.preprocess.channels} channels, "
            f"{args.arch} of {experiment.preprocess.channels}; give another --teacher-arch"
        )
    return teacher.module.to(experiment.device).eval()


def _data(args: argparse.Namespace, experiment: Experiment, fresh: bool) -> Data:
    """Validation images always; training images for training, and for calibration where they exist."""
    flags = DataFlags(args.data, args.batch_size, args.workers, args.seed, args.data_percentage)
    trains = not args.evaluate and (args.epochs > 0 or (fresh and args.float_epochs > 0))
    calibration = args.calib_images if fresh and not experiment.is_float else 0
    classes = experiment.info.num_classes
    return load_data(flags, experiment.preprocess, classes, train=trains, calibration=calibration)


def _announce(job: Run, resumed: dict[str, Any] | None) -> None:
    """One line about what runs where, and what a user should know before it does."""
    args, experiment = job.args, job.experiment
    threads = torch.get_num_threads()
    network = f"{experiment.info.name}, scheme {experiment.scheme_name}"
    log.info("%s, on %s with %d threads; images: %s", network, experiment.device, threads, job.data.sizes())
    if job.data.lacks_train:
        log.info("%s has no folder train/: calibrating on validation images", args.data)
    scratch = not (resumed or args.weights or args.pretrained or args.float_epochs)
    if scratch and (args.epochs == 0 or args.evaluate or not experiment.is_float):
        log.info("%s starts from random weights; --weights, --pretrained or --float-epochs give others", args.arch)
    if resumed is None or resumed["trainer"] is None or args.evaluate:
        return
    done = resumed["trainer"]
    log.info("resumed after %d epochs and %d batches", done["epoch"], done["batch"])
    old = resumed["arguments"]
    changed = [
        f"{key} {now} (was {old[key]})"
        for key in RESUMED_FLAGS
        if key in old and old[key] != (now := str(vars(args)[key]))
    ]
    if changed:
        log.info("not the same run as before: %s", ", ".join(changed))
    if resumed["threads"] != threads:
        log.info("resumed with %d threads, saved with %d: not bit for bit", threads, resumed["threads"])


def _train_float(job: Run) -> None:
    """``--float-epochs``: train the float network before anything is quantized."""
    args, experiment = job.args, job.experiment
    if args.float_epochs == 0 or args.evaluate or job.data.train is None:
        return
    job.phase = "float training"
    recipe = replace(
        _recipe(args),
        epochs=args.float_epochs,
        lr=args.float_lr,
        schedule="cosine",
        fix_bn=False,
        fix_bn_threshold=None,
    )
    Trainer(experiment.model, job.data.train, experiment.preprocess, recipe, None).fit(FloatPhase(job))


def _configure(job: Run) -> None:
    args = job.args
    if job.experiment.is_float:
        return
    configure(
        job.experiment.model,
        act_range=args.act_range if not args.evaluate and args.epochs > 0 else "ema",
        act_range_momentum=args.act_range_momentum,
        act_percentile=args.act_percentile,
        weight_percentile=args.weight_percentile,
        channel_wise=args.channel_wise,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(
        epochs=args.epochs,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.wd,
        schedule=args.lr_schedule,
        warmup_epochs=args.warmup_epochs,
        accumulate=args.accumulate,
        fix_bn=args.fix_bn,
        fix_bn_threshold=args.fix_bn_threshold,
        checkpoint_iter=args.checkpoint_iter,
        evaluate_times=args.evaluate_times,
        distill_alpha=args.distill_alpha,
        temperature=args.temperature,
        print_freq=args.print_freq,
    )


def _train(job: Run, resumed: dict[str, Any] | None, teacher: nn.Module | None) -> None:
    """Quantization-aware training (plain training for the float scheme)."""
    args, experiment, loader = job.args, job.experiment, job.data.train
    assert loader is not None
    job.phase = "training"
    trainer = Trainer(experiment.model, loader, experiment.preprocess, _recipe(args), teacher)
    if resumed is not None and resumed["trainer"] is not None:
        trainer.load(resumed["trainer"])
    if args.start_epoch is not None:
        trainer.epoch, trainer.batch = args.start_epoch, 0
    if trainer.epoch >= args.epochs:
        log.info("all %d epochs are done; --epochs %d would go on", args.epochs, trainer.epoch + 1)
    job.trainer = trainer
    if trainer.step == 0:
        job.validate(0)
        job.save()
    trainer.fit(job)
    if args.reestimate_bn:
        loader.set_epoch(args.epochs)
        count = min(args.reestimate_bn, len(loader))
        reestimate_bn(experiment.model, inputs(loader, count, experiment.preprocess, experiment.device, "BatchNorm"))
        job.last = None
    if job.last is None:
        job.validate(trainer.epoch)
        job.save()


def _finish(job: Run, started: float) -> None:
    """Evaluate the integers once more where training did not, save, print and report."""
    args, experiment = job.args, job.experiment
    if job.last is None:
        label = FLOAT if experiment.is_float else SIMULATION if experiment.simulates else None
        job.last = job.evaluate_integer() if label is None else job.evaluate_float(label)
    if experiment.is_float:
        job.top1_float = job.last.top1
    if job.graph is not None:
        save_graph(job.graph, args.save_path / GRAPH)
    if not args.evaluate:
        if not experiment.is_float:
            name = experiment.scheme_name
            bit_config.save_scheme(
                args.save_path / SCHEME, experiment.bits, name=name, residual_bits=experiment.residual_bits
            )
        write_json(args.save_path / ARGUMENTS, {"command": job.command, "commit": commit(), "flags": vars(args)})
        if not experiment.simulates:
            job.save()
    report = _report(job, started)
    log.info(format_report(report, args.save_path))
    if args.report:
        write_json(args.report, report)


def _report(job: Run, started: float) -> dict[str, Any]:
    """Everything measured, under stable keys (``REPORT_KEYS`` and ``EXTRA_KEYS``)."""
    args, experiment, cost = job.args, job.experiment, job.experiment.cost()
    assert job.last is not None
    same = None
    if job.graph is not None:
        engine = TorchEngine(job.graph, experiment.device)
        same = agreement(experiment.model, engine, job.data.val, experiment.preprocess, args.agreement_images)
    extra = {}
    if job.graph is not None and job.float_classes is not None:
        extra["same_class_as_float"] = 100 * float((job.last.predictions == job.float_classes).double().mean())
    if experiment.simulates:
        extra[TOP1_SIMULATION] = job.last.top1
    elif job.graph is not None and args.fixed_point_quantization:
        extra[TOP1_SIMULATION] = job.evaluate_float(SIMULATION).top1
    return {
        "arch": experiment.info.name,
        "scheme": experiment.scheme_name,
        "images": len(job.data.val.dataset),
        "top1_float": job.top1_float,
        "top1_integer": job.last.top1 if job.graph else None,
        "top5_integer": job.last.top5 if job.graph else None,
        "size_mib": cost.size_mib,
        "bops_g": cost.bops_g,
        "agreement_top1": same.top1 if same else None,
        "agreement_activations": same.activations if same else None,
        "seconds": round(time.perf_counter() - started, 1),
        "commit": commit(),
        "command": job.command,
        "agreement_narrow": same.narrow if same else None,
        "agreement_images": same.images if same else None,
        "float_islands": experiment.model.islands() if job.graph else None,
        "device": str(experiment.device),
        "threads": torch.get_num_threads(),
        "epochs": job.trainer.epoch if job.trainer else 0,
        "best_top1": max(job.best_top1, job.last.top1),
        "engine": args.engine,
        "images_per_second": job.last.images / job.last.seconds,
        **extra,
        **job.measured,
        **unseen_accuracy(job),
    }


@command_line("stopped; nothing was saved")
def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for a user's mistake; 130 when interrupted, with how to continue."""
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", Path(__file__).name, *words])
    with logging_to_console():
        args = build_parser().parse_args(words)
        with zoo_entry(args):
            check(args)
            run(args, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
