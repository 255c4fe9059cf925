"""What the search of bit widths is worth: searched schemes against random ones of the same cost, and uniform ones.

    python -m benchmarks.search_effect --weights FILE --data CIFAR [--steps 100] [--jobs 2] [--output FILE]

For each of three BOPS budgets (those of uniform 3 and 4 bit, and halfway between uniform 2 and 3 bit): the schemes
that the search finds by each metric, five random schemes that use 97 to 100 % of the budget, and the uniform scheme
where there is one.  All are trained alike, each with the same three seeds, and evaluated as integers.  Rows that the
output already has are kept.
A summary and a picture are written beside it.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bit_config import Rule, Scheme
from utils.data_utils import normalize
from utils.evaluation import evaluate
from utils.experiment import Experiment
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.plots import plot_runs
from utils.provenance import commit, read_csv, write_csv
from utils.quantization_utils.bit_width_problem import Budget, Group, groups_of
from utils.quantization_utils.bit_width_search import solve
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.layer_costs import build_problem, fixed_layers
from utils.quantization_utils.sensitivity import METRICS, TRACE, Sensitivities, Settings, measure
from utils.quantization_utils.training import configure
from utils.run_data import Data, DataFlags, inputs, load_data
from utils.trainer import Recipe, Trainer

ARCH, BATCH, TRAIN_IMAGES = "resnet20_cifar10", 128, 50000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (2, 3, 4, 6, 8)
BUDGETS = {"2.5 bit": (2, 3), "3 bit": (3,), "4 bit": (4,)}  # name -> uniform widths whose mean BOPS it is
RANDOM_SCHEMES, SEEDS, LEAST_USE = 5, (0, 1, 2), 0.97
SEARCHED, UNIFORM, RANDOM = "searched", "uniform", "random"


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    weights: Path
    data: str
    steps: int
    lr: float
    images: int
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One scheme under one budget.  bits: by layer, of weights and input.  damage: by the metric."""

    budget: str
    kind: str
    bits: Mapping[str, int]
    metric: str
    damage: float
    bops_g: float
    size_mib: float


def experiment(setting: Setting, scheme: str | Scheme) -> Experiment:
    """The network with the given weights under a scheme, not calibrated."""
    info = create_model(ARCH, None, False, setting.weights)
    return Experiment(info, info.preprocess.override(mean=MEAN, std=STD), scheme, torch.device("cpu"))


def images_of(setting: Setting, run: Experiment, seed: int, train: bool) -> Data:
    """Loaders of one run; training sees ``steps`` batches."""
    flags = DataFlags(setting.data, BATCH, 0, seed, setting.steps * BATCH / TRAIN_IMAGES)
    return load_data(flags, run.preprocess, run.info.num_classes, train=train, calibration=setting.images)


def searched(metric: str) -> str:
    """Kind of the schemes that are searched by a metric; the default one needs no name."""
    return SEARCHED if metric == TRACE else f"{SEARCHED} by {metric}"


def sensitivities(setting: Setting, metric: str) -> Sensitivities:
    """Damage of every layer at every width."""
    run = experiment(setting, "uniform8")
    loader = images_of(setting, run, seed=0, train=False).calibration
    assert loader is not None
    calibrate(run.model, inputs(loader, len(loader), run.preprocess, run.device, "calibration"))
    batches = [(normalize(images, run.preprocess), labels) for images, labels in loader]
    return measure(run.model, batches, metric, WIDTHS, Settings(arch=ARCH))


def cases(setting: Setting) -> Iterator[Case]:
    """All schemes to train."""
    run = experiment(setting, "uniform8")
    fixed = {name: bits for name, (bits, _) in fixed_layers(run.layers).items()}
    problems = {
        metric: build_problem(
            run.layers, sensitivities(setting, metric).damage, WIDTHS, (), fixed=fixed, allow_useless_bits=True
        )
        for metric in setting.metrics
    }
    groups_by = {metric: groups_of(problem)[0] for metric, problem in problems.items()}
    first, groups = next(iter(groups_by.items()))
    for number, (budget, widths) in enumerate(BUDGETS.items()):
        uniforms = [_uniform(groups, bits) for bits in widths]
        limit = statistics.mean(_sum(groups, choice, "bops") for choice in uniforms)
        for metric, free in problems.items():
            best = solve(replace(free, budgets=(Budget("bops", limit),))).bits
            choice = [group.bits.index(best[group.names[0]]) for group in groups]
            yield _case(budget, searched(metric), groups_by[metric], choice, metric)
        if len(widths) == 1:
            yield _case(budget, UNIFORM, groups, uniforms[0], first)
        for i in range(RANDOM_SCHEMES):
            choice = _random(groups, limit, np.random.default_rng([number, i]))
            yield _case(budget, f"{RANDOM} {i + 1}", groups, choice, first)


def _uniform(groups: Sequence[Group], bits: int) -> list[int]:
    return [group.bits.index(bits) if bits in group.bits else 0 for group in groups]


def _random(groups: Sequence[Group], limit: float, generator: np.random.Generator) -> list[int]:
    """Widths drawn evenly, then single ones drawn anew until the budget is used well."""
    choice = [int(generator.integers(len(group.bits))) for group in groups]
    while not LEAST_USE * limit <= (use := _sum(groups, choice, "bops")) <= limit:
        i = int(generator.integers(len(groups)))
        step = 1 if use < limit else -1
        choice[i] = min(max(choice[i] + step, 0), len(groups[i].bits) - 1)
    return choice


def _sum(groups: Sequence[Group], choice: Sequence[int], kind: str) -> float:
    return sum(group.costs[kind][i] for group, i in zip(groups, choice, strict=True))


def _case(budget: str, kind: str, groups: Sequence[Group], choice: Sequence[int], metric: str) -> Case:
    bits = {name: group.bits[i] for group, i in zip(groups, choice, strict=True) for name in group.names}
    damage = sum(group.damage[i] for group, i in zip(groups, choice, strict=True))
    return Case(budget, kind, bits, metric, damage, _sum(groups, choice, "bops"), _sum(groups, choice, "size"))


class _Quiet:
    """Hooks of a training that is only evaluated at its end."""

    def validate(self, epoch: float) -> None: ...

    def save(self) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...


def trained_top1(setting: Setting, bits: Mapping[str, int], seed: int) -> tuple[float, float]:
    """Top-1 of the integer graph, percent of all validation images, after calibration and after training."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rules = tuple(Rule(f"^{re.escape(name)}$", width) for name, width in bits.items())
    run = experiment(setting, Scheme("trained", rules, ends="free"))
    data = images_of(setting, run, seed, train=True)
    assert data.train is not None
    assert data.calibration is not None
    calibrate(run.model, inputs(data.calibration, len(data.calibration), run.preprocess, run.device, "calibration"))
    configure(run.model, act_range="lsq")
    before = _integer_top1(run, data)
    recipe = Recipe(epochs=1, lr=setting.lr, schedule="cosine")
    Trainer(run.model, data.train, run.preprocess, recipe, None).fit(_Quiet())
    return before, _integer_top1(run, data)


def _integer_top1(run: Experiment, data: Data) -> float:
    return evaluate(TorchEngine(run.convert(data.val.classes)), data.val, "integer graph").top1


def measure_all(setting: Setting, jobs: int, output: Path, most: int | None) -> list[dict[str, object]]:
    """Train what the output has no row of, at most ``most``, ``jobs`` at a time; the file is written after each."""
    old = read_csv(output)[1] if output.exists() else []
    rows: list[dict[str, object]] = [dict(row) for row in old]
    done = {(row["budget"], row["scheme"], str(row["seed"])) for row in old}
    if most == 0:
        return rows
    every = list(cases(setting))
    todo = [(c, seed) for seed in SEEDS for c in every if (c.budget, c.kind, str(seed)) not in done][:most]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(trained_top1, setting, case.bits, seed): (case, seed) for case, seed in todo}
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs", disable=None):
            case, seed = futures[future]
            before, after = future.result()
            rows.append(_row(setting, case, seed, before, after))
            write_csv(output, rows)
    return rows


def _row(setting: Setting, case: Case, seed: int, before: float, after: float) -> dict[str, object]:
    return {
        "budget": case.budget,
        "scheme": case.kind,
        "seed": seed,
        "top1_calibrated": round(before, 2),
        "top1": round(after, 2),
        "bops_g": round(case.bops_g, 4),
        "size_mib": round(case.size_mib, 4),
        "damage": f"{case.damage:.4g}",
        "metric": case.metric,
        "steps": setting.steps,
        "lr": setting.lr,
        "bits": " ".join(str(bits) for bits in case.bits.values()),
        "run_commit": commit(),
    }


def _kind(row: Mapping[str, object]) -> str:
    return RANDOM if str(row["scheme"]).startswith(RANDOM) else str(row["scheme"])


def _kinds(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Kinds of schemes that there are rows of, the searched ones first."""
    order = [*map(searched, METRICS), UNIFORM, RANDOM]
    return sorted({_kind(row) for row in rows}, key=order.index)


def _rows_of(rows: Sequence[Mapping[str, object]], budget: str, kind: str) -> list[Mapping[str, object]]:
    return [row for row in rows if row["budget"] == budget and _kind(row) == kind]


def summary(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """One row for each budget and kind of scheme: mean, spread over all runs, and the worst and best."""
    found = []
    for budget in BUDGETS:
        for kind in _kinds(rows):
            own = _rows_of(rows, budget, kind)
            if not own:
                continue
            top1 = [float(str(row["top1"])) for row in own]
            found.append(
                {
                    "budget": budget,
                    "schemes": kind,
                    "runs": len(own),
                    "top-1 mean": f"{statistics.mean(top1):.2f}",
                    "standard deviation": f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "",
                    "least": f"{min(top1):.2f}",
                    "most": f"{max(top1):.2f}",
                    "GBOPS": f"{statistics.mean(float(str(row['bops_g'])) for row in own):.3f}",
                    "MiB": f"{statistics.mean(float(str(row['size_mib'])) for row in own):.3f}",
                }
            )
    return found


def groups_of_runs(rows: Sequence[Mapping[str, object]]) -> dict[str, dict[str, list[list[float]]]]:
    """Budget -> kind of scheme -> top-1 of the runs of each of its schemes."""
    found: dict[str, dict[str, list[list[float]]]] = {budget: {} for budget in BUDGETS}
    for budget in BUDGETS:
        for kind in _kinds(rows):
            by_scheme: dict[object, list[float]] = {}
            for row in _rows_of(rows, budget, kind):
                by_scheme.setdefault(row["scheme"], []).append(float(str(row["top1"])))
            found[budget][kind] = list(by_scheme.values())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help=f"float state_dict of {ARCH}")
    parser.add_argument("--data", required=True, metavar="CIFAR", help="folder with train/ and val/")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help=f"of training, batches of {BATCH}")
    parser.add_argument("--lr", type=float, default=0.01, help="falls to 0 as a cosine")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="for calibration and sensitivities")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=[TRACE, "kl"], help="what is searched by")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one thread each")
    parser.add_argument("--runs", type=int, metavar="N", help="at most so many more (0: only the summary)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/search_effect.csv"), metavar="FILE")
    args = parser.parse_args()
    setting = Setting(args.weights, args.data, args.steps, args.lr, args.images, tuple(args.metrics))
    rows = measure_all(setting, args.jobs, args.output, args.runs)
    table = summary(rows)
    write_csv(args.output.with_name(f"{args.output.stem}_summary.csv"), table)
    plot_runs(args.output.with_suffix(".png"), groups_of_runs(rows), label="top-1 of the integer graph, %")
    for row in table:
        print("  ".join(str(value) for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
