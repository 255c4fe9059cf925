"""Weights and biases of quantized layers against an independent numpy formula; dead channels stay finite."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.quantization_utils.quant_modules import QuantBatchNorm, Quantizer, QuantLayer, RoundedAdd

STEP = np.float32(0.02)


def quantizer(bits=8, signed=True, scale=STEP, **options):
    q = Quantizer(bits, signed, **options)
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    q.set_range(torch.tensor(0.0), torch.tensor(float(scale) * levels))
    q.enabled = True
    return q


def layer_with_bn(bits, bias=True):
    """A convolution whose channels meet every special case of folding."""
    conv, bn = nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        conv.weight[0] = 0  # an all-zero filter
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.1, 2)
        bn.running_var[1] = 1e-9
        bn.weight.uniform_(-2, 2)
        bn.weight[2] = 0
        bn.weight[3] = -1
        bn.bias.normal_()
    layer = QuantLayer(conv, bn, bits)
    layer.attach(quantizer())
    return layer.eval()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("bias", [False, True])
def test_integer_weights_are_those_of_the_contract(bits, bias):
    layer = layer_with_bn(bits, bias)
    conv, bn = layer.module, layer.bn
    f = np.float32
    sigma = np.sqrt(bn.running_var.numpy() + f(bn.eps))
    k = bn.weight.detach().numpy() / sigma
    weight = conv.weight.detach().numpy() * k.reshape(-1, 1, 1, 1)
    shift = bn.bias.detach().numpy() - bn.running_mean.numpy() * k
    shift = shift + (conv.bias.detach().numpy() * k if bias else 0)
    n = 2 ** (bits - 1) - 1
    reach = np.abs(weight).reshape(8, -1).max(1)
    scale = np.maximum(np.maximum(reach / f(n), np.abs(shift) / (STEP * f(2.0**30))), f(2.0**-40))
    inverse = (f(1) / scale).astype(f).reshape(-1, 1, 1, 1)
    expected = np.clip(np.rint((weight * inverse).astype(f)), -n - 1, n)
    found = layer.integer_weights()
    assert found.weight.dtype == torch.int8
    np.testing.assert_allclose(found.scale.numpy(), scale, rtol=1e-5)
    np.testing.assert_allclose(found.bias.numpy(), shift, rtol=1e-4, atol=1e-5)
    # The folding's own rounding may push a value over a tie.
    assert np.abs(found.weight.numpy() - expected).max() <= 1
    assert (found.weight.numpy() != expected).mean() < 0.01
    assert not found.weight[0].any()
    integer_bias = np.rint(found.bias.double().numpy() / (found.scale.double().numpy() * float(STEP)))
    assert np.abs(integer_bias).max() <= 2**30 * 1.0001  # the bias floor of the scale
    assert np.abs(integer_bias[0]) > 2**29  # an all-zero filter's bias keeps all its bits


def test_evaluation_uses_exactly_the_integer_weights_and_biases():
    layer = layer_with_bn(4)
    layer.enabled = True
    layer.eval()
    x = torch.randn(2, 4, 5, 5)
    parts = layer.integer_weights()
    weight = parts.weight.float() * parts.scale.reshape(-1, 1, 1, 1)
    step = parts.scale * STEP
    bias = torch.round(parts.bias / step) * step
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.conv2d(x, weight, bias))


def test_live_and_folded_scales_give_the_same_integers():
    """Symmetric per-channel quantization commutes with folding."""
    layer = layer_with_bn(4, bias=False)
    unfolded = QuantLayer(layer.module, None, 4)
    a, b = layer.integer_weights().weight, unfolded.integer_weights().weight
    sign = torch.sign(layer.bn.weight).reshape(-1, 1, 1, 1)
    alive = [c for c in range(8) if c not in (0, 2)]
    difference = (a - sign * b)[alive].abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("clipping", ["percentile", "narrow", "full"])
def test_weights_clipped_in_training_are_those_of_evaluation_whatever_the_sign_of_gamma(clipping):
    layer = layer_with_bn(3, bias=False)
    alive = [c for c in range(8) if c not in (0, 1, 2)]  # of tiny variance: a scale that the bias decides
    factors = (layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)).detach()
    assert len(set(torch.sign(factors[alive]).tolist())) == 2
    if clipping == "percentile":
        layer.percentile = 80.0
    else:
        layer.learned = nn.Parameter(layer.module.weight.detach().flatten(1).abs().amax(1).clamp_min(1e-6) / 6)
        layer.narrow_range = clipping == "narrow"
    parts = layer.integer_weights()
    lowest = -3 if clipping == "narrow" else -4
    assert (int(parts.weight[alive].min()), int(parts.weight[alive].max())) == (lowest, 3)
    weight = parts.weight * (parts.scale / factors).reshape(-1, 1, 1, 1)
    x = torch.randn(4, 4, 6, 6)
    expected = layer.bn.train()(nn.functional.conv2d(x, weight))
    layer.enabled = True
    with torch.no_grad():
        torch.testing.assert_close(layer.train()(x)[:, alive], expected[:, alive], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("percentile", [0.0, 99.0])
@pytest.mark.parametrize("per_channel", [True, False])
def test_range_options_change_the_scale_only(percentile, per_channel):
    layer = layer_with_bn(4)
    layer.percentile, layer.per_channel = percentile, per_channel
    parts = layer.integer_weights()
    assert torch.isfinite(parts.scale).all()
    assert int(parts.weight.min()) >= -8
    assert int(parts.weight.max()) <= 7


def test_standalone_bn_keeps_the_sign_of_gamma_and_loses_nothing():
    bn = nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 1e-20, 3.0]))
        bn.running_var.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0, 1e-12]))
        bn.bias.normal_()
    layer = QuantBatchNorm(bn)
    layer.attach(quantizer())
    parts = layer.integer_weights()
    assert parts.weight.flatten()[[0, 1, 2, 4]].tolist() == [127, -127, 0, 127]
    x = torch.randn(2, 5, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), bn(x), rtol=1e-5, atol=1e-5)
        scaled = x * (parts.weight.float().flatten() * parts.scale).reshape(1, -1, 1, 1)
        torch.testing.assert_close(scaled + parts.bias.reshape(1, -1, 1, 1), bn(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, False), (4, True), (8, False), (8, True), (16, True)])
@pytest.mark.parametrize("relu", [False, True])
def test_quantizer_rounds_as_the_contract_says(bits, signed, relu):
    q = quantizer(bits, signed, relu=relu)
    x = torch.randn(500) * float(STEP) * 2**bits
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    inverse = np.float32(1) / q.scale.numpy()
    expected = np.clip(np.rint((x.numpy() * inverse).astype(np.float32)), 0 if relu else lo, hi)
    result = q.eval()(x)
    assert np.array_equal(q.integers(result).numpy(), expected)
    assert np.array_equal(result.numpy(), (expected * q.scale.numpy()).astype(np.float32))


def test_relu6_is_an_integer_bound():
    q = quantizer(8, False, scale=0.05, relu=True, ceiling=6.0)
    q.set_range(torch.tensor(0.0), torch.tensor(50.0))
    assert q.x_max == 6
    assert q.bounds() == (0, 255)
    wide = quantizer(16, True, relu=True, ceiling=6.0)
    wide.set_range(torch.tensor(0.0), torch.tensor(3.0))
    assert wide.bounds() == (0, 2**15 - 1)


def test_dead_tensor_quantizes_to_zeros():
    q = quantizer()
    q.set_range(torch.zeros(()), torch.zeros(()))
    assert torch.equal(q.eval()(torch.zeros(4)), torch.zeros(4))
    assert torch.isfinite(q(torch.randn(4))).all()


def test_eight_bit_sums_round_their_branches():
    target, add = quantizer(8, True, scale=0.1), RoundedAdd()
    add.attach(target)
    a, b = torch.tensor([0.04, 0.14]), torch.tensor([0.04, 0.14])
    torch.testing.assert_close(add(a, b), torch.tensor([0.0, 0.2]))
    torch.testing.assert_close(add(a), torch.tensor([0.0, 0.2]))
    target.enabled = False
    torch.testing.assert_close(add(a, b, a), a * 3)


def test_running_extremes_and_momentum_follow_training_batches():
    q = quantizer(8, True, scale=0.01)
    q.tracking = True
    q.train()(torch.tensor([-3.0, 2.0]))
    assert (float(q.x_min), float(q.x_max)) == (-3.0, 2.0)
    q.momentum = 0.75
    q(torch.tensor([-1.0, 4.0]))
    assert (float(q.x_min), float(q.x_max)) == (-2.5, 2.5)
