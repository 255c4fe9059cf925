"""What a file of weights is, and whether its bits are those of a scheme.

Five kinds: integer graphs and training checkpoints of this program, checkpoints and quantized_checkpoints of the
original HAWQ, float weights.  Reading never runs code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bit_config
from utils.checkpoint import FORMAT, checked_checkpoint
from utils.errors import UserError
from utils.experiment import FLOAT
from utils.float_weights import CONTAINER_KEYS, load_float_weights
from utils.graph_evaluation import is_graph_file
from utils.hawq.files import HawqFile, recognise
from utils.hawq.graph import integer_graph
from utils.hawq.schemes import shows_bits
from utils.integer_graph.info import MIB, bytes_by_kind, layer_nodes
from utils.integer_graph.serialize import load
from utils.models import create_model
from utils.preprocess import Preprocess
from utils.quantization_utils.capture import capture
from utils.quantization_utils.prepare import describe_layers, fold_network
from utils.torch_file import read_torch_file

Pairs = Mapping[str, tuple[int, int]]  # layer -> bits of its weights and of the activation it reads


@dataclass(frozen=True)
class Found:
    """What a file says of itself.

    kind: in words.  arch, scheme: as recorded, None where the file does not say.  pairs: recorded bits, empty where
    there are none.  shape: of its input, (channels, size, size).  is_float: of a float network, without bits.
    original: the content of a file of the original HAWQ.
    flags: what `quant_train.py` needs besides the file, architecture and scheme to evaluate it.
    """

    path: Path
    kind: str
    details: str
    flags: tuple[str, ...]
    arch: str | None = None
    scheme: str | None = None
    num_classes: int | None = None
    shape: tuple[int, ...] | None = None
    pairs: Pairs | None = None
    is_float: bool = False
    original: HawqFile | None = None


def identify(path: Path) -> Found:
    """What the file is.

    Raises UserError, one sentence, for files that are missing, damaged, hold code, or are none of the five kinds.
    """
    if is_graph_file(path):
        return _graph(path)
    content = read_torch_file(path)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return _checkpoint(path, checked_checkpoint(content, path))
    original = recognise(content, path)
    if original is not None:
        shown = "its integers are filled in" if shows_bits(original) else "its integers were never filled in"
        details = f"{len(original.tensors)} entries, {shown}"
        flags = ("--resume", str(path), "--resume-quantize")
        return Found(path, f"{original.kind} of the original HAWQ", details, flags, original.arch, original=original)
    return _float(path, content)


def _graph(path: Path) -> Found:
    graph = load(path)
    meta = graph.meta
    size = bytes_by_kind(graph)["packed weights"] / MIB
    stored = {node.name: int(node.attrs["weight_bits"]) for node in layer_nodes(graph) if "weight_bits" in node.attrs}
    pairs = {str(name): (stored.get(name, int(w)), int(a)) for name, w, a in meta.get("layers", [])}
    details = f"{len(graph.nodes)} nodes, {size:.3f} MiB of packed weights, checksum of its content is right"
    shape = tuple(graph.nodes[0].type.shape)
    scheme = str(meta["scheme"]) if "scheme" in meta else None
    arch = str(meta["arch"]) if "arch" in meta else None
    classes = int(graph.nodes[-1].type.shape[0])
    return Found(path, "integer graph", details, ("--resume", str(path)), arch, scheme, classes, shape, pairs)


def _checkpoint(path: Path, content: Mapping[str, Any]) -> Found:
    try:
        pairs = {str(name): (int(w), int(a)) for name, (w, a) in content["bits"].items()}
        shape = Preprocess.from_dict(content["preprocess"]).input_shape
        classes, scheme = int(content["num_classes"]), str(content["scheme"])
        epochs = content["trainer"]["epoch"] if content["trainer"] else 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is a training checkpoint that was changed after saving; use another file") from error
    flags, details = ("--resume", str(path)), f"after {epochs} epochs"
    is_float = scheme == FLOAT
    kind = "training checkpoint"
    return Found(path, kind, details, flags, content["arch"], scheme, classes, shape, pairs, is_float=is_float)


def _float(path: Path, content: Any) -> Found:
    for key in CONTAINER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = [value for value in content.values() if isinstance(value, torch.Tensor)] if _is_state(content) else []
    if not tensors:
        raise UserError(
            f"{path} is none of: integer graph, training checkpoint, checkpoint of the original HAWQ, float weights; "
            "give another file"
        )
    count = sum(tensor.numel() for tensor in tensors)
    details = f"{len(tensors)} tensors, {count:,} numbers"
    return Found(path, "float weights", details, ("--weights", str(path)), scheme=FLOAT, is_float=True)


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(value, torch.Tensor) for value in content.values())


def check_scheme(found: Found, arch: str | None, scheme: str | None) -> str | None:
    """What was checked of architecture and scheme, in words; None where nothing could be.

    arch, scheme: what to check against, None for what the file says.  Raises UserError naming the first layer or
    entry that does not fit.
    """
    arch = arch or found.arch
    if found.arch is not None and arch != found.arch:
        raise UserError(f"{found.path} is of {found.arch}, not of {arch}")
    if arch is None:
        return None
    if found.original is not None:
        return _check_original(found.original, arch, scheme)
    if found.pairs is None:
        load_float_weights(create_model(arch).module, found.path, arch)
        return f"every tensor of {arch} is there in its shape"
    return _check_bits(found, arch, scheme)


def _check_original(original: HawqFile, arch: str, scheme: str | None) -> str:
    converted = integer_graph(original, arch, scheme)
    saturated = f", biases saturate in {len(converted.saturated)} layers" if converted.saturated else ""
    fit = "was asked for and fits" if scheme else "fits its integers"
    return f"the scheme {converted.graph.meta['scheme']} of {arch} {fit}; all entries are there{saturated}"


def _check_bits(found: Found, arch: str, scheme: str | None) -> str | None:
    name = scheme or found.scheme
    if found.is_float:
        if scheme not in (None, FLOAT):
            raise UserError(f"{found.path} is a float network, it was not made with the scheme {scheme}")
        return None
    if not found.pairs or found.shape is None or name is None or not _is_known(name, arch, asked=scheme is not None):
        return None
    module = create_model(arch, found.num_classes).module
    layers = describe_layers(fold_network(capture(module, torch.zeros(1, *found.shape))))
    bits = bit_config.resolve(bit_config.load_scheme(name, arch), layers)
    expected = {layer: (pair.weight, pair.activation) for layer, pair in bits.items()}
    for layer in [*expected, *found.pairs]:
        if expected.get(layer) != found.pairs.get(layer):
            got, wanted = found.pairs.get(layer), expected.get(layer)
            raise UserError(
                f"{found.path} was not made with the scheme {name}: {layer} has the bits {got} (weight, activation) "
                f"there, {wanted} in the scheme"
            )
    return f"all {len(expected)} layers have the bits of {name}"


def _is_known(name: str, arch: str, *, asked: bool) -> bool:
    """Whether a scheme can be looked up: one from a YAML file is recorded by its name alone."""
    try:
        bit_config.load_scheme(name, arch)
    except UserError:
        if asked:
            raise
        return False
    return True
