"""Size and BOPS against hand-counted layers and against the original's printed model zoo table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bit_config import load_scheme, resolve
from utils.quantization_utils import cost_model
from utils.quantization_utils.cost_model import Layer, LayerBits

LAYERS = [
    Layer("stem", "conv", 27 * 8, 27 * 8 * 16 * 16, 8, "image", True, False),
    Layer("norm", "affine", 8, 8 * 16 * 16, 8, "a", False, False),
    Layer("head", "linear", 80, 80, 10, "b", False, True),
]
BITS = {"stem": LayerBits(8, 8, ""), "norm": LayerBits(8, 8, ""), "head": LayerBits(4, 6, "")}


def test_uniform_convention_of_hand_counted_layers() -> None:
    assert cost_model.size_mib(LAYERS, BITS) == (27 * 8 + 8 + 80 / 2) / 2**20
    assert cost_model.bops_g(LAYERS, BITS) == (27 * 8 * 256 * 64 + 8 * 256 * 64 + 80 * 24) / 1e9
    assert cost_model.float_bops_g(LAYERS) == (27 * 8 * 256 + 8 * 256 + 80) * 32 * 32 / 1e9
    assert cost_model.float_size_mib(3 * 2**20) == 12


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 'x' has kind 'pool', expected one of conv, linear, affine"):
        Layer("x", "pool", 1, 1, 1, "a", False, False)


def test_a_missing_layer_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="norm"):
        cost_model.size_mib(LAYERS, {"stem": BITS["stem"]})


# --- The published table -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rows(shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / "reference" / "zoo_table.json").read_text())["rows"]


def resolved(network: Callable[..., Any], arch: str, scheme: str) -> tuple[list[Layer], dict[str, LayerBits]]:
    layers = network(arch).layers
    return layers, resolve(load_scheme(scheme, arch), layers)


def prints_as(value: float | None, printed: float, digits: int) -> bool:
    assert value is not None
    return f"{value:.{digits}f}" == f"{printed:.{digits}f}"


def test_uniform_convention_of_every_row(rows: list[dict[str, Any]], network: Callable[..., Any]) -> None:
    """The reference file holds our own convention beside the printed numbers, computed by another program."""
    for row in rows:
        net, computed = network(row["arch"]), row["computed"]
        if row["scheme"] is None:
            size, bops = cost_model.float_size_mib(net.parameters), cost_model.float_bops_g(net.layers)
        else:
            layers, bits = resolved(network, row["arch"], row["scheme"])
            size, bops = cost_model.size_mib(layers, bits), cost_model.bops_g(layers, bits)
        assert prints_as(size, computed["size_mib"], 4), row["name"]
        assert prints_as(bops, computed["bops_g"], 3), row["name"]


def test_published_convention_of_quantized_rows(rows: list[dict[str, Any]], network: Callable[..., Any]) -> None:
    """20 of 22 sizes and 20 of 22 BOPS to the last printed digit; the others are known not to follow any convention."""
    wrong_sizes, wrong_bops = set(), set()
    quantized = [row for row in rows if row["scheme"]]
    for row in quantized:
        layers, bits = resolved(network, row["arch"], row["scheme"])
        if not prints_as(cost_model.published_size_mib(row["arch"], layers, bits), row["size_mb"], 1):
            wrong_sizes.add(row["name"])
        if not prints_as(cost_model.published_bops_g(row["arch"], layers, bits), row["bops_g"], 0):
            wrong_bops.add(row["name"])
    assert len(quantized) == 22
    assert wrong_sizes == {"resnet50_uniform8", "resnet50_size0.25"}
    assert wrong_bops == {"resnet18_bops0.5", "resnet50_size0.25"}


def test_published_row_of_resnet50_size_25_is_the_optimum(
    rows: list[dict[str, Any]], network: Callable[..., Any]
) -> None:
    """With the layer that the original's integer program keeps at 8 bit, the printed numbers appear."""
    (row,) = [row for row in rows if row["name"] == "resnet50_size0.25"]
    layers, bits = resolved(network, "resnet50", "modelsize_0.25")
    kept = "features.stage3.unit6.body.conv1.conv"
    assert (bits[kept].weight, bits[kept].activation) == (4, 4)
    optimum = {**bits, kept: LayerBits(8, 8, "optimum")}
    assert prints_as(cost_model.published_size_mib("resnet50", layers, optimum), row["size_mb"], 1)
    assert prints_as(cost_model.published_bops_g("resnet50", layers, optimum), row["bops_g"], 0)


def test_published_convention_of_float_rows(rows: list[dict[str, Any]], network: Callable[..., Any]) -> None:
    wrong_sizes = set()
    for row in (row for row in rows if row["scheme"] is None):
        net = network(row["arch"])
        assert prints_as(cost_model.published_float_bops_g(row["arch"], net.layers), row["bops_g"], 0), row["name"]
        if not prints_as(
            cost_model.published_float_size_mib(row["arch"], net.layers, net.parameters), row["size_mb"], 1
        ):
            wrong_sizes.add(row["name"])
    assert wrong_sizes == {"resnet50_baseline", "resnet101_baseline", "resnet101b_baseline"}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_fitted_constants_lie_inside_what_the_table_allows(
    rows: list[dict[str, Any]], network: Callable[..., Any], arch: str
) -> None:
    """Every mixed row but the one whose bits were misprinted bounds the constant from both sides."""
    convention = cost_model.ZOO_MIXED_SIZE[arch]
    lows, highs = [], []
    mixed = [r for r in rows if r["arch"] == arch and r["scheme"] and not r["scheme"].startswith("uniform")]
    for row in mixed:
        if row["name"] == "resnet50_size0.25":
            continue
        layers, bits = resolved(network, arch, row["scheme"])
        size = cost_model.published_size_mib(arch, layers, bits)
        assert size is not None
        searched = size - convention.rest
        lows.append(row["size_mb"] - 0.05 - searched)
        highs.append(row["size_mb"] + 0.05 - searched)
    assert max(lows) < convention.rest < min(highs)
    assert min(highs) - max(lows) < 0.03  # the table leaves no room for another constant


def test_published_convention_is_none_elsewhere(network: Callable[..., Any]) -> None:
    for arch, scheme in [("mobilenetv2_w1", "uniform4"), ("inceptionv3", "uniform8"), ("resnet101", "uniform8")]:
        layers, bits = resolved(network, arch, scheme)
        assert cost_model.published_size_mib(arch, layers, bits) is None
        assert cost_model.published_bops_g(arch, layers, bits) is None
    assert cost_model.published_float_bops_g("mobilenetv2_w1", network("mobilenetv2_w1").layers) is None
    assert cost_model.published_float_size_mib("vgg11", network("resnet18").layers, 1) is None


@pytest.mark.parametrize("scheme", ["uniform3", "w4a8", "w8a4"])
def test_published_convention_knows_4_and_8_bits_only(network: Callable[..., Any], scheme: str) -> None:
    layers, bits = resolved(network, "resnet18", scheme)
    assert cost_model.published_size_mib("resnet18", layers, bits) is None
    assert cost_model.published_bops_g("resnet18", layers, bits) is None


def test_published_convention_needs_the_published_input_size_and_8_bit_ends(network: Callable[..., Any]) -> None:
    layers, bits = resolved(network, "resnet18", "uniform4")
    smaller = [replace(layers[0], macs=layers[0].macs // 4), *layers[1:]]
    assert cost_model.published_bops_g("resnet18", smaller, bits) is None
    assert cost_model.published_float_size_mib("resnet18", smaller, 1) is None
    free = {**bits, layers[0].name: LayerBits(4, 4, "")}
    assert cost_model.published_size_mib("resnet18", layers, free) is None
