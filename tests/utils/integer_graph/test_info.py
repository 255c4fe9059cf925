"""The itemised sizes add up to the file, and every layer is listed."""

import pytest

from utils.integer_graph.info import OTHER, bytes_by_kind, describe, layer_nodes
from utils.integer_graph.serialize import save


@pytest.mark.parametrize("seed", range(6))
def test_the_items_add_up(seed, random_graph, tmp_path):
    graph, path = random_graph(seed), tmp_path / "g.safetensors"
    save(graph, path)
    totals = bytes_by_kind(graph)
    layers = layer_nodes(graph)
    assert totals["packed weights"] == sum(-(-n.arrays["weight"].size * n.attrs["weight_bits"] // 8) for n in layers)
    assert totals["biases"] == sum(4 * len(n.arrays["bias"]) for n in layers)
    scales = [a.nbytes for n in graph.nodes for k, a in n.arrays.items() if k.startswith(("multiplier", "shift"))]
    assert totals["multipliers and shifts"] == sum(scales)
    everything = sum(a.nbytes for n in graph.nodes for k, a in n.arrays.items() if k != "weight")
    assert sum(totals.values()) == everything + totals["packed weights"]
    assert totals[OTHER] >= 4
    text = describe(path)
    assert f"{path.stat().st_size} bytes = " in text
    assert all(node.name in text for node in layers)
    assert "random" in text


def test_float_islands_are_named(builder, tmp_path):
    b = builder(0)
    island = b.island(b.image((2, 3, 3)))
    save(b.classifier(island, 2), tmp_path / "g")
    assert f"{island.name} ({island.attrs['function']})" in describe(tmp_path / "g")
