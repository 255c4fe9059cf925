"""What one pass counts, against direct computation on the integers of the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.utils.doctor.patients import images, network
from utils.api import calibrate, quantize
from utils.doctor.observe import observe
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.training import configure


def test_clipping_and_codes_equal_a_direct_count() -> None:
    model = network()
    name, quantizer = next((n, q) for n, q in model.activation_quantizers().items() if n.startswith("block2"))
    quantizer.set_range(quantizer.x_min, quantizer.x_max / 4)
    layer = model.weight_layers()["block2.0"]
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, arguments, output: kept.append(output.detach().clone()))
    found = next(c for c in observe(model, images(128).inputs()).clipping if c.quantizer == name)
    handle.remove()
    values = torch.cat(kept).clamp_min(0)
    codes = torch.round(values / quantizer.scale)
    assert found.clipped == float((codes > 255).double().mean())
    assert found.clipped > 0.01
    used = len(torch.unique(codes.clamp(0, 255)))
    assert found.unused == pytest.approx(1 - used / 256)
    assert found.seen == pytest.approx((0.0, float(values.max())))
    assert (found.low, found.high) == (0, pytest.approx(255 * float(quantizer.scale)))
    assert float(found.best[1]) > 2 * found.high, "the best range must not be cut by the one in use"


def test_drift_equals_moments_of_the_batchnorm_input() -> None:
    """A drift of one channel, in the quantized network; its mean and deviation measured in front of the BatchNorm."""
    model = network()
    bn = model.model.block3[1]
    with torch.no_grad():
        bn.running_mean[5] -= 2 * bn.running_var[5].sqrt()
        bn.weight[5] = -0.3
        bn.running_var[7] *= 4
    layer = model.weight_layers()["block3.0"]
    assert isinstance(layer, QuantLayer)
    kept: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0].clone()))
    found = next(d for d in observe(model, images(128).inputs()).drift if d.layer == "block3.0")
    handle.remove()
    with torch.no_grad():
        sigma = torch.sqrt(bn.running_var + bn.eps)
        folded = layer.integer_weights()
        unfolded = folded.weight * (folded.scale * sigma / bn.weight).view(-1, 1, 1, 1)
        raw = F.conv2d(torch.cat(kept), unfolded, padding=1).double()
        shift = (raw.mean((0, 2, 3)) - bn.running_mean) / sigma
        spread = raw.std((0, 2, 3), correction=0) / sigma
    assert found.channel == 5
    assert found.worst == pytest.approx(float(shift[5]), rel=1e-3)
    assert found.worst == pytest.approx(2, abs=0.3)
    assert found.rms == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-3)
    assert found.spread == pytest.approx(float(spread.median()), rel=1e-3)
    assert float(spread[7]) == pytest.approx(0.5, abs=0.15)


def test_learned_scales_are_observed_too() -> None:
    model = network()
    before = {c.quantizer: c for c in observe(model, images(64).inputs()).clipping}
    configure(model, act_range="lsq")
    after = {c.quantizer: c for c in observe(model, images(64).inputs()).clipping}
    for name, old in before.items():
        assert after[name].high == pytest.approx(old.high)
        assert after[name].clipped == pytest.approx(old.clipped, abs=1e-3)


class Branches(nn.Module):
    """A sum of two convolutions, a concat, and a layer that only layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.left, self.right = (nn.Conv2d(i, 3, 1) for i in (2, 3, 3))
        self.joined = nn.Conv2d(6, 4, 1)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.free(x))
        x = torch.cat([self.left(x) + self.right(x), x], dim=1)
        return self.output(self.joined(x).mean((2, 3)))


def test_channels_of_sums_and_outputs_are_bound() -> None:
    torch.manual_seed(0)
    module = Branches()
    with torch.no_grad():
        module.left.weight[1] = 0
        module.joined.weight[2] = 0
    model = quantize(module, torch.zeros(1, 2, 4, 4), "uniform8")
    pixels = torch.randn(8, 2, 4, 4)
    calibrate(model, [pixels])
    found = {dead.layer: dead for dead in observe(model, [pixels]).dead}
    assert {name for name, dead in found.items() if dead.bound} == {"free", "left", "right", "output"}
    assert (found["left"].zero, found["left"].constant) == ((1,), (1,))
    assert (found["joined"].zero, found["joined"].constant) == ((2,), (2,))
    assert (found["right"].dead, found["free"].dead) == ((), ())
