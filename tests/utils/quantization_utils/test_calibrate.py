"""Calibration: ranges come from the float network, and bad data are refused."""

import numpy as np
import pytest
import torch
from torch import nn

import bit_config
from utils.errors import UserError
from utils.experiment import quantize_module
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.calibrators import METHODS


def small_model(scheme="uniform8"):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    return quantize_module(module, torch.zeros(1, 3, 8, 8), bit_config.load_scheme(scheme, "net"))[0]


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_the_float_network(method):
    model = small_model("uniform4")
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    assert calibrate(model, batches, method) == 12
    assert all(q.enabled and q.observer is None for q in model.activation_quantizers().values())
    with torch.no_grad():
        features = [torch.relu(model.model[0](b)) for b in batches]
    found = float(model.quantizers["_0_q4"].x_max)
    exact = max(float(f.max()) for f in features)
    assert found == exact if method == "minmax" else 0 < found <= exact
    assert float(model.quantizers["_0_q4"].x_min) == 0


@pytest.mark.parametrize("batches", [[], [torch.empty(0, 3, 8, 8)]])
def test_no_images(batches):
    with pytest.raises(UserError, match="calibration got 0 images; give at least one"):
        calibrate(small_model(), batches)


def test_an_empty_batch_says_nothing():
    batch = torch.randn(2, 3, 8, 8)
    assert calibrate(small_model(), [batch, batch[:0]]) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite(value, method):
    batch = torch.randn(2, 3, 8, 8)
    batch[0, 0, 0, 0] = value
    with pytest.raises(UserError, match="calibration met values that are not finite at 'input_1_q8'"):
        calibrate(small_model(), [batch], method)


def test_a_failed_calibration_leaves_no_observer():
    model = small_model()
    with pytest.raises(UserError):
        calibrate(model, [])
    assert all(q.observer is None for q in model.activation_quantizers().values())


def test_batching_does_not_matter_for_extremes():
    images, found = torch.randn(6, 3, 8, 8), []
    torch.manual_seed(1)
    module = small_model()
    for size in (1, 2, 6):
        calibrate(module, images.split(size), "minmax")
        found.append([float(q.x_max) for q in module.activation_quantizers().values()])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)
