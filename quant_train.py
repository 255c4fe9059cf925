"""Quantize a float CNN to mixed precision, train it quantization-aware, convert it to integers and evaluate those.

Reads top to bottom: :func:`run` is the whole job.  ``python quant_train.py --help`` explains every flag.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from utils.atomic_file import write_atomically
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data_utils import Loader, check_classes, check_same_classes, make_loader, normalize, open_dataset, subset
from utils.distillation import check_distillation
from utils.errors import UserError
from utils.evaluation import Accuracy, agreement, evaluate, float_predictor
from utils.experiment import FLOAT, Experiment
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import save as save_graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import ModelInfo, create_model
from utils.preprocess import Preprocess
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.state import load_quantizer_state, quantizer_state
from utils.quantization_utils.training import configure, reestimate_bn
from utils.train_flags import build_parser, check
from utils.trainer import Interrupted, Recipe, Trainer

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
CHECKPOINT, BEST, GRAPH = "checkpoint.pth.tar", "model_best.pth.tar", "model.safetensors"
log = logging.getLogger("quant_train")


@dataclass
class Data:
    """Loaders of one run; ``train`` is absent where only val/ is needed."""

    train: Loader | None
    val: Loader
    calibration: Loader


class Run:
    """State of one run between its steps: what is measured, what is saved where."""

    def __init__(self, args: argparse.Namespace, experiment: Experiment, data: Data) -> None:
        self.args, self.experiment, self.data = args, experiment, data
        self.trainer: Trainer | None = None
        self.best_top1 = 0.0
        self.top1_float: float | None = None
        self.last: Accuracy | None = None
        self.graph: Graph | None = None
        self.writer: Any = _tensorboard(args) if args.tensorboard else None
        args.save_path.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        path: Path = self.args.save_path / CHECKPOINT
        return path

    def validate(self, epoch: float) -> None:
        """Evaluate the integer graph of the current weights; a new best is kept."""
        self.last = self.evaluate_integer() if not self.experiment.is_float else self.evaluate_float("float")
        log.info("epoch %g: top-1 %.2f, top-5 %.2f (%s)", epoch, self.last.top1, self.last.top5, self._kind())
        self.scalars(self.trainer.step if self.trainer else 0, {"val/top1": self.last.top1})
        if self.last.top1 > self.best_top1:
            self.best_top1 = self.last.top1
            self._save_checkpoint(self.args.save_path / BEST)

    def _kind(self) -> str:
        return "float network" if self.experiment.is_float else "integer graph"

    def evaluate_float(self, label: str) -> Accuracy:
        """Top-1 and top-5 of the float model, or of the fake-quantized one once quantization is on."""
        predictor = float_predictor(self.experiment.model, self.experiment.preprocess, self.experiment.device)
        return evaluate(predictor, self.data.val, label)

    def evaluate_integer(self) -> Accuracy:
        """Convert, evaluate the integer graph on the validation images, keep it."""
        self.graph = self.experiment.convert(self.data.val.classes, self.args.strict_integer)
        engine = TorchEngine(self.graph, self.experiment.device)
        return evaluate(lambda images: engine(images.to(self.experiment.device)), self.data.val, "integer graph")

    def save(self) -> None:
        """Write the checkpoint everything can continue from."""
        self._save_checkpoint(self.checkpoint)

    def _save_checkpoint(self, path: Path) -> None:
        contents = {
            "arch": self.experiment.info.name,
            "scheme": self.experiment.scheme_name,
            "bits": self.experiment.bits_table(),
            "residual_bits": self.experiment.residual_bits,
            "num_classes": self.experiment.info.num_classes,
            "preprocess": self.experiment.preprocess.as_dict(),
            "state_dict": dict(self.experiment.model.model.state_dict()),
            "quantizers": quantizer_state(self.experiment.model),
            "trainer": self.trainer.state() if self.trainer else None,
            "best_top1": self.best_top1,
            "top1_float": self.top1_float,
            "arguments": {key: str(value) for key, value in vars(self.args).items()},
            "threads": torch.get_num_threads(),
            "commit": _commit(),
        }
        save_checkpoint(path, contents)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Curves for TensorBoard, when asked for."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def run(args: argparse.Namespace) -> None:
    """The whole job, in order: model, data, quantization, training, integers, report."""
    started = time.perf_counter()
    device = _device(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    resumed = load_checkpoint(args.resume, args.arch) if args.resume else None
    info, preprocess = _model(args, resumed)
    experiment = Experiment(info, preprocess, args.quant_scheme, device)
    if args.summary:
        print(experiment.table())
        return
    data = _data(args, info, preprocess)
    job = Run(args, experiment, data)
    _log_to(args.save_path / "log.log")
    if resumed is not None:
        _restore(job, resumed)
    else:
        _train_float(job)
        job.top1_float = job.evaluate_float("float").top1
        log.info("float network: top-1 %.2f on %d images", job.top1_float, len(data.val.dataset))
        _calibrate(job)
    if not args.evaluate and args.epochs > 0:
        _train(job, resumed)
    _finish(job, time.perf_counter() - started)


def _model(args: argparse.Namespace, resumed: dict[str, Any] | None) -> tuple[ModelInfo, Preprocess]:
    """The float network and how images become its input; a checkpoint brings its own weights and preprocessing."""
    if resumed is None:
        info = create_model(args.arch, args.num_classes, args.pretrained, args.weights)
        base = info.preprocess
    else:
        info = create_model(args.arch, resumed["num_classes"])
        base = Preprocess.from_dict(resumed["preprocess"])
    changes = {name: getattr(args, name) for name in ("mean", "std", "resize", "input_size")}
    return info, base.override(**changes, rotate180=args.rotate180 or None)


def _data(args: argparse.Namespace, info: ModelInfo, preprocess: Preprocess) -> Data:
    """Validation images always; training images for training, and for calibration where they exist."""
    val = open_dataset(args.data, "val", preprocess, seed=args.seed)
    check_classes(val, info.num_classes, args.data)
    trains = not args.evaluate and (args.epochs > 0 or args.float_epochs > 0)
    train = None
    if trains:
        train = open_dataset(args.data, "train", preprocess, augment=True, seed=args.seed)
        check_same_classes(train, val, args.data)
        if args.data_percentage < 1:
            train = subset(train, fraction=args.data_percentage, seed=args.seed)
    try:
        source = open_dataset(args.data, "train", preprocess, seed=args.seed)
    except UserError:
        source = val
        if args.resume is None and args.quant_scheme != FLOAT:
            print(f"{args.data} has no usable train/ folder: calibrating on validation images")
    calibration = subset(source, count=args.calib_images, seed=args.seed)
    batch = min(args.batch_size, 64)
    return Data(
        train=make_loader(train, args.batch_size, train=True, workers=args.workers) if train else None,
        val=make_loader(val, args.batch_size, train=False, workers=args.workers),
        calibration=make_loader(calibration, batch, train=False, workers=args.workers),
    )


def _train_float(job: Run) -> None:
    """``--float-epochs``: train the float network before anything is quantized."""
    args, experiment = job.args, job.experiment
    if args.float_epochs == 0 or args.evaluate or job.data.train is None:
        return
    recipe = replace(_recipe(args), epochs=args.float_epochs, fix_bn=False, fix_bn_threshold=None, schedule="cosine")
    trainer = Trainer(experiment.model, job.data.train, experiment.preprocess, recipe, None)
    trainer.fit(_Quiet(job))


class _Quiet:
    """Hooks of the float phase: accuracy is printed, nothing is saved."""

    def __init__(self, job: Run) -> None:
        self.job = job

    def validate(self, epoch: float) -> None:
        accuracy = self.job.evaluate_float("float")
        log.info("float epoch %g: top-1 %.2f", epoch, accuracy.top1)

    def save(self) -> None:
        """Nothing: the quantized run has not begun."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Nothing: curves begin with quantization."""


def _calibrate(job: Run) -> None:
    """Fix activation ranges on the calibration subset and switch quantization on."""
    args, experiment = job.args, job.experiment
    if experiment.is_float:
        return
    batches = (normalize(images.to(experiment.device), experiment.preprocess) for images, _ in job.data.calibration)
    count = calibrate(experiment.model, batches, args.calibration, args.calib_percentile)
    log.info("calibrated on %d images in batches of %d (%s)", count, job.data.calibration.batch_size, args.calibration)
    _configure(job)


def _configure(job: Run) -> None:
    args = job.args
    configure(
        job.experiment.model,
        act_range=args.act_range if not args.evaluate and args.epochs > 0 else "ema",
        act_range_momentum=args.act_range_momentum,
        act_percentile=args.act_percentile,
        weight_percentile=args.weight_percentile,
        channel_wise=args.channel_wise,
    )


def _restore(job: Run, saved: dict[str, Any]) -> None:
    """Weights, quantizers and position of a checkpoint."""
    experiment = job.experiment
    if saved["bits"] != experiment.bits_table():
        different = next(name for name, bits in saved["bits"].items() if experiment.bits_table().get(name) != bits)
        raise UserError(
            f"{job.args.resume} was saved with scheme {saved['scheme']}, which gives layer {different!r} "
            f"{saved['bits'][different]} bits (weight, activation), not {experiment.bits_table().get(different)}; "
            f"give --quant-scheme {saved['scheme']}"
        )
    experiment.model.model.load_state_dict(saved["state_dict"])
    load_quantizer_state(experiment.model, saved["quantizers"])
    _configure(job)
    job.best_top1, job.top1_float = saved["best_top1"], saved["top1_float"]
    if saved["threads"] != torch.get_num_threads():
        log.info("resumed with %d threads, saved with %d: not bit for bit", torch.get_num_threads(), saved["threads"])


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


def _train(job: Run, resumed: dict[str, Any] | None) -> None:
    """Quantization-aware training (plain training for the float scheme)."""
    args, experiment = job.args, job.experiment
    assert job.data.train is not None
    trainer = Trainer(
        experiment.model, job.data.train, experiment.preprocess, _recipe(args), _teacher(args, experiment)
    )
    if resumed is not None and resumed["trainer"] is not None:
        trainer.load(resumed["trainer"])
    if args.start_epoch is not None:
        trainer.epoch, trainer.batch = args.start_epoch, 0
    job.trainer = trainer
    if resumed is None:
        job.validate(0)
        job.save()
    trainer.fit(job)
    if args.reestimate_bn:
        images = (
            normalize(i.to(experiment.device), experiment.preprocess)
            for i, _ in islice(job.data.train, args.reestimate_bn)
        )
        reestimate_bn(experiment.model, images)
        job.validate(trainer.epoch)
        job.save()


def _teacher(args: argparse.Namespace, experiment: Experiment) -> nn.Module | None:
    if args.distill_method == "None":
        return None
    check_distillation(args.distill_alpha, args.temperature)
    teacher = create_model(
        args.teacher_arch, experiment.info.num_classes, args.teacher_weights is None, args.teacher_weights
    )
    return teacher.module.to(experiment.device).eval()


def _finish(job: Run, seconds: float) -> None:
    """Evaluate the integers once more where training did not, save, print and report."""
    args, experiment = job.args, job.experiment
    if experiment.is_float:
        accuracy = job.evaluate_float("float") if job.last is None else job.last
        job.top1_float = accuracy.top1
        report = _report(job, None, seconds)
    else:
        accuracy = job.evaluate_integer() if job.last is None else job.last
        assert job.graph is not None
        save_graph(job.graph, args.save_path / GRAPH)
        job.last = accuracy
        report = _report(job, job.graph, seconds)
    if not args.evaluate:
        job.save()
    _print_report(report, args.save_path)
    if args.report:
        write_json(args.report, report)


def _report(job: Run, graph: Graph | None, seconds: float) -> dict[str, Any]:
    """Everything measured, under stable keys."""
    experiment, cost = job.experiment, job.experiment.cost()
    report: dict[str, Any] = {
        "arch": experiment.info.name,
        "scheme": experiment.scheme_name,
        "images": len(job.data.val.dataset),
        "top1_float": job.top1_float,
        "top1_integer": None,
        "top5_integer": None,
        "size_mib": cost.size_mib,
        "bops_g": cost.bops_g,
        "agreement_top1": None,
        "agreement_activations": None,
        "seconds": round(seconds, 1),
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    if graph is not None and job.last is not None:
        engine = TorchEngine(graph, experiment.device)
        same = agreement(experiment.model, engine, job.data.val, experiment.preprocess, job.args.agreement_images)
        report |= {
            "top1_integer": job.last.top1,
            "top5_integer": job.last.top5,
            "float_islands": experiment.model.islands(),
        }
        report |= {
            "agreement_top1": same.top1,
            "agreement_activations": same.activations,
            "agreement_images": same.images,
        }
        if job.args.fixed_point_quantization:
            report["top1_simulation"] = job.evaluate_float("simulation").top1
    return report


def _print_report(report: dict[str, Any], folder: Path) -> None:
    lines = [
        f"{report['arch']} {report['scheme']}: {report['images']} images, {report['seconds']} s",
        f"  top-1 float        {_percent(report['top1_float'])}",
    ]
    if report["top1_integer"] is not None:
        lines += [
            f"  top-1 integer      {_percent(report['top1_integer'])}   top-5 {_percent(report['top5_integer'])}",
            f"  simulation agrees  {_percent(report['agreement_top1'])} of predictions, "
            f"{_percent(report['agreement_activations'])} of activation integers ({report['agreement_images']} images)",
            f"  float islands      {', '.join(report['float_islands']) or 'none'}",
        ]
    if "top1_simulation" in report:
        lines.append(f"  top-1 simulation   {_percent(report['top1_simulation'])}")
    lines.append(f"  size {report['size_mib']:.3f} MiB, {report['bops_g']:.3f} GBOPS, saved in {folder}")
    log.info("\n".join(lines))


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report atomically; raises UserError where it cannot be written."""

    def write(file: BinaryIO) -> None:
        file.write((json.dumps(report, indent=2) + "\n").encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this machine has no usable CUDA device; leave the flag out to run on the CPU"
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; give cpu, cuda or cuda:N") from error


def _tensorboard(args: argparse.Namespace) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(args.save_path))


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _log_to(path: Path) -> None:
    log.addHandler(logging.FileHandler(path))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for a user's mistake; 130 when interrupted (state saved)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    args = build_parser().parse_args(argv)
    try:
        check(args)
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted:
        path = args.save_path / CHECKPOINT
        print(f"\nstopped and saved; continue with the same command and --resume {path}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("\nstopped; nothing had been trained yet", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
