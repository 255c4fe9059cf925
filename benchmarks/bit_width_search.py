"""How long the search of bit widths takes, and what it finds, on the original HAWQ's own tables.

    python -m benchmarks.bit_width_search --tables ilp_tables.json [--points 20] [--repeats 5]

For ResNet-18 and ResNet-50: each of the nine published budgets, the three kinds together, and a front.  Writes
``runs/bench/bit_width_search.csv``.  gain: damage of all layers at 4 bits less that of the solution; seconds: of the
solver, the median of the repeats (of the front: all its points together); slowest: of a single solve.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from utils.errors import command_line
from utils.provenance import write_csv
from utils.quantization_utils.bit_width_problem import Budget, Problem
from utils.quantization_utils.bit_width_search import pareto, solve
from utils.quantization_utils.ilp_tables import problem_of_tables
from utils.tables import plain_table

ARCHS = ("resnet18", "resnet50")
KINDS = ("size", "bops", "latency")
PARTS = (0.75, 0.5, 0.25)


def gain(problem: Problem, damage: float) -> float:
    """Damage of all layers at their lowest width, less another damage."""
    return sum(layer.options[0].damage for layer in problem.layers) - damage


def row(path: Path, arch: str, budgets: Sequence[Budget], repeats: int) -> dict[str, str]:
    """One budget or several joint ones: the solution and its time."""
    problem = problem_of_tables(path, arch, budgets)
    solutions = [solve(problem) for _ in range(repeats)]
    best = solutions[0]
    return {
        "arch": arch,
        "budgets": " ".join(f"{budget.kind}={budget.limit:g}" for budget in budgets),
        "gain": f"{gain(problem, best.damage):.5f}",
        "gap": f"{best.gap:g}",
        "layers_at_4": str(sum(bits == 4 for bits in best.bits.values())),
        "seconds": f"{statistics.median(solution.seconds for solution in solutions):.4f}",
        "slowest": f"{max(solution.seconds for solution in solutions):.4f}",
    }


def front_row(path: Path, arch: str, points: int) -> dict[str, str]:
    """The whole front of damage against BOPS, with its total time."""
    problem = problem_of_tables(path, arch, [Budget("bops", 1, fraction=True)])
    started = time.perf_counter()
    front = pareto(problem, "bops", points)
    seconds = time.perf_counter() - started
    return {
        "arch": arch,
        "budgets": f"front of bops, {len(front)} points",
        "gain": "-",
        "gap": f"{max(solution.gap for solution in front):g}",
        "layers_at_4": "-",
        "seconds": f"{seconds:.4f}",
        "slowest": f"{max(solution.seconds for solution in front):.4f}",
    }


def measure(path: Path, points: int, repeats: int) -> list[dict[str, str]]:
    """Rows for single budgets, all three together, and the front.  Raises UserError for an unusable file."""
    rows = []
    for arch in ARCHS:
        rows += [row(path, arch, [Budget(kind, part, True)], repeats) for kind in KINDS for part in PARTS]
        rows += [row(path, arch, [Budget(kind, part, True) for kind in KINDS], repeats) for part in PARTS]
        rows.append(front_row(path, arch, points))
    return rows


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="JSON file of the original's search tables")
    parser.add_argument("--points", type=int, default=20, help="limits of the front")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/bit_width_search.csv"))
    args = parser.parse_args(argv)
    rows = measure(args.tables, args.points, args.repeats)
    write_csv(args.output, rows)
    print(plain_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
