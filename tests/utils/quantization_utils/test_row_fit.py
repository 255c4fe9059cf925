"""What a layer should answer at single positions, and that the best of all ways to answer it is kept."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.utils.quantization_utils.test_reconstruct import DESCENT, QUICK, images, network
from utils.quantization_utils import row_fit
from utils.quantization_utils.adaround import Grid, pin_grid
from utils.quantization_utils.blocks import Unit, layer_units
from utils.quantization_utils.quant_modules import QuantLayer, evaluated_bias
from utils.quantization_utils.row_fit import fit_rows, rows_of
from utils.quantization_utils.rows import Rows, together
from utils.quantization_utils.side_by_side import SideBySide, run_unit


def walked(scheme: str = "w2a8") -> Iterator[tuple[SideBySide, Unit, Grid]]:
    """Every layer of a network, while both networks have made what it reads."""
    model = network(scheme)
    units = layer_units(model.ops)
    walk = SideBySide(model, units, images())
    for position, unit in enumerate(units):
        walk.float_outputs(unit)
        if unit.layers:
            layer = unit.layers[0].module
            assert isinstance(layer, QuantLayer)
            yield walk, unit, pin_grid(layer)
        walk.quantized_outputs(unit)
        walk.forget(position)


def answered(unit: Unit, product: Tensor) -> Tensor:
    """The unit's output where its layer answers so."""
    values = run_unit(unit, dict.fromkeys(unit.inputs), {unit.layers[0].name: lambda x: product})
    output: Tensor = values[unit.target]
    return output


def test_answers_become_the_targets() -> None:
    partners = 0
    for walk, unit, grid in walked():
        rows = rows_of(unit, walk, grid, walk.learned, seed=3)
        assert rows.answers is not None
        with walk.in_float():
            assert torch.allclose(answered(unit, rows.answers.clone()), rows.targets, atol=1e-4)
        partners += walk.lacking(unit, lambda cache, name: cache.fetch(name, slice(None))) is not None
    assert partners == 1


@pytest.mark.parametrize("shifts", [True, False])
def test_least_squares_lower_the_error_behind_the_activation(shifts: bool) -> None:
    for walk, unit, grid in walked():
        learned, others = (rows_of(unit, walk, grid, part, seed=3) for part in (walk.learned, walk.checked))
        own = evaluated_bias(grid.layer)
        both = together(learned, others)
        before = error(unit, both, grid.nearest, grid.scale, own)
        found = fit_rows(unit, learned, others, grid, DESCENT, noted_nowhere, shifts)
        (name,) = found.integers
        ends = unit.name in ("stem.0", "head")  # of 8 bits
        assert set(found.biases) == ({name} if shifts and not ends else set())
        bias = found.biases.get(name, own)
        after = error(unit, both, found.integers[name], found.weight_scales[name], bias)
        assert float(after.sum()) < (1.001 if ends else 0.7) * float(before.sum())


def error(unit: Unit, rows: Rows, integers: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    weights = integers * scale.reshape(-1, *[1] * (integers.dim() - 1))
    left = answered(unit, rows.product(weights, slice(None)) + bias[:, None]) - rows.targets
    return left.square().mean(1)


def test_learned_rounding_begins_where_least_squares_end() -> None:
    """Of the same rows; no channel is worse for having learned."""
    for walk, unit, grid in walked("w3a8"):
        learned, others = (rows_of(unit, walk, grid, part, seed=3) for part in (walk.learned, walk.checked))
        losses: list[float] = []
        found = [
            fit_rows(unit, learned, others, grid, settings, partial(noted, losses), shifts=True)
            for settings in (DESCENT, QUICK)
        ]
        assert [part.steps > 0 for part in found] == [False, True]
        assert losses == sorted(losses, reverse=True)


def test_learned_rounding_replaces_least_squares_only_where_it_is_clearly_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replaced = dict.fromkeys((0.0, row_fit.CLEARLY, 1.0), 0)
    for walk, unit, grid in walked("w3a8"):
        if unit.name in ("stem.0", "head"):  # of 8 bits, without least squares
            continue
        learned, others = (rows_of(unit, walk, grid, part, seed=3) for part in (walk.learned, walk.checked))
        fit = partial(fit_rows, unit, learned, others, grid)
        (solved,) = fit(DESCENT, noted_nowhere, shifts=True).integers.values()
        for share in replaced:
            monkeypatch.setattr(row_fit, "CLEARLY", share)
            (integers,) = fit(QUICK, noted_nowhere, shifts=True).integers.values()
            replaced[share] += int((integers != solved).flatten(1).any(1).sum())
    none, some, all_of_them = replaced.values()
    assert none == 0
    assert 0 < some < all_of_them


def noted_nowhere(step: int, loss: float) -> None:
    pass


def noted(losses: list[float], step: int, loss: float) -> None:
    losses.append(loss)


def test_rows_of_two_sets_together() -> None:
    for walk, unit, grid in walked():
        learned, others = (rows_of(unit, walk, grid, part, seed=3) for part in (walk.learned, walk.checked))
        both = together(learned, others)
        assert learned.answers is not None
        assert both.answers is not None
        count = learned.targets.shape[1]
        assert torch.equal(both.inputs[..., :count], learned.inputs)
        assert torch.equal(both.targets[:, count:], others.targets)
        assert torch.equal(both.answers[:, :count], learned.answers)
