"""python -m utils.quantization_utils.ptq_board: the published table of post-training quantization on your own data.

One row for each network, backend, width and calibrator: our accuracy, its drop from float and the published drop.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

import bit_config
from utils.atomic_file import write_text
from utils.errors import UserError, command_line
from utils.flag_kinds import ANY, COUNT, COUNT0, REALS, Kind
from utils.provenance import read_csv, write_csv
from utils.quantization_utils.backends import BACKENDS
from utils.quantization_utils.board_network import BoardNetwork, Measured, RowSettings
from utils.quantization_utils.ptq_recipe import parse_recipe
from utils.quantization_utils.published_ptq import combinations, networks, published, source
from utils.tables import markdown_table
from utils.train_flags import PUBLISHED, QUICK, Parser

EPILOG = """\
Rows that are finished in the CSV file are not run again with the same images, weights and settings; after Ctrl-C the
same command goes on.  The table is written as Markdown beside it.  Without --bits and --calibrators the published
combinations are run, for backends that the published table does not have those of academic.

Weights are looked for as DIR/ARCH.pth; rows without weights say so.  hawq is evaluated in integers, the others are
simulated.  Where the data have no train/, calibration takes validation images; top-1 and drop are then also given on
the others.

example:
  python -m utils.quantization_utils.ptq_board --data IMAGENET --archs resnet18 --weights-dir W --output board.csv

exit status: 0 done, 2 the input cannot be used, 130 interrupted"""
DEFAULT_BACKENDS = ("academic", "tensorrt", "hawq")
NONE = "-"


@dataclass(frozen=True)
class Case:
    """What a row is about; calibrator: a recipe as of ``--ptq``."""

    arch: str
    calibrator: str
    backend: str
    bits: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arch} {self.backend} {self.bits} {self.calibrator}"

    @property
    def file_name(self) -> str:
        """For files."""
        return self.name.replace(" ", "_").replace("/", "-")


Row = dict[str, str]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The rows asked for, in order.  Raises UserError for calibrators and widths that do not exist."""
    for text in args.calibrators or ():
        parse_recipe(text)
    for text in args.bits or ():
        bit_config.load_scheme(text, "")
    for arch, backend in product(args.archs, args.backends):
        known = combinations(backend)
        pairs = known
        if args.calibrators or args.bits:
            every = dict.fromkeys(calibrator for calibrator, _ in combinations("academic"))
            widths = args.bits or dict.fromkeys(bits for _, bits in known)
            pairs = [(calibrator, bits) for bits, calibrator in product(widths, args.calibrators or every)]
        yield from (Case(arch, calibrator, backend, bits) for calibrator, bits in pairs)


def row_of(case: Case, measured: Measured) -> Row:
    """A row of the table; what is not known is ``-``."""
    theirs = published(case.arch, case.backend, case.bits, case.calibrator)
    drop = None if theirs is None else theirs.float_top1 - theirs.top1
    return {
        **vars(case),
        "evaluated": measured.kind or NONE,
        "images": _shown(measured.images, 0),
        "top1_float": _shown(measured.top1_float),
        "top1": _shown(measured.top1),
        "drop": _shown(measured.drop),
        "published_drop": _shown(drop),
        "published_top1": _shown(None if theirs is None else theirs.top1),
        "images_unseen": _shown(measured.images_unseen, 0),
        "top1_unseen": _shown(measured.top1_unseen),
        "drop_unseen": _shown(measured.drop_unseen),
        "seconds": _shown(measured.seconds, 1),
        "note": measured.note or NONE,
        "settings": measured.settings or NONE,
    }


def _shown(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


class Board:
    """The rows so far, in a CSV file and as Markdown beside it.

    Rows of the file that were not asked for now are kept.  Raises UserError for a file that is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".md":
            raise UserError(
                f"--output {path} is the name of the Markdown file beside the CSV; give a name like board.csv"
            )
        old = read_csv(path)[1] if path.exists() else []
        columns = set(row_of(Case("", "", "", ""), Measured()))
        if any(set(row) != columns for row in old):
            raise UserError(f"{path} is not a table of this command; give another --output")
        self.rows = {Case(*(row[key] for key in Case.__dataclass_fields__)): row for row in old}

    def finished(self, case: Case, settings: str) -> bool:
        """Whether a row was measured with these settings, or with any where there are no weights now ("")."""
        row = self.rows.get(case)
        return row is not None and row["top1"] != NONE and settings in (row["settings"], "")

    def add(self, case: Case, measured: Measured) -> None:
        """Put a row in its place and write both files."""
        self.rows[case] = row_of(case, measured)
        write_csv(self.path, list(self.rows.values()))
        write_text(self.path.with_suffix(".md"), self.markdown() + "\n")

    def markdown(self) -> str:
        """The table for people, with the source of the published figures below."""
        hidden = ("settings",)
        shown = [{key: row[key] for key in row if key not in hidden} for row in self.rows.values()]
        return f"{markdown_table(shown)}\n\nPublished: {source()}." if shown else ""


def run(args: argparse.Namespace) -> None:
    """Measure every row that is not finished.  Raises UserError."""
    board, wanted = Board(args.output), list(dict.fromkeys(cases(args)))
    settings = RowSettings(
        data=args.data,
        weights_dir=args.weights_dir,
        images=args.calib_images,
        seed=args.seed,
        setting=args.ptq_setting,
        batch_size=args.batch_size,
        workers=args.workers,
        preprocess={key: vars(args)[key] for key in ("mean", "std", "resize", "input_size")},
        rotate180=args.rotate180,
    )
    found = {arch: BoardNetwork(arch, settings) for arch in dict.fromkeys(args.archs)}
    with tqdm(wanted, desc="rows", unit="row", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            network = found[case.arch]
            if board.finished(case, network.settings_text()):
                continue
            state = args.output.with_name(f"{args.output.stem}.{case.file_name}.rounding.pth.tar")
            board.add(case, network.measure(case.backend, case.bits, case.calibrator, state))
            tqdm.write(f"{case.name}: {_sentence(board.rows[case])}")
    print(board.markdown())


def _sentence(row: Row) -> str:
    if row["top1"] == NONE:
        return row["note"]
    return f"top-1 {row['top1']} ({row['evaluated']}), drop {row['drop']}, published drop {row['published_drop']}"


def build_parser() -> argparse.ArgumentParser:
    """The command line; its ``parse_args`` raises UserError."""
    parser = Parser(
        prog="python -m utils.quantization_utils.ptq_board",
        description=str(__doc__),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="images, as for quant_train.py")
    parser.add_argument(
        "--archs", default=networks(), nargs="+", metavar="NAME", help="networks (default: the table's)"
    )
    parser.add_argument("--backends", default=DEFAULT_BACKENDS, choices=tuple(BACKENDS), nargs="+", help="engines")
    parser.add_argument("--bits", metavar="wXaY", nargs="+", help="widths (default: the published ones)")
    parser.add_argument("--calibrators", nargs="+", metavar="NAME", help="as of --ptq (default: the published ones)")
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="folder with the float weights ARCH.pth")
    parser.add_argument("--output", type=Path, required=True, metavar="CSV", help="the table, kept after every row")
    _number(parser, "--calib-images", COUNT, 256, "images that calibrate")
    _number(parser, "--seed", ANY, 0, "of the choice of images and of learned rounding")
    _number(parser, "--batch-size", COUNT, 64, "images per batch")
    _number(parser, "--workers", COUNT0, 2, "processes that decode images")
    parser.add_argument("--ptq-setting", choices=(QUICK, PUBLISHED), default=QUICK, help="how long adaround learns")
    for flag in ("--mean", "--std"):
        parser.add_argument(flag, type=REALS.parse, nargs="+", metavar="X", help="of the input normalisation")
    for flag, kind in (("--resize", COUNT0), ("--input-size", COUNT)):
        parser.add_argument(flag, type=kind.parse, metavar="N", help="as for quant_train.py, for all networks")
    parser.add_argument("--rotate180", action="store_true", help="turn images upside down")
    return parser


def _number(parser: argparse.ArgumentParser, flag: str, kind: Kind, default: int, text: str) -> None:
    shown = f"{text} (default: %(default)s)"
    parser.add_argument(flag, type=kind.parse, metavar=kind.metavar, default=default, help=shown)


@command_line("stopped; finished rows are kept, the same command goes on")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    run(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
