"""What evaluates integer graphs in ``quant_train.py``, and the evaluation of a graph's file alone."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from utils.errors import UserError
from utils.evaluation import Accuracy, Engine, evaluate
from utils.flag_checks import check_outputs, fill_in
from utils.hawq.graph import ARITHMETIC
from utils.integer_graph.info import MIB, bytes_by_kind
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import load
from utils.integer_graph.torch_engine import TorchEngine
from utils.preprocess import Preprocess
from utils.provenance import commit
from utils.run_data import DataFlags, load_data
from utils.run_log import log
from utils.run_report import REPORT_KEYS, write_json
from utils.train_flags import TORCH

COMPILED = "tvm"  # folder of the compiled model in the folder of the run
SUFFIX = ".safetensors"
FIXED = ("mean", "std", "resize", "input_size", "rotate180", "arch", "quant_scheme")  # by the graph


def engine_maker(args: argparse.Namespace, device: torch.device) -> Callable[[Graph], Engine]:
    """What makes the engine of a graph; for ``--engine tvm`` it is compiled, and held to the torch engine.

    args: parsed and filled in.  Raises UserError where TVM or a C compiler is missing.
    """
    if args.engine == TORCH:
        return lambda graph: TorchEngine(graph, device)
    from tvm_benchmark.compile import require_tools
    from tvm_benchmark.validate import Checked, compiled

    require_tools()

    def make(graph: Graph) -> Checked:
        model = compiled(graph, args.save_path / COMPILED, args.batch_size, torch.get_num_threads(), log.info)
        return Checked(model, TorchEngine(graph, device), args.agreement_images)

    return make


def is_graph_file(path: Path | None) -> bool:
    """Whether ``--resume`` names an integer graph, not a checkpoint."""
    return path is not None and path.suffix == SUFFIX


def evaluate_graph_file(args: argparse.Namespace, command: str, device: torch.device) -> None:
    """``--resume model.safetensors -e``: top-1 and top-5 of an integer graph, printed and reported.

    args: parsed.  Raises UserError for files and flags that do not fit.
    """
    _check(args)
    graph = load(args.resume)
    if "preprocess" not in graph.meta:
        raise UserError(f"{args.resume} does not say how image files become its input; convert the model again")
    evaluate_graph(args, graph, command, device)


def evaluate_graph(args: argparse.Namespace, graph: Graph, command: str, device: torch.device) -> Accuracy:
    """Evaluate an integer graph on the validation images of ``--data``, print and report.

    args: parsed.  graph: with its preprocessing in ``meta``.  Raises UserError.
    """
    started = time.perf_counter()
    arch, scheme = (str(graph.meta.get(key, "own")) for key in ("arch", "scheme"))
    fill_in(args, arch, scheme)
    check_outputs(args)
    make_engine = engine_maker(args, device)
    flags = DataFlags(args.data, args.batch_size, args.workers, args.seed)
    preprocess, classes = Preprocess.from_dict(graph.meta["preprocess"]), graph.nodes[-1].type.shape[0]
    data = load_data(flags, preprocess, classes, train=False, calibration=0)
    if graph.meta.get("arithmetic") == ARITHMETIC:
        network = f"{arch}, scheme {scheme}, of the original HAWQ"
        log.info("%s, on %s, engine %s; images: %s", network, device, args.engine, data.sizes())
    accuracy = evaluate(make_engine(graph), data.val, "integer graph")
    seconds = time.perf_counter() - started
    log.info("%s", _text(f"{arch} {scheme}", accuracy, args.engine, seconds))
    if args.report:
        write_json(args.report, _report(graph, accuracy, args.engine, seconds) | {"command": command})
    return accuracy


def _report(graph: Graph, accuracy: Accuracy, engine: str, seconds: float) -> dict[str, object]:
    measured = {
        "arch": graph.meta.get("arch", "own"),
        "scheme": graph.meta.get("scheme", "own"),
        "images": accuracy.images,
        "top1_integer": accuracy.top1,
        "top5_integer": accuracy.top5,
        "size_mib": bytes_by_kind(graph)["packed weights"] / MIB,
        "seconds": round(seconds, 1),
        "commit": commit(),
        "engine": engine,
        "images_per_second": accuracy.images / accuracy.seconds,
    }
    return dict.fromkeys(REPORT_KEYS) | measured


def _check(args: argparse.Namespace) -> None:
    if not args.evaluate:
        raise UserError(
            f"--resume {args.resume} is an integer graph, which can be evaluated (-e) but not trained; give the "
            "checkpoint (.pth.tar) to go on training"
        )
    given = [name for name in FIXED if vars(args)[name]]
    if given:
        raise UserError(f"{args.resume} brings its own --{given[0].replace('_', '-')}; leave that flag out")


def _text(name: str, accuracy: Accuracy, engine: str, seconds: float) -> str:
    rate = accuracy.images / accuracy.seconds
    return (
        f"{name}: {accuracy.images} images, {seconds:.1f} s\n"
        f"  top-1 integer      {accuracy.top1:.2f} %   top-5 {accuracy.top5:.2f} %\n"
        f"  engine             {engine}, {rate:.0f} images/s in all"
    )
