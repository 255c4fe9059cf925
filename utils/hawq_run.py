"""``quant_train.py --resume`` with a file of the original HAWQ: evaluate it as it is, or train on from its weights."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import FORMAT
from utils.errors import UserError
from utils.graph_evaluation import evaluate_graph
from utils.hawq.arithmetic import Options
from utils.hawq.files import HawqFile, recognise
from utils.hawq.fitting import float_network
from utils.hawq.graph import float_layers, integer_graph
from utils.hawq.schemes import choose_scheme
from utils.integer_graph.serialize import save
from utils.run_log import log
from utils.run_state import GRAPH
from utils.train_flags import FLOAT


def read_original(content: Any, path: Path | None) -> HawqFile | None:
    """What was read from ``--resume`` as a file of the original, None if it is none (or there is no such flag)."""
    if path is None or (isinstance(content, Mapping) and content.get("format") == FORMAT):
        return None
    return recognise(content, path)


def evaluates_original(args: argparse.Namespace, original: HawqFile) -> bool:
    """Whether ``-e`` is about the original's own integers; without ``--resume-quantize`` its float weights count.

    ``--summary`` evaluates nothing.
    """
    return args.evaluate and not args.summary and (args.resume_quantize or original.integers)


def evaluate_original(args: argparse.Namespace, original: HawqFile, command: str, device: torch.device) -> None:
    """``--resume FILE --resume-quantize -e``: convert with the original's arithmetic, evaluate and save the graph.

    args: parsed.  Raises UserError where file, architecture and scheme do not fit together.
    """
    _refuse_float_scheme(args, original)
    info = float_network(original, args.arch, args.num_classes)
    preprocess = info.preprocess.override(
        mean=args.mean, std=args.std, resize=args.resize, input_size=args.input_size, rotate180=args.rotate180 or None
    )
    options = Options(args.weight_percentile, args.channel_wise)
    converted = integer_graph(original, info.name, args.quant_scheme, preprocess=preprocess, options=options, info=info)
    for layer, channels in converted.saturated.items():
        log.info("%s: the original clamps the bias of %d channels to 2^31, here it ends just below", layer, channels)
    if args.fixed_point_quantization:
        log.info("--fixed-point-quantization has no effect: the integers of %s are evaluated", original.path)
    args.resume = None  # outputs go to the folder of a run, not beside the file
    evaluate_graph(args, converted.graph, command, device)
    path = args.save_path / GRAPH
    save(converted.graph, path)
    log.info("  saved              %s, with the original's arithmetic", path)


def start_from_original(args: argparse.Namespace, content: Any, original: HawqFile | None) -> None:
    """Turn ``--resume`` of the original's file into what goes on from it: its weights, scheme and epoch.

    content: of the file.  original: the same, None for a float checkpoint and for checkpoints of this program, which
    are left alone.  Changes args.  Raises UserError where file, architecture and scheme do not fit together.
    """
    if original is not None:
        _start(args, original)
    elif _is_float_checkpoint(content):
        if args.resume_quantize:
            raise UserError(f"{args.resume} holds a float network, leave out --resume-quantize, which is for others")
        args.arch = content.get("arch") if args.arch is None else args.arch
        log.info("%s is a float checkpoint: its weights are taken", args.resume)
    else:
        return
    args.weights, args.resume = args.resume, None


def _start(args: argparse.Namespace, original: HawqFile) -> None:
    if original.integers:
        raise UserError(
            f"{original.path} holds integers only, which can be evaluated (-e) but not trained; give the "
            "checkpoint.pth.tar of that run"
        )
    info = float_network(original, args.arch, args.num_classes)
    args.arch, args.num_classes = info.name, info.num_classes
    taken = "its float weights are taken"
    if args.resume_quantize:
        _refuse_float_scheme(args, original)
        args.quant_scheme = choose_scheme(original, info.name, float_layers(info), args.quant_scheme)
        args.start_epoch = original.epoch if args.start_epoch is None else args.start_epoch
        taken = f"its float weights, scheme {args.quant_scheme} and epoch {original.epoch} are taken"
    elif args.evaluate:
        taken += " (--resume-quantize would evaluate its own integers)"
    log.info("%s is a checkpoint of the original HAWQ: %s, ranges are calibrated anew", original.path, taken)


def _refuse_float_scheme(args: argparse.Namespace, original: HawqFile) -> None:
    if args.quant_scheme == FLOAT:
        raise UserError(
            f"--quant-scheme float has no bit widths, {original.path} is quantized; leave it out, or leave out "
            "--resume-quantize to take the float weights of a checkpoint"
        )


def _is_float_checkpoint(content: Any) -> bool:
    return isinstance(content, Mapping) and content.get("format") != FORMAT and "state_dict" in content
