"""Both networks unit by unit: what the walk keeps is what whole passes give, and no more memory than it says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.utils.quantization_utils.test_reconstruct import float_answers, images, network
from utils.quantization_utils.blocks import Unit, block_units, layer_units
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.side_by_side import SideBySide, peak_bytes

COUNT = 40  # two batches, the second one smaller
Units = Callable[[list[Op]], list[Unit]]


def kept_bytes(walk: SideBySide) -> int:
    """Memory of both caches; tensors under two names count once."""
    stored = {id(memory): memory for cache in (walk.quantized, walk.floating) for memory, _ in cache._stored.values()}
    return sum(memory.numel() * memory.element_size() for memory in stored.values())


def walked(model: QuantizedModel, units: list[Unit], batch: Tensor) -> tuple[SideBySide, int]:
    """The walk after its last unit, which is not forgotten, and the most memory it held."""
    walk, most = SideBySide(model, units, batch), 0
    for position, unit in enumerate(units):
        walk.float_outputs(unit)
        walk.quantized_outputs(unit)
        most = max(most, kept_bytes(walk))
        if position + 1 < len(units):
            walk.forget(position)
    return walk, most


@pytest.mark.parametrize("split", [layer_units, block_units])
def test_the_last_unit_answers_as_the_whole_network(split: Units) -> None:
    model, batch = network(), images(COUNT)
    units = split(model.ops)
    walk, _ = walked(model, units, batch)
    everything = slice(None)
    with torch.no_grad():
        answers = model(batch)
    name = units[-1].outputs[-1]
    assert torch.allclose(walk.floating.fetch(name, everything), float_answers(model, batch), atol=1e-5)
    assert torch.allclose(walk.quantized.fetch(name, everything), answers, atol=1e-5)
    assert not torch.allclose(answers, float_answers(model, batch), atol=1e-2)


def test_a_branch_of_a_sum_makes_up_for_the_other_branch() -> None:
    """What it should be plus what the other branch is, is what the sum should be."""
    model, batch = network("w2a8"), images(COUNT)
    units = layer_units(model.ops)
    walk = SideBySide(model, units, batch)
    everything, found = slice(None), []
    for position, unit in enumerate(units):
        walk.float_outputs(unit)
        if walk.lacking(unit, lambda cache, name: cache.fetch(name, everything)) is not None:
            (branches,) = (op.inputs for op in model.ops if op.kind == "add")
            (partner,) = (name for name in branches if name != unit.target)
            other = walk.quantized.fetch(partner, everything)
            assert not torch.equal(other, walk.floating.fetch(partner, everything))
            total = sum(walk.floating.fetch(name, everything) for name in branches)
            assert torch.allclose(walk.wanted(unit, everything) + other, total, atol=1e-5)
            found.append(unit.name)
        else:
            assert torch.equal(walk.wanted(unit, everything), walk.floating.fetch(unit.target, everything))
        walk.quantized_outputs(unit)
        walk.forget(position)
    assert found == ["wide.0"]


@pytest.mark.parametrize("split", [layer_units, block_units])
def test_memory_is_foretold(split: Units) -> None:
    model = network()
    units = split(model.ops)
    _, most = walked(model, units, images(COUNT))
    assert most <= peak_bytes(model, units, COUNT) <= 1.5 * most


@pytest.mark.parametrize("count", [3, COUNT])
def test_errors_and_power_by_channel(count: int) -> None:
    model, batch = network(), images(count)
    units = layer_units(model.ops)
    walk, _ = walked(model, units[:1], batch)
    unit, everything = units[0], slice(None)
    assert unit.outputs == (unit.target,)
    wanted = walk.floating.fetch(unit.target, everything).double()
    squares = (walk.quantized.fetch(unit.target, everything) - wanted).square().sum((2, 3))
    checked = slice(30, None) if count == COUNT else slice(2, None)
    assert list(walk.checked) == list(range(count))[checked]
    assert list(walk.learned) == list(range(30 if count == COUNT else 3))
    errors, of_checked = walk.errors(unit)
    assert torch.allclose(errors, squares.sum(0))
    assert torch.allclose(of_checked, squares[checked].sum(0))
    assert torch.allclose(walk.power(unit), wanted.square().sum((0, 2, 3)))


def test_float_outputs_leave_quantization_on() -> None:
    model, batch = network(), images(COUNT)
    with torch.no_grad():
        before = model(batch)
    units = layer_units(model.ops)
    SideBySide(model, units, batch).float_outputs(units[0])
    with torch.no_grad():
        assert torch.equal(model(batch), before)
