"""``python -m zoo train``: trains our own entries by ``recipes.yaml``, each a run of ``quant_train.py``.

A run that was interrupted goes on where it stopped when the command is given again; a finished one is not repeated.
"""

import argparse
from pathlib import Path

from utils.errors import EXIT_INTERRUPTED, UserError
from utils.tables import plain_table
from zoo.recipes import FULL, SHORT, Recipe, find, load, profile_text
from zoo.record import record
from zoo.runs import Runs, quant_train, top1

EXAMPLES = """examples:
  python -m zoo train digits_w4a4                                 the float network first, seconds, no files needed
  python -m zoo train resnet20_cifar10_w4a4 --data CIFAR          continues what was interrupted
  python -m zoo train --all --data CIFAR --record                 everything, and into zoo/entries and the manifest
"""
DEFAULT_FOLDER = Path("runs/zoo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m zoo train``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries of zoo/recipes.yaml")
    parser.add_argument("--all", action="store_true", help="every entry, with its control")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ of CIFAR-10 (digits need none)")
    profiles = "; ".join(f"{name} {profile_text(name)}" for name in (SHORT, FULL))
    parser.add_argument("--profile", choices=(SHORT, FULL), default=SHORT, help=f"{profiles} (default: {SHORT})")
    parser.add_argument(
        "--save-path", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help=f"of all runs (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument(
        "--record", action="store_true", help="train the float control too, copy into zoo/entries, write the manifest"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or that of the run that failed or was interrupted.  Raises UserError.

    args: parsed with the flags of :func:`add_arguments`.
    """
    entries = _chosen(args)
    location = None if args.data is None else str(Path(args.data).absolute())
    runs = Runs(args.save_path.absolute(), args.profile, location)
    plan = planned(runs, entries, controls=args.record or args.all)
    for recipe in plan:
        runs.images(recipe)
    for number, recipe in enumerate(plan, 1):
        code = _train(runs, recipe, f"{number} of {len(plan)}")
        if code:
            return code
    if args.record:
        for recipe in entries:
            entry = record(runs, recipe)
            print(f"recorded {entry.name}: top-1 {entry.top1:.2f} on {entry.images} images, {entry.bytes:,} bytes")
    print(plain_table([_row(runs, recipe) for recipe in plan]))
    return 0


def _chosen(args: argparse.Namespace) -> list[Recipe]:
    if args.all == bool(args.names):
        raise UserError("give names of entries or --all; python -m zoo list shows the names")
    chosen = [find(name) for name in args.names] if args.names else [r for r in load().values() if r.is_entry]
    wrong = [recipe.name for recipe in chosen if args.record and not recipe.is_entry]
    if wrong:
        raise UserError(f"{wrong[0]} is a control, which is no entry of its own; leave out --record")
    return chosen


def planned(runs: Runs, entries: list[Recipe], *, controls: bool) -> list[Recipe]:
    """What has to be trained, in order: what an entry starts from (unless its weights are there), it, its control."""
    plan: dict[str, Recipe] = {}
    for recipe in entries:
        if recipe.start is not None and runs.weights(start := find(recipe.start)) is None:
            plan[start.name] = start
        plan[recipe.name] = recipe
        if recipe.control is not None and controls:
            plan[recipe.control] = find(recipe.control)
    return list(plan.values())


def _train(runs: Runs, recipe: Recipe, position: str) -> int:
    """One run, or what is left of it."""
    runs.check_flags(recipe)
    if runs.report(recipe) is not None:
        print(f"== {recipe.name} ({position}): trained already in {runs.of(recipe)}", flush=True)
        return 0
    print(f"== {recipe.name} ({position})", flush=True)
    code = quant_train(runs.arguments(recipe))
    if code == EXIT_INTERRUPTED:
        print("the same command goes on from there", flush=True)
    return code


def _row(runs: Runs, recipe: Recipe) -> dict[str, str]:
    report = runs.report(recipe)
    assert report is not None
    control = runs.report(find(recipe.control)) if recipe.control else None
    return {
        "run": recipe.name,
        "top-1 %": f"{top1(recipe, report):.2f}",
        "control %": f"{top1(find(str(recipe.control)), control):.2f}" if control else "-",
        "images": str(report["images"]),
        "size MiB": f"{report['size_mib']:.3f}",
        "GBOPS": f"{report['bops_g']:.3f}",
    }
