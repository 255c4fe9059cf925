"""The summary table: every layer and total is in it, in at most 120 columns."""

from collections.abc import Callable
from typing import Any

import pytest

from bit_config import load_scheme, resolve
from utils.quantization_utils import cost_model
from utils.quantization_utils.cost_model import Layer, LayerBits
from utils.quantization_utils.scheme_report import WIDTH, format_table, shorten


def table(network: Callable[..., Any], arch: str, scheme: str) -> tuple[list[str], list[Layer], dict[str, LayerBits]]:
    net = network(arch)
    bits = resolve(load_scheme(scheme, arch), net.layers)
    text = format_table(net.layers, bits, arch, scheme=scheme, parameters=net.parameters)
    return text.split("\n"), net.layers, bits


def row_of(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.split()[:1] == [name]]
    return line.split()


@pytest.mark.parametrize(("arch", "scheme"), [("resnet18", "bops_0.5"), ("inceptionv3", "uniform4")])
def test_every_layer_has_its_line(network: Callable[..., Any], arch: str, scheme: str) -> None:
    lines, layers, bits = table(network, arch, scheme)
    assert max(map(len, lines)) <= WIDTH
    for layer in layers:
        _, kind, weights, macs, w, a, *reason = row_of(lines, layer.name)
        assert (kind, int(weights.replace(",", ""))) == (layer.kind, layer.weights)
        assert float(macs.replace(",", "")) == round(layer.macs / 1e6, 3)
        assert (int(w), int(a), " ".join(reason)) == (
            bits[layer.name].weight,
            bits[layer.name].activation,
            bits[layer.name].reason,
        )


def test_totals_show_both_conventions(network: Callable[..., Any]) -> None:
    lines, layers, bits = table(network, "resnet50", "bops_0.5")
    sizes = cost_model.size_mib(layers, bits), cost_model.published_size_mib("resnet50", layers, bits)
    bops = cost_model.bops_g(layers, bits), cost_model.published_bops_g("resnet50", layers, bits)
    expected = [*(f"{v:.2f}" for v in sizes), *(f"{v:.3f}" for v in bops)]
    assert row_of(lines, "bops_0.5")[1:] == expected
    float_size = cost_model.float_size_mib(network("resnet50").parameters)
    assert row_of(lines, "float")[1] == f"{float_size:.2f}"
    assert row_of(lines, "compression")[1] == f"{float_size / sizes[0]:.2f}x"


def test_what_was_not_published_is_a_dash(network: Callable[..., Any]) -> None:
    lines, _, _ = table(network, "mobilenetv2_w1", "w4a8")
    assert row_of(lines, "w4a8")[2::2] == ["-", "-"]
    assert row_of(lines, "compression")[2::2] == ["-", "-"]


def test_long_names_and_reasons_stay_inside_the_width() -> None:
    names = [f"backbone.{'deep.' * 30}block{i}.conv" for i in range(3)]
    layers = [Layer(name, "conv", 10**9, 10**12, 1, name, False, False) for name in names]
    bits = {name: LayerBits(4, 8, f"rule '.*'; tied to {names[0]}") for name in names}
    lines = format_table(layers, bits, "net", scheme="a scheme " * 20, parameters=10**10).split("\n")
    assert max(map(len, lines)) <= WIDTH
    assert [line for line in lines if "block2.conv  conv  1,000,000,000  1,000,000.000  4  8  rule" in line]


@pytest.mark.parametrize("width", [4, 5, 9, 10, 11, 12])
def test_shorten_keeps_both_ends(width: int) -> None:
    text = "abcdefghijk"
    short = shorten(text, width)
    assert len(short) == min(width, len(text))
    head, _, tail = short.partition("...")
    assert text.startswith(head)
    assert text.endswith(tail)
