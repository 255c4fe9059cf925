"""Folding a BatchNorm against evaluating it."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.quantization_utils.fold_bn import affine_of, fold

EPSILON = np.finfo(np.float32).eps


def random_bn(channels: int, kind: type = nn.BatchNorm2d, affine: bool = True) -> nn.Module:
    """Factors of both signs, a zero, a tiny variance."""
    bn = kind(channels, affine=affine).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.1, 3.0)
    bn.running_var[0] = 1e-12
    if affine:
        with torch.no_grad():
            bn.weight.normal_()
            bn.bias.normal_()
            bn.weight[1] = 0
            bn.weight[2] = -bn.weight[2].abs()
    return bn


LAYERS = {
    "conv": lambda bias: (nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.BatchNorm2d, (2, 3, 5, 5)),
    "depthwise": lambda bias: (nn.Conv2d(6, 6, 3, groups=6, bias=bias), nn.BatchNorm2d, (2, 6, 5, 5)),
    "linear": lambda bias: (nn.Linear(7, 6, bias=bias), nn.BatchNorm1d, (4, 7)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folded_equals_unfolded(layer, bias, affine):
    module, kind, shape = LAYERS[layer](bias)
    bn = random_bn(6, kind, affine)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = bn(module(x))
        weight, folded_bias = fold(module.weight, module.bias, bn)
        if isinstance(module, nn.Linear):
            found = nn.functional.linear(x, weight, folded_bias)
        else:
            found = nn.functional.conv2d(x, weight, folded_bias, padding=module.padding, groups=module.groups)
    # Cancellation of the mean against the layer's result: errors are relative to the terms, k * |y| and |shift|.
    k, shift = (t.abs().reshape(1, -1, *[1] * (expected.dim() - 2)) for t in affine_of(bn))
    with torch.no_grad():
        tolerance = 64 * EPSILON * (k * (module(x).abs() + 1) + shift)
    assert torch.isfinite(found).all()
    assert ((found - expected).abs() <= tolerance).all()


def test_affine_of_by_its_formula_in_float64():
    bn = random_bn(6)
    gamma, beta, mean, var = (t.detach().double() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    k, shift = affine_of(bn)
    torch.testing.assert_close(k.double(), gamma / (var + bn.eps).sqrt(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(shift.double(), beta - mean * gamma / (var + bn.eps).sqrt(), rtol=1e-5, atol=1e-5)


def test_without_bn_nothing_changes():
    conv = nn.Conv2d(1, 1, 1)
    assert fold(conv.weight, conv.bias, None) == (conv.weight, conv.bias)


def test_gradients_reach_gamma_beta_weight_and_bias():
    conv, bn = nn.Conv2d(3, 6, 1), random_bn(6)
    weight, bias = fold(conv.weight, conv.bias, bn)
    (weight.sum() + bias.sum()).backward()
    for parameter in (conv.weight, conv.bias, bn.weight, bn.bias):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
