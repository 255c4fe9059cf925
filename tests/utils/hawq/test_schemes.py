"""Bits are read off a file's integers: every published scheme is recognised, every other one refused with reasons."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bit_config
from tests.utils.hawq.original import network, original_key
from utils.errors import UserError
from utils.hawq.files import HawqFile, recognise
from utils.hawq.graph import float_layers, integer_graph
from utils.hawq.names import float_module
from utils.hawq.schemes import bits_of, choose_scheme, shown_bits, shows_bits
from utils.models import create_model
from utils.quantization_utils.cost_model import Layer

CASES = [(arch, name) for arch, schemes in bit_config.PUBLISHED.items() for name in schemes]
NAMES = {arch: list(schemes) for arch, schemes in bit_config.PUBLISHED.items()}


@pytest.fixture(scope="module")
def layers() -> Mapping[str, list[Layer]]:
    with torch.device("meta"):
        return {arch: float_layers(create_model(arch)) for arch in NAMES}


def integers_of(arch: str, bits: Mapping[str, int], names: Mapping[str, str]) -> HawqFile:
    """A file with two weights a layer, of which the greater one fills the bits; names: path -> the original's."""
    tensors = {f"{names[path]}.weight_integer": torch.tensor([1.0, -(2.0 ** (b - 1)) + 1]) for path, b in bits.items()}
    return HawqFile(Path("f.pth.tar"), tensors, True, arch)


def original_names(arch: str, layers: list[Layer]) -> dict[str, str]:
    """Path of a layer in the float network -> module of the original."""
    if arch == "inceptionv3":
        return {layer.name: _inception_name(layer.name) for layer in layers}
    keys = {layer.name: original_key(arch, f"{layer.name}.weight").removesuffix(".weight") for layer in layers}
    return {path: key if path == "output" else key.removesuffix(".conv") for path, key in keys.items()}


def _inception_name(path: str) -> str:
    if path == "output.fc":
        return "output.q_fc"
    *parents, name, _ = path.split(".")
    parents = [f"q_{part}" if part in ("init_block", "conv_list") else part for part in parents]
    return ".".join([*parents, f"q_{name}", "q_convbn"])


@pytest.mark.parametrize("percentile", [False, True])
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_published_schemes_are_recognised(
    layers: Mapping[str, list[Layer]], arch: str, name: str, percentile: bool
) -> None:
    """From integers alone; equal schemes are told apart by nobody.  A percentile clamps one further below."""
    bits = {path: pair.weight for path, pair in bits_of(name, arch, layers[arch]).items()}
    names = original_names(arch, layers[arch])
    assert {f"{float_module(names[path])}" for path in bits} == {path.removesuffix(".conv") for path in bits}
    file = integers_of(arch, bits, names)
    if percentile:
        file = replace(file, tensors={key: value - 1 for key, value in file.tensors.items()})
    found = choose_scheme(file, arch, layers[arch], None)
    assert bit_config.PUBLISHED[arch][found] == bit_config.PUBLISHED[arch][name]
    assert choose_scheme(file, arch, layers[arch], name) == name
    assert shows_bits(file)


@pytest.mark.parametrize("width", range(2, 9))
def test_widths_of_integers(width: int) -> None:
    greatest = 2.0 ** (width - 1) - 1
    for value, kind in ((greatest, torch.float32), (-greatest - 1, torch.float32), (-greatest - 1, torch.int8)):
        tensors = {"quant_output.weight_integer": torch.tensor([[0, value]]).to(kind)}
        assert shown_bits(HawqFile(Path("f"), tensors, True)) == {"quant_output.weight_integer": width}


def test_files_that_show_nothing() -> None:
    tensors = {"quant_output.weight_integer": torch.zeros(3, dtype=torch.int8), "quant_output.bias": torch.ones(3)}
    file = HawqFile(Path("f"), tensors | {"a.weight_integer": torch.zeros(0)}, False)
    assert shown_bits(file) == {}
    assert not shows_bits(file)


def resnet18(scheme: str = "bops_0.5", changed: Mapping[str, Tensor] | None = None) -> HawqFile:
    file = recognise(network("resnet18", scheme).checkpoint(), Path("f.pth.tar"))
    assert file is not None
    return replace(file, tensors={**file.tensors, **(changed or {})})


def test_another_scheme_names_the_first_entry_and_what_fits(layers: Mapping[str, list[Layer]]) -> None:
    message = (
        r"^f\.pth\.tar was not made with the scheme uniform4: stage1\.unit1\.quant_convbn1\.weight_integer has 8 bits "
        r"there, 4 in the scheme; it fits bops_0\.5$"
    )
    with pytest.raises(UserError, match=message):
        choose_scheme(resnet18(), "resnet18", layers["resnet18"], "uniform4")
    with pytest.raises(UserError, match=message):
        integer_graph(resnet18(), scheme="uniform4")


def test_bits_of_no_published_scheme(layers: Mapping[str, list[Layer]]) -> None:
    file = resnet18(changed={"stage1.unit1.quant_convbn1.weight_integer": torch.tensor([1.0, 2.0, 3.0])})
    with pytest.raises(UserError, match=r"has 3 bits there, 8 in the scheme; no published scheme of resnet18 fits it"):
        choose_scheme(file, "resnet18", layers["resnet18"], "uniform8")
    with pytest.raises(UserError, match=r"holds bit widths that fit no published scheme of resnet18 \(uniform8, "):
        choose_scheme(file, "resnet18", layers["resnet18"], None)


def without_integers(file: HawqFile) -> HawqFile:
    """As saved before the first forward, or stripped of what the original derives: widths are not shown."""
    return replace(file, tensors={k: v for k, v in file.tensors.items() if "_integer" not in k and "scaling" not in k})


def test_a_scheme_must_be_given_where_no_integers_show_it(layers: Mapping[str, list[Layer]]) -> None:
    file = without_integers(resnet18())
    message = r"does not show its bit widths, which may be any published scheme of resnet18 \(uniform8.*give --quant-sc"
    with pytest.raises(UserError, match=message):
        choose_scheme(file, "resnet18", layers["resnet18"], None)
    assert choose_scheme(file, "resnet18", layers["resnet18"], "uniform4") == "uniform4"


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    """The weights' bits are right, those of one activation are not: the recorded scale shows it."""
    path = tmp_path / "mine.yaml"
    rules = "[['stage1.unit1.body.conv2', [8, 4]], ['stage[12].unit2.body.conv2|stage3.unit2|stage4', 4], ['.*', 8]]"
    path.write_text(f"rules: {rules}\n")
    message = r"stage1\.unit1\.quant_act1\.act_scaling_factor is of 8 bits there, of 4 in the scheme; it fits bops_0\.5"
    with pytest.raises(UserError, match=message):
        integer_graph(resnet18(), scheme=str(path))
    assert integer_graph(without_integers(resnet18()), scheme=str(path)).graph.meta["scheme"] == "mine"


def test_residuals_of_8_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules: [['.*', 8]]\nresidual_bits: 8\n")
    with pytest.raises(UserError, match="has residual_bits 8, files of the original always 16"):
        integer_graph(resnet18("uniform8"), scheme=str(path))
