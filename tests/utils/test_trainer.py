"""The training loop: schedules, accumulation, BatchNorm modes, positions."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bit_config import load_scheme
from utils.digits_net import DIGITS_PREPROCESS, DigitsNet
from utils.errors import Interrupted, UserError
from utils.experiment import quantize_module
from utils.preprocess import Preprocess
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.training import configure, learned_scales, parameter_groups, reestimate_bn
from utils.trainer import Recipe, Trainer, learning_rate, validation_batches

PREPROCESS = Preprocess(mean=(0.5,), std=(0.5,), resize=None, input_size=8, channels=1)


class Batches:
    """Stands for a Loader: the same random images in every epoch."""

    def __init__(self, images: int, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (images, 1, 8, 8), dtype=torch.uint8, generator=generator)
        self.labels = torch.arange(images) % 10
        self.batch_size, self.start = batch_size, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.start = start_batch

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = list(zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True))
        yield from batches[self.start :]


class Hooks:
    """Remembers what the loop said, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float]] = []

    def validate(self, epoch: float) -> None:
        self.events.append(("validate", epoch))

    def save(self) -> None:
        self.events.append(("save", 0))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.events.append(("scalars", step))


def linear() -> QuantizedModel:
    """A network without BatchNorm, quantization off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return quantize_module(net, torch.zeros(1, 1, 8, 8), load_scheme("uniform8", "own"))[0]


def digits(act_range: str | None = None) -> QuantizedModel:
    """The digits network, calibrated and configured, or (None) with quantization off."""
    torch.manual_seed(0)
    model = quantize_module(DigitsNet(), torch.zeros(1, 1, 8, 8), load_scheme("uniform4", "digits"))[0]
    if act_range is not None:
        calibrate(model, [torch.randn(16, 1, 8, 8)])
        configure(model, act_range=act_range)
    return model


def trainer(model: QuantizedModel, loader: Batches, **recipe: object) -> Trainer:
    settings = {"epochs": 1, "lr": 0.01, **recipe}
    return Trainer(model, loader, DIGITS_PREPROCESS, Recipe(**settings), None)


@pytest.mark.parametrize("epoch", [0, 0.5, 29.99, 30, 59.5, 60, 89.9])
def test_step_schedule_is_the_original(epoch: float) -> None:
    assert learning_rate(Recipe(epochs=90, lr=0.1), epoch) == 0.1 * 0.1 ** (math.floor(epoch) // 30)


def test_cosine_schedule() -> None:
    recipe = Recipe(epochs=10, lr=0.2, schedule="cosine")
    for i in range(101):
        expected = 0.1 * (1 + math.cos(math.pi * i / 100))
        assert learning_rate(recipe, i / 10) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_rises_linearly_from_zero(schedule: str) -> None:
    recipe = Recipe(epochs=10, lr=0.2, schedule=schedule, warmup_epochs=2)
    plain = Recipe(epochs=10, lr=0.2, schedule=schedule)
    for i in range(20):
        assert learning_rate(recipe, i / 10) == pytest.approx(0.2 * (i / 10) / 2)
    assert learning_rate(recipe, 2) == learning_rate(plain, 2)


def test_each_step_has_its_rate() -> None:
    loader, rates = Batches(40, 10), []
    run = trainer(linear(), loader, epochs=2, schedule="cosine", accumulate=2)
    step = run.optimizer.step
    run.optimizer.step = lambda: (rates.append(run.optimizer.param_groups[0]["lr"]), step())[1]
    run.fit(Hooks())
    assert rates == [learning_rate(run.recipe, epoch) for epoch in (0, 0.5, 1, 1.5)]


def test_accumulation_equals_a_big_batch() -> None:
    small, big = linear(), linear()
    trainer(small, Batches(40, 5), accumulate=4, epochs=3).fit(Hooks())
    trainer(big, Batches(40, 20), epochs=3).fit(Hooks())
    start = linear()
    for a, b, c in zip(small.parameters(), big.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(b, c)


def test_last_group_of_an_epoch_may_be_short() -> None:
    model, steps = linear(), []
    run = trainer(model, Batches(50, 10), accumulate=2, epochs=2)
    step = run.optimizer.step
    run.optimizer.step = lambda: (steps.append(run.batch), step())[1]
    run.fit(Hooks())
    assert steps == [2, 4, 5, 2, 4, 5]


def test_weight_decay_and_order_of_parameters() -> None:
    model = digits("lsq")
    groups = parameter_groups(model, 0.25)
    assert [id(p) for p in groups[0]["params"]] == [id(p) for _, p in model.model.named_parameters()]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for _, p in learned_scales(model)]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert len(groups[1]["params"]) > len(model.weight_layers())
    optimizer = trainer(model, Batches(10, 10), weight_decay=0.25).optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]


def test_without_learned_scales_there_is_one_group() -> None:
    assert len(parameter_groups(digits("ema"), 0.1)) == 1


def frozen_per_batch(run: Trainer, batches: int) -> list[bool]:
    """Whether BatchNorms were folded in each batch; stops after that many."""
    seen: list[bool] = []
    loss = run._loss

    def recording(*arguments: Tensor) -> Tensor:
        seen.append(all(layer.frozen for layer in run.model.weight_layers().values()))
        run._stop = len(seen) == batches
        return loss(*arguments)

    run._loss = recording
    try:
        run.fit(Hooks())
    except Interrupted:
        assert len(seen) == batches
    return seen


def test_fix_bn_holds_from_the_first_batch() -> None:
    model = digits("ema")
    before = {k: v.clone() for k, v in model.model.state_dict().items() if "running" in k}
    assert frozen_per_batch(trainer(model, Batches(30, 10), fix_bn=True), 3) == [True] * 3
    after = model.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_fix_bn_threshold_counts_batches_across_a_resume() -> None:
    loader, threshold = Batches(50, 10), 4
    straight = frozen_per_batch(trainer(digits("ema"), loader, fix_bn_threshold=threshold, epochs=2), 10)
    assert straight == [batch >= threshold for batch in range(1, 11)]
    model = digits("ema")
    first = trainer(model, loader, fix_bn_threshold=threshold, epochs=2)
    parts = frozen_per_batch(first, 2)
    second = trainer(model, loader, fix_bn_threshold=threshold, epochs=2)
    second.load(first.state())
    parts += frozen_per_batch(second, 100)
    assert parts == straight


def test_reestimated_statistics_are_averages_over_the_batches() -> None:
    """Against what the BatchNorms' own inputs say, for the quantized network."""
    model = digits("ema")
    seen: dict[str, list[Tensor]] = {}
    norms = {name: m for name, m in model.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    hooks = [
        norm.register_forward_pre_hook(lambda m, inputs, name=name: seen.setdefault(name, []).append(inputs[0].clone()))
        for name, norm in norms.items()
    ]
    ranges = {name: q.x_max.clone() for name, q in model.activation_quantizers().items()}
    momenta = [norm.momentum for norm in norms.values()]
    assert reestimate_bn(model, [torch.randn(12, 1, 8, 8) + i for i in range(3)]) == 3
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        means = torch.stack([x.double().mean((0, 2, 3)) for x in seen[name]])
        variances = torch.stack([x.double().transpose(0, 1).flatten(1).var(1) for x in seen[name]])
        torch.testing.assert_close(norm.running_mean.double(), means.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), variances.mean(0), rtol=1e-4, atol=1e-6)
    assert momenta == [norm.momentum for norm in norms.values()]
    assert all(torch.equal(q.x_max, ranges[name]) for name, q in model.activation_quantizers().items())
    assert not model.training


def test_reestimation_without_batches_is_refused() -> None:
    with pytest.raises(UserError, match="--reestimate-bn got 0 images"):
        reestimate_bn(digits("ema"), [])


@pytest.mark.parametrize("times", [-1, 0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_validations_end_steps(times: int, accumulate: int) -> None:
    total = 10
    found = validation_batches(total, Recipe(epochs=1, lr=0.1, evaluate_times=times, accumulate=accumulate))
    assert all(0 < batch < total and batch % accumulate == 0 for batch in found)
    if accumulate == 1:
        assert len(found) == max(0, min(times, total) - 1)


def test_order_of_events() -> None:
    hooks = Hooks()
    trainer(linear(), Batches(40, 10), epochs=2, evaluate_times=2, checkpoint_iter=3).fit(hooks)
    assert hooks.events == [
        *[("validate", 0.5), ("save", 0), ("scalars", 4), ("validate", 1), ("save", 0)],
        *[("save", 0), ("validate", 1.5), ("scalars", 8), ("validate", 2), ("save", 0)],
    ]


def test_settings_of_the_optimizer_are_the_recipes_after_a_load() -> None:
    loader = Batches(20, 10)
    first = trainer(linear(), loader, momentum=0.9, weight_decay=0.1)
    first.fit(Hooks())
    second = trainer(linear(), loader, momentum=0.5, weight_decay=0.2)
    second.load(first.state())
    group = second.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.2)
    for p, q in zip(first.optimizer.param_groups[0]["params"], group["params"], strict=True):
        assert torch.equal(first.optimizer.state[p]["momentum_buffer"], second.optimizer.state[q]["momentum_buffer"])


def test_momentum_is_dropped_where_other_scales_are_learned() -> None:
    first = trainer(digits("ema"), Batches(10, 10))
    first.fit(Hooks())
    second = trainer(digits("lsq"), Batches(10, 10))
    second.load(first.state())
    assert not second.optimizer.state
    assert second.step == 1


def test_infinite_loss_is_one_sentence() -> None:
    run = trainer(linear(), Batches(20, 10), lr=1e38)
    with pytest.raises(UserError, match=r"the training loss became (nan|inf) in epoch 1, batch 2; lower the learning"):
        run.fit(Hooks())


def test_errors_of_the_loader_pass_through() -> None:
    loader = Batches(20, 10)
    loader.labels = loader.labels[:5]
    with pytest.raises(ValueError, match="zip"):
        trainer(linear(), loader).fit(Hooks())


@pytest.mark.parametrize("stopped", [True, False])
def test_killed_loader_processes_end_a_stopped_run(stopped: bool) -> None:
    """A signal to the process group reaches them first; without one it is an error like any other."""
    run = trainer(linear(), Batches(20, 10))

    class Broken(Batches):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            run._stop = stopped
            raise RuntimeError("a worker was killed")
            yield

    run.loader = Broken(20, 10)
    with pytest.raises(Interrupted if stopped else RuntimeError):
        run.fit(Hooks())
