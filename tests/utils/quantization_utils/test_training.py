import pytest
import torch
from torch import nn

from bit_config import load_scheme, resolve
from utils.errors import UserError
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.capture import capture
from utils.quantization_utils.prepare import QuantizedModel, describe_layers, fold_network, prepare
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.training import configure, learned_scales, parameter_groups, reestimate_bn


def quantized(scheme: str = "uniform4") -> QuantizedModel:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 4 * 4, 5),
    )  # fmt: skip
    captured = capture(model, torch.zeros(1, 3, 8, 8))
    network = fold_network(captured)
    result = prepare(captured, network, resolve(load_scheme(scheme, "small"), describe_layers(network)))
    calibrate(result, [torch.randn(8, 3, 8, 8)])
    return result


def test_learned_scales_start_at_the_calibrated_ones_and_change_nothing_in_evaluation() -> None:
    images = torch.randn(4, 3, 8, 8)
    model = quantized()
    before = model(images)
    configure(model, act_range="lsq")
    assert torch.equal(model.eval()(images), before)


def test_parameters_keep_the_float_models_order_and_scales_do_not_decay() -> None:
    model = quantized()
    configure(model, act_range="lsq")
    weights, scales = parameter_groups(model, weight_decay=0.1)
    assert [id(p) for p in weights["params"]] == [id(p) for _, p in model.model.named_parameters()]
    assert (weights["weight_decay"], scales["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in scales["params"]] == [id(p) for _, p in learned_scales(model)]


def test_every_scale_of_at_most_8_bits_learns() -> None:
    model = quantized()
    configure(model, act_range="lsq")
    model.train()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    grads = {name: p.grad for name, p in learned_scales(model)}
    narrow = [name for name, q in model.activation_quantizers().items() if q.bits <= 8]
    layers = [name for name, layer in model.weight_layers().items() if isinstance(layer, QuantLayer)]
    assert set(grads) == {f"activation:{n}" for n in narrow} | {f"weight:{n}" for n in layers}
    assert all(g is not None and bool(torch.isfinite(g).all()) and bool((g != 0).any()) for g in grads.values())


def test_tracked_ranges_follow_the_moving_average() -> None:
    model = quantized()
    configure(model, act_range="ema", act_range_momentum=0.9)
    quantizer = next(q for q in model.activation_quantizers().values() if q.signed)
    old_min, old_max = quantizer.x_min.clone(), quantizer.x_max.clone()
    images = 3 * torch.randn(4, 3, 8, 8)
    model.train()
    model(images)
    torch.testing.assert_close(quantizer.x_min, 0.9 * old_min + 0.1 * images.min())
    torch.testing.assert_close(quantizer.x_max, 0.9 * old_max + 0.1 * images.max())


def test_running_extremes_only_widen() -> None:
    model = quantized()
    configure(model, act_range="ema", act_range_momentum=-1)
    quantizer = next(q for q in model.activation_quantizers().values() if q.signed)
    old_max = quantizer.x_max.clone()
    model.train()
    model(0.01 * torch.randn(4, 3, 8, 8))
    assert torch.equal(quantizer.x_max, old_max)
    model(torch.full((4, 3, 8, 8), 50.0))
    assert float(quantizer.x_max) == 50.0


def test_evaluation_and_frozen_ranges_do_not_track() -> None:
    model = quantized()
    configure(model, act_range="ema")
    before = [q.x_max.clone() for q in model.activation_quantizers().values()]
    model.eval()
    model(50 * torch.randn(4, 3, 8, 8))
    assert all(torch.equal(a, q.x_max) for a, q in zip(before, model.activation_quantizers().values(), strict=True))


def test_reestimated_statistics_are_the_averages_over_the_batches() -> None:
    model = quantized()
    batches = [torch.randn(16, 3, 8, 8) + i for i in range(3)]
    first = next(iter(model.weight_layers().values()))
    assert isinstance(first, QuantLayer)
    bn = first.bn
    assert bn is not None
    momentum = bn.momentum
    seen: list[torch.Tensor] = []
    hook = bn.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach().clone()))
    assert reestimate_bn(model, batches) == 3
    hook.remove()
    assert bn.running_mean is not None
    assert bn.running_var is not None
    torch.testing.assert_close(bn.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert bn.momentum == momentum
    assert not model.training


def test_reestimation_without_images_is_refused_and_keeps_the_statistics() -> None:
    model = quantized()
    reestimate_bn(model, [torch.randn(16, 3, 8, 8)])
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(UserError, match="0 images"):
        reestimate_bn(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


def test_frozen_training_uses_running_statistics_and_keeps_them() -> None:
    model = quantized()
    configure(model)
    model.train()
    model.freeze_bn()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    model(torch.randn(8, 3, 8, 8)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    gammas = [p for name, p in model.model.named_parameters() if name in ("1.weight", "4.bias")]
    assert all(p.grad is not None for p in gammas)
