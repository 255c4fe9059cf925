"""Ties, fixed layers and costs: what the search adds up is what the prepared network then costs."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bit_config import Rule, load_scheme, resolve, save_scheme
from utils.errors import UserError
from utils.experiment import quantize_module
from utils.layer_latency import write_layer_latency
from utils.models import create_model
from utils.quantization_utils.bit_width_problem import Budget, tied_names
from utils.quantization_utils.bit_width_search import solve
from utils.quantization_utils.cost_model import Layer, LayerBits, bops_g, size_mib
from utils.quantization_utils.ilp_tables import damage_of_tables
from utils.quantization_utils.layer_costs import build_problem, fixed_layers, read_latency, ties_of
from utils.quantization_utils.quant_modules import QuantLayer


class TwoReaders(nn.Module):
    """A convolution called twice, two that read one tensor, a standalone BN that reads it too, two heads' sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.after = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = torch.relu(self.left(x) + self.right(x))
        x = torch.relu(self.bn(x)) + torch.relu(self.after(x))
        return self.fc(x.mean((2, 3)))


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "two readers":
        return TwoReaders(), torch.zeros(1, 3, 8, 8)
    info = create_model(name)
    return info.module, torch.zeros(1, *info.preprocess.input_shape)


def random_damage(layers: list[Layer], widths: tuple[int, ...]) -> dict[str, dict[int, float]]:
    return {layer.name: {bits: random.random() / bits for bits in (*widths, 8)} for layer in layers}


@pytest.mark.parametrize("name", ["digits", "two readers", "resnet20_cifar10", "preresnet20_cifar10"])
def test_the_prepared_network_costs_what_the_search_said(name: str, tmp_path: Path) -> None:
    """Through the scheme file: bits of weights and of the quantizer in front of every layer, size and BOPS."""
    module, example = network(name)
    _, layers, _ = quantize_module(module, example, load_scheme("uniform8", name))
    widths = (2, 4, 8)
    for seed in range(3):
        random.seed(seed)
        fixed = {layer: bits for layer, (bits, _) in fixed_layers(layers).items()}
        budgets = (Budget("size", 0.5, True), Budget("bops", 0.5, True), Budget("mean_bits", 0.6, True))
        problem = build_problem(layers, random_damage(layers, widths), widths, budgets, fixed=fixed)
        solution = solve(problem)
        chosen = {layer: LayerBits(bits, bits, "searched") for layer, bits in solution.bits.items()}
        save_scheme(tmp_path / "s.yaml", chosen, name="s", comments=["two\nlines", "and: one"])
        scheme = load_scheme(str(tmp_path / "s.yaml"), name)
        model, _, bits = quantize_module(network(name)[0], example, scheme)
        assert {layer: (b.weight, b.activation) for layer, b in bits.items()} == {
            layer: (b.weight, b.activation) for layer, b in chosen.items()
        }
        assert solution.use["size"] == pytest.approx(size_mib(layers, bits), rel=1e-12)
        assert solution.use["bops"] == pytest.approx(bops_g(layers, bits), rel=1e-12)
        weights = sum(layer.weights for layer in layers)
        assert solution.use["mean_bits"] == pytest.approx(size_mib(layers, bits) * 8 * 2**20 / weights, rel=1e-12)
        for layer, quantized in model.weight_layers().items():
            assert quantized._source[0].bits == solution.bits[layer]
            if isinstance(quantized, QuantLayer):
                assert quantized.bits == solution.bits[layer]


def test_ties() -> None:
    """A tie of a module's calls, one of readers; a layer tied to a standalone BN has its 8 bits."""
    _, layers, _ = quantize_module(*network("two readers"), load_scheme("uniform8", ""))
    ties = ties_of(layers)
    assert set(ties) == {("twice", "twice#2"), ("left", "right"), ("bn", "after")}
    fixed = {layer: bits for layer, (bits, _) in fixed_layers(layers).items()}
    assert fixed == {"stem": 8, "bn": 8, "fc": 8}
    problem = build_problem(layers, random_damage(layers, (4,)), (4,), (), fixed=fixed)
    assert tied_names(problem) == [("stem",), ("twice", "twice#2"), ("left", "right"), ("bn", "after"), ("fc",)]
    bits = solve(problem).bits
    assert bits == {"stem": 8, "twice": 4, "twice#2": 4, "left": 4, "right": 4, "bn": 8, "after": 8, "fc": 8}


def layer(name: str, **changed: Any) -> Layer:
    fields = {"kind": "conv", "weights": 2**20, "macs": 10**9, "channels": 1, "reads": f"into {name}"}
    return Layer(name, **{**fields, "first": False, "last": False, **changed})


LAYERS = [
    layer("stem", first=True),
    layer("body.a"),
    layer("body.b", weights=2**21),
    layer("norm", kind="affine"),
    layer("head", kind="linear", last=True),
]


def test_fixed_layers() -> None:
    assert fixed_layers(LAYERS) == {
        "stem": (8, "fixed: first layer"),
        "norm": (8, "fixed: standalone BN"),
        "head": (8, "fixed: last layer"),
    }
    changed = fixed_layers(LAYERS, (Rule("stem", 4), Rule("body.a", 2), Rule("body", 3), Rule("norm", 8)))
    assert changed == {
        "stem": (4, "fixed by 'stem'"),
        "body.a": (2, "fixed by 'body.a'"),
        "body.b": (3, "fixed by 'body'"),
        "norm": (8, "fixed: standalone BN"),
        "head": (8, "fixed: last layer"),
    }


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (Rule("stage9", 4), "--search-fix 'stage9' occurs in no layer name, such as 'stem'"),
        (Rule("norm", 4), "--search-fix 'norm' only matches standalone BN, which always has 8 bits"),
        (Rule("body", (4, 8)), r"--search-fix 'body' has the bits \(4, 8\), expected one number"),
    ],
)
def test_rules_that_fix_nothing(rule: Rule, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fixed_layers(LAYERS, (rule,))


DAMAGE = {"body.a": {4: 0.5, 8: 0.25}, "body.b": {4: 2.0, 8: 0.125}, "head": {8: 0.0625}}
FIXED = {"stem": 8, "norm": 8, "head": 8}
LATENCY = {"body.a": {4: 1.0, 8: 2.0}, "body.b": {4: 3.0, 8: 4.0}, "head": {8: 0.5}}


def test_costs() -> None:
    """Fixed layers count with what is known of them."""
    problem = build_problem(LAYERS, DAMAGE, (4, 8), (), fixed=FIXED, latency=LATENCY)
    found = {x.name: {o.bits: (o.damage, dict(o.costs)) for o in x.options} for x in problem.layers}
    assert list(found["stem"]) == list(found["norm"]) == list(found["head"]) == [8]
    assert found["body.b"][4] == (2.0, {"size": 1.0, "bops": 16.0, "mean_bits": 4 * 2 / 6, "latency": 3.0})
    assert found["stem"][8] == (0.0, {"size": 1.0, "bops": 64.0, "mean_bits": 8 / 6, "latency": 0.0})
    assert found["head"][8][0] == 0.0625
    assert found["head"][8][1]["latency"] == 0.5


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"damage": {}}, "no damage of the layer 'body.a' at 4 bits; measure again, or leave out 4"),
        ({"widths": (2, 8)}, "no damage of the layer 'body.a' at 2 bits"),
        ({"latency": {"body.a": LATENCY["body.a"]}}, "no latency of the layer 'body.b' at 4 bits"),
    ],
)
def test_searched_layers_need_numbers(changed: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"damage": DAMAGE, "widths": (4, 8), "budgets": (), "latency": LATENCY} | changed
    with pytest.raises(UserError, match=sentence):
        build_problem(LAYERS, fixed=FIXED, **arguments)


def test_tied_layers_fixed_to_different_bits() -> None:
    layers = [layer("a", reads="x"), layer("b", reads="x")]
    with pytest.raises(UserError, match=r"a \(4 bit\) and b \(8 bit\) must share their bits"):
        solve(build_problem(layers, {}, (4, 8), (), fixed={"a": 4, "b": 8}))


def test_latency_of_a_file(tmp_path: Path) -> None:
    write_layer_latency(tmp_path / "l.csv", {"body.a": {8: 2.0, 4: 1.0}})
    assert read_latency(tmp_path / "l.csv", "any", LAYERS)["body.a"] == {
        **dict.fromkeys((2, 3, 4), 1.0),
        **dict.fromkeys((5, 6, 7, 8), 2.0),
    }


def test_latency_of_the_original(shared: Path) -> None:
    layers = [layer("features.stage1.unit1.body.conv1.conv"), layer("other")]
    found = read_latency(shared / "reference" / "ilp_tables.json", "resnet18", layers)
    assert {name: (row[4], row[8]) for name, row in found.items()} == {layers[0].name: (0.21094404, 0.36189111)}


def test_the_published_search_of_resnet18_is_ours(shared: Path, network_layers: list[Layer]) -> None:
    """Our costs and ties with the original's damage give its latency_0.5 from the same budget."""
    tables = shared / "reference" / "ilp_tables.json"
    from_tables = damage_of_tables(tables, "resnet18", [x.name for x in network_layers])
    fixed = {name: bits for name, (bits, _) in fixed_layers(network_layers).items()}
    latency = read_latency(tables, "resnet18", network_layers)
    for kind, scheme in (("size", "modelsize"), ("bops", "bops"), ("latency", "latency")):
        budgets = (Budget(kind, 0.5, True),)
        problem = build_problem(network_layers, from_tables, (4, 8), budgets, fixed=fixed, latency=latency)
        published = resolve(load_scheme(f"{scheme}_0.5", "resnet18"), network_layers)
        assert solve(problem).bits == {name: bits.weight for name, bits in published.items()}


@pytest.fixture(scope="module")
def network_layers() -> list[Layer]:
    module, example = network("resnet18")
    return quantize_module(module, example, load_scheme("uniform8", "resnet18"))[1]
