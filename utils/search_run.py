"""``quant_train.py --search``: sensitivities, costs, the best bits under the budgets, and a scheme file of them."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from bit_config import Rule, save_scheme
from utils.data_utils import Loader, normalize
from utils.errors import Interrupted, UserError
from utils.experiment import Experiment
from utils.layer_latency import latency_path
from utils.plots import Front, plot_fronts
from utils.provenance import provenance, write_csv
from utils.quantization_utils.bit_width_problem import Budget, Problem
from utils.quantization_utils.bit_width_search import (
    Solution,
    pareto,
    prices,
    require_feasible,
    shown,
    solve,
)
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.cost_model import LayerBits
from utils.quantization_utils.ilp_tables import damage_of_tables, is_tables
from utils.quantization_utils.layer_costs import Damage, Latency, build_problem, fixed_layers, read_latency
from utils.quantization_utils.sensitivity import METRICS, Sensitivities, Settings, measure
from utils.run_data import DataFlags, inputs, load_data
from utils.run_log import log, log_to
from utils.search_flags import parse_budgets, parse_fixes, parse_widths
from utils.search_report import Search, format_search, front_rows, layer_table

SENSITIVITY, STATE = "sensitivity.json", "sensitivity_state.pth.tar"
SCHEME, LAYERS, FRONT, PICTURE, LOG = "searched.yaml", "search.csv", "pareto.csv", "pareto.png", "log.log"
LABELS = {
    "size": "size of the weights, MiB",
    "bops": "bit operations of one image, 1e9",
    "latency": "latency of the layers, ms",
    "mean_bits": "mean bits of the weights",
}


class _Request:
    """What the flags ask for, with the costs of this network.  Raises UserError as the parsers do."""

    def __init__(self, args: argparse.Namespace, experiment: Experiment) -> None:
        if args.search_metric not in METRICS:
            raise UserError(f"--search-metric is {args.search_metric!r}, expected one of {', '.join(METRICS)}")
        self.experiment, self.allow = experiment, args.allow_useless_bits
        self.budgets: tuple[Budget, ...] = parse_budgets(args.search)
        self.widths = parse_widths(args.search_bits)
        rules: tuple[Rule, ...] = parse_fixes(args.search_fix or ())
        fixed = fixed_layers(experiment.layers, rules)
        self.fixed = {name: bits for name, (bits, _) in fixed.items()}
        self.reasons = {name: reason for name, (_, reason) in fixed.items()}
        self.latency = _latency(args, experiment) if _needs_latency(args, self.budgets) else None

    def problem(self, damage: Damage) -> Problem:
        return build_problem(
            self.experiment.layers,
            damage,
            self.widths,
            self.budgets,
            fixed=self.fixed,
            latency=self.latency,
            allow_useless_bits=self.allow,
        )

    def check(self) -> None:
        """Raise UserError, before anything is measured, for budgets that no bits can keep."""
        bits = {*self.widths, *self.fixed.values()}
        require_feasible(self.problem({layer.name: dict.fromkeys(bits, 0.0) for layer in self.experiment.layers}))


def search(args: argparse.Namespace, experiment: Experiment) -> None:
    """Choose the bits of every layer, print them with reasons and prices, and write the files of the search.

    experiment: the network under any scheme of 8 bits, not calibrated.  Raises UserError for budgets that cannot be
    kept and for files that cannot be used, Interrupted where the measurement was stopped.
    """
    request = _Request(args, experiment)
    request.check()
    log_to(args.save_path / LOG)
    damage, damage_of = _damage(args, experiment, request.widths)
    problem = request.problem(damage)
    solution = solve(problem)
    found = Search(experiment.info.name, problem, solution, prices(problem), request.reasons, damage_of)
    log.info(format_search(found))
    write_csv(args.save_path / LAYERS, layer_table(found))
    if args.pareto is not None:
        _fronts(args, problem, solution)
    _save(args, experiment, found)


def _needs_latency(args: argparse.Namespace, budgets: Sequence[Budget]) -> bool:
    return args.layer_latency is not None or any(budget.kind == "latency" for budget in budgets)


def _latency(args: argparse.Namespace, experiment: Experiment) -> Latency:
    arch = experiment.info.name
    path: Path = args.layer_latency or latency_path(arch)
    if not path.exists() and args.layer_latency is None:
        raise UserError(
            f"a latency budget needs measured latencies: make them with python -m tvm_benchmark.layer_latency -a {arch}"
            ", or give a file to --layer-latency"
        )
    return read_latency(path, arch, experiment.layers)


def _damage(args: argparse.Namespace, experiment: Experiment, widths: Sequence[int]) -> tuple[Damage, str]:
    """The damage of every layer, and where it comes from in words."""
    path: Path | None = args.sensitivity
    if path is not None and is_tables(path):
        names = [layer.name for layer in experiment.layers]
        return damage_of_tables(path, experiment.info.name, names), "damage of the original's tables"
    found = _sensitivities(args, experiment, widths)
    return found.damage, f"damage by {found.metric} on {found.images} images"


def _sensitivities(args: argparse.Namespace, experiment: Experiment, widths: Sequence[int]) -> Sensitivities:
    """From the file the user gave, or measured now and saved."""
    arch = experiment.info.name
    if args.sensitivity is not None:
        loaded = Sensitivities.load(args.sensitivity)
        if loaded.arch != arch:
            raise UserError(
                f"{args.sensitivity} holds sensitivities of {loaded.arch}, not of {arch}; give another file"
            )
        return loaded
    flags = DataFlags(args.data, args.batch_size, args.workers, args.seed, args.data_percentage)
    classes = experiment.info.num_classes
    data = load_data(flags, experiment.preprocess, classes, train=False, calibration=args.search_images)
    assert data.calibration is not None
    if data.lacks_train:
        log.info("%s has no folder train/: measuring on validation images", args.data)
    if not (args.weights or args.pretrained):
        log.info("%s has random weights; --weights or --pretrained give others", arch)
    state = args.save_path / STATE
    try:
        measured = _measure(args, experiment, data.calibration, widths, state)
    except KeyboardInterrupt:
        kept = f"; what was measured is in {state}, the same command goes on" if state.exists() else ""
        raise Interrupted(f"stopped during the measurement{kept}") from None
    measured.save(args.save_path / SENSITIVITY)
    state.unlink(missing_ok=True)
    log.info("sensitivities are in %s", args.save_path / SENSITIVITY)
    return measured


def _measure(
    args: argparse.Namespace, experiment: Experiment, loader: Loader, widths: Sequence[int], state: Path
) -> Sensitivities:
    model, device = experiment.model, experiment.device
    batches = inputs(loader, len(loader), experiment.preprocess, device, "calibration")
    calibrate(model, batches, args.calibration, args.calib_percentile, args.mse_power or 2.0)
    log.info("measuring the damage of %d layers (%s)", len(experiment.layers), args.search_metric)
    settings = Settings(arch=experiment.info.name, seed=args.seed, calibration=args.calibration)
    return measure(model, _labelled(loader, experiment), args.search_metric, widths, settings, state)


def _labelled(loader: Loader, experiment: Experiment) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images with their labels, on the device."""
    for images, labels in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
        device = experiment.device
        yield normalize(images.to(device), experiment.preprocess), labels.to(device)


def _fronts(args: argparse.Namespace, problem: Problem, solution: Solution) -> None:
    """A front for each budget, the others kept; one table and one picture of all."""
    fronts = {budget.kind: pareto(problem, budget.kind, args.pareto) for budget in problem.budgets}
    write_csv(args.save_path / FRONT, front_rows(fronts))
    panels = [
        Front(LABELS[kind], [(s.use[kind], s.damage) for s in front], (solution.use[kind], solution.damage))
        for kind, front in fronts.items()
    ]
    plot_fronts(args.save_path / PICTURE, panels, f"{args.arch}: {args.search}")
    counts = ", ".join(f"{len(front)} points for {kind}" for kind, front in fronts.items())
    log.info("front: %s, in %s and %s", counts, args.save_path / FRONT, PICTURE)


def _save(args: argparse.Namespace, experiment: Experiment, found: Search) -> None:
    path: Path = args.save_scheme or args.save_path / SCHEME
    solution = found.solution
    bits = {name: LayerBits(width, width, "searched") for name, width in solution.bits.items()}
    comments = [
        f"searched for {args.search}: damage {solution.damage:.6g} ({found.damage_of}), gap {solution.gap:.2g}",
        ", ".join(f"{shown(kind, use)} of at most {limit:.6g}" for kind, use, limit in _uses(solution)),
        *(f"{key}: {value}" for key, value in provenance().items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_scheme(path, bits, name=path.stem, residual_bits=experiment.residual_bits, comments=comments)
    log.info("the scheme is in %s: python quant_train.py -a %s --quant-scheme %s ...", path, args.arch, path)


def _uses(solution: Solution) -> list[tuple[str, float, float]]:
    limits: Mapping[str, float] = solution.limits
    return [(kind, solution.use[kind], limit) for kind, limit in limits.items()]
