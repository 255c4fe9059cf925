"""Whether a compiled model gives the integer graph's logits, every one, compared by equality."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm

from utils.integer_graph.ir import Graph
from utils.integer_graph.torch_engine import TorchEngine


class Model(Protocol):
    """What is compared: fixed batches of uint8 images [batch, C, H, W] to logits float32 [batch, classes]."""

    batch: int

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Equality:
    """images, logits: how many were compared.  different: how many logits differ.  first: the first of them."""

    images: int
    logits: int
    different: int
    first: str = ""

    @property
    def sentence(self) -> str:
        """For people."""
        if self.different == 0:
            return f"equal: all {self.logits} logits of {self.images} images"
        return (
            f"the compiled model is wrong: {self.different} of {self.logits} logits of {self.images} images differ "
            f"from the integer graph's, the first is {self.first}; please report the network and the CPU"
        )


def compare(model: Model, graph: Graph, images: Tensor, progress: bool = True) -> Equality:
    """Run both on images uint8 [N, C, H, W], N a multiple of the model's batch; the graph by the torch engine, which
    equals the interpreter."""
    engine = TorchEngine(graph)
    got, expected = [], []
    for part in tqdm(images.split(model.batch), desc="comparing", unit="batch", disable=not progress):
        got.append(model(np.ascontiguousarray(part.numpy())).copy())
        expected.append(engine(part).numpy())
    return difference(np.concatenate(got), np.concatenate(expected))


def difference(got: np.ndarray, expected: np.ndarray) -> Equality:
    """How logits differ from the expected ones, both float32 [N, classes]."""
    if got.shape != expected.shape:
        first = f"the shape {list(got.shape)}, expected {list(expected.shape)}"
        return Equality(len(expected), expected.size, expected.size, first)
    places = np.argwhere(got != expected)
    if not len(places):
        return Equality(len(expected), expected.size, 0)
    image, logit = (int(i) for i in places[0])
    first = f"logit {logit} of image {image}: {got[image, logit]:.9g}, expected {expected[image, logit]:.9g}"
    return Equality(len(expected), expected.size, len(places), first)


def whole_batches(count: int, batch: int) -> int:
    """The smallest multiple of the batch that is at least ``count``.

    >>> whole_batches(32, 1), whole_batches(32, 7)
    (32, 35)
    """
    return -(-count // batch) * batch
