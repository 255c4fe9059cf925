"""Small integer graphs that compile in a second."""

import numpy as np

from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import make_node, verify

SHAPE, CLASSES = (3, 7, 6), 5


def _conv(name: str, x: Node, outputs: int, random: np.random.Generator, stride: int = 1) -> tuple[Node, Node]:
    """3x3 convolution with padding 1, and its requantization to 8 bits, unsigned."""
    arrays = {
        "weight": random.integers(-127, 128, (outputs, x.type.shape[0], 3, 3)).astype(np.int8),
        "bias": random.integers(-1000, 1000, outputs).astype(np.int32),
    }
    attrs = {"stride": [stride] * 2, "dilation": [1, 1], "padding": [1] * 4, "groups": 1, "weight_bits": 8}
    acc = make_node(name, "conv2d", [x], attrs=attrs, arrays=arrays)
    scale = {"multiplier": np.full(1, 1 << 25, np.int32), "shift": np.full(1, 33, np.uint8)}
    clamp = {"rounding": "up", "lo": 0, "hi": 255, "bits": 8, "signed": False}
    return acc, make_node(f"{name}.q", "requantize", [acc], attrs=clamp, arrays=scale)


def _graph(first: Node, random: np.random.Generator) -> Graph:
    one = _conv("conv1", first, 20, random)
    two = _conv("conv2", one[-1], 8, random, stride=2)
    flat = make_node("flat", "reshape", [two[-1]], attrs={"shape": [int(np.prod(two[-1].type.shape))]})
    weight = random.integers(-127, 128, (CLASSES, *flat.type.shape)).astype(np.int8)
    arrays = {"weight": weight, "bias": np.arange(CLASSES, dtype=np.int32)}
    linear = make_node("linear", "linear", [flat], attrs={"weight_bits": 8}, arrays=arrays)
    logits = make_node("logits", "logits", [linear], arrays={"scale": np.full(1, 0.001, np.float32)})
    meta = {"arch": "small", "scheme": "uniform8", "classes": list("abcde")}
    graph = Graph((first, *one, *two, flat, linear, logits), meta)
    verify(graph)
    return graph


def small_graph(seed: int = 0) -> Graph:
    """uint8 images [N, 3, 7, 6] -> 5 logits."""
    random = np.random.default_rng(seed)
    table = random.integers(0, 256, (SHAPE[0], 256)).astype(np.int16)
    attrs = {"shape": list(SHAPE), "bits": 8, "signed": False}
    return _graph(make_node("image", "image", attrs=attrs, arrays={"table": table}), random)


def float_graph() -> Graph:
    """float32 images [N, 3, 7, 6] -> 5 logits."""
    attrs = {"shape": list(SHAPE), "inverse_scale": 50.0, "lo": 0, "hi": 255, "bits": 8, "signed": False}
    return _graph(make_node("input", "quantize", attrs=attrs), np.random.default_rng(1))


def images(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 3, 7, 6]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE)).astype(np.uint8)
