"""Every data movement of torch as nodes: moving element numbers through the nodes gives what torch gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.integer_graph.movement import materialise
from utils.integer_graph.ops import OPS, make_node

SHAPE = (6, 4, 5)


def source(shape=SHAPE):
    table = np.zeros((shape[0], 256), np.int16) + np.arange(-128, 128, dtype=np.int16)
    return make_node(
        "in", "image", attrs={"shape": shape, "bits": 8, "signed": True}, arrays={"table": table}, scale=1.0
    )


def moved(movement, shape=SHAPE):
    """Apply a torch function to an image by the nodes found for it; returns nodes, their result and torch's."""
    size = int(np.prod(shape))
    numbers = torch.arange(1, size + 1, dtype=torch.float64).reshape(1, *shape)
    index = movement(numbers)[0].numpy().astype(np.int64) - 1
    nodes, values = [], {}
    x = np.random.default_rng(0).integers(-128, 128, (2, *shape))
    node = materialise(source(shape), index, "m", lambda n: nodes.append(n) or n)
    values["in"] = x
    for n in nodes:
        values[n.name] = OPS[n.op].compute([values[i] for i in n.inputs], n)
    expected = movement(torch.from_numpy(x).double()).numpy().astype(np.int64)
    return nodes, values[node.name], expected


def shuffled(x, groups=3):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def space_to_depth(x):
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)


MOVEMENTS = {
    "identity": (lambda x: x, SHAPE, []),
    "flatten": (lambda x: x.flatten(1), SHAPE, ["reshape"]),
    "reshape": (lambda x: x.reshape(-1, 12, 5, 2), SHAPE, ["reshape"]),
    "slice": (lambda x: x[:, 1:4], SHAPE, ["gather"]),
    "chunk": (lambda x: x.chunk(2, 1)[1], SHAPE, ["gather"]),
    "shuffle": (shuffled, SHAPE, ["gather"]),
    "channel zeros": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 3)), SHAPE, ["gather"]),
    "zeros": (torch.zeros_like, SHAPE, ["gather"]),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3)), SHAPE, ["pad2d"]),
    "crop": (lambda x: x[:, :, 1:3, 2:], SHAPE, ["pad2d"]),
    "pad and crop": (lambda x: F.pad(x, (1, -2, -1, 0)), SHAPE, ["pad2d"]),
    "slice and pad": (lambda x: F.pad(x[:, ::2], (1, 1, 1, 1)), SHAPE, ["gather", "pad2d"]),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), SHAPE, ["upsample"]),
    "nearest, uneven": (lambda x: F.interpolate(x, size=(7, 9)), SHAPE, ["upsample", "max_pool"]),
    "nearest, down": (lambda x: F.interpolate(x, size=(2, 5)), SHAPE, ["max_pool"]),
    "stride": (lambda x: x[:, :, ::2, ::3], SHAPE, ["max_pool"]),
    "stride with offset": (lambda x: x[:, :, 1::2, 1::3], SHAPE, ["pad2d", "max_pool"]),
    "space to depth": (space_to_depth, (2, 4, 6), None),
    "transposition": (lambda x: x.transpose(1, 2), SHAPE, ["reshape", "gather", "reshape"]),
    "last to first": (lambda x: x.permute(0, 3, 1, 2).contiguous(), SHAPE, ["reshape", "gather", "reshape"]),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), SHAPE, ["reshape", "gather", "reshape"]),
    "flip": (lambda x: x.flip(2), SHAPE, ["reshape", "gather", "reshape"]),
    "vector slice": (lambda x: x[:, 2:5], (6,), ["gather"]),
    "vector to pixels": (lambda x: x[..., None, None], (6,), ["reshape"]),
    "vector to images": (lambda x: x[..., None, None].expand(-1, 6, 3, 2), (6,), ["reshape", "upsample"]),
    "pixels spread": (lambda x: x.expand(-1, 6, 3, 4), (6, 1, 1), None),
    "pixels regrouped": (lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6), (6, 1, 1), ["reshape", "gather"]),
}


@pytest.mark.parametrize("name", MOVEMENTS)
def test_nodes_move_what_torch_moves(name):
    movement, shape, ops = MOVEMENTS[name]
    nodes, found, expected = moved(movement, shape)
    assert np.array_equal(found, expected)
    if ops is not None:
        assert [node.op for node in nodes] == ops


def test_random_compositions():
    generator = np.random.default_rng(1)
    steps = [shuffled, lambda x: x.flip(3), lambda x: F.pad(x, (0, 1, 1, 0)), lambda x: x[:, :, 1:], lambda x: x * 0]
    steps += [
        lambda x: x.transpose(2, 3),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x[:, [3, 3, 0, 1, 5, 2]],
    ]
    for _ in range(40):
        chosen = generator.integers(0, len(steps), 3)

        def movement(x, chosen=chosen):
            for i in chosen:
                x = steps[i](x)
            return x

        _, found, expected = moved(movement)
        assert np.array_equal(found, expected)


def test_zero_channels_widen_the_bounds():
    table = np.full((2, 256), 7, np.int16)
    attrs = {"shape": (2, 1, 1), "bits": 8, "signed": False}
    image = make_node("in", "image", attrs=attrs, arrays={"table": table}, scale=1.0)
    padded = make_node("g", "gather", [image], arrays={"index": np.array([1, -1], np.int32)})
    assert (padded.type.lo, padded.type.hi) == (0, 7)
    plain = make_node("g", "gather", [image], arrays={"index": np.array([1], np.int32)})
    assert (plain.type.lo, plain.type.hi) == (7, 7)
