"""Where each engine quantizes, how wide, with which codes; and that the simulation is the arithmetic in integers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bit_config
from utils.errors import UserError
from utils.experiment import Experiment, quantize_module
from utils.models import create_model
from utils.quantization_utils.backends import BACKENDS, why_not
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.coded import CodedLayer, CodedQuantizer
from utils.quantization_utils.ptq import quantize_after_training
from utils.quantization_utils.ptq_recipe import parse_recipe
from utils.quantization_utils.reconstruct import Settings, reconstruct
from utils.quantization_utils.sqnr import layer_sqnr
from utils.quantization_utils.weight_ranges import calibrate_weights
from utils.random_networks import spread_statistics

SIMULATED = [name for name, backend in BACKENDS.items() if not backend.converts]


class Block(nn.Module):
    """Convolution, pool, residual block, average pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(self.body(x) + x)
        return self.last(x.mean((2, 3)))


def network(backend: str, scheme: str = "w8a8"):
    module, images = Block(), torch.randn(8, 3, 8, 8)
    spread_statistics(module, images)
    model = quantize_module(module, images, bit_config.load_scheme(scheme, "own"), BACKENDS[backend])[0]
    return model, images


def placed(backend: str, scheme: str = "w8a8") -> dict[str, CodedQuantizer]:
    """Quantizers by the value behind which they are."""
    model, _ = network(backend, scheme)
    quantizers = model.activation_quantizers()
    return {op.inputs[0]: quantizers[op.name] for op in model.ops if op.name in quantizers}


def test_where_tensors_are_quantized():
    image, stem_conv, stem, pool, body, total, relu, mean = _names("academic")
    assert set(placed("academic")) == {image, pool, mean}  # inputs of layers; the shortcut sees the pooled tensor
    assert set(placed("tensorrt")) == {image, stem, pool, body, relu, mean}  # pools, and both operands of the sum
    assert set(placed("openvino")) == {image, pool, body, relu, mean}  # a max pool takes what comes
    assert set(placed("onnxruntime")) == {image, stem, pool, body, relu, mean, "last"}  # and the logits
    assert stem_conv not in placed("tensorrt")
    assert total not in placed("tensorrt")


def _names(backend: str) -> list[str]:
    model, _ = network(backend)
    return [op.name for op in model.ops if op.kind in ("input", "clip", "max_pool", "conv", "add", "avg_pool")]


def test_codes_of_activations():
    image, _, _, pool, body, _, relu, mean = _names("tensorrt")
    signed, unsigned = (-127, 127, False), (0, 255, True)
    for backend, at_image, behind_relu in (
        ("tensorrt", signed, signed),
        ("openvino", signed, unsigned),
        ("academic", unsigned, unsigned),
        ("onnxruntime", unsigned, unsigned),
    ):
        found = {name: (q.code.lo, q.code.hi, q.code.affine) for name, q in placed(backend).items()}
        assert found[image] == at_image
        assert found[pool] == behind_relu
        assert found[mean] == behind_relu
        if backend != "academic":
            assert found[body] == at_image
            assert found[relu] == behind_relu
    model, images = network("openvino")
    calibrate(model, [images], "minmax")
    pooled = next(q for q in model.activation_quantizers().values() if q.code.affine)
    assert pooled.bounds() == (0, 255)


@pytest.mark.parametrize("backend", SIMULATED)
def test_ends(backend):
    """The first and the last layer, with what they read, have 8 bits where the engine says so."""
    model, _ = network(backend, "w4a4")
    widths = {name: (layer.bits, layer.code.hi - layer.code.lo) for name, layer in model.weight_layers().items()}
    whole = 0 if BACKENDS[backend].weights == "asymmetric" else 1  # narrow codes lack one
    narrow, wide = (4, 15 - whole), (8, 255 - whole)
    ends = wide if BACKENDS[backend].ends_8bit else narrow
    assert widths == {"stem.0": ends, "body.0": narrow, "last": ends}
    image, _, _, pool, _, _, _, mean = _names(backend)
    bits = {name: quantizer.bits for name, quantizer in placed(backend, "w4a4").items()}
    assert (bits[image], bits[pool], bits[mean]) == ((8, 4, 8) if BACKENDS[backend].ends_8bit else (4, 4, 4))
    assert {width for name, width in bits.items() if name not in (image, mean)} == {4}


def test_a_scheme_decides_about_the_ends_of_the_integer_graph():
    model, _ = network("hawq", "w4a4")
    assert {name: layer.bits for name, layer in model.weight_layers().items()} == {"stem.0": 8, "body.0": 4, "last": 8}


@pytest.mark.parametrize("backend", SIMULATED)
def test_without_quantization_it_is_the_float_network(backend):
    model, images = network(backend)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), model.model(images))


def test_padding_with_the_zero_point_is_the_arithmetic_in_integers():
    """A convolution of codes, padded with the zero point and corrected by it, gives what the simulation gives."""
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 3))
    images = torch.rand(4, 2, 6, 6) * 3 - 1
    scheme = bit_config.load_scheme("w8a8", "own")
    model = quantize_module(module, images, scheme, BACKENDS["onnxruntime"])[0]
    calibrate(model, [images], "minmax")
    calibrate_weights(model, "minmax")
    model.enable()
    quantizer = next(q for q in model.activation_quantizers().values())
    lo, _ = quantizer.bounds()
    zero = -lo
    assert 0 < zero < 255
    layer = model.weight_layers()["0"]
    assert isinstance(layer, CodedLayer)
    with torch.no_grad():
        codes = (quantizer.integers(quantizer(images)) + zero).double()
        simulated = layer(quantizer(images)).double()
    weights, scale = layer.integer_weights().weight.double(), layer.integer_weights().scale.double()
    step = (scale * float(quantizer.scale)).reshape(-1, 1, 1)
    bias = module[0].bias.detach().double().reshape(-1, 1, 1)
    correction = zero * weights.sum((1, 2, 3)).reshape(-1, 1, 1)

    def real(padding: int) -> Tensor:
        accumulators = F.conv2d(F.pad(codes, (1, 1, 1, 1), value=padding), weights)
        return (accumulators - correction) * step + bias

    np.testing.assert_allclose(simulated.numpy(), real(zero).numpy(), atol=1e-5)
    border = (simulated - real(0)).abs()
    assert float(border[:, :, 1:-1, 1:-1].max()) < 1e-5  # inside, padding does not matter
    assert float(border.max()) > 0.01


def test_batch_norm_stays_float_where_it_is_not_folded():
    model, _ = network("academic")
    layers = model.weight_layers()
    assert isinstance(layers["body.0"], CodedLayer)
    assert not layers["body.0"].folded
    assert network("tensorrt")[0].weight_layers()["body.0"].folded


@pytest.mark.parametrize("backend", SIMULATED)
@pytest.mark.parametrize("recipe", ["minmax/ema", "mse/ema_mse", "mse+equalize+bias", "mse+adaround"])
def test_every_part_of_a_recipe_works(backend, recipe):
    model, images = network(backend, "w4a8")
    with torch.no_grad():
        expected = model.eval()(images)
    results = []
    settings = Settings(steps=60, positions=256)
    reference = quantize_after_training(
        model,
        [images[:4], images[4:]],
        parse_recipe(recipe),
        rounding=lambda m: results.extend(reconstruct(m, images, settings)),
        say=lambda line: None,
    )
    with torch.no_grad():
        found = model(images)
    error = float((found - expected).square().sum() / expected.square().sum())
    assert 0 < error < 0.2
    assert len(layer_sqnr(model, [images], reference)) == 3
    if "adaround" in recipe:
        assert [r.name for r in results] == ["stem.0", "body.0", "last"]
        assert all(r.loss_after <= r.loss_nearest for r in results)
        assert any(r.loss_after < r.loss_nearest for r in results)


def test_learned_rounding_of_asymmetric_weights_stays_on_the_codes():
    model, images = network("academic", "w4a8")
    calibrate(model, [images], "minmax")
    calibrate_weights(model, "mse")
    model.enable()
    layer = model.weight_layers()["body.0"]
    assert isinstance(layer, CodedLayer)
    low, high = layer.integer_range()
    reconstruct(model, images, Settings(steps=60, positions=256))
    integers = layer.integer_weights().weight
    assert bool(((integers >= low) & (integers <= high)).all())
    assert bool(torch.equal(low, layer.integer_range()[0]))
    assert int((high - low).flatten()[0]) == 15


def test_a_simulation_has_no_integer_graph():
    info = create_model("digits")
    experiment = Experiment(info, info.preprocess, "w8a8", torch.device("cpu"), BACKENDS["onnxruntime"])
    assert experiment.simulates
    with pytest.raises(UserError, match="onnxruntime has no integer graph: zero points would fold"):
        experiment.convert(())


def test_data():
    assert [name for name, backend in BACKENDS.items() if backend.converts] == ["hawq"]
    assert all(name == backend.name and backend.why for name, backend in BACKENDS.items())
    assert why_not(BACKENDS["hawq"], "block") is None
    assert why_not(BACKENDS["tensorrt"], "adaround") is None
    assert why_not(BACKENDS["tensorrt"], "descent") is None
    assert "the same codes above and below zero; use adaround" in str(why_not(BACKENDS["academic"], "descent"))
    assert "the simulation of tensorrt does not offer" in str(why_not(BACKENDS["tensorrt"], "block"))


def test_an_engine_is_only_data():
    """A made-up engine needs no code: sums alone are quantized, to full codes."""
    own = replace(BACKENDS["tensorrt"], name="own", narrow=False, reads=("add",))
    module, images = Block(), torch.randn(4, 3, 8, 8)
    spread_statistics(module, images)
    model = quantize_module(module, images, bit_config.load_scheme("w8a8", "own"), own)[0]
    assert [(q.code.lo, q.code.hi) for q in model.activation_quantizers().values()] == [(-128, 127)] * 2
