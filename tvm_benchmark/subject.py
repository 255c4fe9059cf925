"""What is measured: an integer graph, and the float network it was made from, for the peers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bit_config import Scheme
from utils.checkpoint import load_checkpoint
from utils.data_utils import normalize
from utils.errors import UserError
from utils.experiment import Cost, Experiment, scheme_of
from utils.integer_graph import serialize
from utils.integer_graph.info import layer_nodes
from utils.integer_graph.ir import Graph, Node
from utils.models import ModelInfo, create_model
from utils.preprocess import Preprocess
from utils.quantization_utils import cost_model
from utils.quantization_utils.cost_model import Layer, LayerBits
from utils.random_networks import calibrated, random_images, spread_statistics

CALIBRATION_IMAGES = 8
DEFAULT_SCHEME = "uniform8"


@dataclass(frozen=True)
class Subject:
    """graph: takes uint8 images.  network: the float network, or None where ``reason`` says why there is none."""

    graph: Graph
    network: ModelInfo | None
    reason: str = ""

    @property
    def arch(self) -> str:
        return str(self.graph.meta.get("arch", "own network"))

    @property
    def scheme(self) -> str:
        return str(self.graph.meta.get("scheme", "unknown scheme"))

    def images(self, count: int, seed: int) -> Tensor:
        """Random uint8 images [count, C, H, W]."""
        return random_images(self.graph.nodes[0].type.shape, count, seed)


def load_subject(
    arch: str | None, scheme: str | Scheme | None, graph: Path | None = None, checkpoint: Path | None = None
) -> Subject:
    """The subject that a command line names: a graph file, else a checkpoint, else a network with random weights.

    arch: may be None with a file; else it must be the file's.  scheme: of a network with random weights (None:
    uniform8); a file has its own.  Raises UserError.
    """
    if scheme is not None and (graph or checkpoint) is not None:
        raise UserError(
            f"got the scheme {scheme} for {graph or checkpoint}, which has its own; leave out --quant-scheme"
        )
    if graph is not None:
        return _from_graph(graph, arch)
    if checkpoint is not None:
        return _from_checkpoint(checkpoint, arch)
    if arch is None:
        raise UserError("nothing to measure; give an architecture with -a, or a file with --graph or --checkpoint")
    experiment = calibrated(arch, scheme or DEFAULT_SCHEME, CALIBRATION_IMAGES)
    return Subject(experiment.convert(()), experiment.info)


def _from_checkpoint(path: Path, arch: str | None) -> Subject:
    saved = load_checkpoint(path, arch)
    preprocess = Preprocess.from_dict(saved["preprocess"])
    info = create_model(saved["arch"], saved["num_classes"])
    info = ModelInfo(info.name, info.source, info.module, preprocess, info.num_classes)
    experiment = Experiment(info, preprocess, scheme_of(saved), torch.device("cpu"))
    if experiment.is_float:
        raise UserError(f"{path} holds a float network; give a checkpoint of a quantized one")
    experiment.load_state(saved, str(path))
    return Subject(experiment.convert(()), info)


def _from_graph(path: Path, arch: str | None) -> Subject:
    graph = serialize.load(path)
    found = graph.meta.get("arch")
    if arch is not None and arch != found:
        raise UserError(f"{path} is a graph of {found}, not of {arch}; leave out -a or give that architecture")
    if graph.nodes[0].op != "image":
        raise UserError(f"{path} does not start from uint8 images; convert the model with its preprocessing")
    try:
        return Subject(graph, _random_network(graph.meta))
    except (UserError, KeyError) as error:
        return Subject(graph, None, f"the float network of {path.name} cannot be built ({error})")


def _random_network(meta: Any) -> ModelInfo:
    """The architecture of a graph with random weights: as fast as with its own."""
    torch.manual_seed(0)
    info = create_model(meta["arch"], meta["num_classes"])
    preprocess = Preprocess.from_dict(meta["preprocess"])
    images = random_images(preprocess.input_shape, CALIBRATION_IMAGES)
    spread_statistics(info.module, normalize(images, preprocess))
    return ModelInfo(info.name, info.source, info.module, preprocess, info.num_classes)


def layer_bits(graph: Graph) -> dict[str, LayerBits]:
    """Layer -> bits of its weights and of the activation it reads.  Raises UserError where the graph records none."""
    if "layers" not in graph.meta:
        raise UserError("the graph does not record the bits of its layers; convert the model again")
    return {name: LayerBits(weight, activation, "") for name, weight, activation in graph.meta["layers"]}


def cost(graph: Graph) -> Cost:
    """Size and bit operations of the scheme by the uniform convention (``cost_model``)."""
    layers, bits = _layers(graph), layer_bits(graph)
    return Cost(cost_model.size_mib(layers, bits), cost_model.bops_g(layers, bits))


def _layer_name(node: Node) -> str:
    return str(node.attrs.get("layer", node.name))


def layer_macs(graph: Graph) -> dict[str, int]:
    """Layer -> multiply-adds for one image."""
    return {
        _layer_name(node): node.arrays["weight"].size * math.prod(node.type.shape) // node.arrays["weight"].shape[0]
        for node in layer_nodes(graph)
    }


def _layers(graph: Graph) -> list[Layer]:
    layers = []
    macs = layer_macs(graph)
    for node in layer_nodes(graph):
        weight = node.arrays["weight"]
        kind = "linear" if node.op == "linear" else "conv"
        name = _layer_name(node)
        layers.append(Layer(name, kind, weight.size, macs[name], weight.shape[0], node.inputs[0], False, False))
    return layers
