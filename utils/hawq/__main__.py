"""Convert a file of the original HAWQ into an integer graph that every engine runs.

    python -m utils.hawq checkpoint.pth.tar -o model.safetensors [-a ARCH] [--quant-scheme SCHEME]

Needs no images.  Then evaluate it (quant_train.py --resume model.safetensors -e) or compile it (tvm_benchmark.compile).
"""

import argparse
import sys
from pathlib import Path

from utils.errors import UserError, command_line
from utils.flag_kinds import percentile
from utils.graph_evaluation import SUFFIX
from utils.hawq.arithmetic import Options
from utils.hawq.files import read_hawq
from utils.hawq.graph import integer_graph
from utils.integer_graph.serialize import save


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.hawq", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="checkpoint, model_best or quantized_checkpoint (.pth.tar)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="integer graph to write")
    parser.add_argument("-a", "--arch", metavar="NAME", help="default: what the file names")
    parser.add_argument("--quant-scheme", metavar="NAME", help="default: what the file's integers fit")
    parser.add_argument("--weight-percentile", type=percentile, default=0.0, metavar="P", help="as in its training")
    parser.add_argument("--no-channel-wise", action="store_true", help="one weight scale per layer, as in its training")
    args = parser.parse_args(argv)
    print(_convert(args))
    return 0


def _convert(args: argparse.Namespace) -> str:
    file = read_hawq(args.file)
    if file is None:
        raise UserError(f"{args.file} is no quantized network of the original HAWQ; give its checkpoint.pth.tar")
    if args.output.suffix != SUFFIX:
        raise UserError(f"the output {args.output} needs a name that ends in {SUFFIX}, by which graphs are known")
    options = Options(args.weight_percentile, not args.no_channel_wise)
    converted = integer_graph(file, args.arch, args.quant_scheme, options=options)
    save(converted.graph, args.output)
    return f"{args.output}: {converted.graph.meta['arch']}, {converted.graph.meta['scheme']}"


if __name__ == "__main__":
    sys.exit(main())
