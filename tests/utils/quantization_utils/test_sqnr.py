"""Signal to quantization noise against numpy, its limits, and what becomes of it in JSON and in a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.api import calibrate, quantize
from utils.plots import plot_sqnr
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.sqnr import LIMIT, format_worst, layer_sqnr, worst_layers


def linear(bits: str = "w4a8") -> QuantizedModel:
    model = quantize(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.zeros(1, 3, 2, 2), bits).eval()
    layer_of(model, "1").bits = 4
    return model


def layer_of(model: QuantizedModel, name: str) -> QuantLayer:
    found = model.weight_layers()[name]
    assert isinstance(found, QuantLayer)
    return found


def decibels(exact: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


def test_one_layer_against_numpy() -> None:
    model, images = linear(), torch.randn(20, 3, 2, 2)
    calibrate(model, [images], "minmax")
    layer = layer_of(model, "1")
    (source,) = [q for q in model.activation_quantizers().values() if q.signed and float(q.x_max) == images.max()]
    x = images.flatten(1).double().numpy()
    weight, bias = (p.detach().double().numpy() for p in layer.module.parameters())
    step, (lo, hi) = float(source.scale), source.bounds()
    scale = np.abs(weight).max(1, keepdims=True) / 7
    x_hat = np.clip(np.rint(x / step), lo, hi) * step
    w_hat = np.clip(np.rint(weight / scale), -7, 7) * scale
    expected = decibels(x @ weight.T + bias, x_hat @ w_hat.T + bias)
    assert layer_sqnr(model, [images]) == {"1": pytest.approx(expected, abs=0.01)}
    assert 10 < expected < 40


def test_noise_of_earlier_layers_is_in_it_and_batches_add_up() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    model, images = quantize(module, torch.zeros(1, 3, 4, 4), "w4a4"), torch.randn(21, 3, 4, 4)
    calibrate(model, [images])
    with torch.no_grad():
        model.enable(False)
        exact = model(images).double().numpy()
        model.enable()
        found = model(images).double().numpy()  # the logits: the last layer's output and 16 bits behind it
    whole = layer_sqnr(model, [images])
    assert list(whole) == ["0", "3"]
    assert whole["3"] == pytest.approx(decibels(exact, found), abs=0.1)
    parts = layer_sqnr(model, images.split(5))
    assert parts == {name: pytest.approx(db, abs=1e-4) for name, db in whole.items()}
    model.enable(False)
    assert layer_sqnr(model, [images]) == whole
    assert all(q.enabled for q in model.activation_quantizers().values())


def test_another_reference() -> None:
    """The weights were changed since: noise is counted from where they were, and they stay changed."""
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    model, images = quantize(module, torch.zeros(1, 3, 4, 4), "w8a8"), torch.randn(16, 3, 4, 4)
    reference = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        module[0].weight.mul_(1.1)
        module[0].bias.mul_(1.1)
    changed = module[0].weight.detach().clone()
    calibrate(model, [images])
    own, other = layer_sqnr(model, [images]), layer_sqnr(model, [images], reference)
    assert own["0"] > 35
    assert other["0"] == pytest.approx(20, abs=0.5)  # a tenth of the signal
    assert torch.equal(module[0].weight, changed)


def exact_layer(reach: float = 127.0) -> tuple[QuantizedModel, Tensor]:
    """Whole weights and whole inputs at scales of one: quantization changes nothing."""
    model, images = linear(), torch.randint(-100, 101, (9, 3, 2, 2)).float()
    layer = layer_of(model, "1")
    with torch.no_grad():
        layer.module.weight.copy_(torch.randint(-7, 8, (5, 12)))
        layer.module.bias.zero_()
    layer.learned = nn.Parameter(torch.ones(5))
    calibrate(model, [images])
    for quantizer in model.activation_quantizers().values():
        if quantizer.bits == 8:
            quantizer.set_range(torch.tensor(-reach), torch.tensor(reach))
    return model, images


def test_a_perfect_layer_has_the_limit() -> None:
    model, images = exact_layer()
    assert layer_sqnr(model, [images]) == {"1": LIMIT}
    coarse, images = exact_layer(2540.0)  # steps of twenty
    assert 0 < layer_sqnr(coarse, [images])["1"] < 30


def test_noise_without_signal_has_the_negative_limit() -> None:
    model, images = exact_layer()
    nothing = {key: torch.zeros_like(value) for key, value in model.model.state_dict().items()}
    assert layer_sqnr(model, [images], nothing) == {"1": -LIMIT}
    with torch.no_grad():
        layer_of(model, "1").module.weight.zero_()
    assert layer_sqnr(model, [images]) == {"1": LIMIT}  # neither signal nor noise


def test_limits_are_valid_json_and_can_be_drawn(tmp_path: Path) -> None:
    model, images = exact_layer()
    nothing = {key: torch.zeros_like(value) for key, value in model.model.state_dict().items()}
    values = {"best": layer_sqnr(model, [images])["1"], "worst": layer_sqnr(model, [images], nothing)["1"]}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    for name, drawn in (("both", values), ("one", {"best": LIMIT}), ("many", {f"l{i}": 10.0 - i for i in range(40)})):
        plot_sqnr(tmp_path / f"{name}.png", drawn)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_worst_come_first() -> None:
    values = {f"layer{i}": float(db) for i, db in enumerate([12, 30, -3, 150, 7, 8, 9, 40, 22, 23, 24, 11, 3])}
    worst = worst_layers(values)
    assert len(worst) == 10
    assert [db for _, db in worst] == sorted(values.values())[:10]
    assert worst[0] == ("layer2", -3.0)
    assert worst_layers(values, 2) == [("layer2", -3.0), ("layer12", 3.0)]
    lines = format_worst(values).splitlines()
    assert lines[0] == "signal to quantization noise of 13 layers, the worst:"
    assert lines[1] == "    -3.0 dB  layer2"
    assert len(lines) == 11
    assert worst_layers({"a": 1.0, "b": 1.0}) == [("a", 1.0), ("b", 1.0)]
