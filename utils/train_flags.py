"""Command line of ``quant_train.py``: the original's flags under their names, and ours."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from utils.data_utils import DIGITS
from utils.errors import UserError
from utils.quantization_utils.observers import METHODS
from utils.quantization_utils.training import ACT_RANGES

EXAMPLES = """examples:
  python quant_train.py                                          digits: trains, quantizes, evaluates; no files needed
  python quant_train.py -a resnet50 --quant-scheme bops_0.5 --summary
                                                                 the layers, their bits and what they cost
  python quant_train.py -a mobilenetv2_w1 --weights w.pth --data IMAGENET --quant-scheme uniform8 --epochs 0
                                                                 quantize by calibration alone
  python quant_train.py -a resnet18 --pretrained --data IMAGENET --quant-scheme uniform4 --epochs 5 --lr 0.001
                                                                 quantization-aware training
  python quant_train.py -a resnet18 --data IMAGENET --quant-scheme uniform4 -e --resume RUN/checkpoint.pth.tar
                                                                 evaluate the integer network
"""


def _positive(kind: Callable[[str], float], zero: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise argparse.ArgumentTypeError(f"{text} is not a {'non-negative' if zero else 'positive'} number")
        return value

    return parse


def _percentile(text: str) -> float:
    value = float(text)
    if value != 0 and not 50 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a percentile; give 0 (off) or more than 50 and at most 100")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="quant_train.py",
        description="Quantize a float CNN to mixed precision, train it quantization-aware, convert it to one integer graph and evaluate that.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in (_network, _data, _quantization, _training, _distillation, _running, _kept):
        add(parser)
    return parser


def _network(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("network")
    g.add_argument(
        "-a",
        "--arch",
        metavar="NAME",
        help="PyTorchCV name, torchvision name (or torchvision/NAME), or 'digits' (default: resnet18, or digits without --data)",
    )
    g.add_argument("--weights", type=Path, metavar="FILE", help="float state_dict to start from")
    g.add_argument(
        "--pretrained",
        action="store_true",
        help="start from published weights (downloaded once; offline, the answer names the file to place by hand)",
    )
    g.add_argument("--num-classes", type=int, metavar="N", help="classes of the network (default: the architecture's)")


def _data(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("data")
    g.add_argument(
        "--data",
        metavar="DIR",
        help="folder with train/ and val/ (one folder a class), torchvision's CIFAR-10 folder, or 'digits'; only val/ is needed with -e and --epochs 0 (which then calibrates on val/ and says so)",
    )
    g.add_argument(
        "-b",
        "--batch-size",
        type=_positive(int),
        default=128,
        metavar="N",
        help="images per batch (default: %(default)s)",
    )
    g.add_argument(
        "-j",
        "--workers",
        type=_positive(int, zero=True),
        default=4,
        metavar="N",
        help="processes that decode images (default: %(default)s, at most one per core)",
    )
    g.add_argument(
        "--data-percentage",
        type=_positive(float),
        default=1.0,
        metavar="P",
        help="share of the training images to use, 0 to 1; the same images for the same --seed",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        g.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{what} of the input normalisation, one value or one per channel (default: the architecture's)",
        )
    g.add_argument("--resize", type=int, metavar="N", help="shortest edge before the crop, 0 for none")
    g.add_argument(
        "--crop",
        "--input-size",
        dest="input_size",
        type=int,
        metavar="N",
        help="edge of the centre crop, which is the network's input",
    )
    g.add_argument(
        "--rotate180", action="store_true", help="turn images upside down (for weights made for such images)"
    )


def _quantization(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("quantization")
    g.add_argument(
        "--quant-scheme",
        default="uniform8",
        metavar="SCHEME",
        help="a published scheme (bops_0.5, ...), uniformN or wXaY with 2 to 8 bits, a YAML file, or 'float' for no quantization (default: %(default)s)",
    )
    g.add_argument(
        "--summary", action="store_true", help="print every layer's bits with reason, size and BOPS, then stop"
    )
    g.add_argument(
        "--calibration",
        choices=METHODS,
        default="mse",
        help="how activation ranges are found before training (default: %(default)s)",
    )
    g.add_argument(
        "--calib-images",
        type=_positive(int),
        default=512,
        metavar="N",
        help="images of the fixed calibration subset (default: %(default)s)",
    )
    g.add_argument(
        "--calib-percentile",
        type=_percentile,
        default=99.99,
        metavar="P",
        help="percentile of --calibration percentile (default: %(default)s)",
    )
    g.add_argument(
        "--act-range",
        choices=ACT_RANGES,
        default="ema",
        help="activation ranges in training: ema follows the batches, lsq learns the scales of activations and weights (default: %(default)s)",
    )
    g.add_argument(
        "--act-range-momentum",
        type=float,
        default=-1.0,
        metavar="M",
        help="weight of the old range in the moving average, 0.9 to 0.99; -1 keeps running extremes (default: %(default)s)",
    )
    g.add_argument(
        "--act-percentile",
        type=_percentile,
        default=0.0,
        metavar="P",
        help="take this percentile of each training batch as its range, 0 for its extremes",
    )
    g.add_argument(
        "--weight-percentile",
        type=_percentile,
        default=0.0,
        metavar="P",
        help="the same for weight ranges (the original ignored it for unfolded BatchNorm and linear layers)",
    )
    g.add_argument(
        "--channel-wise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one weight scale per output channel (in the original, giving the flag switched this off)",
    )
    g.add_argument("--strict-integer", action="store_true", help="refuse networks in which an operator stays in float")
    g.add_argument(
        "--agreement-images",
        type=_positive(int),
        default=256,
        metavar="N",
        help="images on which simulation and integer graph are compared (default: %(default)s)",
    )


def _training(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("training")
    g.add_argument(
        "--epochs",
        type=_positive(int, zero=True),
        metavar="N",
        help="epochs of quantization-aware training; 0 calibrates, converts, evaluates and saves (default: 90; 5 for the digits)",
    )
    g.add_argument(
        "--float-epochs",
        type=_positive(int, zero=True),
        metavar="N",
        help="train the float network first (default: 0; 15 for the digits without --weights)",
    )
    g.add_argument(
        "--start-epoch", type=_positive(int, zero=True), metavar="N", help="override the epoch of a resumed run"
    )
    g.add_argument(
        "--lr",
        "--learning-rate",
        type=_positive(float),
        default=0.01,
        metavar="X",
        help="learning rate (default: %(default)s; the original's 0.1 is for training from scratch)",
    )
    g.add_argument(
        "--momentum", type=_positive(float, zero=True), default=0.9, metavar="X", help="of SGD (default: %(default)s)"
    )
    g.add_argument(
        "--wd",
        "--weight-decay",
        type=_positive(float, zero=True),
        default=1e-4,
        metavar="X",
        help="weight decay, not applied to learned scales (default: %(default)s)",
    )
    g.add_argument(
        "--lr-schedule",
        choices=("step", "cosine"),
        default="step",
        help="times 0.1 every 30 epochs, or half a cosine to 0 (default: %(default)s)",
    )
    g.add_argument(
        "--warmup-epochs",
        type=_positive(float, zero=True),
        default=0.0,
        metavar="X",
        help="epochs (may be a fraction) in which the rate rises linearly from 0",
    )
    g.add_argument(
        "--accumulate", type=_positive(int), default=1, metavar="N", help="add up the gradients of N batches per step"
    )
    g.add_argument(
        "--fix-BN",
        dest="fix_bn",
        action="store_true",
        help="train with BatchNorms folded under their running statistics",
    )
    g.add_argument(
        "--fix-BN-threshold",
        dest="fix_bn_threshold",
        type=_positive(int),
        metavar="N",
        help="fold BatchNorms from the N-th training step on (counted across resumes)",
    )
    g.add_argument(
        "--reestimate-bn",
        type=_positive(int, zero=True),
        default=0,
        metavar="N",
        help="re-estimate BatchNorm statistics on N training batches after the last epoch",
    )
    g.add_argument(
        "--evaluate-times", type=int, default=1, metavar="N", help="validations per epoch (default: %(default)s)"
    )
    g.add_argument(
        "--checkpoint-iter",
        type=int,
        default=-1,
        metavar="N",
        help="save every N steps besides every epoch (did nothing in the original)",
    )


def _distillation(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("distillation")
    g.add_argument(
        "--distill-method",
        choices=("None", "KD_naive"),
        default="None",
        help="learn from a float teacher's softened outputs (default: %(default)s)",
    )
    g.add_argument(
        "--teacher-arch",
        default="resnet101",
        metavar="NAME",
        help="the teacher; give the student's own --arch to learn from its float self (default: %(default)s)",
    )
    g.add_argument(
        "--teacher-weights",
        type=Path,
        metavar="FILE",
        help="its float state_dict; without it the published weights are used",
    )
    g.add_argument(
        "--distill-alpha",
        type=float,
        default=0.95,
        metavar="X",
        help="weight of the teacher's term, 0 to 1 (default: %(default)s); the KL divergence is a mean over the batch, not over classes as in the original",
    )
    g.add_argument("--temperature", type=float, default=6.0, metavar="T", help="softening (default: %(default)s)")


def _running(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("running")
    g.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help="evaluate only: the checkpoint of --resume, or a fresh calibration",
    )
    g.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="checkpoint to continue bit for bit, or to start training from (calibrated ones have 0 epochs behind them)",
    )
    g.add_argument(
        "--save-path",
        type=Path,
        metavar="DIR",
        help="folder for checkpoints, integer graph and log (default: runs/ARCH_SCHEME)",
    )
    g.add_argument("--report", type=Path, metavar="FILE", help="write everything measured as JSON")
    g.add_argument("--tensorboard", action="store_true", help="write curves into the save folder for TensorBoard")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    g.add_argument("--gpu", type=int, metavar="N", help="the same as --device cuda:N")
    g.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads (default: torch's own choice)")
    g.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of initialisation, order, augmentation and subsets (default: %(default)s)",
    )
    g.add_argument(
        "-p",
        "--print-freq",
        type=_positive(int),
        default=10,
        metavar="N",
        help="batches between updates of the progress bar's figures (default: %(default)s)",
    )


def _kept(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("flags of the original with one sensible value")
    g.add_argument(
        "--quant-mode",
        choices=("symmetric",),
        default="symmetric",
        help="the sign of an activation follows from the graph here, scales are symmetric (the original ignored this flag)",
    )
    g.add_argument(
        "--bias-bit", type=int, choices=(32,), default=32, help="biases are 32-bit integers (0 crashed in the original)"
    )
    g.add_argument(
        "--fixed-point-quantization",
        action="store_true",
        help="also evaluate the float simulation of quantization; the integer graph is evaluated in any case",
    )
    g.add_argument(
        "--resume-quantize",
        action="store_true",
        help="accepted with --resume: checkpoints made here always restore their quantizers",
    )
    for name, default in (("world-size", 1), ("rank", 0)):
        g.add_argument(
            f"--{name}", type=int, default=default, help="training runs in one process; other values are refused"
        )


def check(args: argparse.Namespace) -> None:
    """Cross-checks that argparse cannot make; fills in defaults that depend on other flags.  Raises UserError."""
    if args.world_size not in (-1, 1) or args.rank not in (-1, 0):
        raise UserError(
            f"--world-size {args.world_size} --rank {args.rank}: training runs in one process on one device; leave both flags out"
        )
    if args.resume_quantize and args.resume is None:
        raise UserError("--resume-quantize needs --resume FILE to say which checkpoint")
    if args.data_percentage > 1:
        raise UserError(f"--data-percentage is {args.data_percentage}, expected a share of more than 0 and at most 1")
    if args.act_range_momentum != -1 and not 0 <= args.act_range_momentum < 1:
        raise UserError(f"--act-range-momentum is {args.act_range_momentum}, expected -1 or 0 to 1")
    if args.data is None and (args.arch in (None, DIGITS)):
        args.data = DIGITS
    if args.data is None and not args.summary:
        raise UserError(
            f"--data is missing: give the folder with the images for {args.arch} (train/ and val/, or CIFAR-10's), or leave out -a for the embedded digits"
        )
    if args.arch is None:
        args.arch = DIGITS if args.data == DIGITS else "resnet18"
    fresh_digits = args.data == DIGITS and args.weights is None and args.resume is None
    if args.epochs is None:
        args.epochs = 5 if args.data == DIGITS else 90
    if args.float_epochs is None:
        args.float_epochs = 15 if fresh_digits and not args.evaluate else 0
    if args.device is None:
        args.device = f"cuda:{args.gpu}" if args.gpu is not None else ""
    if args.save_path is None:
        args.save_path = (
            Path("runs")
            / f"{args.arch.replace('/', '_')}_{Path(args.quant_scheme).stem if args.quant_scheme.endswith(('.yaml', '.yml')) else args.quant_scheme}"
        )
