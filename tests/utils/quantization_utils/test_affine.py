"""Transforming linear streams keeps the function and BatchNorm's statistics, and makes rounding better."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.utils.quantization_utils.test_balance import Residual, answers, images, layer, names, network
from utils.errors import UserError
from utils.quantization_utils import affine
from utils.quantization_utils.affine import Transformed, best_matrix, transform_streams
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.channel_groups import Group, find_groups
from utils.quantization_utils.channel_statistics import Seen, observe
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.reconstruct import Settings, reconstruct


def stream_of(model: QuantizedModel) -> Group:
    (group,) = [group for group in find_groups(model) if group.mixable]
    return group


def seen(model: QuantizedModel, group: Group) -> dict[str, Seen]:
    wanted = {op.inputs[0] for op in [*group.makers, *group.readers]} | {op.name for op in group.makers}
    return observe(model, [images()], dict.fromkeys(wanted), "a test")


def test_only_streams_are_linear() -> None:
    makers, readers = names(stream_of(network(Residual())))
    assert sorted(makers) == ["project.0.0", "project.1.0", "stem.0"]
    assert readers == ["expand.0.0", "expand.1.0", "last.0"]


@pytest.mark.parametrize("clip", [nn.ReLU, nn.ReLU6])
def test_the_function_stays(clip: type[nn.Module]) -> None:
    model = network(Residual(clip))
    before, weight = answers(model), layer(model, "project.0.0").module.weight.detach().clone()
    done = transform_streams(model, [images()])
    assert done.streams == 1
    assert done.decibels > 0.5
    assert not torch.allclose(layer(model, "project.0.0").module.weight, weight, rtol=0.05)
    assert torch.allclose(answers(model), before, atol=1e-4 * float(before.abs().max()))


class Plain(nn.Module):
    """A pool and biases without BatchNorm around a stream that a classifier reads."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.make(x), 1), 1))


def test_layers_without_batch_norm() -> None:
    model = network(Plain(), "w4a8")
    layer(model, "head").bits = 4
    before = answers(model)
    assert transform_streams(model, [images()]).streams == 1
    assert torch.allclose(answers(model), before, atol=1e-4 * float(before.abs().max()))


def test_batch_norms_have_the_statistics_of_their_inputs() -> None:
    net = Residual()
    model = network(net)
    transform_streams(model, [images()])
    inputs: dict[nn.Module, Tensor] = {}
    norms = [net.stem[1], net.project[0][1], net.project[1][1]]
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}))
    with torch.no_grad():
        net.eval()(images())
    for norm in norms:
        found = inputs[norm].double().transpose(0, 1).flatten(1)
        assert torch.allclose(norm.running_mean.double(), found.mean(1), atol=1e-4)
        assert torch.allclose(norm.running_var.double(), found.var(1, correction=0), rtol=1e-3, atol=1e-6)


def test_errors_reach_the_readers_behind_their_maker() -> None:
    model = network(Residual())
    group = stream_of(model)
    contained = affine._contained(model, group)
    layers = {op.name: op.attrs["layer"] for op in group.makers}
    read = {op.attrs["layer"]: {layers[name] for name in contained[op.inputs[0]]} for op in group.readers}
    assert read == {
        "expand.0.0": {"stem.0"},
        "expand.1.0": {"stem.0", "project.0.0"},
        "last.0": {"stem.0", "project.0.0", "project.1.0"},
    }


class Kernels(nn.Sequential):
    """Layers with kernels on both sides of a stream; the one that makes it has a bias in front of its BatchNorm."""

    def __init__(self) -> None:
        middle = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)
        ends = nn.Conv2d(3, 6, 1), nn.Linear(8, 5)
        super().__init__(ends[0], nn.ReLU(), *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), ends[1])


def test_a_bias_in_front_of_batch_norm() -> None:
    net = Kernels()
    model = network(net)
    before = answers(model)
    transform_streams(model, [images()])
    assert torch.allclose(answers(model), before, atol=1e-4 * float(before.abs().max()))
    assert not bool(net[2].bias.any())


def folded(found: QuantLayer) -> np.ndarray:
    """[O, I, positions]."""
    weight = found.module.weight.flatten(2).detach().double()
    if found.bn is not None:
        factor = found.bn.weight / torch.sqrt(found.bn.running_var + found.bn.eps)  # type: ignore[operator]
        weight = weight * factor.detach().double()[:, None, None]
    result: np.ndarray = weight.numpy()
    return result


def steps(weight: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1.4 / 7.5 * np.mean(np.abs(weight) ** 8, (1, 2)) ** (1 / 8)
    return result


def left(covariance: np.ndarray) -> float:
    minors = [float(np.linalg.det(covariance[:k, :k])) for k in range(len(covariance) + 1)]
    return sum(after / before for before, after in pairwise(minors))


def noise(model: QuantizedModel, group: Group, found: dict[str, Seen], t: np.ndarray) -> float:
    """The foretold noise of the network's one stream, after its formula; a layer of 8 bits makes none."""
    inverse, total, cost = np.linalg.inv(t), 0.0, {}
    for op in group.readers:
        weight, values = folded(layer(model, op.attrs["layer"])), found[op.inputs[0]]
        g, positions = values.covariance().numpy(), range(weight.shape[2])
        power = sum(np.trace(weight[:, :, p] @ g @ weight[:, :, p].T) for p in positions)
        cost[op.attrs["layer"]] = sum(weight[:, :, p].T @ weight[:, :, p] for p in positions) / power
        mixed, spread = np.einsum("oip,ij->ojp", weight, inverse), np.diag(t @ g @ t.T)
        crest = float(values.largest.max()) / np.sqrt(np.diag(g).max())
        q = crest * np.sqrt(np.mean(spread**8) ** (1 / 8)) / 127
        rounding = (steps(mixed) ** 2).sum() * left(t @ g @ t.T) * len(positions)
        total += (rounding + q**2 * (mixed**2).sum()) / 12 / power
    behind = {"project.0.0": ["expand.1.0", "last.0"], "project.1.0": ["last.0"], "2": ["4"]}
    for op in group.makers:
        if op.attrs["layer"] in behind:
            g, weight = found[op.inputs[0]].covariance().numpy(), folded(layer(model, op.attrs["layer"]))
            order = np.argsort(np.diag(g))
            costs = inverse.T @ sum(cost[name] for name in behind[op.attrs["layer"]]) @ inverse
            scaled = steps(np.einsum("oi,ikp->okp", t, weight))
            total += (scaled**2 * np.diag(costs)).sum() * left(g[order][:, order]) * weight.shape[2] / 12
    return float(total)


@pytest.mark.parametrize("net", [Residual, Kernels])
def test_the_matrix_lowers_the_noise_and_no_neighbour_is_better(
    net: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(net())
    group = stream_of(model)
    values, contained = seen(model, group), affine._contained(model, group)
    matrix, decibels = best_matrix(group, values, contained)
    t = matrix.numpy()
    best = noise(model, group, values, t)
    assert decibels == pytest.approx(10 * np.log10(noise(model, group, values, np.eye(len(t))) / best), abs=1e-6)
    random = np.random.default_rng(0)
    for size in (0.01, 0.05, 0.3):
        for _ in range(50):
            near = (np.eye(len(t)) + size * random.standard_normal(t.shape)) @ t
            assert noise(model, group, values, near) > 0.99 * best
    monkeypatch.setattr(affine, "STEPS", 1000)
    assert decibels > 0.8 * best_matrix(group, values, contained)[1] > 0.1


class Bottleneck(nn.Sequential):
    """A linear stream of 24 channels between two layers with weights of 3 bits."""

    def __init__(self) -> None:
        ends = nn.Conv2d(3, 32, 3), nn.Linear(48, 5)
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(ends[0], nn.ReLU(), nn.Conv2d(32, 24, 1), nn.Conv2d(24, 48, 1), nn.ReLU(), *pool, ends[1])


def test_least_squares_gain() -> None:
    def error(transformed: bool) -> float:
        model = network(Bottleneck(), "w3a8")
        if transformed:
            assert transform_streams(model, [images()]).decibels > 1
        calibrate(model, [images()], "minmax")
        model.enable()
        (after,) = [r.loss_after for r in reconstruct(model, images(), Settings(steps=0)) if r.name == "3"]
        return after

    assert error(transformed=True) < 0.8 * error(transformed=False)


def test_dead_channels_and_one_image() -> None:
    net = Residual()
    model = network(net)
    with torch.no_grad():
        net.project[0][0].weight[1] = 0
        net.stem[1].weight[2] = net.stem[1].bias[2] = 0
        for part in net.project:
            part[1].weight[2] = part[1].bias[2] = 0  # a channel of the stream that is always zero
        net.project[1][0].weight.zero_()
    before = answers(model)
    transform_streams(model, [images(1)])
    assert torch.allclose(answers(model), before, atol=1e-3 * float(before.abs().max()))


def test_values_that_are_not_finite() -> None:
    net = Residual()
    model = network(net)
    with torch.no_grad():
        net.deep[0][0].weight[2] = torch.nan
    with pytest.raises(UserError, match=r"the affine transformation met values that are not finite at '.*'; check"):
        transform_streams(model, [images()])


def test_nothing_to_transform() -> None:
    model = network(Residual(), "w8a8")
    before = answers(model)
    assert transform_streams(model, [images()]) == Transformed(0, 0.0)
    assert torch.equal(answers(model), before)
