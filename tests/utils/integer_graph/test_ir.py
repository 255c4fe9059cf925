"""Graphs as data: look-up, consumers, lifetimes, integer ranges."""

import pytest

from utils.integer_graph.ir import Graph, Node, TensorType, int_range

TYPE = TensorType((1,), 8, True, -1, 1)


@pytest.fixture
def diamond():
    """a feeds b and (twice) c, which also reads b."""
    nodes = [("a", ()), ("b", ("a",)), ("c", ("a", "b", "a"))]
    return Graph(tuple(Node(name, "add", inputs, TYPE) for name, inputs in nodes))


def test_node_by_name(diamond):
    assert diamond.node("b").inputs == ("a",)
    with pytest.raises(KeyError):
        diamond.node("z")


def test_consumers_are_listed_once(diamond):
    names = {name: [node.name for node in users] for name, users in diamond.consumers().items()}
    assert names == {"a": ["b", "c"], "b": ["c"], "c": []}


def test_last_uses(diamond):
    assert [set(names) for names in diamond.last_uses()] == [set(), set(), {"a", "b"}]


@pytest.mark.parametrize("bits", range(1, 33))
def test_int_range_holds_every_integer_of_the_width(bits):
    for signed in (False, True):
        lo, hi = int_range(bits, signed)
        assert hi - lo + 1 == 2**bits
        assert (lo < 0) == signed
