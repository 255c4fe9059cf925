"""Equalisation keeps the function, helps where channels differ, and says what it cannot scale."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.api import calibrate, quantize
from utils.quantization_utils.equalize import CONVERGED, Pair, equalize, find_pairs, input_ranges
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.weight_ranges import calibrate_weights
from utils.random_networks import spread_statistics

WIDTH = 8


class Chain(nn.Module):
    """Every kind of pair: behind a BatchNorm, depthwise, grouped, with a bias, through pools into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2))
        self.last = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.wide(self.deep(self.stem(x)))))


class Others(nn.Module):
    """A ReLU6, a fork, a sum, a weight used twice, a BatchNorm without factors; one pair among them."""

    def __init__(self) -> None:
        super().__init__()
        self.six, self.forked = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.shared, self.bare = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.hidden, self.head = nn.Conv2d(4, 4, 8), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.forked(nn.functional.relu6(self.six(x))))
        x = torch.relu(self.left(x) + self.right(x))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        x = torch.relu(self.norm(self.bare(x)))
        return self.head(torch.flatten(torch.relu(self.hidden(x)), 1))


CHAIN_PAIRS = (
    Pair("stem.0", "deep.0"),
    Pair("deep.0", "wide.0"),
    Pair("wide.0", "last.0"),
    Pair("last.0", "head"),
)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def network(module: nn.Module, scheme: str = "w8a8") -> QuantizedModel:
    spread_statistics(module, images())
    return quantize(module, images(), scheme).eval()


@torch.no_grad()
def answers(model: QuantizedModel) -> Tensor:
    result: Tensor = model(images())
    return result


def bad_chain() -> Chain:
    """The same function as a harmless network's, with channels that differ by three decades."""
    module = Chain()
    factors = torch.logspace(-1.5, 1.5, WIDTH)
    with torch.no_grad():
        for bn in (module.stem[1], module.deep[1]):
            bn.weight.uniform_(0.5, 1.5)
        spread_statistics(module, images())
        for parameter in (module.stem[1].weight, module.stem[1].bias):
            parameter.mul_(factors)
        module.deep[0].weight.div_(factors.reshape(-1, 1, 1, 1))
        for parameter in (module.wide[0].weight, module.wide[0].bias):
            parameter.mul_(factors.reshape(-1, *[1] * (parameter.dim() - 1)))
        module.last[0].weight.div_(factors.reshape(1, -1, 1, 1))
    return module


def quantized(module: nn.Module) -> QuantizedModel:
    """Without the spreading of :func:`network`, which would undo the bad channels."""
    return quantize(module, images(), "w4a4").eval()


@torch.no_grad()
def spread(layer: QuantLayer) -> float:
    """The largest range of an output channel over the smallest."""
    ranges = fold(layer.module.weight, None, layer.bn)[0].flatten(1).abs().amax(1)
    return float(ranges.max() / ranges.min())


def layer(model: QuantizedModel, name: str) -> QuantLayer:
    found = model.weight_layers()[name]
    assert isinstance(found, QuantLayer)
    return found


@pytest.mark.parametrize("bad", [False, True])
def test_the_float_network_stays_as_it_is(bad: bool) -> None:
    model = quantized(bad_chain()) if bad else network(Chain())
    expected = answers(model)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    done = equalize(model)
    assert done.pairs == CHAIN_PAIRS
    assert done.skipped == {}
    error = (answers(model) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4
    changed = {key for key, value in model.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"stem.1.weight", "stem.1.bias", "deep.0.weight", "wide.0.weight", "wide.0.bias", "head.weight"} <= changed
    assert not changed & {"stem.0.weight", "head.bias", "stem.1.running_mean", "stem.1.running_var"}


def test_both_ranges_of_a_channel_become_their_geometric_mean() -> None:
    """One pair alone, one sweep: r1 and r2 both become sqrt(r1 * r2)."""
    torch.manual_seed(3)
    model = network(nn.Sequential(nn.Conv2d(3, 6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4)))
    first, second = layer(model, "0"), layer(model, "3")
    rows = first.module.weight.detach().flatten(1).abs().amax(1).numpy().copy()
    columns = second.module.weight.detach().abs().amax(0).numpy().copy()
    done = equalize(model)
    assert done.sweeps == 2  # the second one sees that nothing changes
    after = first.module.weight.detach().flatten(1).abs().amax(1).numpy()
    np.testing.assert_allclose(after, np.sqrt(rows * columns), rtol=1e-5)
    np.testing.assert_allclose(input_ranges(second).detach(), np.sqrt(rows * columns), rtol=1e-5)


@torch.no_grad()
def error_at_4_bits(module: nn.Module, equalized: bool) -> float:
    """Squared error of the logits against the float network's, relative; one weight range per layer."""
    model = quantized(module)
    expected = answers(model)
    if equalized:
        equalize(model)
    calibrate(model, [images()], "minmax")
    calibrate_weights(model, "minmax", per_channel=False)
    return float((answers(model) - expected).square().sum() / expected.square().sum())


def test_bad_channels_quantize_better_afterwards() -> None:
    module = bad_chain()
    model = quantized(module)
    assert spread(layer(model, "stem.0")) > 300
    before = error_at_4_bits(module, equalized=False)
    after = error_at_4_bits(module, equalized=True)
    assert after < before / 3
    assert spread(layer(model, "stem.0")) < 30


def test_a_second_call_changes_almost_nothing() -> None:
    model = quantized(bad_chain())
    first = equalize(model)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    second = equalize(model)
    assert first.sweeps > 1
    assert second.sweeps == 1
    for key, value in model.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=3 * CONVERGED, atol=0)


def test_what_is_left_out() -> None:
    """Outputs that nobody or several read are no pair to begin with; the rest is named."""
    model = network(Others())
    pairs, skipped = find_pairs(model)
    assert pairs == [Pair("hidden", "head")]
    assert skipped == {
        "six": "an upper clip at 6 (ReLU6) lies behind it",
        "shared": "its weights are used twice",
        "shared#2": "its weights are used twice",
        "bare": "its BatchNorm has no factors",
    }
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    expected = answers(model)
    done = equalize(model)
    assert done.skipped == skipped
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-5)
    changed = {key for key, value in model.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"hidden.weight", "hidden.bias", "head.weight"}


def test_a_network_without_pairs() -> None:
    model = network(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5)))
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    done = equalize(model)
    assert (done.pairs, done.skipped, done.sweeps) == ((), {}, 0)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_dead_channels_are_left_alone() -> None:
    module = Chain()
    spread_statistics(module, images())
    with torch.no_grad():
        module.stem[1].weight[2] = 0
        module.wide[0].weight[3] = 0
        module.head.weight[:, 1] = 0
    model = quantize(module, images(), "w4a4").eval()
    expected = answers(model)
    equalize(model)
    assert all(bool(torch.isfinite(value).all()) for value in model.model.state_dict().values())
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-5)
    assert not module.stem[1].weight[2].detach().any()
    assert not module.head.weight[:, 1].detach().any()
