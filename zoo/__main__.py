"""python -m zoo: models that were published or trained here; lists, downloads, verifies, trains and compares them."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from utils.errors import UserError, command_line
from utils.provenance import write_csv
from zoo import listing, manifest, store, table, train
from zoo.manifest import Own, Published
from zoo.verify import verify

EXIT_DIFFERS = 1
EPILOG = """\
Published entries are checkpoints of the original HAWQ on Google Drive; their figures are as published, not measured
here.  Own entries are in this repository; their figures were measured, on the machine and commit that list names.

examples:
  python -m zoo list --arch resnet50 --max-size 20
  python -m zoo download resnet50_bops0.5
  python -m zoo verify resnet50_bops0.5 --data IMAGENET
  python -m zoo verify runs/mine/model.safetensors --scheme uniform4
  python -m zoo table --markdown
  python quant_train.py --zoo resnet50_bops0.5 -e --data IMAGENET

exit status: 0 done (verify: nothing differs), 1 verify found a difference, 2 the input cannot be used, 130 stopped."""
VERIFY_EPILOG = """\
A file may be an integer graph or training checkpoint of this program, a checkpoint or quantized_checkpoint of the
original HAWQ, or float weights.  Code in a file is never run.

examples:
  python -m zoo verify digits_w4a4 --data digits
  python -m zoo verify checkpoint.pth.tar --arch resnet18 --scheme bops_0.5"""


class _Parser(argparse.ArgumentParser):
    """Answers mistakes with one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _list(args: argparse.Namespace) -> int:
    kind = Own if args.own else Published if args.published else None
    entries = listing.select(manifest.load(), arch=args.arch, max_size=args.max_size, kind=kind)
    print(listing.listing(entries, manifest.read(manifest.MANIFEST).notes))
    if args.output:
        write_csv(args.output, [listing.line(entry) for entry in entries])
    return 0


def _download(args: argparse.Namespace) -> int:
    zoo_dir = args.zoo_dir or store.default_folder()
    done = store.obtain(manifest.find(args.name), zoo_dir, force=args.force)
    print(done.checkpoint)
    if done.record is None:
        print("in this repository, nothing to download; its sha256 is the recorded one")
        return 0
    state = "already here" if not done.new else f"from {done.by_hand}" if done.by_hand else "downloaded"
    print(f"{state}, archive of {done.record.bytes:,} bytes, sha256 {done.record.sha256}")
    if done.first:
        print("no sha256 was known: this one is trusted and recorded, later downloads must have it")
    if done.twins:
        print(f"note: the archive of {', '.join(done.twins)} is the same file, so at least one name is wrong")
    return 0


def _verify(args: argparse.Namespace) -> int:
    ok = True
    zoo_dir = args.zoo_dir or store.default_folder()
    for check in verify(args.target, zoo_dir, data=args.data, scheme=args.scheme, arch=args.arch):
        print(check, flush=True)
        ok = ok and check.ok is not False
    return 0 if ok else EXIT_DIFFERS


def _table(args: argparse.Namespace) -> int:
    content = manifest.read(manifest.MANIFEST)
    rows = table.compute(content.published)
    if args.output:
        table.save(rows, args.output)
    print(table.text(rows, content.notes.source, args.markdown))
    return 0


def _mebibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of MiB")
    return value


_mebibytes.__name__ = "number of MiB"  # argparse's "invalid ... value"


def _zoo_dir(parser: argparse.ArgumentParser) -> None:
    shown = f"cache folder (default: ${store.VARIABLE}, else {store.FOLDER})"
    parser.add_argument("--zoo-dir", type=Path, metavar="DIR", help=shown)


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    description = __doc__.split(": ", 1)[1]
    parser = _Parser(prog="python -m zoo", description=description, epilog=EPILOG, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="list | download | verify | table | train")

    def command(name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=layout)
        sub.set_defaults(function=function)
        return sub

    shown = command("list", _list, "show the entries and say which figures are published and which measured")
    shown.add_argument("--arch", metavar="A", help="of this architecture only")
    shown.add_argument("--max-size", type=_mebibytes, metavar="MIB", help="of at most this size")
    group = shown.add_mutually_exclusive_group()
    group.add_argument("--own", action="store_true", help="entries trained and measured here only")
    group.add_argument("--published", action="store_true", help="entries of the original only")
    shown.add_argument("--output", type=Path, metavar="CSV", help="also write it here, with provenance")

    download = command(
        "download", _download, "get an entry into the cache folder and print the file to give to --resume"
    )
    download.add_argument("name", metavar="NAME", help="of the list")
    download.add_argument("--force", action="store_true", help="download again; the content must be the recorded one")
    _zoo_dir(download)

    checked = command("verify", _verify, "say what a file is; check its format, hash, bits and, with --data, accuracy")
    checked.epilog = VERIFY_EPILOG
    checked.add_argument("target", metavar="FILE_or_NAME", help="a file, or an entry that is here already")
    checked.add_argument("--data", metavar="DIR", help="evaluate on these images (val/) and compare with the manifest")
    checked.add_argument("--scheme", metavar="S", help="the scheme it must have (default: the entry's, or its own)")
    checked.add_argument("--arch", metavar="A", help="the network it must be of (default: the entry's, or its own)")
    _zoo_dir(checked)

    compared = command("table", _table, "compare the published sizes and BOPS with ours and say why cells differ")
    compared.add_argument("--markdown", action="store_true", help="print it as Markdown")
    compared.add_argument("--output", type=Path, metavar="CSV", help="also write it here, with provenance")

    train.add_arguments(command("train", train.run, "train entries of our own, or go on with what was interrupted"))
    return parser


@command_line("stopped; the same command goes on from there")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    return int(args.function(args))


if __name__ == "__main__":
    sys.exit(main())
