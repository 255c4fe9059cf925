"""Every metric against a plain computation; interruption and resumption; files."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bit_config import Rule, Scheme
from utils.api import calibrate, quantize
from utils.errors import UserError
from utils.experiment import quantize_module
from utils.quantization_utils.fold_bn import affine_of
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.sensitivity import METRICS, Sensitivities, Settings, measure
from utils.quantization_utils.sensitivity_state import Progress
from utils.random_networks import random_images, spread_statistics

COUNT, CLASSES = 12, 5
WIDTHS = (2, 4, 8)
LAYERS = ["stem.0", "body.0", "norm", "head"]
SETTINGS = Settings(arch="small", max_probes=8, tolerance=1e-9)
Batch = tuple[Tensor, Tensor]


class Small(nn.Module):
    """Two convolutions, a residual sum, a standalone BatchNorm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.norm(torch.relu(self.body(x) + x)))
        return self.head(3 * x.mean((2, 3)))


def images() -> Tensor:
    return (random_images((3, 6, 6), COUNT, 0).float() - 128) / 64


def labels() -> Tensor:
    return torch.arange(COUNT) % CLASSES


def batches(size: int = 5) -> list[Batch]:
    return list(zip(images().split(size), labels().split(size), strict=True))


def network(bits: int = 8) -> QuantizedModel:
    torch.manual_seed(2)
    module = Small()
    spread_statistics(module, images())
    scheme = Scheme("all", (Rule(".*", (bits, bits)),), 16, "free")
    model, _, _ = quantize_module(module, torch.zeros(1, 3, 6, 6), scheme)
    calibrate(model, images().split(5))
    return model


def of(metric: str, widths: Sequence[int] = WIDTHS, settings: Settings = SETTINGS, **more: Any) -> Sensitivities:
    return measure(network(), batches(), metric, widths, settings, **more)


@torch.no_grad()
def one_on(bits: int, layer: str) -> Tensor:
    """Logits of a network built and calibrated for this width, one layer and the quantizer in front of it on."""
    model = network(bits)
    model.enable(False)
    found = model.weight_layers()[layer]
    found.enabled = found._source[0].enabled = True
    logits: Tensor = model(images())
    return logits


@torch.no_grad()
def reference() -> Tensor:
    logits: Tensor = network().model.eval()(images())
    return logits


def weight_error(bits: int, layer: str) -> tuple[Tensor, Tensor]:
    """Quantized minus folded weights by plain rounding to the largest weight of each channel, and the fold's factor."""
    found = network(bits).weight_layers()[layer]
    assert isinstance(found, QuantLayer)
    weight = found.module.weight.detach()
    factor = torch.ones(len(weight)) if found.bn is None else affine_of(found.bn)[0].detach()
    shape = (-1, *[1] * (weight.dim() - 1))
    folded = weight * factor.reshape(shape)
    step = folded.abs().reshape(len(weight), -1).amax(1).reshape(shape) / (2 ** (bits - 1) - 1)
    return torch.round(folded / step) * step - folded, factor.reshape(shape)


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels(), reduction="none")


def check(found: Sensitivities, layer: str, bits: int, values: Tensor) -> None:
    """Mean and standard error of the values of all images."""
    assert found.damage[layer][bits] == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-6)
    expected = float(values.std()) / math.sqrt(COUNT)
    assert found.standard_error[layer][bits] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_loss_and_kl_are_those_of_the_network_with_one_layer_on(layer: str) -> None:
    loss, kl = of("loss"), of("kl")
    before = reference()
    for bits in WIDTHS:
        after = one_on(bits, layer)
        check(loss, layer, bits, cross_entropy(after) - cross_entropy(before))
        p, q = before.softmax(1), after.softmax(1)
        check(kl, layer, bits, (p * (p / q).log()).sum(1))


@pytest.mark.parametrize("layer", LAYERS)
def test_sqnr_is_noise_over_signal(layer: str) -> None:
    found = of("sqnr")
    signal = reference().square().sum(1)
    for bits in WIDTHS:
        noise = (one_on(bits, layer) - reference()).square().sum(1)
        ratio = float(noise.sum() / signal.sum())
        assert found.damage[layer][bits] == pytest.approx(ratio, rel=1e-3)
        error = float((noise - ratio * signal).std() / math.sqrt(COUNT) / signal.mean())
        assert found.standard_error[layer][bits] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("layer", ["stem.0", "body.0", "head"])
def test_fisher_is_squared_gradients_times_squared_weight_errors(layer: str) -> None:
    found = of("fisher")
    module = network().model.eval()
    weight = module.get_parameter(f"{layer}.weight")
    gradients = [
        torch.autograd.grad(F.cross_entropy(module(image.unsqueeze(0)), label.unsqueeze(0)), weight)[0]
        for image, label in zip(images(), labels(), strict=True)
    ]
    for bits in WIDTHS:
        error, factor = weight_error(bits, layer)
        check(found, layer, bits, torch.stack([((g / factor) * error).square().sum() for g in gradients]))


@pytest.mark.parametrize("layer", ["stem.0", "body.0", "head"])
def test_trace_is_the_mean_trace_times_the_squared_weight_error(layer: str) -> None:
    found = of("trace")
    module = network().model.eval()
    weight = module.get_parameter(f"{layer}.weight").detach()

    def loss(flat: Tensor) -> Tensor:
        logits = torch.func.functional_call(module, {f"{layer}.weight": flat.reshape(weight.shape)}, images())
        return F.cross_entropy(logits, labels())

    hessian: Any = torch.autograd.functional.hessian(loss, weight.reshape(-1))
    diagonal = torch.diagonal(hessian).reshape(weight.shape)
    for bits in WIDTHS:
        error, factor = weight_error(bits, layer)
        trace = float((diagonal / factor.square()).sum())
        assert found.damage[layer][bits] == pytest.approx(
            trace / weight.numel() * float(error.square().sum()), rel=1e-3
        )
        assert found.standard_error[layer][bits] == 0  # 8 probes are all there are for 5 classes


def test_trace_with_activations_adds_the_damage_of_what_a_layer_reads() -> None:
    weights, both = of("trace"), of("trace+activations")
    module = network().model.eval()
    assert isinstance(module, Small)
    with torch.no_grad():
        x = module.stem(images())
        x = torch.relu(module.norm(torch.relu(module.body(x) + x))).mean((2, 3))
    slope = module.head.weight.detach() * 3
    p = reference().softmax(1)
    traces = [float((slope.T @ (torch.diag(row) - torch.outer(row, row)) @ slope).trace()) for row in p]
    for bits in WIDTHS:
        quantizer = network(bits).weight_layers()["head"]._source[0]
        rounded = (x / quantizer.scale).round().clamp(0, 2**bits - 1) * quantizer.scale
        expected = sum(traces) / COUNT / 4 * float((rounded - x).square().sum()) / COUNT
        assert both.damage["head"][bits] - weights.damage["head"][bits] == pytest.approx(expected, rel=1e-2)
        assert both.damage["norm"][bits] > 0


def test_a_standalone_norm_has_no_weights_to_damage() -> None:
    assert set(of("trace").damage["norm"].values()) == {0.0}
    assert set(of("fisher").damage["norm"].values()) == {0.0}


@pytest.mark.parametrize("metric", METRICS)
def test_fewer_bits_do_more_damage_and_names_are_those_of_schemes(metric: str) -> None:
    found = of(metric)
    assert (found.metric, found.arch, found.images) == (metric, "small", COUNT)
    assert list(found.damage) == list(found.standard_error) == LAYERS
    totals = [sum(row[bits] for row in found.damage.values()) for bits in WIDTHS]
    assert totals[0] > totals[1] > abs(totals[2])


@pytest.mark.parametrize("metric", METRICS)
def test_an_interrupted_measurement_ends_like_an_uninterrupted_one(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, seed=3, save_seconds=0.0, max_probes=4)
    expected = of(metric, settings=settings)
    state = tmp_path / "state.pth.tar"
    saves: list[int] = []
    save = Progress.save

    def interrupted(progress: Progress) -> None:
        save(progress)
        saves.append(progress.position)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        of(metric, settings=settings, state=state)
    assert of(metric, settings=settings, state=state) == expected
    assert saves[:3] == [1, 2, 3]  # the second call went on where the first one stopped
    del saves[:]
    assert of(metric, settings=settings, state=state) == expected
    assert len(saves) == 1  # nothing was left to do


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pth.tar"
    of("loss", state=state)
    with pytest.raises(UserError, match="metric loss, this one has kl; go on with the same settings, or remove"):
        of("kl", state=state)
    with pytest.raises(UserError, match=r"with widths \[2, 4, 8\], this one has \[4\]"):
        of("loss", (4,), state=state)
    with pytest.raises(UserError, match="another network, calibration or set of images; remove the file"):
        measure(network(), [(images() + 1, labels())], "loss", WIDTHS, SETTINGS, state)
    with pytest.raises(UserError, match="another network, calibration or set of images"):
        measure(network(7), batches(), "loss", WIDTHS, SETTINGS, state)
    state.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="damaged"):
        of("loss", state=state)


def test_the_same_seed_gives_the_same_result_and_the_model_is_left_alone() -> None:
    model = network()
    model.train()
    before = [(q.bits, float(q.x_max), q.enabled, q.in_place) for q in model.activation_quantizers().values()]
    few = replace(SETTINGS, max_probes=2)
    first = measure(model, batches(), "trace", WIDTHS, few)
    assert measure(model, batches(), "trace", WIDTHS, few) == first
    assert measure(model, batches(), "trace", WIDTHS, replace(few, seed=1)).damage != first.damage
    assert before == [(q.bits, float(q.x_max), q.enabled, q.in_place) for q in model.activation_quantizers().values()]
    assert model.training
    assert all(layer.enabled and layer.bits == 8 for layer in model.weight_layers().values())


@pytest.mark.parametrize("metric", METRICS)
def test_a_loss_that_is_not_finite_is_one_sentence(metric: str) -> None:
    model = network()
    with torch.no_grad():
        model.model.get_parameter("head.bias")[0] = math.nan
    with pytest.raises(UserError, match=r"is not finite; check the weights and the images for NaN or infinity$"):
        measure(model, batches(), metric, WIDTHS, SETTINGS)


def test_wrong_arguments_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"metric is 'hessian', expected one of trace, trace.activations"):
        of("hessian")
    with pytest.raises(UserError, match="the widths are 1, 4, expected some of 2 to 8"):
        of("loss", (4, 1))
    with pytest.raises(UserError, match="the widths are none"):
        of("loss", ())
    with pytest.raises(UserError, match=r"sensitivities \(loss\) got 1 images, expected at least 2"):
        measure(network(), [(images()[:1], labels()[:1])], "loss", WIDTHS, SETTINGS)
    with pytest.raises(UserError, match=r"sensitivities \(trace\) got 0 images"):
        measure(network(), [], "trace", WIDTHS, SETTINGS)
    with pytest.raises(UserError, match="no activation ranges yet"):
        measure(quantize(Small(), torch.zeros(1, 3, 6, 6), "uniform8"), batches(), "loss", WIDTHS, SETTINGS)
    with pytest.raises(UserError, match="tolerance is 0, expected more than 0"):
        Settings(tolerance=0)
    with pytest.raises(UserError, match="max_probes is 1, expected at least 2"):
        Settings(max_probes=1)


SAVED = Sensitivities("kl", "net", 7, {"a": {2: 0.5, 8: -1e-9}, "b": {4: 1.0}}, {"a": {2: 0.1, 8: 0.0}, "b": {4: 0.2}})


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sensitivities.json"
    SAVED.save(path)
    assert Sensitivities.load(path) == SAVED


def test_a_file_from_elsewhere_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(UserError, match=r"cannot read the sensitivities .*file\.json: No such file"):
        Sensitivities.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        Sensitivities.load(path)
    for text in ("[]", "{}", '{"format": "x"}'):
        path.write_text(text)
        with pytest.raises(UserError, match="does not hold sensitivities"):
            Sensitivities.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "has version 9, this program reads 1"),
        ({"metric": "x"}, "metric is 'x', expected one of trace"),
        ({"images": 0}, "images a number above 0"),
        ({"arch": None}, "arch must be a name"),
        ({"damage": {}}, "damage is missing or empty"),
        ({"damage": {"a": {"9": 1.0}}}, "damage of 'a' must have bits from 2 to 8"),
        ({"damage": {"a": {"8": math.nan}}}, "damage of 'a' must be finite numbers;"),
        ({"damage": {"a": {"8": "1"}}}, "damage of 'a' must be finite numbers;"),
        ({"standard_error": {"a": {"8": -1.0}}}, "standard_error of 'a' must be finite numbers of at least 0"),
        ({"damage": {"a": {"8": 1.0}}}, "must have the same layers and bits"),
    ],
)
def test_a_changed_file_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "file.json"
    SAVED.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Sensitivities.load(path)
