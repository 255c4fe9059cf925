"""The first node and the first value in which two graphs differ."""

import dataclasses

import numpy as np
import pytest

from utils.errors import UserError
from utils.integer_graph.diff import first_difference, first_value_difference, random_images, read_images
from utils.integer_graph.ir import Graph
from utils.integer_graph.ops import make_node


@pytest.fixture
def graph(builder):
    b = builder(1)
    x = b.requantize(b.conv(b.image((2, 6, 6))))
    return b.classifier(x, 3)


def changed(graph, number, **fields):
    nodes = list(graph.nodes)
    nodes[number] = dataclasses.replace(nodes[number], **fields)
    return Graph(tuple(nodes), graph.meta)


def with_value(graph, number, key, place, delta):
    array = graph.nodes[number].arrays[key].copy()
    array[place] += delta
    return changed(graph, number, arrays={**graph.nodes[number].arrays, key: array})


def test_equal_graphs(graph):
    assert first_difference(graph, graph) is None
    assert first_value_difference(graph, graph, random_images(graph, 3)) is None


def test_the_first_changed_array_value_is_named(graph):
    bias = graph.nodes[1].arrays["bias"]
    other = with_value(graph, 1, "bias", -1, 5)
    place, count = [len(bias) - 1], len(bias)
    expected = f"node 1 ({graph.nodes[1].name}): array bias differs in 1 of {count} values; {place} is {bias[-1]} in"
    assert first_difference(graph, other).startswith(expected)
    name = graph.nodes[1].name
    values = graph.nodes[1].type.shape[1] * graph.nodes[1].type.shape[2] * 2
    message = first_value_difference(graph, other, random_images(graph, 2))
    assert message.startswith(f"{name}: its value differs in {values} of ")
    assert f"[0, {len(bias) - 1}, 0, 0] is " in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "other"}, "name is conv2d1 in the first and other in the second"),
        ({"op": "linear"}, "op is conv2d in the first and linear"),
        ({"scale": 2.0}, "scale is None in the first and 2.0"),
        ({"attrs": {"groups": 7}}, "attribute stride is"),
        ({"arrays": {}}, "array weight is in the first only"),
        ({"arrays": {"weight": np.zeros(3, np.int8)}}, r"array weight is int8 .* and int8 \[3\] in the second"),
    ],
)
def test_structure(graph, fields, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(first_difference(graph, changed(graph, 1, **fields)))


def test_lengths(graph):
    shorter = Graph(graph.nodes[:-1])
    assert (
        first_difference(graph, shorter) == f"the first has {len(graph.nodes)} nodes, the second {len(shorter.nodes)}"
    )


def test_logits_are_compared_even_under_other_names(graph):
    last = dataclasses.replace(graph.nodes[-1], name="renamed")
    double = dataclasses.replace(last, arrays={"scale": last.arrays["scale"] * 2})
    images = random_images(graph, 2)
    assert first_value_difference(graph, Graph((*graph.nodes[:-1], last)), images) is None
    assert "the logits differs in 6 of 6" in first_value_difference(graph, Graph((*graph.nodes[:-1], double)), images)


def test_random_images_are_seeded_and_of_the_input_s_dtype(graph):
    images = random_images(graph, 4)
    assert (images.dtype, images.shape) == (np.uint8, (4, 2, 6, 6))
    np.testing.assert_array_equal(images, random_images(graph, 4))
    attrs = {"shape": [5], "inverse_scale": 1.0, "lo": 0, "hi": 1, "bits": 8, "signed": True}
    floats = random_images(Graph((make_node("x", "quantize", attrs=attrs),)), 3)
    assert (floats.dtype, floats.shape) == (np.float32, (3, 5))


def test_images_from_a_file(tmp_path, graph):
    np.save(tmp_path / "x.npy", random_images(graph, 2))
    np.testing.assert_array_equal(read_images(tmp_path / "x.npy"), random_images(graph, 2))
    np.savez(tmp_path / "x.npz", a=np.zeros(2), b=np.zeros(2))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").touch()
    for name, message in [
        ("none.npy", "cannot read .*none.npy"),
        ("text.npy", "cannot read .*text.npy"),
        ("empty.npy", "cannot read"),
        ("objects.npy", "cannot read"),
        ("x.npz", "several arrays"),
    ]:
        with pytest.raises(UserError, match=message):
            read_images(tmp_path / name)
