"""Command line of ``quant_train.py`` as a table: the original's flags under their names, and ours."""

import argparse
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError
from utils.flag_kinds import (
    ANY,
    COUNT,
    COUNT0,
    FILE,
    FOLDER,
    NAME,
    PERCENTILE,
    REAL,
    REAL0,
    REALS,
    SIGNED,
    SWITCH,
    YES_NO,
    Kind,
    Row,
    number,
    one_of,
)
from utils.quantization_utils.backends import BACKENDS, DEFAULT
from utils.quantization_utils.calibrators import METHODS
from utils.quantization_utils.training import ACT_RANGES
from utils.search_flags import SEARCH_FLAGS

EXAMPLES = """examples:
  python quant_train.py
      digits: trains a float network, quantizes, trains, converts and evaluates it; seconds, no files needed
  python quant_train.py -a resnet50 --quant-scheme bops_0.5 --summary
      the layers, their bits and what they cost
  python quant_train.py -a mobilenetv2_w1 --weights w.pth --data IMAGENET --quant-scheme uniform8 --epochs 0
      quantize by calibration alone
  python quant_train.py -a mobilenetv2_w1 --weights W --data DIR --quant-scheme w4a8 --ptq mse+balance+affine+descent
      the same with rounding by least squares; the worst layers are named and drawn
  python quant_train.py -a resnet18 --pretrained --data IMAGENET --quant-scheme uniform4 --epochs 5 --lr 0.001
      quantization-aware training
  python quant_train.py --data IMAGENET --resume RUN/checkpoint.pth.tar -e
      evaluate the integer network of a checkpoint; without -e: continue its training; with --engine tvm: evaluate it
      compiled for this CPU
  python quant_train.py -a resnet20_cifar10 --weights w.pth --data CIFAR --search bops=0.5,size=0.6 --save-scheme s.yaml
      choose every layer's bits under both budgets; s.yaml then goes into --quant-scheme
  python quant_train.py --explain RUN
      which layers do the damage, what is sick, what would help

files of a run in --save-path:
  checkpoint.pth.tar  all that --resume needs          model_best.pth.tar  the same at the best validation
  model.safetensors   integer graph of the last state  scheme.yaml         bits of every layer, for --quant-scheme
  arguments.json      flags, command, commit           log.log             what was printed, of all runs there
  sqnr.png            noise of every layer, with --ptq
  explain.txt, .html  what --explain found
  sensitivity.json, search.csv, pareto.csv, pareto.png  what --search found
"""


TORCH, TVM = "torch", "tvm"
MSE, FLOAT = "mse", "float"
QUICK, PUBLISHED = "quick", "published"

# fmt: off
FLAGS: dict[str, tuple[Row, ...]] = {
    "network": (
        ("-a --arch", NAME, None,
         "PyTorchCV name, torchvision name (or torchvision/NAME), or 'digits' (default: the checkpoint's with "
         "--resume, digits without --data, else resnet18)"),
        ("--weights", FILE, None, "float state_dict, or checkpoint of any run, to start from"),
        ("--pretrained", SWITCH, False,
         "start from published weights (downloaded once; offline, the answer names the file to place by hand)"),
        ("--zoo", NAME, None,
         "entry of the zoo (python -m zoo list), downloaded where needed: -e evaluates it, without -e training starts "
         "from it; brings its architecture and scheme"),
        ("--zoo-dir", FOLDER, None, "where --zoo keeps downloads (default: $HAWQ_ZOO_DIR, else ~/.cache/hawq-zoo)"),
        ("--num-classes", COUNT, None, "classes of the network (default: the architecture's)"),
    ),
    "data": (
        ("--data", Kind(str, "DIR"), None,
         "folder with train/ and val/ (one folder a class), torchvision's CIFAR-10 or CIFAR-100 folder, or 'digits'; "
         "-e and --epochs 0 need only val/ (then also calibrated on, which is said)"),
        ("-b --batch-size", COUNT, 128, "images per batch; the original's was 1"),
        ("-j --workers", COUNT0, 4, "processes that decode images, at most one per core"),
        ("--data-percentage", REAL, 1.0,
         "share of the training images to use, 0 to 1; the same images for the same --seed (in the original: others "
         "in every run)"),
        ("--mean", REALS, None,
         "mean of the input normalisation, one value or one per channel (default: the architecture's)"),
        ("--std", REALS, None, "its standard deviation (default: the architecture's)"),
        ("--resize", Kind(number(int, zero=True), "N"), None, "shortest edge before the crop, 0 for none"),
        ("--input-size --crop", COUNT, None, "edge of the centre crop, which is the network's input"),
        ("--rotate180", SWITCH, False, "turn images upside down (for weights made for such images)"),
    ),
    "quantization": (
        ("--quant-scheme", Kind(str, "SCHEME"), None,
         "a published scheme (bops_0.5, ...), uniformN or wXaY with 2 to 8 bits, a YAML file, or 'float' for no "
         "quantization (default: the checkpoint's with --resume, else uniform8; the original's was uniform4)"),
        ("--summary", SWITCH, False, "print every layer's bits with reason, size and BOPS, then stop"),
        ("--calibration", one_of(*METHODS), MSE, "how activation ranges are found before training"),
        ("--ptq", NAME, None,
         "post-training quantization, parts joined by +: a calibrator of --calibration (mse and ema_mse are for "
         "weights too; W/A names both, such as mse/ema_quantile), any of equalize, balance, affine, bias, and one of "
         "descent, adaround and block; implies --epochs 0"),
        ("--ptq-backend", one_of(*BACKENDS), DEFAULT,
         "whose quantization --ptq does: hawq is the integer graph, the others are simulated in float and evaluated, "
         "without integer graph and checkpoint"),
        ("--ptq-setting", one_of(QUICK, PUBLISHED), QUICK,
         "how long adaround and block learn: quick suits a CPU, published takes 10,000 steps a layer or 20,000 a "
         "block"),
        ("--mse-power", REAL, None,
         "p of the mse calibrators' mean |error| to the p (default: 2, and 2.4 with descent, adaround or block)"),
        ("--calib-images", COUNT, 512, "images of the fixed calibration subset"),
        ("--calib-percentile", PERCENTILE, 99.99, "percentile of --calibration percentile"),
        ("--act-range", one_of(*ACT_RANGES), None,
         "ranges in training: lsq learns the scales of activations and weights, ema follows the batches as the "
         "original does (default: as before with --resume, else lsq; ema where one of the three flags below is given)"),
        ("--act-range-momentum", Kind(float, "M"), None,
         "weight of the old range in the moving average, 0.9 to 0.99; -1 keeps running extremes (default: -1)"),
        ("--act-percentile", PERCENTILE, 0.0, "range of a training batch: this percentile, 0 for its extremes"),
        ("--weight-percentile", PERCENTILE, 0.0,
         "the same for weight ranges (the original ignored it for unfolded BatchNorm and linear layers)"),
        ("--channel-wise", YES_NO, True,
         "one weight scale per output channel (in the original, giving the flag switched this off)"),
        ("--strict-integer", SWITCH, False, "refuse networks in which an operator stays in float"),
        ("--agreement-images", COUNT, 256, "images on which simulation and integer graph are compared"),
    ),
    "search of bit widths": SEARCH_FLAGS,
    "training": (
        ("--epochs", COUNT0, None,
         "epochs of quantization-aware training in all; 0 calibrates, converts, evaluates and saves (default: 90; 5 "
         "for the digits)"),
        ("--float-epochs", COUNT0, None,
         "train the float network first, with a cosine from --float-lr; not saved on the way, so for long training "
         "rather run --quant-scheme float and give its checkpoint to --weights (default: 0; 15 for the digits without "
         "--weights)"),
        ("--float-lr", REAL, 0.1, "learning rate of --float-epochs"),
        ("--start-epoch", COUNT0, None, "epoch to start with, also on resume (the original ignored it there)"),
        ("--lr --learning-rate", REAL, 0.01, "learning rate; the original's 0.1 is for training from scratch"),
        ("--momentum", REAL0, 0.9, "of SGD"),
        ("--wd --weight-decay", REAL0, 1e-4, "weight decay, not applied to learned scales"),
        ("--lr-schedule", one_of("step", "cosine"), "step", "times 0.1 every 30 epochs, or half a cosine to 0"),
        ("--warmup-epochs", REAL0, 0.0, "epochs (may be a fraction) in which the rate rises linearly from 0"),
        ("--accumulate", COUNT, 1, "add up the gradients of N batches per step"),
        ("--fix-BN", SWITCH, False, "train with BatchNorms folded under their running statistics"),
        ("--fix-BN-threshold", COUNT, None,
         "fold BatchNorms from the N-th training batch on, counted across resumes (not in the original)"),
        ("--reestimate-bn", COUNT0, 0,
         "re-estimate BatchNorm statistics on N training batches after the last epoch"),
        ("--evaluate-times", ANY, 1, "validations per epoch (in the original: more of them, with distillation only)"),
        ("--checkpoint-iter", ANY, -1, "save every N batches besides every epoch (did nothing in the original)"),
    ),
    "distillation": (
        ("--distill-method", one_of("None", "KD_naive"), "None", "learn from a float teacher's softened outputs"),
        ("--teacher-arch", NAME, "resnet101",
         "the teacher; give the student's own --arch to learn from its float self"),
        ("--teacher-weights", FILE, None, "its float state_dict; without it the published weights are used"),
        ("--distill-alpha", SIGNED, 0.95,
         "weight of the teacher's term, 0 to 1; the KL divergence is a mean over the batch, not over classes as in "
         "the original"),
        ("--temperature", Kind(float, "T"), 6.0, "softening"),
    ),
    "running": (
        ("-e --evaluate", SWITCH, False,
         "evaluate the integer graph only: the checkpoint of --resume, or a fresh calibration"),
        ("--explain", Kind(Path, "RUN"), None,
         "examine a finished run (folder or checkpoint) on --calib-images validation images: damage, cost and time of "
         "every layer, what is sick and what would help; writes explain.txt and explain.html into its folder"),
        ("--layer-latency", FILE, None,
         "measured layer latencies (python -m tvm_benchmark.layer_latency), for --explain and a latency budget of "
         "--search (also the original's tables as JSON; default: the file of this machine)"),
        ("--engine", one_of(TORCH, TVM), TORCH,
         "what runs the integer graph with -e: tvm compiles it for this CPU (kept in the save folder, see docs/tvm.md) "
         "and demands the logits of torch on --agreement-images images"),
        ("--resume", FILE, None,
         "checkpoint to continue bit for bit, or to start training from (after --epochs 0); brings its architecture, "
         "scheme, weights and quantizers; a missing file is an error (the original went on with random weights); with "
         "-e also an integer graph (model.safetensors); of a file of the original, training starts from its float "
         "weights, with ranges calibrated anew"),
        ("--save-path", FOLDER, None,
         "folder of the run's files (default: that of --resume, else runs/ARCH_SCHEME; the original put it in front of "
         "the file names)"),
        ("--report", FILE, None, "write everything measured as JSON"),
        ("--tensorboard", SWITCH, False, "write curves into the save folder for TensorBoard"),
        ("--device", NAME, "", "cpu, cuda or cuda:N (default: cuda if there is one)"),
        ("--gpu", COUNT0, None, "the same as --device cuda:N"),
        ("--threads", COUNT, None, "CPU threads (default: torch's own choice; on resume as many as before)"),
        ("--seed", ANY, 0, "of initialisation, order, augmentation and subsets (the original had none)"),
        ("-p --print-freq", COUNT, 10, "batches between updates of the progress bar's figures"),
    ),
    "flags of the original with one sensible value": (
        ("--quant-mode", one_of("symmetric"), "symmetric",
         "the sign of an activation follows from the graph here, scales are symmetric (the original ignored this)"),
        ("--bias-bit", one_of(32), 32, "biases are 32-bit integers (0 crashed in the original)"),
        ("--fixed-point-quantization", SWITCH, False,
         "also evaluate the float simulation of quantization; the integer graph is evaluated in any case"),
        ("--resume-quantize", SWITCH, False,
         "with --resume of a file of the original: -e evaluates its own integers with its arithmetic, training takes "
         "its scheme and epoch too; checkpoints made here always restore their quantizers"),
        ("--world-size", ANY, 1, "training runs in one process; more are refused"),
        ("--rank", ANY, 0, "accepted as 0"),
        ("--dist-url", Kind(str, "URL"), None, "accepted, has no effect"),
        ("--dist-backend", NAME, None, "accepted, has no effect"),
        ("--multiprocessing-distributed", SWITCH, False, "accepted with at most one GPU, where it has no effect"),
    ),
}
# fmt: on

# What a resumed run takes from its file instead, and what other flags already say.
NOT_RESUMED = (
    *("weights", "pretrained", "ptq", "zoo", "zoo_dir", "float_epochs", "start_epoch", "gpu", "resume", "arch"),
    "quant_scheme",
)


class Parser(argparse.ArgumentParser):
    """Answers mistakes with one sentence, not with the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser; see ``--help``. Its ``parse_args`` raises UserError."""
    parser = Parser(
        prog="quant_train.py",
        description="Quantize a float CNN to mixed precision, train it quantization-aware, convert it to one integer "
        "graph and evaluate that.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for names, kind, default, text in rows:
            shown = default not in (None, False, -1, "") and "action" not in dict(kind.options)
            group.add_argument(
                *names.split(),
                dest=_attribute(names),
                default=default,
                help=text + (" (default: %(default)s)" if shown else ""),
                **_arguments(kind),
            )
    return parser


def _arguments(kind: Kind) -> dict[str, Any]:
    options = dict(kind.options)
    if "action" in options:
        return options
    return {"type": kind.parse, **options} | ({"choices": kind.choices} if kind.choices else {"metavar": kind.metavar})


def _attribute(names: str) -> str:
    return _long_name(names).removeprefix("--").replace("-", "_").lower()


def _long_name(names: str) -> str:
    return next(name for name in names.split() if name.startswith("--"))


def resume_command(args: argparse.Namespace, script: Path, checkpoint: Path) -> str:
    """The complete command line that continues a run from ``checkpoint``, quoted for a shell.

    args: parsed and filled in.  script: path of quant_train.py.
    """
    words = ["python", os.path.relpath(script), "--resume", str(checkpoint)]
    for names, kind, default, _ in (row for rows in FLAGS.values() for row in rows):
        key = _attribute(names)
        if key not in NOT_RESUMED and vars(args)[key] != default:
            words += _flag_words(_long_name(names), kind, vars(args)[key])
    return shlex.join(words)


def _flag_words(name: str, kind: Kind, value: Any) -> Iterator[str]:
    if kind is YES_NO and value is False:
        yield name.replace("--", "--no-", 1)
        return
    yield name
    if "action" not in dict(kind.options):
        yield from (str(v) for v in (value if isinstance(value, list) else [value]))
