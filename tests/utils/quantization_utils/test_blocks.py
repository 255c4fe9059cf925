"""Where networks are cut."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from utils.api import quantize
from utils.models import create_model
from utils.quantization_utils.blocks import Unit, block_units, layer_units
from utils.quantization_utils.prepare import QuantizedModel


def network(arch: str) -> QuantizedModel:
    info = create_model(arch)
    return quantize(info.module, torch.zeros(1, *info.preprocess.input_shape), "uniform4")


def names(units: list[Unit]) -> list[list[str]]:
    return [[op.attrs["layer"] for op in unit.layers] for unit in units if unit.layers]


def complete(model: QuantizedModel, units: list[Unit]) -> bool:
    """Every operator is in one unit (batch-size arithmetic perhaps in several), and reads what exists by then."""
    ready = {op.name for op in model.ops if op.kind == "input"}
    done: list[str] = []
    for unit in units:
        assert set(unit.inputs) <= ready
        own = [op.name for op in unit.ops if op.kind != "host"]
        known = ready | {op.name for op in unit.ops}
        assert all(name in known for op in unit.ops for name in op.inputs)
        assert unit.target in own
        done += own
        ready |= set(unit.outputs)
    return sorted(done) == sorted(op.name for op in model.ops if op.kind not in ("input", "host"))


@pytest.mark.parametrize("arch", ["resnet20_cifar10", "mobilenetv2_w1", "resnet18", "inceptionv3", "densenet121"])
def test_units_cover_the_network_in_order(arch: str) -> None:
    model = network(arch)
    assert complete(model, layer_units(model.ops))
    assert complete(model, block_units(model.ops))
    assert all(len(unit.layers) <= 1 for unit in layer_units(model.ops))


def test_blocks_of_a_resnet_are_its_residual_blocks() -> None:
    found = names(block_units(network("resnet20_cifar10").ops))
    assert len(found) == 1 + 9 + 1
    assert found[0] == ["features.init_block.conv"]
    assert found[1] == [f"features.stage1.unit1.body.conv{i}.conv" for i in (1, 2)]
    assert sorted(found[4]) == [
        *(f"features.stage2.unit1.body.conv{i}.conv" for i in (1, 2)),
        "features.stage2.unit1.identity_conv.conv",
    ]
    assert found[-1] == ["output"]


def test_blocks_of_a_mobilenet_are_its_inverted_bottlenecks() -> None:
    found = names(block_units(network("mobilenetv2_w1").ops))
    units = [(stage, unit) for stage, count in enumerate((1, 2, 3, 7, 4), 1) for unit in range(1, count + 1)]
    expected = [[f"features.stage{s}.unit{u}.conv{i}.conv" for i in (1, 2, 3)] for s, u in units]
    assert found == [["features.init_block.conv"], *expected, ["features.final_block.conv", "output"]]


def test_blocks_of_a_densenet_are_its_units() -> None:
    found = names(block_units(network("densenet121").ops))
    assert len(found) == 1 + 58 + 3 + 1
    assert all(len(layers) == 2 for layers in found if ".unit" in layers[0])


def test_a_part_that_is_too_large_and_has_no_place_to_cut_is_taken_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.quantization_utils.blocks.LARGEST_BLOCK", 2)
    model = network("resnet20_cifar10")
    units = block_units(model.ops)
    assert complete(model, units)
    assert [layers for layers in names(units) if "stage2.unit1" in layers[0]] == [
        [f"features.stage2.unit1.{name}"] for name in ("identity_conv.conv", "body.conv1.conv", "body.conv2.conv")
    ]
    assert ["features.stage1.unit1.body.conv1.conv", "features.stage1.unit1.body.conv2.conv"] in names(units)


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        y = self.b(x) + self.c(x)
        return torch.flatten(y, 1)


def test_a_layer_ends_at_a_fork_and_at_a_sum() -> None:
    model = quantize(Forked(), torch.zeros(1, 3, 4, 4), "uniform4")
    kinds = {
        unit.layers[0].attrs["layer"]: [op.kind for op in unit.ops] for unit in layer_units(model.ops) if unit.layers
    }
    assert kinds["a"][:2] == ["conv", "quantize"]
    assert kinds["b"] == kinds["c"] == ["conv"]
    assert names(block_units(model.ops)) == [["a"], ["b", "c"]]


def test_straight_rows_are_cut_where_least_flows() -> None:
    widths = [3, 32, 4, 32, 4, 32, 4]
    convs = [nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)]
    model = quantize(nn.Sequential(*convs, nn.Flatten()), torch.zeros(1, 3, 4, 4), "uniform4")
    assert names(block_units(model.ops, most=2)) == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert [len(layers) for layers in names(block_units(model.ops, most=1))] == [1] * 6
