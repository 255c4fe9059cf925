"""Graph files: round trips, size on disk, refusal of everything that is not a graph."""

import base64
import dataclasses
import errno
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import save_file

from utils.errors import UserError
from utils.integer_graph import serialize
from utils.integer_graph.ir import Graph, int_range
from utils.integer_graph.ops import make_node


def assert_same(a, b):
    """Two graphs, field by field."""
    assert a.meta == b.meta
    for x, y in zip(a.nodes, b.nodes, strict=True):
        assert dataclasses.replace(x, arrays={}) == dataclasses.replace(y, arrays={})
        assert x.arrays.keys() == y.arrays.keys()
        for key, array in x.arrays.items():
            assert array.dtype == y.arrays[key].dtype
            np.testing.assert_array_equal(array, y.arrays[key])


@given(st.data(), st.integers(2, 8), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_packing_round_trip(data, bits, shape):
    lo, hi = int_range(bits, True)
    values = data.draw(arrays(np.int8, tuple(shape), elements=st.integers(lo, hi)))
    packed = serialize.pack(values, bits)
    assert len(packed) == -(-values.size * bits // 8)
    np.testing.assert_array_equal(serialize.unpack(packed, bits, values.shape), values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_matches_its_definition_across_chunks(bits, monkeypatch):
    monkeypatch.setattr(serialize, "CHUNK", 16)
    lo, hi = int_range(bits, True)
    values = np.random.default_rng(bits).integers(lo, hi + 1, 53, dtype=np.int8)
    packed = serialize.pack(values, bits)
    as_one_integer = sum((int(v) % (1 << bits)) << (i * bits) for i, v in enumerate(values))
    assert int.from_bytes(packed.tobytes(), "little") == as_one_integer
    np.testing.assert_array_equal(serialize.unpack(packed, bits, values.shape), values)


@pytest.mark.parametrize("seed", range(8))
def test_round_trip(seed, random_graph, tmp_path):
    graph = random_graph(seed)
    path = tmp_path / "model.safetensors"
    serialize.save(graph, path)
    loaded = serialize.load(path)
    assert_same(graph, loaded)
    assert serialize.graph_hash(loaded) == serialize.graph_hash(graph)
    before = path.read_bytes()
    serialize.save(loaded, path)
    assert path.read_bytes() == before


def test_the_hash_sees_every_array_and_the_meta(random_graph):
    graph = random_graph(1)
    seen = {serialize.graph_hash(graph), serialize.graph_hash(Graph(graph.nodes, {**graph.meta, "arch": "other"}))}
    changes = 0
    for i, node in enumerate(graph.nodes):
        for key, array in node.arrays.items():
            changed = array.copy()
            changed.flat[0] += 1
            other = dataclasses.replace(node, arrays={**node.arrays, key: changed})
            seen.add(serialize.graph_hash(Graph((*graph.nodes[:i], other, *graph.nodes[i + 1 :]), graph.meta)))
            changes += 1
    assert len(seen) == changes + 2


def conv_chain(widths, kernel, bits):
    """image, then convolutions of the given widths, then a classifier: sizes of a real network."""
    rng = np.random.default_rng(0)
    table = rng.integers(-128, 128, (3, 256), dtype=np.int16)
    attrs = {"shape": [3, 8, 8], "bits": 8, "signed": True}
    nodes = [make_node("input", "image", attrs=attrs, arrays={"table": table}, scale=0.1)]
    lo, hi = int_range(bits, True)
    storage = {"rounding": "up", "lo": 0, "hi": 255, "bits": 8, "signed": False}
    conv = {"stride": [1, 1], "padding": [kernel // 2] * 4, "dilation": [1, 1], "groups": 1, "weight_bits": bits}
    for i, width in enumerate(widths):
        name = f"features.stage{i}.unit1.body.conv1.conv"
        shape = (width, nodes[-1].type.shape[0], kernel, kernel)
        weights = {"weight": rng.integers(lo, hi + 1, shape, dtype=np.int8), "bias": np.zeros(width, np.int32)}
        nodes.append(make_node(name, "conv2d", [nodes[-1]], attrs=conv, arrays=weights))
        scales = {"multiplier": np.full(width, 2**20, np.int32), "shift": np.full(width, 32, np.uint8)}
        nodes.append(make_node(name + ".requantize", "requantize", [nodes[-1]], attrs=storage, arrays=scales))
    flat = int(np.prod(nodes[-1].type.shape))
    nodes.append(make_node("flat", "reshape", [nodes[-1]], attrs={"shape": [flat]}))
    weights = {"weight": rng.integers(lo, hi + 1, (10, flat), dtype=np.int8), "bias": np.zeros(10, np.int32)}
    nodes.append(make_node("output", "linear", [nodes[-1]], attrs={"weight_bits": bits}, arrays=weights))
    nodes.append(make_node("logits", "logits", [nodes[-1]], arrays={"scale": np.ones(10, np.float32)}))
    return Graph(tuple(nodes), {"arch": "chain"})


RESNET18 = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5


@pytest.mark.parametrize(("widths", "kernel"), [(RESNET18, 3), ([16] * 60, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_size_on_disk(widths, kernel, bits, tmp_path):
    graph = conv_chain(widths, kernel, bits)
    serialize.save(graph, tmp_path / "g")
    weights = [node.arrays["weight"] for node in graph.nodes if "weight" in node.arrays]
    packed = sum(-(-w.size * bits // 8) for w in weights)
    channels = sum(len(w) for w in weights)
    assert (tmp_path / "g").stat().st_size <= (packed + 9 * channels) * 1.05 + 64 * 1024


@pytest.fixture
def saved(random_graph, tmp_path):
    path = tmp_path / "model.safetensors"
    serialize.save(random_graph(2), path)
    return path


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        serialize.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_folder(tmp_path):
    refused(tmp_path / "none", "is missing")
    refused(tmp_path, "is not a file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    refused(saved, "not a complete safetensors file")


def test_garbage(saved):
    saved.write_bytes(b"\x80\x04garbage" * 100)
    refused(saved, "not a complete safetensors file")


def test_any_changed_byte_of_the_data_is_refused(saved):
    content = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(start, len(content), 37):
        changed = bytearray(content)
        changed[position] ^= 1
        saved.write_bytes(changed)
        refused(saved, "cannot use")


def rewrite(path, change):
    """Change the header of a file with the function `change`, leaving its tensors."""
    with safe_open(path, framework="numpy") as file:
        entry, tensors = file.metadata()[serialize.ENTRY], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header = json.loads(zlib.decompress(base64.b64decode(entry)))
    change(header)
    save_file(tensors, path, metadata={serialize.ENTRY: encoded(json.dumps(header).encode())})


def encoded(text):
    """A header entry as the file holds it."""
    return base64.b64encode(zlib.compress(text)).decode()


def test_other_formats(saved):
    save_file({"a": np.zeros(3)}, saved, metadata={"who": "else"})
    refused(saved, "not an integer graph")
    save_file({"a": np.zeros(3)}, saved)
    refused(saved, "not an integer graph")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["nodes"][1].update(op="teleport"), "'teleport', which this version does not know"),
        (lambda c: c["nodes"][0].update(inputs=["later"]), "not defined before it"),
        (lambda c: c["nodes"][0]["type"].__setitem__(4, 999), "the stored type is"),
        (lambda c: c.update(version=99), "version 99, expected 1"),
        (lambda c: c["nodes"].pop(), "belong to no node"),
        (lambda c: c.pop("nodes"), "KeyError"),
        (lambda c: c["meta"].update(arch="swapped"), "checksum does not match"),
        (lambda c: c.update(nodes=17), "TypeError"),
    ],
)
def test_edited_graphs(saved, change, message):
    rewrite(saved, change)
    refused(saved, message)


@pytest.mark.parametrize(
    "entry", ["?", encoded(b"{"), encoded(b"[]"), encoded(b"[" * 10**5), "", encoded(b" " * 1000)[:8]]
)
def test_header_that_is_no_json_object(saved, entry):
    save_file({}, saved, metadata={serialize.ENTRY: entry})
    refused(saved, "cannot use")


def test_a_header_that_inflates_without_end_is_refused(saved, monkeypatch):
    monkeypatch.setattr(serialize, "MAX_JSON", 1000)
    refused(saved, "cut off or too large")


def test_a_full_disk_leaves_the_old_file(saved, random_graph, monkeypatch):
    before = saved.read_bytes()

    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(serialize, "_write", full)
    with pytest.raises(UserError, match="No space left on device"):
        serialize.save(random_graph(3), saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_graph_that_does_not_verify_is_not_written(random_graph, tmp_path):
    graph = random_graph(0)
    with pytest.raises(ValueError, match="the last node"):
        serialize.save(Graph(graph.nodes[:-1]), tmp_path / "g")
    assert not (tmp_path / "g").exists()
