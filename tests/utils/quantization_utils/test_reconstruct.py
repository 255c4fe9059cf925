"""Reconstruction as a whole: it lowers every unit's error, writes back exactly, and repeats itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import stop_after
from utils.api import calibrate, quantize
from utils.errors import UserError
from utils.quantization_utils.adaround import pin_grid
from utils.quantization_utils.blocks import layer_units
from utils.quantization_utils.output_scales import best_scales
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer, evaluated_bias
from utils.quantization_utils.reconstruct import LayerResult, Settings, reconstruct
from utils.quantization_utils.row_fit import fit_rows
from utils.quantization_utils.rows import Rows
from utils.random_networks import random_images, spread_statistics

QUICK = Settings(steps=60, positions=256, batch=8, lr=0.05)
BLOCKS = replace(QUICK, granularity="block", scale_lr=1e-3)
DESCENT = replace(QUICK, steps=0)


class Residual(nn.Module):
    """Depthwise, grouped and strided convolutions, ReLU6, a sum, a linear layer; gamma of both signs and zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Linear(12, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.wide(self.deep(x)) + x)
        return self.head(self.down(x).mean((2, 3)))


def images(count: int = 32, seed: int = 0) -> Tensor:
    """Smooth images: neighbouring pixels, so inputs of a layer, are correlated."""
    return (random_images((3, 8, 8), count, seed).float() - 128) / 64


def network(scheme: str = "w3a8", count: int = 32) -> QuantizedModel:
    torch.manual_seed(1)
    module = Residual()
    spread_statistics(module, images())
    with torch.no_grad():
        module.stem[1].weight[0] *= -1
        module.stem[1].weight[1] = 0
        module.wide[0].weight[2] = 0
    model = quantize(module, torch.zeros(1, 3, 8, 8), scheme)
    calibrate(model, [images(count)])
    return model


def layers(model: QuantizedModel) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in model.weight_layers().items() if isinstance(layer, QuantLayer)}


def integers(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: layer.integer_weights().weight for name, layer in layers(model).items()}


@torch.no_grad()
def float_answers(model: QuantizedModel, batch: Tensor) -> Tensor:
    model.enable(False)
    answers: Tensor = model(batch)
    model.enable()
    return answers


def never_worse(results: list[LayerResult]) -> bool:
    return all(result.loss_after <= result.loss_nearest for result in results)


@pytest.mark.parametrize("scheme", ["w2a8", "w3a8", "w4a4", "w8a8"])
def test_every_layer_with_an_error_gets_better(scheme: str) -> None:
    results = reconstruct(network(scheme), images(), QUICK)
    assert [result.name for result in results] == ["stem.0", "deep.0", "wide.0", "down.0", "head"]
    assert never_worse(results)
    gained = [result for result in results if result.loss_nearest > 1e-6]
    assert gained
    assert all(result.loss_after < result.loss_nearest and result.flipped > 0 for result in gained)


@pytest.mark.parametrize("scheme", ["w2a8", "w3a8", "w4a4"])
def test_least_squares_alone_move_weights_scales_and_biases(scheme: str) -> None:
    model = network(scheme)
    before = {name: layer.integer_weights() for name, layer in layers(model).items()}
    results = reconstruct(model, images(), DESCENT)
    assert never_worse(results)
    assert [result.steps for result in results] == [0] * 5
    for name in ("deep.0", "wide.0", "down.0"):  # first and last layer have 8 bits, their biases stay
        now = layers(model)[name].integer_weights()
        for part in ("weight", "scale", "bias"):
            assert not torch.equal(vars(now)[part], vars(before[name])[part])
    inner = results[1:4]
    assert all(result.loss_after < result.loss_nearest for result in inner)
    assert sum(result.loss_after for result in inner) < 0.8 * sum(result.loss_nearest for result in inner)


def test_a_bias_that_two_layers_share_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.first, self.second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.head = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.flatten(self.head(torch.relu(self.norm(self.second(torch.relu(self.norm(self.first(x))))))), 1)

    torch.manual_seed(1)
    module = Shared()
    model = quantize(module, torch.zeros(1, 3, 8, 8), "w3a8")
    calibrate(model, [images()])
    results = reconstruct(model, images(), DESCENT)
    assert never_worse(results)
    assert not module.norm.bias.any()
    assert module.head.bias is not None


def test_the_reported_loss_is_the_loss_of_the_model() -> None:
    """Of the last layer, so that nothing behind it can hide a difference."""
    model = network()
    wanted = float_answers(model, images())
    last = reconstruct(model, images(), QUICK)[-1]
    error = (model(images()).detach() - wanted).square().sum() / wanted.square().sum()
    assert last.loss_after == pytest.approx(float(error), rel=1e-4)


def test_the_network_is_nearer_to_the_float_network_on_new_images() -> None:
    model = network()
    fresh = images(64, seed=9)
    wanted = float_answers(model, fresh)
    before = (model(fresh).detach() - wanted).square().sum()
    reconstruct(model, images(), replace(QUICK, steps=300))
    assert float((model(fresh).detach() - wanted).square().sum()) < 0.8 * float(before)


@pytest.mark.parametrize("settings", [BLOCKS, replace(BLOCKS, learn_activation_scales=False)])
def test_blocks_get_better(settings: Settings) -> None:
    model = network("w4a4")
    ranges = {name: q.x_max.clone() for name, q in model.activation_quantizers().items()}
    results = reconstruct(model, images(), settings)
    assert [result.name for result in results] == ["stem.0", "deep.0 ... wide.0", "down.0 ... head"]
    assert never_worse(results)
    assert sum(result.loss_after < result.loss_nearest for result in results) >= 2
    moved = [name for name, q in model.activation_quantizers().items() if not torch.equal(q.x_max, ranges[name])]
    assert bool(moved) == settings.learns_scales
    assert all(q.learned is None for q in model.activation_quantizers().values())


@pytest.mark.parametrize("positions", [0, 100_000])
def test_whole_maps_and_all_positions_serve_too(positions: int) -> None:
    results = reconstruct(network(), images(), replace(QUICK, positions=positions))
    assert never_worse(results)
    assert sum(result.loss_after < result.loss_nearest for result in results) >= 4


@pytest.mark.parametrize("settings", [QUICK, BLOCKS])
def test_the_same_seed_gives_the_same_weights(settings: Settings) -> None:
    first, second, other = network("w4a4"), network("w4a4"), network("w4a4")
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        reconstruct(model, images(), replace(settings, seed=seed))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    mine, others = integers(first), integers(other)
    assert any(not torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("settings", [QUICK, BLOCKS, DESCENT])
def test_a_resumed_run_equals_an_uninterrupted_one(settings: Settings, tmp_path: Path) -> None:
    whole, halved = network("w4a4"), network("w4a4")
    expected = reconstruct(whole, images(), settings)
    settings = replace(settings, state=tmp_path / "state.pth.tar")
    with pytest.raises(KeyboardInterrupt):
        reconstruct(halved, images(), settings, stop_after(2))
    resumed = network("w4a4")
    results = reconstruct(resumed, images(), settings)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    numbers = [[replace(result, seconds=0) for result in found] for found in (results, expected)]
    assert numbers[0] == numbers[1]


def test_a_finished_state_repeats_the_result_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, state=tmp_path / "state.pth.tar")
    first, second = network(), network()
    reconstruct(first, images(), settings)
    monkeypatch.setattr("utils.quantization_utils.reconstruct.fit_rows", None)
    reconstruct(second, images(), settings)
    assert all(torch.equal(a, b) for a, b in zip(integers(first).values(), integers(second).values(), strict=True))


def test_one_image_is_enough() -> None:
    assert never_worse(reconstruct(network(count=1), images(1), QUICK))
    assert never_worse(reconstruct(network("w4a4", count=1), images(1), BLOCKS))


def test_batches_count_as_one_set() -> None:
    whole, parts = network(), network()
    reconstruct(whole, images(), QUICK)
    reconstruct(parts, images().split(7), QUICK)
    assert all(torch.equal(a, b) for a, b in zip(integers(whole).values(), integers(parts).values(), strict=True))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.own(self.shared(torch.relu(self.shared(x)))), 1)


def test_a_layer_that_runs_twice_is_left_alone() -> None:
    torch.manual_seed(1)
    module = Twice()
    shared, own = module.shared.weight.detach().clone(), module.own.weight.detach().clone()
    model = quantize(module, torch.zeros(1, 3, 8, 8), "w3a8")
    calibrate(model, [images()])
    assert [result.name for result in reconstruct(model, images(), QUICK)] == ["own"]
    assert torch.equal(module.shared.weight, shared)
    assert not torch.equal(module.own.weight, own)


def test_negligible_errors_are_left_alone() -> None:
    model = network()
    weights = {name: layer.module.weight.detach().clone() for name, layer in layers(model).items()}
    results = reconstruct(model, images(), replace(QUICK, negligible=10.0))
    assert [result.steps for result in results] == [0] * 5
    assert all(torch.equal(layer.module.weight, weights[name]) for name, layer in layers(model).items())


def test_a_loss_that_settles_ends_a_layer_early() -> None:
    settings = replace(QUICK, steps=400, patience=2)
    results = reconstruct(network("w2a8"), images(), settings)
    assert any(result.steps < 400 for result in results)
    everything = reconstruct(network("w2a8"), images(), replace(settings, patience=0))
    assert all(result.steps == 400 for result in everything)


def test_uncalibrated_models_are_refused() -> None:
    model = quantize(Residual(), torch.zeros(1, 3, 8, 8), "w4a8")
    with pytest.raises(UserError, match="no activation ranges yet; call calibrate"):
        reconstruct(model, images(), QUICK)


@pytest.mark.parametrize("nothing", [torch.zeros(0, 3, 8, 8), []])
def test_no_images_are_refused(nothing: Tensor | list[Tensor]) -> None:
    with pytest.raises(UserError, match="got 0 images; give at least one"):
        reconstruct(network(), nothing, QUICK)


def test_too_little_memory_is_refused_before_anything_happens() -> None:
    with pytest.raises(UserError, match=r"activations of 32 images take 0\.0 GiB.*give at most \d+ images"):
        reconstruct(network(), images(), replace(QUICK, cache_gib=1e-5))


def test_values_that_are_not_finite_are_refused() -> None:
    model = network()
    bad = images()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite at 'stem\.0'"):
        reconstruct(model, bad, QUICK)


def positive_rows(layer: QuantLayer, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of a depthwise layer behind a ReLU, [C, 9, R], and the float answers [C, R]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 1 + torch.rand((len(layer.module.weight), 9, 500), generator=generator)
    return inputs, (layer.module.weight.detach().reshape(-1, 1, 9) @ inputs)[:, 0]


@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_with_the_least_error_of_the_output(per_channel: bool) -> None:
    quantized = QuantLayer(nn.Conv2d(6, 6, 3, groups=6, bias=False), None, 4).eval()
    quantized.per_channel = per_channel
    inputs, wanted = positive_rows(quantized)

    def error(weights: Tensor) -> Tensor:
        return ((weights.reshape(-1, 1, 9) @ inputs)[:, 0] - wanted).square().mean(1)

    grid = pin_grid(quantized)
    found = best_scales(grid, error)
    weights = quantized.module.weight.detach()
    reach = torch.maximum(weights / 7, weights / -8).flatten(1).amax(1)
    reach = reach if per_channel else reach.amax().expand(6)
    tried = [grid.scale, *(reach * factor / 50 for factor in range(20, 61))]
    losses = []
    for scale in tried:
        steps = scale.reshape(-1, 1, 1, 1)
        losses.append(error((weights / steps).round().clamp(-8, 7) * steps))
    table = torch.stack(losses) if per_channel else torch.stack(losses).sum(1, keepdim=True).expand(-1, 6)
    expected = torch.stack(tried)[table.argmin(0), torch.arange(6)]
    assert torch.allclose(found, expected)
    assert float(table.min(0).values.sum()) < 0.5 * float(table[0].sum())
    assert per_channel or len(found.unique()) == 1


class Classifier(nn.Module):
    """A last layer with more weights a channel than there are images to learn from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.wide = nn.Conv2d(16, 512, 1, bias=False)
        self.relu = nn.ReLU()
        self.head = nn.Linear(512, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.wide(self.relu(self.stem(x)))).mean((2, 3)))


def classifier() -> QuantizedModel:
    torch.manual_seed(2)
    model = quantize(Classifier(), torch.zeros(1, 3, 8, 8), "w3a8")
    calibrate(model, [images(16)])
    return model


def test_a_block_does_not_learn_its_images_by_heart() -> None:
    """Learned from all 16, and judged by them, its error on new images is half as large again as nearest rounding's."""
    model, fresh = classifier(), images(200, seed=9)
    wanted = float_answers(model, fresh)
    before = (model(fresh).detach() - wanted).square().sum()
    reconstruct(model, images(16), replace(BLOCKS, steps=400))
    assert float((model(fresh).detach() - wanted).square().sum()) <= 1.02 * float(before)


def test_a_layer_does_not_learn_noise_by_heart() -> None:
    """What the float network answers differs from the weights' answers by noise, so nothing can be learned."""
    model = classifier()
    unit = [unit for unit in layer_units(model.ops) if unit.layers][-1]
    (op,) = unit.layers
    assert isinstance(op.module, QuantLayer)
    weights, bias = op.module.module.weight.detach(), evaluated_bias(op.module)[:, None]

    def rows(seed: int, count: int, noise: float = 0.3) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.rand((1, 512, count), generator=generator)
        clean = weights @ inputs[0] + bias
        return Rows(inputs, clean + noise * clean.std() * torch.randn(clean.shape, generator=generator))

    learned, fresh = rows(0, 24), rows(2, 2000, noise=0)
    errors = {}
    for name, others in (("nearest", None), ("checked", rows(1, 2000)), ("by heart", learned)):
        grid = pin_grid(op.module)
        integers, scale = grid.nearest, grid.scale
        if others is not None:
            found = fit_rows(unit, learned, others, grid, replace(QUICK, steps=400), lambda step, loss: None)
            integers, scale = found.integers[op.name], found.weight_scales[op.name]
        answers = (integers * scale[:, None]) @ fresh.inputs[0] + bias
        errors[name] = float((answers - fresh.targets).square().mean())
    assert errors["checked"] < 10 * errors["nearest"]
    assert errors["by heart"] > 100 * errors["nearest"]


def test_blocks_choose_scales_by_their_output_before_they_learn() -> None:
    """One step moves no weight: what is better is so by its scales."""
    settings = replace(BLOCKS, steps=1, learn_activation_scales=False)
    results = reconstruct(network("w3a8"), images(), settings)
    assert all(result.loss_after < 0.9 * result.loss_nearest for result in results[1:])
