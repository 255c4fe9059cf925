"""python -m utils.integer_graph: look into integer graphs, compare them, classify images with them."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.errors import command_line
from utils.integer_graph.diff import first_difference, first_value_difference, random_images, read_images
from utils.integer_graph.info import describe
from utils.integer_graph.predict import predict
from utils.integer_graph.serialize import load

EPILOG = """\
An integer graph is the file quant_train.py writes after conversion (model.safetensors): it holds integer weights,
biases, multipliers and tables, and nothing float between the pixels and the logits.

examples:
  python -m utils.integer_graph info runs/resnet18/model.safetensors
  python -m utils.integer_graph diff old/model.safetensors new/model.safetensors --images 8
  python -m utils.integer_graph predict model.safetensors cat.jpg dog.png --top 3

exit status: 0 done (diff: the graphs are equal), 1 diff found a difference, 2 the input cannot be used."""


def _info(args: argparse.Namespace) -> int:
    print(describe(args.file))
    return 0


def _diff(args: argparse.Namespace) -> int:
    a, b = load(args.a), load(args.b)
    structure = first_difference(a, b)
    images = random_images(a, args.images) if args.input is None else read_images(args.input)
    value = first_value_difference(a, b, images)
    print(f"structure: {structure or 'equal'}")
    print(f"values of {len(images)} images: {value or 'equal at every node both have, and the logits are equal'}")
    return 0 if structure is None and value is None else 1


def _predict(args: argparse.Namespace) -> int:
    results = predict(load(args.file), args.image, args.top)
    for path, classes in zip(args.image, results, strict=True):
        print(path)
        for name, share in classes:
            print(f"  {share:7.2%}  {name}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small, give at least 1")
    return value


_positive.__name__ = "positive integer"  # argparse's "invalid ... value"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m utils.integer_graph",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="info | diff | predict")

    def command(name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        return sub

    info = command("info", _info, "list operators, layers with their bits, and where the bytes of the file go")
    info.add_argument("file", type=Path, metavar="FILE", help="integer graph")
    diff = command("diff", _diff, "name the first node, and the first value, in which two graphs differ")
    diff.add_argument("a", type=Path, metavar="A", help="integer graph")
    diff.add_argument("b", type=Path, metavar="B", help="integer graph")
    inputs = diff.add_mutually_exclusive_group()
    inputs.add_argument("--images", type=_positive, default=2, metavar="N", help="random images to run (default 2)")
    inputs.add_argument("--input", type=Path, metavar="FILE.npy", help="images to run, uint8 [N, C, H, W]")
    guess = command("predict", _predict, "classify image files; prints the best classes and their softmax shares")
    guess.add_argument("file", type=Path, metavar="FILE", help="integer graph")
    guess.add_argument("image", type=Path, nargs="+", metavar="IMAGE", help="image file, RGB or grey")
    guess.add_argument("--top", type=_positive, default=5, metavar="K", help="classes to print (default 5)")
    return parser


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    return int(args.function(args))


if __name__ == "__main__":
    sys.exit(main())
