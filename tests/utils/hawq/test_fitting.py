"""Which network a file is of: found where it does not say, refused where it says or shows another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.utils.hawq.original import network
from utils.errors import UserError
from utils.hawq.files import HawqFile, recognise
from utils.hawq.fitting import architecture, fitting_architectures, float_network


def file_of(arch: str = "resnet18", *, integers: bool = False) -> HawqFile:
    original = network(arch, "bops_0.5")
    file = recognise(original.quantized_checkpoint() if integers else original.checkpoint(), Path("f.pth.tar"))
    assert file is not None
    return file


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2_w1"])
def test_network_and_classes_are_found(arch: str, integers: bool) -> None:
    file = replace(file_of(arch, integers=integers), arch=None)
    assert fitting_architectures(file) == [arch]
    info = float_network(file, None)
    assert (info.name, info.num_classes) == (arch, 10)


@pytest.mark.data
@pytest.mark.parametrize(
    ("arch", "expected"),
    [("resnet50", ["resnet50", "resnet50b"]), ("resnet101", ["resnet101"]), ("inceptionv3", ["inceptionv3"])],
)
def test_recorded_layouts(shared: Path, arch: str, expected: list[str]) -> None:
    """resnet50b has the same weights as resnet50 and another stride: the user must say which."""
    layout = json.loads((shared / "reference" / "hawq_golden" / f"layout_{arch}.json").read_text())
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape, _, _ in layout["quant"]}
    assert fitting_architectures(HawqFile(Path("f"), tensors, False)) == expected


def test_networks_that_fit_are_named() -> None:
    file = replace(file_of(), arch=None, tensors={"quant_input.x_max": torch.zeros(1)})
    with pytest.raises(UserError, match="does not say which network it is of; give -a, one of resnet18, resnet50, "):
        architecture(file, None)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet50", r"f\.pth\.tar is a checkpoint of resnet18, not of resnet50; give -a resnet18"),
        ("vgg16", r"is a checkpoint of resnet18, not of vgg16"),
    ],
)
def test_another_architecture_than_the_file_names(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        float_network(file_of(), arch)


def test_an_architecture_that_the_original_lacks() -> None:
    with pytest.raises(UserError, match=r"the original HAWQ has no vgg16, so f\.pth\.tar cannot be one; it has resn"):
        float_network(replace(file_of(), arch="vgg16"), None)


@pytest.mark.parametrize("integers", [False, True])
def test_another_architecture_than_the_weights_show(integers: bool) -> None:
    """Named are the first entry that disagrees, and what fits."""
    file = replace(file_of(integers=integers), arch=None)
    leaf = "weight_integer" if integers else r"conv\.weight"
    disagreement = rf"stage1\.unit1\.quant_convbn1\.{leaf} has shape \[64, 64, 3, 3\], \[64, 64, 1, 1\] there"
    with pytest.raises(UserError, match=rf"f\.pth\.tar is no checkpoint of resnet50: {disagreement}; it fits resnet18"):
        float_network(file, "resnet50")


def test_entries_without_a_place() -> None:
    with pytest.raises(UserError, match=r"quant_init_block_convbn\.conv\.weight \[64, 3, 7, 7\] has no place there"):
        float_network(replace(file_of(), arch=None), "mobilenetv2_w1")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("stage4.unit2.quant_convbn2.conv.weight", r"nothing for features\.stage4\.unit2\.body\.conv2\.conv\.weight"),
        ("stage1.unit1.quant_convbn1.bn.running_var", r"nothing for .*stage1\.unit1\.body\.conv1\.bn\.running_var"),
        ("quant_output.bias", r"nothing for output\.bias \[10\]; it fits no network of the original"),
    ],
)
def test_missing_entries(key: str, message: str) -> None:
    file = file_of()
    tensors = {name: value for name, value in file.tensors.items() if name != key}
    with pytest.raises(UserError, match=f"it has {message}"):
        float_network(replace(file, tensors=tensors), None)


def test_counters_may_be_absent() -> None:
    file = file_of()
    tensors = {name: value for name, value in file.tensors.items() if not name.endswith("num_batches_tracked")}
    assert float_network(replace(file, tensors=tensors), None).num_classes == 10


def test_another_number_of_classes() -> None:
    with pytest.raises(UserError, match="is a network of 10 classes, not of 1000; leave out --num-classes"):
        float_network(file_of(), None, 1000)
    assert float_network(file_of(), None, 10).num_classes == 10
