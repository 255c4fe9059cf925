"""Balancing keeps the function, finds the best factors, and makes rounding better where columns are badly sized."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.api import quantize
from utils.errors import UserError
from utils.quantization_utils import balance as module
from utils.quantization_utils.balance import balance, best_factors
from utils.quantization_utils.channel_groups import Group, find_groups
from utils.quantization_utils.channel_statistics import Seen, observe
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.weight_ranges import calibrate_weights
from utils.random_networks import spread_statistics

WIDTH = 6


def block(inputs: int, outputs: int, size: int = 1, groups: int = 1, clip: nn.Module | None = None) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), clip or nn.Identity())


class Residual(nn.Module):
    """Two inverted residual blocks on one stream, and a classifier."""

    def __init__(self, clip: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = block(3, WIDTH, 3)
        self.expand = nn.ModuleList(block(WIDTH, 2 * WIDTH, clip=clip()) for _ in range(2))
        self.deep = nn.ModuleList(block(2 * WIDTH, 2 * WIDTH, 3, 2 * WIDTH, clip()) for _ in range(2))
        self.project = nn.ModuleList(block(2 * WIDTH, WIDTH) for _ in range(2))
        self.last = block(WIDTH, WIDTH, clip=clip())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for expand, deep, project in zip(self.expand, self.deep, self.project, strict=True):
            x = x + project(deep(expand(x)))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.last(x), 1), 1))


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def network(net: nn.Module, scheme: str = "w4a8") -> QuantizedModel:
    torch.manual_seed(3)
    spread_statistics(net, images())
    return quantize(net, images(), scheme).eval()


def names(group: Group) -> tuple[list[str], list[str]]:
    return [op.attrs["layer"] for op in group.makers], [op.attrs["layer"] for op in group.readers]


def layer(model: QuantizedModel, name: str) -> QuantLayer:
    found = model.weight_layers()[name]
    assert isinstance(found, QuantLayer)
    return found


@torch.no_grad()
def answers(model: QuantizedModel) -> Tensor:
    model.enable(False)
    result: Tensor = model(images())
    return result


@pytest.mark.parametrize("clip", [nn.ReLU, nn.ReLU6])
def test_the_function_stays(clip: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HARDLY", 0.0)
    model = network(Residual(clip))
    before, weight = answers(model), layer(model, "project.0.0").module.weight.detach().clone()
    done = balance(model, [images()])
    assert done.groups >= 3
    assert done.decibels > 0
    assert not torch.allclose(layer(model, "project.0.0").module.weight, weight, rtol=0.05)
    assert torch.allclose(answers(model), before, atol=1e-4 * float(before.abs().max()))


def test_channels_at_a_ceiling_stay() -> None:
    net = Residual(nn.ReLU6)
    model = network(net)
    with torch.no_grad():
        net.deep[0][1].bias[:3] += 6.0
    group = next(g for g in find_groups(model) if names(g)[0] == ["deep.0.0"])
    factors, _ = best_factors(group, seen(model, group))
    assert torch.equal(factors[:3], torch.ones(3, dtype=torch.float64))
    assert not bool((factors[3:] == 1).any())


def seen(model: QuantizedModel, group: Group) -> dict[str, Seen]:
    wanted: dict[str, float | None] = {name: None for name, _ in group.gaining()}
    return observe(model, [images()], wanted | dict(group.ceilings), "balancing")


def noise(weight: np.ndarray, covariance: np.ndarray, largest: np.ndarray, c: np.ndarray) -> float:
    """The objective of one 1x1 reader of 4 bits and an unsigned 8-bit input, after its formula."""
    unforetold = 1 / np.diag(np.linalg.inv(covariance))
    scaled = weight * c
    steps = 1.4 / 7.5 * np.mean(np.abs(scaled) ** 8, 1) ** (1 / 8)
    q = (largest / c).max() / 255
    total = (steps**2).sum() * (unforetold / c**2).sum() + q**2 * (scaled**2).sum()
    return float(total / 12 / np.einsum("oi,ij,oj->", weight, covariance, weight))


def test_factors_are_the_best() -> None:
    model = network(Residual())
    with torch.no_grad():
        layer(model, "project.0.0").module.weight[:, 0] *= 6
    group = next(g for g in find_groups(model) if names(g)[0] == ["deep.0.0"])
    (name,) = {op.inputs[0] for op in group.readers}
    values = seen(model, group)[name]
    factors, decibels = best_factors(group, {name: values})
    reader = layer(model, "project.0.0")
    k = reader.bn.weight / torch.sqrt(reader.bn.running_var + reader.bn.eps)  # type: ignore[union-attr, operator]
    weight = (reader.module.weight.flatten(1) * k[:, None]).detach().double().numpy()
    arguments = weight, values.covariance().numpy(), values.largest.numpy()
    found, plain = noise(*arguments, factors.numpy()), noise(*arguments, np.ones(2 * WIDTH))
    assert decibels == pytest.approx(10 * np.log10(plain / found), abs=1e-6)
    assert decibels > 1
    random = np.random.default_rng(0)
    for size in (0.02, 0.1, 0.5):
        for _ in range(100):
            near = factors.numpy() * np.exp(size * random.standard_normal(2 * WIDTH))
            assert noise(*arguments, near) > 0.999 * found


def test_rounding_gains() -> None:
    """One input of a layer is small and read with large weights: it takes all codes for itself."""

    def error(balanced: bool) -> float:
        net = Residual()
        model = network(net)
        with torch.no_grad():
            net.deep[0][1].weight[0] /= 20
            net.deep[0][1].bias[0] /= 20
            net.project[0][0].weight[:, 0] *= 20
        exact = answers(model)
        if balanced:
            balance(model, [images()])
        calibrate_weights(model, "mse", 2.0, True)
        for found in model.weight_layers().values():
            found.enabled = True
        with torch.no_grad():
            return float((model(images()) - exact).square().sum())

    assert error(balanced=True) < 0.5 * error(balanced=False)


def test_dead_channels_and_one_image() -> None:
    net = Residual()
    model = network(net)
    with torch.no_grad():
        net.project[0][0].weight[1] = 0  # an output that reads nothing
        net.deep[0][0].weight[2] = 0  # an input that is constant
        net.project[1][0].weight.zero_()
    before = answers(model)
    balance(model, [images(1)])
    assert torch.allclose(answers(model), before, atol=1e-4 * float(before.abs().max()))


def test_values_that_are_not_finite() -> None:
    net = Residual()
    model = network(net)
    with torch.no_grad():
        net.deep[0][0].weight[2] = torch.nan
    with pytest.raises(UserError, match=r"balancing met values that are not finite at '.*'; check the weights"):
        balance(model, [images()])


def test_nothing_to_balance() -> None:
    model = network(Residual(), "w8a8")
    before = answers(model)
    assert balance(model, [images()]) == module.Balanced(0, 0.0)
    assert torch.equal(answers(model), before)
