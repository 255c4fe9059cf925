"""Scales, rounding and gradients of fake quantization against independent formulas."""

import math

import numpy as np
import pytest
import torch

from utils.quantization_utils import quant_primitives as q

WIDTHS = [(bits, signed) for bits in range(2, 17) for signed in (False, True)]


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_int_range_counts_two_to_the_bits_values(bits, signed):
    lo, hi = q.int_range(bits, signed)
    assert hi - lo + 1 == 2**bits
    assert (lo == 0) != signed
    assert lo in (0, -hi - 1)


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.0), (-5.0, 2.0), (0.0, 0.1)])
def test_activation_scale(bits, signed, low, high):
    reach = max(-low, high) if signed else high
    expected = np.float32(reach) / np.float32(2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    found = q.activation_scale(torch.tensor(low), torch.tensor(high), bits, signed)
    assert found.dtype == torch.float32
    assert found.item() == expected


def test_activation_scale_of_a_dead_tensor_is_positive():
    zero = torch.zeros(())
    assert q.activation_scale(zero, zero, 8, True) == q.MIN_ACTIVATION_SCALE > 0


def test_quantize_rounds_half_to_even_through_the_float32_reciprocal():
    x = torch.randn(10_000) * 3
    x[:5] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]) * 0.25
    scale = torch.tensor(0.25)
    inverse = np.float32(1) / np.float32(0.25)
    expected = np.clip(np.rint((x.numpy() * inverse).astype(np.float32)), -8, 7)
    assert np.array_equal(q.quantize(x, scale, -8, 7).numpy(), expected)
    assert q.quantize(x, scale, -8, 7)[:5].tolist() == [0, 2, 2, 0, -2]


def test_weight_scale_per_channel_and_per_tensor():
    weight = torch.randn(5, 3, 2, 2)
    weight[3] = 0
    rows = np.abs(weight.numpy().reshape(5, -1)).max(1) / np.float32(7)
    np.testing.assert_array_equal(q.weight_scale(weight, 4).numpy(), np.maximum(rows, np.float32(q.MIN_WEIGHT_SCALE)))
    assert q.weight_scale(weight, 4, per_channel=False).tolist() == [float(rows.max())] * 5


@pytest.mark.parametrize("percentile", [90.0, 99.0, 75.5])
def test_weight_percentile_takes_order_statistics(percentile):
    weight = torch.randn(4, 200)
    count = weight.shape[1]
    ordered = np.sort(weight.numpy(), axis=1)
    high = ordered[:, math.ceil(count * percentile / 100) - 1]
    low = ordered[:, math.ceil(count * (100 - percentile) / 100) - 1]
    expected = np.maximum(np.abs(high), np.abs(low)) / np.float32(127)
    np.testing.assert_array_equal(q.weight_scale(weight, 8, percentile=percentile).numpy(), expected)


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (4, False), (8, True)])
def test_fake_quantize_value_and_straight_through_mask(bits, signed):
    lo, hi = q.int_range(bits, signed)
    scale = torch.tensor(0.1)
    x = (torch.randn(2, 3, 17, 5) * 0.1 * hi).requires_grad_()
    result = q.FakeQuantize.apply(x.clone(), scale, lo, hi, False)
    expected = q.quantize(x.detach(), scale, lo, hi) * scale
    assert torch.equal(result, expected)
    grad = torch.randn_like(result)
    result.backward(grad)
    t = x.detach() * scale.reciprocal()
    inside = (t >= lo - 0.5) & (t <= hi + 0.5)
    assert torch.equal(x.grad, grad * inside)
    assert 0 < inside.float().mean() < 1


def test_fake_quantize_with_relu_passes_no_gradient_below_zero():
    scale = torch.tensor(0.1)
    x = torch.randn(1000).mul(2).requires_grad_()
    result = q.FakeQuantize.apply(x.clone(), scale, 0, 15, True)
    assert torch.equal(result, q.quantize(x.detach().clamp(min=0), scale, 0, 15) * scale)
    result.sum().backward()
    t = x.detach() * scale.reciprocal()
    assert torch.equal(x.grad, ((t >= 0) & (t <= 15.5)).float())


@pytest.mark.parametrize("channels", [False, True])
def test_learned_scale_gradient_is_that_of_lsq(channels):
    lo, hi, factor = -8, 7, 0.37
    x = torch.randn(6, 50, dtype=torch.float32).requires_grad_()
    scale = (torch.rand(6) * 0.1 + 0.1 if channels else torch.tensor(0.15)).requires_grad_()
    grad = torch.randn(6, 50)
    q.FakeQuantizeLearned.apply(x, scale, lo, hi, factor).backward(grad)
    step = scale.detach().double().reshape(-1, 1) if channels else scale.detach().double()
    t = x.detach().double() / step
    inside = (t >= lo) & (t <= hi)
    # LSQ, equation 3: round(t) - t inside, the bound outside.
    terms = torch.where(inside, t.round() - t, t.clamp(lo, hi)) * grad
    expected = factor * (terms.sum(1) if channels else terms.sum())
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-3, atol=1e-3 * factor)
    assert torch.equal(x.grad, grad * inside)


def test_learned_scale_forward_is_fake_quantization():
    x, scale = torch.randn(4, 9), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = (x * scale.reciprocal().reshape(-1, 1)).clamp(-8, 7).round() * scale.reshape(-1, 1)
    assert torch.equal(q.FakeQuantizeLearned.apply(x, scale, -8, 7, 1.0), expected)


def test_weights_pass_gradients_straight_through():
    weight = torch.randn(3, 4).requires_grad_()
    scale = torch.full((3, 1), 0.2)
    result = q.FakeQuantizeWeight.apply(weight, scale, -2, 1)
    assert torch.equal(result, q.quantize(weight.detach(), scale, -2, 1) * scale)
    grad = torch.randn(3, 4)
    result.backward(grad)
    assert torch.equal(weight.grad, grad)


def test_evaluation_in_inference_mode_leaves_nothing_that_cannot_be_used_later(monkeypatch):
    monkeypatch.setattr(q, "_BUFFERS", {})
    with torch.inference_mode():
        inside = q.FakeQuantize.apply(torch.full((3,), 0.26), torch.tensor(0.5), -8, 7, False)
    outside = q.FakeQuantize.apply(torch.full((3,), 0.26), torch.tensor(0.5), -8, 7, False)
    assert inside.tolist() == outside.tolist() == [0.5] * 3
