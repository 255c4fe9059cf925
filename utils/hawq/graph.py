"""From a file of the original to the integer graph that gives its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import bit_config
from utils.hawq.arithmetic import Options
from utils.hawq.builder import Builder
from utils.hawq.files import HawqFile
from utils.hawq.fitting import float_network
from utils.hawq.networks import FAMILIES, Network
from utils.hawq.parameters import parameters_of
from utils.hawq.schemes import advice, bits_of, choose_scheme
from utils.integer_graph.ir import FORMAT_VERSION, Graph
from utils.integer_graph.ops import verify
from utils.models import ModelInfo
from utils.preprocess import Preprocess
from utils.quantization_utils.capture import capture
from utils.quantization_utils.cost_model import Layer
from utils.quantization_utils.prepare import describe_layers, fold_network

ARITHMETIC = "original"  # what the graph's meta says of where its rules come from


@dataclass(frozen=True)
class Converted:
    """graph: verified.  saturated: layer -> channels whose bias, clamped to 2^31 by the original, had to be reduced by
    what the channel's weights may add, for accumulators to hold the sum."""

    graph: Graph
    saturated: dict[str, int]


def float_layers(info: ModelInfo) -> list[Layer]:
    """The layers that a scheme gives bits to."""
    return describe_layers(fold_network(capture(info.module, torch.zeros(1, *info.preprocess.input_shape))))


def integer_graph(
    file: HawqFile,
    arch: str | None = None,
    scheme: str | None = None,
    *,
    preprocess: Preprocess | None = None,
    float_input: bool = False,
    classes: Sequence[str] | None = None,
    options: Options | None = None,
    info: ModelInfo | None = None,
) -> Converted:
    """Convert a checkpoint or quantized_checkpoint of the original.

    arch, scheme: None takes what the file shows.  preprocess: of the images, None for the architecture's.
    float_input: the graph takes normalised float32 images, as the original's network does, in place of uint8 pixels.
    info: what :func:`utils.hawq.fitting.float_network` gave, where it is built already.
    Raises UserError where file, architecture and scheme do not fit together, naming the first entry that disagrees.
    """
    info = info or float_network(file, arch)
    name, layers = info.name, float_layers(info)
    scheme = choose_scheme(file, name, layers, scheme)
    bits = bits_of(scheme, name, layers)
    parameters = parameters_of(file, options or Options(), advice(file, name, layers))
    builder = Builder(info.module, parameters, bits)
    images = preprocess or info.preprocess
    FAMILIES[name](Network(builder, tuple(file.tensors), images.input_shape, None if float_input else images))
    meta = _meta(info, bit_config.load_scheme(scheme, name).name, images, classes)
    meta["layers"] = [[layer.name, bits[layer.name].weight, bits[layer.name].activation] for layer in layers]
    graph = Graph(tuple(builder.nodes), meta)
    verify(graph)
    return Converted(graph, builder.saturated)


def _meta(info: ModelInfo, scheme: str, images: Preprocess, classes: Sequence[str] | None) -> dict[str, object]:
    return {
        "format": FORMAT_VERSION,
        "input_size": list(images.input_shape),
        "preprocess": images.as_dict(),
        "islands": [],
        "arch": info.name,
        "scheme": scheme,
        "num_classes": info.num_classes,
        "classes": list(classes or []),
        "residual_bits": 16,
        "arithmetic": ARITHMETIC,
    }
