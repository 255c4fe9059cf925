"""What flags of ``quant_train.py`` mean together: combinations that are refused, and defaults that depend on others."""

import argparse
import os
from pathlib import Path

import torch

from utils.data_utils import DIGITS
from utils.distillation import check_distillation
from utils.errors import UserError
from utils.quantization_utils.backends import BACKENDS, DEFAULT, why_not
from utils.quantization_utils.ptq_recipe import DESCENT, LEARNED, parse_recipe
from utils.quantization_utils.quant_modules import RUNNING_MIN_MAX
from utils.search_flags import check_search
from utils.train_flags import FLOAT, MSE, QUICK, TORCH, TVM

EPOCHS, DIGITS_EPOCHS, DIGITS_FLOAT_EPOCHS = 90, 5, 15


def check(args: argparse.Namespace) -> None:
    """Cross-checks that argparse cannot make, before anything is read.  Raises UserError."""
    processes = max(args.world_size, torch.cuda.device_count() if args.multiprocessing_distributed else 1)
    if processes > 1 or args.rank > 0:
        asked = max(processes, args.rank + 1)
        raise UserError(
            f"--world-size, --rank and --multiprocessing-distributed ask for {asked} training processes here; training "
            "runs in one process on one device, leave them out"
        )
    if args.explain is not None:
        _check_explain(args)
    check_search(args)
    if args.ptq is not None:
        _check_ptq(args)
    if args.ptq_backend != DEFAULT:
        _check_simulation(args)
    if args.resume_quantize and args.resume is None:
        raise UserError("--resume-quantize needs --resume FILE to say which checkpoint")
    if args.resume is not None and (args.weights is not None or args.pretrained):
        raise UserError("--resume brings its own weights; leave out --weights and --pretrained, or leave out --resume")
    if args.data_percentage > 1:
        raise UserError(f"--data-percentage is {args.data_percentage}, expected a share of more than 0 and at most 1")
    if args.engine == TVM and not args.evaluate:
        raise UserError("--engine tvm evaluates only: give -e with it, or leave it out, training validates with torch")
    momentum = args.act_range_momentum
    if momentum not in (None, -1) and not 0 <= momentum < 1:
        raise UserError(f"--act-range-momentum is {momentum}, expected -1 or 0 to 1")
    if args.distill_method != "None":
        check_distillation(args.distill_alpha, args.temperature)
    if args.gpu is not None and args.device not in ("", f"cuda:{args.gpu}"):
        raise UserError(f"--gpu {args.gpu} and --device {args.device} name two devices; give one of them")


def _check_explain(args: argparse.Namespace) -> None:
    others = ("resume", "weights", "pretrained", "zoo", "ptq", "evaluate", "summary", "quant_scheme", "report")
    given = [name for name in others if vars(args)[name]]
    if given:
        raise UserError(f"--explain examines a run as it is; leave out --{given[0].replace('_', '-')}")


def _check_ptq(args: argparse.Namespace) -> None:
    recipe = parse_recipe(args.ptq)
    if args.resume is not None:
        raise UserError("--ptq starts from float weights: give --weights FILE, or leave --ptq out to --resume")
    if args.quant_scheme == FLOAT:
        raise UserError("--ptq quantizes, the scheme float does not; give another --quant-scheme")
    if args.calibration not in (MSE, recipe.activations):
        raise UserError(f"--ptq {args.ptq} and --calibration {args.calibration} differ; leave out --calibration")
    if (recipe.balance or recipe.affine or recipe.rounding == DESCENT) and not args.channel_wise:
        raise UserError(f"--ptq {args.ptq} needs a scale for every channel; leave out --no-channel-wise")
    if args.ptq_setting != QUICK and recipe.rounding not in LEARNED:
        raise UserError(f"--ptq {args.ptq} learns nothing; leave out --ptq-setting, or add {' or '.join(LEARNED)}")


def _check_simulation(args: argparse.Namespace) -> None:
    flag = f"--ptq-backend {args.ptq_backend}"
    if args.ptq is None:
        raise UserError(f"{flag} needs --ptq to say how, for example --ptq mse")
    why = why_not(BACKENDS[args.ptq_backend], parse_recipe(args.ptq).rounding)
    if why is not None:
        raise UserError(f"{flag}: {why}")
    if args.epochs:
        raise UserError(f"{flag} is simulated and cannot be trained; leave out --epochs, or give {DEFAULT}")
    if args.engine != TORCH or args.strict_integer:
        asked = "--strict-integer" if args.engine == TORCH else f"--engine {args.engine}"
        raise UserError(f"{flag} is simulated and has no integer graph; leave out {asked}, or give {DEFAULT}")


def fill_in(args: argparse.Namespace, arch: str | None, scheme: str | None, act_range: str | None = None) -> None:
    """Defaults that depend on other flags, and on the checkpoint to resume.  Raises UserError.

    arch, scheme: the checkpoint's; act_range: the one it was trained with, None where it was only calibrated.
    """
    args.arch = args.arch or arch
    if args.data is None and args.arch in (None, DIGITS):
        args.data = DIGITS
    needs_images = not args.summary and (args.search is None or args.sensitivity is None)
    if args.data is None and needs_images:
        raise UserError(
            f"--data is missing: give the folder with the images for {args.arch} (train/ and val/, or CIFAR's), or "
            "leave out -a for the embedded digits"
        )
    if args.arch is None:
        args.arch = DIGITS if args.data == DIGITS else "resnet18"
    args.quant_scheme = args.quant_scheme or scheme or "uniform8"
    follows = args.act_range_momentum is not None or args.act_percentile or args.weight_percentile
    args.act_range = args.act_range or ("ema" if follows else act_range or "lsq")
    args.act_range_momentum = RUNNING_MIN_MAX if args.act_range_momentum is None else args.act_range_momentum
    fresh_digits = args.data == DIGITS and args.weights is None and args.resume is None and not args.evaluate
    if args.epochs is None and args.ptq is not None:
        args.epochs = 0
    if args.epochs is None:
        args.epochs = DIGITS_EPOCHS if args.data == DIGITS else EPOCHS
    if args.float_epochs is None:
        args.float_epochs = DIGITS_FLOAT_EPOCHS if fresh_digits else 0
    if args.gpu is not None:
        args.device = f"cuda:{args.gpu}"
    if args.save_path is None:
        args.save_path = args.resume.parent if args.resume is not None else Path("runs") / _run_name(args)


def _run_name(args: argparse.Namespace) -> str:
    if args.search is not None:
        return f"{args.arch}_search".replace("/", "_")
    scheme = Path(args.quant_scheme).stem if args.quant_scheme.endswith((".yaml", ".yml")) else args.quant_scheme
    return f"{args.arch}_{scheme}".replace("/", "_")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError now for a --save-path or --report that could not be written hours later; makes nothing."""
    ancestor = next(path for path in (args.save_path, *args.save_path.absolute().parents) if path.exists())
    _check_folder("--save-path", args.save_path, ancestor)
    for flag, path in (("--report", args.report), ("--save-scheme", args.save_scheme)):
        if path is not None:
            _check_file(flag, path, args.save_path)


def _check_file(flag: str, path: Path, save_path: Path) -> None:
    """A file to write, in a folder that exists or that the run makes."""
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give the name of a file in it")
    if folder.exists():
        _check_folder(flag, path, folder)
    elif folder != save_path.absolute():
        raise UserError(f"{flag} {path}: the folder {path.parent} does not exist; make it first")


def _check_folder(flag: str, path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {folder} is not a folder; give another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: no permission to write into {folder}; give another place")
