"""Random integer graphs for the tests of every engine and file format."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.utils.integer_graph.random_graphs import Builder, build, pixels
from utils.integer_graph.ir import Graph


@pytest.fixture
def builder() -> type[Builder]:
    """The class that builds random nodes one at a time: builder(seed)."""
    return Builder


@pytest.fixture
def random_graph() -> Callable[..., Graph]:
    """random_graph(seed, rounding="up", length=8)."""
    return build


@pytest.fixture
def random_images() -> Callable[..., np.ndarray]:
    """random_images(graph, count, seed=0)."""
    return pixels
