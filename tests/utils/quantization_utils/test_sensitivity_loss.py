"""Loss increase of single layers against plain computations on the whole network."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bit_config import Rule, Scheme
from utils.api import calibrate, quantize
from utils.errors import UserError
from utils.experiment import quantize_module
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer
from utils.quantization_utils.sensitivity_loss import loss_increase, mean_and_error
from utils.quantization_utils.single_layer import logits_alone, sites, untouched
from utils.quantization_utils.state import quantizer_state
from utils.random_networks import random_images, spread_statistics

COUNT = 24


class Forked(nn.Module):
    """Two layers read one tensor through a max pool; a sum, a standalone BatchNorm, ReLU6 and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(self.norm(torch.relu(self.left(x) + self.right(x))))
        return self.head(x.mean((2, 3)))


def images(count: int = COUNT) -> Tensor:
    return (random_images((3, 8, 8), count, 0).float() - 128) / 64


def labels(count: int = COUNT) -> Tensor:
    return torch.arange(count) % 5


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(zip(images().split(10), labels().split(10), strict=True))


def network(bits: int = 8) -> QuantizedModel:
    torch.manual_seed(1)
    module = Forked()
    spread_statistics(module, images())
    scheme = Scheme("all", (Rule(".*", (bits, bits)),), 16, "free")
    model, _, _ = quantize_module(module, torch.zeros(1, 3, 8, 8), scheme)
    calibrate(model, [images()])
    return model


LAYERS = ["stem.0", "left.0", "right.0", "norm", "head"]
UNSHARED = ["stem.0", "norm", "head"]


@torch.no_grad()
def plainly(model: QuantizedModel, layer: str) -> tuple[Tensor, Tensor]:
    """Float logits and those with one layer's switch and that of the quantizer in front of it on."""
    model.enable(False)
    reference = model(images())
    found = model.weight_layers()[layer]
    found.enabled = found._source[0].enabled = True
    logits = model(images())
    model.enable()
    return reference, logits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loss_increase_is_that_of_the_network_with_one_layer_on(bits: int) -> None:
    model = network(bits)
    found = loss_increase(model, batches())
    assert list(found) == LAYERS
    for layer in UNSHARED:
        reference, logits = plainly(model, layer)
        losses = [F.cross_entropy(x, labels(), reduction="none") for x in (reference, logits)]
        hits = [(x.argmax(1) == labels()).double() for x in (reference, logits)]
        difference = losses[1] - losses[0]
        assert found[layer].loss == pytest.approx(float(difference.mean()), abs=1e-6)
        assert found[layer].loss_error == pytest.approx(float(difference.std()) / math.sqrt(COUNT), abs=1e-6)
        assert found[layer].top1 == pytest.approx(100 * float((hits[1] - hits[0]).mean()), abs=1e-9)


def test_only_quantizes_the_named_layers_at_the_given_bits() -> None:
    """With the ranges of a network of that width it is that network."""
    coarse, fine = network(3), network(8)
    for name, site in sites(coarse).items():
        sites(fine)[name].quantizer.set_range(site.quantizer.x_min, site.quantizer.x_max)
    found = loss_increase(fine, batches(), dict.fromkeys(LAYERS[1:], 3))
    assert list(found) == LAYERS[1:]
    expected = loss_increase(coarse, batches())
    assert found == {name: expected[name] for name in LAYERS[1:]}
    assert found["head"].loss != loss_increase(fine, batches())["head"].loss


def test_a_tensor_of_two_readers_is_quantized_for_the_one_layer_alone() -> None:
    model = network(2)
    with untouched(model):
        found = {name: logits for name, _, logits in logits_alone(model, images(), dict.fromkeys(LAYERS, (None,)))}
    quantizer = sites(model)["left.0"].quantizer
    assert quantizer is sites(model)["right.0"].quantizer
    model.enable(False)
    module = model.model
    assert isinstance(module, Forked)
    with torch.no_grad():
        x = module.stem(images())
        pooled, rounded = module.pool(x), module.pool(_rounded(quantizer, x))
        for layer in ("left.0", "right.0"):
            quantized = model.weight_layers()[layer]
            quantized.enabled = True
            y = quantized(rounded)
            left = y if layer == "left.0" else module.left(pooled)
            right = y.clamp(0, 6) if layer == "right.0" else module.right(pooled)
            total = torch.relu(module.norm(torch.relu(left + right)))
            torch.testing.assert_close(found[layer], module.head(total.mean((2, 3))), rtol=1e-4, atol=1e-5)


def _rounded(quantizer: Quantizer, x: Tensor) -> Tensor:
    return torch.round(x / quantizer.scale).clamp(0, 3) * quantizer.scale


def test_the_model_is_left_as_it_was() -> None:
    model = network(4)
    model.weight_layers()["head"].enabled = False
    model.train()
    before = quantizer_state(model)
    switches = [m.enabled for m in (*model.weight_layers().values(), *model.activation_quantizers().values())]
    in_place = [q.in_place for q in model.activation_quantizers().values()]
    loss_increase(model, batches(), {"left.0": 2})
    assert str(quantizer_state(model)) == str(before)
    assert switches == [m.enabled for m in (*model.weight_layers().values(), *model.activation_quantizers().values())]
    assert in_place == [q.in_place for q in model.activation_quantizers().values()]
    assert model.training


def test_mean_and_error_of_known_numbers() -> None:
    mean, error = mean_and_error(torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]))
    assert mean.tolist() == [2.0, 4.0]
    assert error.tolist() == pytest.approx([1 / math.sqrt(3), 0.0])
    assert mean_and_error(torch.tensor([5.0]))[1].item() == math.inf


def test_errors_are_one_sentence() -> None:
    model = network()
    with pytest.raises(UserError, match=r"no layer 'neck'; it has stem\.0, left\.0"):
        loss_increase(model, batches(), {"neck": 4})
    with pytest.raises(UserError, match="got 0 images"):
        loss_increase(model, [])
    fresh = quantize(Forked(), torch.zeros(1, 3, 8, 8), "uniform8")
    with pytest.raises(UserError, match="no activation ranges yet"):
        loss_increase(fresh, batches())
    with torch.no_grad():
        model.model.get_parameter("head.bias")[0] = math.nan
    with pytest.raises(UserError, match="the loss of the float network is not finite"):
        loss_increase(model, batches())
