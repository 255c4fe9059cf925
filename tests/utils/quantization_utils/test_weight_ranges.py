"""Weight ranges against numpy loops over the folded weights, and what becomes of them in the integer graph."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.api import Preprocess, calibrate, convert, quantize
from utils.errors import UserError
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.weight_ranges import calibrate_weights, folded_mse_scale

PREPROCESS = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, resize=None, input_size=6)
GAMMA = (1.5, -0.7, 0.0, 0.4, -2.0, 1e-3)
ZERO_FACTOR, ALL_ZERO, CONSTANT = 2, 3, 4  # channels
EPS = 2.0**-40


class Net(nn.Module):
    """A convolution behind which factors of both signs and zero follow, one without BatchNorm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, len(GAMMA), 3, bias=False), nn.BatchNorm2d(len(GAMMA))
        self.second, self.head = nn.Conv2d(len(GAMMA), 5, 3), nn.Linear(5 * 2 * 2, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.distributions.StudentT(3.0).sample(self.first.weight.shape))
            self.first.weight[ALL_ZERO] = 0
            self.first.weight[CONSTANT] = 0.3
            self.norm.weight.copy_(torch.tensor(GAMMA))
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.flatten(torch.relu(self.second(x)), 1))


def network(weight_bits: int = 4) -> QuantizedModel:
    model = quantize(Net(), torch.zeros(1, 3, 6, 6), f"w{weight_bits}a8")
    for layer in layers(model).values():
        layer.bits = weight_bits  # a scheme gives the first and the last layer 8
    calibrate(model, [torch.randn(4, 3, 6, 6)])
    return model.eval()


def layers(model: QuantizedModel) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in model.weight_layers().items() if isinstance(layer, QuantLayer)}


def factors_of(layer: QuantLayer) -> np.ndarray:
    """What a layer's BatchNorm multiplies by, float32 [O]."""
    if layer.bn is None:
        return np.ones(len(layer.module.weight), np.float32)
    variance = layer.bn.running_var.numpy() + np.float32(layer.bn.eps)
    return layer.bn.weight.detach().numpy() / np.sqrt(variance)


def folded_of(layer: QuantLayer) -> np.ndarray:
    """Folded weights, float32 [O, values]."""
    return layer.module.weight.detach().flatten(1).numpy() * factors_of(layer)[:, None]


def alive_of(layer: QuantLayer) -> np.ndarray:
    """Channels with folded weights; the scales of others are as wide as their biases need them, bool [O]."""
    return np.abs(folded_of(layer)).max(1) > 0


def errors_of(values: np.ndarray, bits: int, candidates: int, power: float) -> np.ndarray:
    """Mean ``|x_hat - x| ** power`` of every candidate, ranges shrunk by one percent of the whole each."""
    hi = 2 ** (bits - 1) - 1
    found = []
    for i in range(candidates):
        step = max(np.abs(values).max() * (1 - 0.01 * i) / hi, EPS)
        found.append((np.abs(np.clip(np.rint(values / step), -hi, hi) * step - values) ** power).mean())
    return np.array(found)


def expected_scale(values: np.ndarray, bits: int, candidates: int, power: float) -> float:
    reach = np.abs(values).max() * (1 - 0.01 * int(np.argmin(errors_of(values, bits, candidates, power))))
    return float(reach / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_mse_per_channel(bits: int, power: float) -> None:
    model = network(bits)
    calibrate_weights(model, "mse", power)
    for layer in layers(model).values():
        rows = folded_of(layer).astype(np.float64)
        expected = [expected_scale(row, bits, 80, power) for row in rows]
        np.testing.assert_allclose(folded_mse_scale(layer, power), expected, rtol=1e-5)
        applied = layer.integer_weights().scale.numpy()
        alive = alive_of(layer)
        np.testing.assert_allclose(applied[alive], np.array(expected)[alive], rtol=1e-5)
        assert len(set(applied.tolist())) == len(applied)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_mse_per_layer(bits: int, power: float) -> None:
    model = network(bits)
    calibrate_weights(model, "mse", power, per_channel=False)
    for layer in layers(model).values():
        expected = expected_scale(folded_of(layer).astype(np.float64), bits, 95, power)
        scale = folded_mse_scale(layer, power)
        assert scale.shape == (len(layer.module.weight),)
        np.testing.assert_allclose(scale, expected, rtol=1e-5)
        alive = np.abs(factors_of(layer)) > 0
        np.testing.assert_allclose(layer.integer_weights().scale.numpy()[alive], expected, rtol=1e-5)


def test_mse_shrinks_ranges_with_outliers() -> None:
    """So that the tests above cannot be passed by the largest magnitude."""
    model = network(3)
    calibrate_weights(model, "mse")
    first = layers(model)["first"]
    shrunk = folded_mse_scale(first).numpy() * 3 / np.abs(folded_of(first)).max(1).clip(EPS)
    assert (shrunk[[0, 1]] < 0.95).all()
    assert shrunk[CONSTANT] == pytest.approx(1)


def test_a_channel_has_80_candidates_a_layer_95() -> None:
    """One weight of 1 among many of 0.1, at 2 bits: a tenth of the range is best, and only the 91st candidate."""
    module = nn.Linear(301, 1)
    with torch.no_grad():
        module.weight.fill_(0.1)
        module.weight[0, 0] = 1
    layer = QuantLayer(module, None, 2)
    assert folded_mse_scale(layer).tolist() == [1.0]
    layer.per_channel = False
    assert folded_mse_scale(layer).tolist() == [pytest.approx(0.1)]


def test_channels_that_say_nothing() -> None:
    model = network(4)
    calibrate_weights(model, "mse")
    layer = layers(model)["first"]
    assert layer.learned is not None
    assert bool((torch.isfinite(layer.learned) & (layer.learned > 0)).all())
    integers = layer.integer_weights().weight
    assert not integers[ALL_ZERO].any()
    assert not integers[ZERO_FACTOR].any()
    assert integers[CONSTANT].unique().tolist() == [-7]  # its factor is negative
    own = layer.module.weight[ZERO_FACTOR].detach().abs().max() / 7
    assert float(layer.learned.detach()[ZERO_FACTOR]) == pytest.approx(float(own))


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_learned_scale_times_the_factor_is_the_folded_scale(per_channel: bool) -> None:
    model = network()
    calibrate_weights(model, "mse", per_channel=per_channel)
    for layer in layers(model).values():
        assert layer.learned is not None
        factors, folded = np.abs(factors_of(layer)), folded_mse_scale(layer).numpy()
        alive = (factors > 0) & (folded > 0)
        np.testing.assert_allclose((layer.learned.detach().numpy() * factors)[alive], folded[alive], rtol=1e-6)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_conversion_gives_those_integers(method: str, per_channel: bool) -> None:
    model = network()
    calibrate_weights(model, method, per_channel=per_channel)
    graph = convert(model, PREPROCESS)
    nodes = [node for node in graph.nodes if "weight" in node.arrays]
    for node, layer in zip(nodes, layers(model).values(), strict=True):
        hi = 7
        folded = folded_of(layer)
        if method == "minmax":
            reach = np.abs(folded).max(1) if per_channel else np.abs(folded).max().repeat(len(folded))
            scale = (reach / np.float32(hi)).clip(np.float32(EPS))
        else:
            assert layer.learned is not None
            scale = (layer.learned.detach().numpy() * np.abs(factors_of(layer))).clip(np.float32(EPS))
        expected = np.clip(np.rint(folded * (np.float32(1) / scale)[:, None]), -hi, hi)
        assert np.array_equal(node.arrays["weight"].reshape(len(folded), -1), expected)


def test_minmax_puts_the_ranges_back() -> None:
    model = network()
    before = {name: layer.integer_weights() for name, layer in layers(model).items()}
    calibrate_weights(model, "mse")
    changed = {name: layer.integer_weights() for name, layer in layers(model).items()}
    calibrate_weights(model, "minmax")
    for name, layer in layers(model).items():
        assert layer.learned is None
        assert not torch.equal(before[name].scale, changed[name].scale)
        assert torch.equal(before[name].scale, layer.integer_weights().scale)
        assert torch.equal(before[name].weight, layer.integer_weights().weight)


def test_nothing_of_the_float_network_changes() -> None:
    model = network()
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    calibrate_weights(model, "mse")
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    model = network()
    with torch.no_grad():
        layers(model)["head"].module.weight[1, 2] = bad
    with pytest.raises(UserError, match=r"^the weights of layer 'head' are not finite; check .* infinity$"):
        calibrate_weights(model, method)


# ---- folding changes nothing ----------------------------------------------------------------------------------------


def unfolded(layer: QuantLayer) -> QuantLayer:
    """The same convolution without its BatchNorm."""
    return QuantLayer(layer.module, None, layer.bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_folding_changes_no_integer_but_its_sign(bits: int, method: str) -> None:
    """Symmetric narrow ranges per channel: integers of w at s, and of k w at s |k|, are the same but for k's sign."""
    model = network(bits)
    calibrate_weights(model, method)
    folded = layers(model)["first"]
    plain = unfolded(folded)
    plain.learned = folded.learned
    ours, theirs = folded.integer_weights(), plain.integer_weights()
    factors = torch.from_numpy(factors_of(folded))
    assert (factors < 0).any()
    sign = factors.sign().reshape(-1, 1, 1, 1).to(torch.int8)
    assert torch.equal(ours.weight, theirs.weight * sign)
    alive = torch.from_numpy(alive_of(folded))
    torch.testing.assert_close(ours.scale[alive], (theirs.scale * factors.abs())[alive], rtol=1e-6, atol=0)
    assert theirs.weight[ZERO_FACTOR].any()


def test_folding_changes_ranges_of_a_whole_layer() -> None:
    """Per layer it does matter, so the lemma's test can fail."""
    model = network(4)
    calibrate_weights(model, "minmax", per_channel=False)
    folded = layers(model)["first"]
    plain = unfolded(folded)
    plain.per_channel = False
    sign = torch.from_numpy(factors_of(folded)).sign().reshape(-1, 1, 1, 1).to(torch.int8)
    assert not torch.equal(folded.integer_weights().weight, plain.integer_weights().weight * sign)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_the_search_finds_the_same_ranges_before_and_after_folding(method: str) -> None:
    model = network(4)
    calibrate_weights(model, method)
    folded = layers(model)["first"]
    plain = unfolded(folded)
    found = folded_mse_scale(plain) if method == "mse" else plain.integer_weights().scale
    factors = torch.from_numpy(factors_of(folded)).abs()
    alive = torch.from_numpy(alive_of(folded))
    expected = folded.integer_weights().scale[alive]
    torch.testing.assert_close((found * factors)[alive], expected, rtol=1e-5, atol=0)
