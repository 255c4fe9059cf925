"""Least squares against direct sums over positions and against trying everything."""

from itertools import product

import pytest
import torch
from torch import Tensor

from utils.quantization_utils.least_squares import TRUSTS, Quadratic, descend, nearest_plane, solve

LOW, HIGH = -4, 3


def rows(groups: int, size: int, outputs: int, count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs [groups, size, count] with means, weights [outputs, size], noisy answers [outputs, count]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn((groups, size, size), generator=generator) + 2
    inputs = mixed @ torch.rand((groups, size, count), generator=generator) + 1
    weights = torch.randn((outputs, size), generator=generator)
    answers = (weights.reshape(groups, -1, size) @ inputs).flatten(0, 1) + 5
    return inputs, weights, answers + 0.1 * torch.randn(answers.shape, generator=generator)


def error(inputs: Tensor, answers: Tensor, weights: Tensor) -> Tensor:
    """Variance of what the weights leave, by output: the error with the best bias."""
    groups, size, _ = inputs.shape
    left = (weights.double().reshape(groups, -1, size) @ inputs.double()).flatten(0, 1) - answers.double()
    return left.var(1, correction=0)


def solutions(quadratic: Quadratic, weights: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [solve(quadratic, weights, scale, (LOW, HIGH), trust) for trust in (None, *TRUSTS)]


@pytest.mark.parametrize(("groups", "outputs"), [(1, 6), (2, 6), (6, 6)])
def test_bias_and_scale_are_the_best_ones(groups: int, outputs: int) -> None:
    inputs, weights, answers = rows(groups, 4, outputs)
    quadratic = Quadratic.of(inputs, answers)
    bias = quadratic.bias(weights.double())
    left = (weights.reshape(groups, -1, 4) @ inputs).flatten(0, 1) + bias[:, None].float() - answers
    assert torch.allclose(left.mean(1), torch.zeros(outputs), atol=1e-3)
    integers = (weights / 0.5).round().clamp(LOW, HIGH).double()
    integers[0] = 0  # no scale is better than another one
    scale = quadratic.best_scale(integers, torch.full((outputs,), 0.5, dtype=torch.float64))
    assert float(scale[0]) == 0.5
    lowest = error(inputs, answers, integers * scale[:, None])
    for factor in (0.98, 1.02):
        assert bool((error(inputs, answers, integers * scale[:, None] * factor)[1:] > lowest[1:]).all())


@pytest.mark.parametrize("groups", [1, 3])
def test_descent_ends_where_no_single_change_helps(groups: int) -> None:
    inputs, weights, answers = rows(groups, 6, 12)
    quadratic = Quadratic.of(inputs, answers)
    scale = weights.abs().amax(1).double() / HIGH
    first = (weights / scale[:, None]).round().clamp(LOW, HIGH).double()
    integers, found = descend(quadratic, first, scale, (LOW, HIGH))
    assert torch.equal(integers, integers.clamp(LOW, HIGH))
    assert torch.equal(integers, integers.round())
    lowest = error(inputs, answers, integers * found[:, None])
    assert bool((lowest <= error(inputs, answers, first * scale[:, None]) + 1e-9).all())
    for column, change in product(range(6), (-1, 1)):
        other = integers.clone()
        other[:, column] = (other[:, column] + change).clamp(LOW, HIGH)
        assert bool((error(inputs, answers, other * found[:, None]) >= lowest * (1 - 1e-4)).all())


def test_nearest_plane_is_rounding_for_inputs_that_are_not_correlated() -> None:
    weights = torch.randn((5, 4), generator=torch.Generator().manual_seed(1)).double()
    gram = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0])).double()[None]
    quadratic = Quadratic(gram, weights @ gram[0], torch.zeros(1, 4).double(), torch.zeros(5).double())
    scale = torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.equal(nearest_plane(quadratic, scale, (LOW, HIGH)), (weights / 0.3).round().clamp(LOW, HIGH))


def test_least_squares_come_near_the_best_of_all_integers() -> None:
    inputs, weights, answers = rows(1, 4, 20)
    quadratic = Quadratic.of(inputs, answers)
    scale = weights.abs().amax(1).double() / HIGH
    everything = torch.tensor(list(product(range(LOW, HIGH + 1), repeat=4))).double()
    optimum = torch.stack(
        [error(inputs, answers, (everything[i] * scale[:, None])) for i in range(len(everything))]
    ).amin(0)
    rounded = error(inputs, answers, (weights / scale[:, None]).round() * scale[:, None])
    plane = error(inputs, answers, nearest_plane(quadratic, scale, (LOW, HIGH)) * scale[:, None])
    assert float(plane.median()) < 0.7 * float(rounded.median())  # clamps can make it worse
    assert bool((plane >= optimum * (1 - 1e-6)).all())
    best = torch.stack(
        [error(inputs, answers, z * s[:, None]) for z, s, _ in solutions(quadratic, weights.double(), scale)]
    ).amin(0)
    assert float(best.sum()) < 1.2 * float(optimum.sum())


def test_what_is_held_near_the_weights_stays_there() -> None:
    """No share of the targets and a strong pull: plain rounding."""
    inputs, weights, answers = rows(1, 6, 8)
    held = Quadratic.of(inputs, -answers).near(weights.double(), share=0, ridge=1e4)
    scale = torch.full((8,), 0.4, dtype=torch.float64)
    expected = (weights / 0.4).round().clamp(LOW, HIGH).double()
    assert torch.equal(nearest_plane(held, scale, (LOW, HIGH)), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_columns_without_inputs_and_channels_without_weights(groups: int) -> None:
    inputs, weights, answers = rows(groups, 5, 8)
    inputs[:, 2] = 0
    weights[3] = 0
    scales = torch.full((8,), 0.4, dtype=torch.float64)
    found = solutions(Quadratic.of(inputs, answers), weights.double(), scales)
    assert {float(integers.min()) for integers, *_ in found} == {LOW}
    assert all(bool(torch.isfinite(part).all()) for solution in found for part in solution)
    assert all(float(scale.min()) > 0 for _, scale, _ in found)


def test_more_columns_than_are_changed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights, answers = rows(1, 40, 6)
    quadratic = Quadratic.of(inputs, answers)
    scale = weights.abs().amax(1).double() / HIGH
    first = (weights / scale[:, None]).round().double()
    whole = descend(quadratic, first, scale, (LOW, HIGH))
    monkeypatch.setattr("utils.quantization_utils.least_squares.COLUMNS", 7)
    parts = descend(quadratic, first, scale, (LOW, HIGH))
    assert torch.equal(whole[0], parts[0])
    assert torch.allclose(whole[1], parts[1])


@pytest.mark.parametrize("groups", [1, 8])
def test_some_channels_are_solved_as_among_all(groups: int) -> None:
    inputs, weights, answers = rows(groups, 5, 8)
    quadratic, scale = Quadratic.of(inputs, answers), weights.abs().amax(1).double() / HIGH
    channels = torch.arange(8) % 3 == 0
    every, some = (
        solve(quadratic, weights.double(), scale, (LOW, HIGH), TRUSTS[0], channels=which) for which in (None, channels)
    )
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a[channels], b[channels])


def test_more_starts_leave_no_larger_error() -> None:
    inputs, weights, answers = rows(1, 12, 30)
    quadratic, scale = Quadratic.of(inputs, answers), weights.abs().amax(1).double() / HIGH
    one, few = (
        solve(quadratic, weights.double(), scale, (LOW, HIGH), (1.0, 0.0), starts) for starts in ((1.0,), (0.8, 1.0))
    )
    lowest, lower = (error(inputs, answers, z * s[:, None]) for z, s, _ in (few, one))
    assert bool((lowest <= lower * (1 + 1e-9)).all())
    assert bool((lowest < lower * 0.99).any())
