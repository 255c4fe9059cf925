"""Tile kernels: the registers' configuration, every shape of a unit, what the kernel refuses."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.tvm_benchmark.dense_graphs import Shape, conv, single
from tests.tvm_benchmark.kernels import check, clamp_attrs, finished, image, requantized
from tvm_benchmark.convolution import emit_with
from tvm_benchmark.dense import Tiling
from tvm_benchmark.isa import TARGETS, Target, runs_here
from tvm_benchmark.plan import Plan, Step, make_plan
from tvm_benchmark.source import Source
from tvm_benchmark.tiles import TileKernel, tile_config
from utils.integer_graph.ir import Graph
from utils.integer_graph.ops import make_node

AMX = TARGETS["amx"]
needs_tiles = pytest.mark.skipif(not runs_here(AMX), reason="this processor has no tile registers")
SHAPES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # (tiles, panel)


def test_the_configuration_gives_rows_and_bytes_of_each_register() -> None:
    config = tile_config(13, [6, 7])
    assert (config.dtype, config.shape) == (np.uint8, (64,))
    columns, rows = config[16:48].view(np.uint16), config[48:]
    assert (int(config[0]), int(config[1:16].max())) == (1, 0)
    assert columns.tolist() == [64] * 8 + [0] * 8
    assert rows.tolist() == [13] * 6 + [16] * 2 + [0] * 8


def kernel(tiling: Tiling) -> TileKernel:
    plan = make_plan(single(Shape(8, 100), (3, 34)), 1)
    return TileKernel(plan, next(step for step in plan.steps if step.kind == "conv"), AMX, tiling)


@pytest.mark.parametrize(("tiles", "panel"), SHAPES)
def test_no_register_has_two_uses(tiles: int, panel: int) -> None:
    config = kernel(Tiling(5, panel, tiles, kernel="tiles")).source.params[-1].array
    assert config is not None
    rows = config[48:56]
    accumulators = tiles * panel
    assert (rows[:accumulators] == 5).all()
    assert 1 <= (rows == 16).sum() <= 8 - accumulators
    assert (rows[4:] == 5).sum() >= 1


def test_more_than_four_accumulators_or_16_pixels_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        kernel(Tiling(16, 3, 2, kernel="tiles"))
    with pytest.raises(AssertionError):
        kernel(Tiling(17, 1, 1, kernel="tiles"))


def branches(shape: Shape, size: tuple[int, int], count: int) -> Graph:
    """The same convolution ``count`` times, its results added."""
    x = image((shape.inputs * shape.groups, *size), signed=True)
    anchors = [conv(f"c{i}", x, shape) for i in range(count)]
    low = [requantized(anchor) for anchor in anchors]
    arrays = {f"multiplier{i}": np.full(1, 1 << 10, np.int32) for i in range(count)}
    arrays |= {f"shift{i}": np.full(1, 14, np.uint8) for i in range(count)}
    total = make_node("sum", "add", low, attrs=clamp_attrs(), arrays=arrays)
    return finished([x, *anchors, *low, total])


@needs_tiles
@pytest.mark.tvm
@pytest.mark.parametrize("orders", [("panels", "pixels"), ("pixels", "panels")], ids=lambda orders: orders[0])
@pytest.mark.parametrize(
    ("shape", "size", "pixels"),
    [
        (Shape(70, 100), (5, 7), 16),
        (Shape(5, 50, kernel=(3, 3), padding=(1, 1, 1, 1), bits=4), (7, 6), 6),
        (Shape(20, 32, groups=2, kernel=(1, 3), stride=(1, 2), padding=(0, 0, 2, 1)), (5, 9), 3),
    ],
    ids=["point", "four bits", "groups"],
)
def test_every_shape_of_a_unit(shape: Shape, size: tuple[int, int], pixels: int, orders: tuple[str, str]) -> None:
    """Along rows in one order, along the whole image in the other."""
    tilings: Iterator[Tiling] = (
        Tiling(pixels, panel, tiles, order, "tiles", walk)
        for walk, order in zip(("rows", "long"), orders, strict=True)
        for tiles, panel in SHAPES
    )

    def emit(plan: Plan, step: Step, target: Target) -> Source:
        return emit_with(plan, step, target, next(tilings))

    check(branches(shape, size, 2 * len(SHAPES)), AMX, batch=2, emit_conv=emit)


@needs_tiles
@pytest.mark.tvm
def test_weights_that_are_fetched_ahead() -> None:
    check(single(Shape(160, 200, kernel=(3, 3), padding=(1, 1, 1, 1)), (6, 9)), AMX)


@needs_tiles
@pytest.mark.tvm
def test_tensors_that_are_far_away() -> None:
    check(single(Shape(3, 64, kernel=(3, 3), padding=(1, 1, 1, 1)), (67, 66)), AMX)
