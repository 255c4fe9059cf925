"""The torch engine equals the interpreter on every node, integer by integer."""

import numpy as np
import pytest
import torch

from utils.integer_graph import interpreter
from utils.integer_graph.ops import OPS, verify
from utils.integer_graph.torch_engine import TorchEngine
from utils.integer_graph.torch_steps import STEPS


def assert_equal_everywhere(graph, images):
    """Every node of both engines, by equality; the logits by bits."""
    expected = interpreter.run(graph, images, keep=True)
    engine = TorchEngine(graph)
    got = engine.run(torch.from_numpy(images))
    assert list(got) == list(expected)
    for node in graph.nodes:
        value = got[node.name].numpy()
        assert value.dtype == expected[node.name].dtype
        np.testing.assert_array_equal(value, expected[node.name], err_msg=f"{node.name} {dict(node.attrs)}")
    last = expected[graph.nodes[-1].name]
    np.testing.assert_array_equal(engine(torch.from_numpy(images)).numpy(), last)
    np.testing.assert_array_equal(interpreter.run(graph, images), last)


@pytest.mark.parametrize("rounding", ["up", "even"])
@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed, rounding, random_graph, random_images):
    graph = random_graph(seed, rounding)
    verify(graph)
    assert_equal_everywhere(graph, random_images(graph, 3))


def test_every_op_has_a_step():
    assert set(STEPS) == set(OPS)
