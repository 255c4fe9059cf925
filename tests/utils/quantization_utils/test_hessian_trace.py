"""Traces against exact Hessians of small networks, and their standard errors against what seeds really do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.api import calibrate, quantize
from utils.quantization_utils.fold_bn import affine_of
from utils.quantization_utils.hessian_trace import (
    PROBES_PER_VISIT,
    Trace,
    hessian_traces,
    input_name,
    new_sums,
    number_of_probes,
)
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.sensitivity_state import Progress, Settings
from utils.quantization_utils.single_layer import untouched
from utils.random_networks import random_images, spread_statistics

COUNT, CLASSES = 24, 5
SEEDS = 40
ALL = Settings(max_probes=8, tolerance=1e-9)  # 5 classes: all probes there are
FEW = Settings(max_probes=2)


class Piecewise(nn.Module):
    """Convolutions with BatchNorm, ReLU6, a sum, max and average pools: piecewise linear in each layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(torch.relu(self.body(x) + x))
        return self.head(x.mean((2, 3)))


class Curved(nn.Module):
    """A swish and a gate (product of two tensors) in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU())
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.gate(x))
        return self.head(2 * x.mean((2, 3)))


def images() -> Tensor:
    return (random_images((3, 6, 6), COUNT, 0).float() - 128) / 64


def labels() -> Tensor:
    return torch.arange(COUNT) % CLASSES


def network(kind: Callable[[], nn.Module]) -> QuantizedModel:
    torch.manual_seed(2)
    module = kind()
    spread_statistics(module, images())
    with torch.no_grad():
        module.get_parameter("head.weight").mul_(3)
    model = quantize(module, torch.zeros(1, 3, 6, 6), "uniform8")
    calibrate(model, [images()])
    return model


def traces(model: QuantizedModel, settings: Settings, activations: bool = False) -> dict[str, Trace]:
    progress = Progress(None, {}, "", new_sums(COUNT, model, activations), 1e9)
    with untouched(model):
        return hessian_traces(model, [(images(), labels())], settings, progress, activations)


def quant_layers(model: QuantizedModel) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in model.weight_layers().items() if isinstance(layer, QuantLayer)}


def exact(model: QuantizedModel) -> dict[str, float]:
    """Traces of the Hessian by torch, of the module itself; per output channel over the BatchNorm's factor squared."""
    module = model.model.eval()
    found = {}
    for name, layer in quant_layers(model).items():
        weight = layer.module.weight.detach()
        rows = len(weight)

        def loss(flat: Tensor, name: str = name, like: Tensor = weight) -> Tensor:
            logits = torch.func.functional_call(module, {f"{name}.weight": flat.reshape(like.shape)}, images())
            return F.cross_entropy(logits, labels())

        hessian = torch.autograd.functional.hessian(loss, weight.reshape(-1))
        by_row = torch.diagonal(hessian).reshape(rows, -1).sum(1)
        factor = torch.ones(rows) if layer.bn is None else affine_of(layer.bn)[0].detach()
        found[name] = float((by_row / factor.square()).sum())
    return found


def test_number_of_probes_covers_the_classes() -> None:
    assert [number_of_probes(n) for n in (1, 2, 3, 10, 1000)] == [1, 2, 4, 16, 1024]


def test_all_probes_give_the_exact_trace_of_a_piecewise_linear_network() -> None:
    model = network(Piecewise)
    found, expected = traces(model, ALL), exact(model)
    assert list(found) == list(expected) == ["stem.0", "body.0", "head"]
    for name in found:
        assert found[name].error == 0
        assert found[name].value == pytest.approx(expected[name], rel=1e-3)
        assert found[name].elements == quant_layers(model)[name].module.weight.numel()


def test_few_probes_are_within_their_own_confidence_interval() -> None:
    model = network(Piecewise)
    found, expected = traces(model, FEW), exact(model)
    for name in found:
        assert 0 < found[name].error < 0.2 * found[name].value
        assert abs(found[name].value - expected[name]) < 4 * found[name].error


def test_a_curved_network_is_within_its_own_confidence_interval() -> None:
    model = network(Curved)
    found, expected = traces(model, replace(ALL, max_probes=64)), exact(model)
    for name in ("stem.0", "gate"):
        assert found[name].error > 0
        assert abs(found[name].value - expected[name]) < 4 * found[name].error
    assert found["stem.0"].error < 0.2 * found["stem.0"].value
    assert found["head"].error == 0  # nothing curved behind it
    assert found["head"].value == pytest.approx(expected["head"], rel=1e-3)


@pytest.mark.parametrize(("kind", "names"), [(Piecewise, ("stem.0", "body.0", "head")), (Curved, ("stem.0", "gate"))])
def test_intervals_cover_the_exact_trace_as_often_as_they_say(kind: Callable[[], nn.Module], names: list[str]) -> None:
    """Of 40 seeds 95 % are 38; 33 or fewer, or a mean square beyond 2, have a chance below 1 in 100."""
    model = network(kind)
    expected = exact(model)
    runs = [traces(model, replace(FEW, seed=seed)) for seed in range(SEEDS)]
    for name in names:
        scores = [(run[name].value - expected[name]) / run[name].error for run in runs]
        assert sum(abs(score) < 2.06 for score in scores) > 33  # Student's t with 24 degrees of freedom
        assert 0.4 < sum(score * score for score in scores) / SEEDS < 2
        assert abs(sum(scores)) / SEEDS**0.5 < 3.5


def test_the_curvature_of_the_logits_matters() -> None:
    """So that the test of the curved network would fail without that part."""
    model = network(Curved)
    model.ops = [replace(op, kind="clip") if op.kind in ("function", "mul") else op for op in model.ops]
    without = traces(model, ALL)
    expected = exact(model)
    assert abs(without["stem.0"].value - expected["stem.0"]) > 0.02 * abs(expected["stem.0"])


def test_traces_of_what_layers_read() -> None:
    model = network(Piecewise)
    found = traces(model, ALL, activations=True)
    module = model.model.eval()
    assert isinstance(module, Piecewise)

    def of_image(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(module.head(x.reshape(1, -1)), target.reshape(1, -1))

    with torch.no_grad():
        stem = module.stem(images())
        features = module.pool(torch.relu(module.body(stem) + stem)).mean((2, 3))
    pairs = zip(features, F.one_hot(labels(), CLASSES).float(), strict=True)
    hessians: list[Any] = [torch.autograd.functional.hessian(of_image, pair)[0][0] for pair in pairs]
    sizes = [hessian.trace() for hessian in hessians]
    head = found[input_name("head")]
    assert head.value == pytest.approx(float(torch.stack(sizes).mean()), rel=1e-3)
    assert head.elements == 4
    assert found[input_name("stem.0")].elements == 3 * 6 * 6
    assert {name: found[name] for name in ("stem.0", "head")} == {
        name: trace for name, trace in traces(model, ALL).items() if name in ("stem.0", "head")
    }


def test_it_stops_when_the_largest_layers_are_known_well_enough() -> None:
    model = network(Piecewise)
    steps = []
    for tolerance in (1.0, 1e-9):
        progress = Progress(None, {}, "", new_sums(COUNT, model, False), 1e9)
        with untouched(model):
            hessian_traces(model, [(images(), labels())], replace(ALL, tolerance=tolerance, max_probes=64), progress)
        steps.append(progress.position)
    assert steps == [2 * COUNT, 8 // PROBES_PER_VISIT * COUNT]  # 30 degrees of freedom; all probes there are


def test_the_same_seed_gives_the_same_traces() -> None:
    model = network(Curved)
    assert traces(model, FEW) == traces(model, FEW)
    assert traces(model, FEW) != traces(model, replace(FEW, seed=1))
