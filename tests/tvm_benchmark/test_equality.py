"""Comparison of a compiled model with its graph."""

import numpy as np
import pytest
import torch

from tvm_benchmark.equality import Equality, compare, whole_batches
from utils.integer_graph.ir import Graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.random_networks import calibrated, random_images


@pytest.fixture(scope="module")
def graph() -> Graph:
    return calibrated("digits", "uniform4").convert(())


class Wrong:
    """The graph's own logits with a few changed in the second batch."""

    batch = 2

    def __init__(self, graph: Graph, changes: dict[tuple[int, int], float]) -> None:
        self.engine, self.changes, self.calls = TorchEngine(graph), changes, 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        logits = self.engine(torch.from_numpy(images)).numpy().copy()
        if self.calls == 1:
            for place, value in self.changes.items():
                logits[place] = value
        self.calls += 1
        return logits


def test_equal_logits(graph: Graph) -> None:
    images = random_images(graph.nodes[0].type.shape, 4)
    found = compare(Wrong(graph, {}), graph, images, progress=False)
    assert found == Equality(4, 40, 0)
    assert found.sentence == "equal: all 40 logits of 4 images"


def test_the_first_difference_is_named(graph: Graph) -> None:
    images = random_images(graph.nodes[0].type.shape, 6)
    expected = TorchEngine(graph)(images).numpy()
    found = compare(Wrong(graph, {(1, 7): 1e6, (1, 9): float("nan")}), graph, images, progress=False)
    assert (found.images, found.logits, found.different) == (6, 60, 2)
    assert found.first == f"logit 7 of image 3: 1000000, expected {expected[3, 7]:.9g}"
    assert "2 of 60 logits of 6 images differ" in found.sentence


def test_a_wrong_shape_is_a_difference(graph: Graph) -> None:
    class Short(Wrong):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            return super().__call__(images)[:, :5]

    found = compare(Short(graph, {}), graph, random_images(graph.nodes[0].type.shape, 2), progress=False)
    assert found.different == 20
    assert found.first == "the shape [2, 5], expected [2, 10]"


def test_whole_batches() -> None:
    assert [whole_batches(32, batch) for batch in (1, 8, 5, 64)] == [32, 32, 35, 64]
