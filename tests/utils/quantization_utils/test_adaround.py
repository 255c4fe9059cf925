"""Write-back: the integers chosen are the integers that conversion takes."""

import pytest
import torch
from torch import Tensor, nn

from utils.quantization_utils.adaround import Grid, SoftRounding, pin_grid, with_scale, write_integers
from utils.quantization_utils.quant_modules import Quantizer, QuantLayer


def layer(module: nn.Conv2d | nn.Linear, bn: nn.BatchNorm2d | None, bits: int, per_channel: bool = True) -> QuantLayer:
    result = QuantLayer(module, bn, bits).eval()
    result.per_channel = per_channel
    result.enabled = True
    source = Quantizer(8, signed=False)
    source.set_range(torch.tensor(0.0), torch.tensor(3.0))
    source.enabled = True
    result.attach(source)
    return result


def trained_bn(channels: int) -> nn.BatchNorm2d:
    """Factors of both signs, one of them zero."""
    bn = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        bn.weight.copy_(torch.randn(channels))
        bn.weight[1] = 0
        bn.bias.copy_(torch.randn(channels))
        bn.running_mean.copy_(torch.randn(channels))  # type: ignore[union-attr]
        bn.running_var.copy_(torch.rand(channels) + 0.1)  # type: ignore[union-attr]
    return bn


def random_choice(grid: Grid) -> Tensor:
    below = grid.ratio.floor()
    up = torch.randint(0, 2, below.shape)
    return torch.where(grid.free, below + up, grid.nearest)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_written_integers_are_the_layers_integers(bits: int, per_channel: bool, folded: bool) -> None:
    conv = nn.Conv2d(8, 12, 3, groups=2)
    quantized = layer(conv, trained_bn(12) if folded else None, bits, per_channel)
    grid = pin_grid(quantized)
    chosen = random_choice(grid)
    write_integers(grid, chosen)
    assert torch.equal(quantized.integer_weights().weight, chosen.to(torch.int8))
    assert bool((chosen != grid.nearest).any())


def test_written_integers_of_a_linear_layer_survive_an_mse_range() -> None:
    linear = nn.Linear(20, 6)
    quantized = layer(linear, None, 4)
    quantized.learned = nn.Parameter(linear.weight.detach().abs().amax(1) / 9)  # clips the largest
    grid = pin_grid(quantized)
    chosen = random_choice(grid)
    write_integers(grid, chosen)
    assert torch.equal(quantized.integer_weights().weight, chosen.to(torch.int8))
    assert (int(chosen.min()), int(chosen.max())) == (-8, 7)


def test_pinning_changes_no_answer() -> None:
    conv = nn.Conv2d(4, 6, 3)
    quantized = layer(conv, trained_bn(6), 4)
    images = torch.rand(2, 4, 8, 8)
    before = quantized(images)
    pin_grid(quantized)
    torch.testing.assert_close(quantized(images), before, rtol=1e-5, atol=1e-6)


def test_zero_channels_keep_their_weights_and_give_no_nan() -> None:
    conv = nn.Conv2d(4, 4, 3)
    bn = trained_bn(4)
    with torch.no_grad():
        conv.weight[2] = 0
    quantized = layer(conv, bn, 4)
    unused = conv.weight[1].clone()
    grid = pin_grid(quantized)
    assert not bool(grid.free[1].any())
    assert not bool(grid.free[2].any())
    write_integers(grid, random_choice(grid))
    assert torch.equal(conv.weight[1], unused)
    assert bool((conv.weight[2] == 0).all())
    found = quantized.integer_weights()
    assert not bool(found.weight[1:3].any())
    assert bool(torch.isfinite(found.scale).all())
    assert bool(torch.isfinite(quantized.learned).all())


def test_soft_weights_start_at_the_float_weights() -> None:
    grid = pin_grid(layer(nn.Conv2d(4, 6, 3, bias=False), None, 4))
    soft = SoftRounding(grid)
    expected = torch.where(grid.free, grid.ratio, grid.nearest) * grid.scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(soft.weights(20.0, 0.0), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(soft.integers()[grid.free], torch.floor(grid.ratio + 0.5)[grid.free])


def test_gradient_is_that_of_the_formula() -> None:
    grid = pin_grid(layer(nn.Conv2d(4, 6, 3, bias=False), None, 3))
    soft = SoftRounding(grid)
    with torch.no_grad():
        soft.alpha.normal_(0, 2)
    weights = torch.randn(grid.ratio.shape)
    (soft.weights(7.0, 0.05) * weights).sum().backward()

    alpha = soft.alpha.detach().clone().requires_grad_()
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    real = torch.where(grid.free, grid.ratio.floor() + h, grid.nearest) * grid.scale.reshape(-1, 1, 1, 1)
    penalty = (grid.free * (1 - (2 * h - 1).abs() ** 7.0)).sum()
    ((real * weights).sum() + 0.05 * penalty).backward()
    torch.testing.assert_close(soft.alpha.grad, alpha.grad, rtol=1e-4, atol=1e-6)


def test_undecided_counts_free_weights_between_two_integers() -> None:
    grid = pin_grid(layer(nn.Conv2d(4, 6, 3, bias=False), None, 4))
    soft = SoftRounding(grid)
    assert soft.undecided() > 0.5
    with torch.no_grad():
        soft.alpha.copy_(torch.where(soft.alpha >= 0, 10.0, -10.0))
    assert soft.undecided() == 0


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_other_steps_and_back(per_channel: bool, folded: bool) -> None:
    conv = nn.Conv2d(8, 12, 3, groups=2)
    quantized = layer(conv, trained_bn(12) if folded else None, 4, per_channel)
    grid = pin_grid(quantized)
    before = quantized.integer_weights()
    alive = grid.factor != 0
    other = with_scale(grid, torch.where(alive, grid.scale * 1.25, grid.scale))
    real = grid.ratio * grid.scale.reshape(-1, 1, 1, 1)
    assert torch.allclose(other.ratio * other.scale.reshape(-1, 1, 1, 1), real, atol=1e-6)
    assert torch.allclose(other.scale[alive], 1.25 * grid.scale[alive])
    assert torch.allclose(quantized.integer_weights().scale, other.scale)
    chosen = random_choice(other)
    write_integers(other, chosen)
    assert torch.equal(quantized.integer_weights().weight, chosen.to(torch.int8))

    conv.weight.data.copy_(grid.ratio * 0)  # weights come back from a copy, scales from the grid
    again = with_scale(grid, grid.scale)
    assert torch.equal(again.learned, grid.learned)
    assert torch.equal(quantized.integer_weights().scale, before.scale)


def test_reach_clips_no_weight_and_wastes_no_integer() -> None:
    quantized = layer(nn.Conv2d(8, 12, 3), None, 4)
    quantized.module.weight.data[3] = 0
    grid = pin_grid(quantized)
    steps = (grid.ratio * grid.scale.reshape(-1, 1, 1, 1))[grid.reach > 0] / grid.reach[grid.reach > 0].reshape(
        -1, 1, 1, 1
    )
    assert float(grid.reach[3]) == 0
    assert len(steps) == 11
    used = torch.maximum(steps / 7, steps / -8).flatten(1).amax(1)
    assert torch.allclose(used, torch.ones(11))
