"""Which network families convert to integers: every classifier family of PyTorchCV and torchvision, one by one.

    python -m benchmarks.families [--families seresnet mobilenetv3 ...] [--all] [--limit N] [--scheme uniform8]

Takes a small network of each family with random weights, quantizes it, calibrates it on two random images, converts
it, and compares interpreter and torch engine on two others: every integer of every node, by equality.  Each network
runs in a process of its own.  Writes ``runs/bench/families.csv`` and prints the totals.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils.data_utils import normalize
from utils.errors import UserError
from utils.experiment import Experiment
from utils.integer_graph.interpreter import run
from utils.integer_graph.ir import Graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model, model_families
from utils.provenance import read_csv, write_csv
from utils.quantization_utils.calibrate import calibrate
from utils.random_networks import random_images, spread_statistics

# Families whose first registered network is not a small one.
SMALL = {
    "pytorchcv/darknet": ("darknet_tiny",),
    "pytorchcv/densenet_cifar": ("densenet40_k12_bc_cifar10",),
    "pytorchcv/efficientnet": ("efficientnet_b0", "efficientnet_b0b"),
    "pytorchcv/fdmobilenet": ("fdmobilenet_wd4",),
    "pytorchcv/igcv3": ("igcv3_wd4",),
    "pytorchcv/mnasnet": ("mnasnet_small",),
    "pytorchcv/mobilenet": ("mobilenet_wd4",),
    "pytorchcv/mobilenet_cub": ("mobilenet_wd4_cub",),
    "pytorchcv/mobilenetb": ("mobilenetb_wd4",),
    "pytorchcv/mobilenetv2": ("mobilenetv2_wd4", "mobilenetv2b_wd4"),
    "pytorchcv/mobilenetv3": ("mobilenetv3_small_w7d20", "mobilenetv3_large_w1"),
    "pytorchcv/regnet": ("regnetx002", "regnety002"),
    "pytorchcv/shufflenet": ("shufflenet_g3_wd4",),
    "pytorchcv/vgg": ("vgg11", "bn_vgg11b"),
    "pytorchcv/wrn1bit_cifar": ("wrn20_10_1bit_cifar10", "wrn20_10_32bit_cifar10"),
}
# torchvision keeps several architectures in one module; these are the families its documentation lists.
TORCHVISION = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "efficientnet_v2": "efficientnet_v2_s",
    "googlenet": "googlenet",
    "inception_v3": "inception_v3",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small",
    "regnet_x": "regnet_x_400mf",
    "regnet_y": "regnet_y_400mf",
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "shufflenet_v2": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_t",
    "swin_v2": "swin_v2_t",
    "vgg": "vgg11",
    "vit": "vit_b_32",
    "wide_resnet": "wide_resnet50_2",
}
IMAGES = 2
OUTCOMES = ("integers", "islands", "refused", "different", "crashed")


def representatives() -> list[tuple[str, str]]:
    """(family, network) of every family: PyTorchCV's in its own order, then torchvision's."""
    chosen = []
    for family, names in model_families().items():
        if family.startswith("pytorchcv/"):
            chosen += [(family, name) for name in SMALL.get(family, names[:1])]
    return chosen + [(f"torchvision/{family}", f"torchvision/{name}") for family, name in TORCHVISION.items()]


def everything() -> list[tuple[str, str]]:
    """(family, network) of every network; torchvision's families are its modules here."""
    return [(family, name) for family, names in model_families().items() for name in names]


def check(family: str, name: str, scheme: str) -> dict[str, Any]:
    """The row of one network; ``outcome`` is one of OUTCOMES and ``reason`` says why it is refused."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"family": family, "name": name, "captured": False, "converted": False, "equal": False}
    try:
        _check(row, name, scheme)
    except UserError as error:
        row |= {"outcome": "refused", "reason": str(error)}
    except Exception as error:  # one network must not stop the table; a crash is a result, and counted as one
        row |= {"outcome": "crashed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


COLUMNS = (
    *("family", "name", "outcome", "input_size", "parameters_m", "captured", "converted", "equal", "islands", "nodes"),
    *("integers", "different", "float_error", "simulation_error", "integer_error", "seconds", "reason"),
)


def _check(row: dict[str, Any], name: str, scheme: str) -> None:
    info = create_model(name)
    shape = info.preprocess.input_shape
    parameters = sum(p.numel() for p in info.module.parameters())
    row |= {"input_size": shape[1], "parameters_m": round(parameters / 1e6, 3)}
    calibration, test = (random_images(shape, IMAGES, seed) for seed in (1, 2))
    experiment = Experiment(info, info.preprocess, scheme, torch.device("cpu"))
    row["captured"] = True
    spread_statistics(info.module, normalize(calibration, info.preprocess))
    calibrate(experiment.model, [normalize(calibration, info.preprocess)])
    graph = experiment.convert(())
    row |= {"converted": True, "islands": len(graph.meta["islands"]), "nodes": len(graph.nodes)}
    row |= _errors(experiment, graph, test)
    row |= _compare(graph, test)
    row["outcome"] = "different" if not row["equal"] else "islands" if row["islands"] else "integers"


@torch.no_grad()
def _errors(experiment: Experiment, graph: Graph, images: torch.Tensor) -> dict[str, str]:
    """Greatest distance from the float network's logits, in their standard deviations.

    float_error: of the prepared network with quantization off; simulation_error: of fake quantization; integer_error:
    of the integer graph.  Random deep networks with batch norm amplify any noise by about 1.2 per layer, so the last
    two say little there; the first shows whether the prepared network computes the same function.
    """
    real = normalize(images, experiment.preprocess)
    simulated = experiment.model(real)
    experiment.model.enable(False)
    plain = experiment.model(real)
    expected = experiment.info.module(real)
    spread = max(float(expected.std()), 1e-30)
    found = {"float": plain, "simulation": simulated, "integer": TorchEngine(graph)(images)}
    return {f"{key}_error": f"{float((value - expected).abs().max()) / spread:.3g}" for key, value in found.items()}


def _compare(graph: Graph, images: torch.Tensor) -> dict[str, Any]:
    """How many integers of all nodes interpreter and torch engine disagree on, one image at a time."""
    total = different = 0
    engine = TorchEngine(graph)
    for image in images.split(1):
        expected = run(graph, image.numpy(), keep=True)
        got = engine.run(image)
        total += sum(values.size for values in expected.values())
        different += sum(int(np.count_nonzero(got[n].numpy() != values)) for n, values in expected.items())
    return {"integers": total, "different": different, "equal": different == 0}


def rows_of(cases: Sequence[tuple[str, str]], scheme: str) -> Iterable[dict[str, Any]]:
    """One row for each case, each made in a fresh process; one that dies (of memory, say) is a crash."""
    for family, name in tqdm(cases, unit="network", disable=None):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                yield pool.submit(check, family, name, scheme).result()
            except BrokenProcessPool:
                died = {"family": family, "name": name, "outcome": "crashed", "reason": "the process died"}
                yield dict.fromkeys(COLUMNS, "") | died


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Families by their outcome (the worst of a family's networks counts), then every refusal."""
    worst: dict[str, str] = {}
    for row in rows:
        worst[row["family"]] = max(worst.get(row["family"], OUTCOMES[0]), row["outcome"], key=OUTCOMES.index)
    lines = [f"{len(worst)} families, {len(rows)} networks"]
    for outcome in OUTCOMES:
        members = [family for family, found in worst.items() if found == outcome]
        shown = "" if outcome == "integers" or not members else ": " + ", ".join(members)
        lines.append(f"{outcome:>10} {len(members):4}{shown}")
    lines += [f"{row['name']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join(lines)


def _other_rows(path: Path, cases: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of an earlier table about other networks than those that are measured now."""
    names = {name for _, name in cases}
    return [dict(row) for row in read_csv(path)[1] if row["name"] not in names] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these, with or without the library's name")
    parser.add_argument("--all", action="store_true", help="every network of a family, not a small one alone")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N networks")
    parser.add_argument("--scheme", default="uniform8")
    parser.add_argument("--keep", action="store_true", help="keep the output file's rows about other networks")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/families.csv"), metavar="FILE")
    args = parser.parse_args()
    cases = everything() if args.all else representatives()
    if args.families:
        cases = [case for case in cases if case[0] in args.families or case[0].split("/")[1] in args.families]
    if not cases:
        print(f"error: no family is called {' or '.join(args.families)}; see model_families", file=sys.stderr)
        return 2
    cases = cases[: args.limit]
    rows = _other_rows(args.output, cases) if args.keep else []
    for row in rows_of(cases, args.scheme):
        rows.append(row)
        write_csv(args.output, rows)
    print(summary(rows))
    return 1 if any(row["outcome"] in ("different", "crashed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
