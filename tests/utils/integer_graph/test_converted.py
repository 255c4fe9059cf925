"""Element numbers: what they show about a movement, and what they refuse."""

import numpy as np
import pytest
import torch

from utils.integer_graph.converted import Value, element_numbers, moved, stored_shape, value_of_shape
from utils.integer_graph.ops import make_node


def value(shape, scales=1):
    table = np.zeros((shape[0], 256), np.int16)
    node = make_node(
        "in", "image", attrs={"shape": shape, "bits": 8, "signed": True}, arrays={"table": table}, scale=1.0
    )
    return Value(node, np.ones(scales))


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), (2, 3), (2, 3, 4, 5), (2, 2, 2, 2, 2)])
def test_stored_shape_keeps_the_elements(shape):
    stored = stored_shape(shape)
    assert len(stored) in (1, 3)
    assert np.prod(stored) == np.prod(shape)


def test_numbers_are_distinct_over_both_images():
    numbers = element_numbers(value((2, 3, 4)))
    assert numbers.shape == (2, 2, 3, 4)
    assert sorted(numbers.flatten().tolist()) == list(range(1, 49))


def test_a_chain_of_movements_composes():
    source = value((4, 2, 2))
    first = moved(source, element_numbers(source)[:, 1:3])
    second = moved(first, torch.nn.functional.pad(element_numbers(first), (0, 0, 0, 0, 0, 1)))
    assert second.index[:, 0, 0].tolist() == [4, 8, -1]
    assert second.node is source.node


def test_lists_of_parts():
    source = value((4, 2, 2))
    parts = moved(source, element_numbers(source).chunk(2, 1))
    assert [part.index[0, 0, 0] for part in parts] == [0, 8]


@pytest.mark.parametrize("mixed", [lambda x: x.flip(0), lambda x: x.reshape(1, -1), lambda x: x[:1].expand_as(x)])
def test_images_do_not_mix(mixed):
    source = value((4, 2, 2))
    with pytest.raises(ValueError, match="moves elements from one image to another"):
        moved(source, mixed(element_numbers(source)))


def test_accumulators_only_lose_axes():
    source = value((4, 1, 1), scales=4)
    assert moved(source, element_numbers(source).flatten(1)).index.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="works on accumulators"):
        moved(source, element_numbers(source)[:, :2])


def test_value_of_another_rank():
    node = value((6, 2, 2)).node
    assert value_of_shape(node, np.ones(1), (6, 2, 2)).index is None
    assert value_of_shape(node, np.ones(1), (2, 3, 2, 2)).index.shape == (2, 3, 2, 2)
