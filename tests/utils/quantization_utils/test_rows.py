"""A layer as a product over positions equals the layer."""

from typing import Any

import pytest
import torch
from torch import nn

from utils.quantization_utils.rows import draw_rows
from utils.quantization_utils.tensor_cache import TensorCache

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "padding": (1, 0), "stride": (1, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 4},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("arguments", CONVOLUTIONS)
def test_convolution(arguments: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, bias=False, **arguments)
    x = torch.randn(3, 4, 9, 8)
    y = conv(x).detach()
    cache = TensorCache(3)
    cache.put("x", slice(0, 3), x)
    cache.put("y", slice(0, 3), y)
    rows = draw_rows(conv, (cache, "x"), (cache, "y"), seed=1)
    assert rows.targets.shape == (8, y.numel() // 8)
    torch.testing.assert_close(rows.product(conv.weight, slice(None)).detach(), rows.targets, rtol=1e-4, atol=1e-5)
    part = slice(3, 11)
    torch.testing.assert_close(rows.product(conv.weight, part).detach(), rows.targets[:, part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 7, 6)])
def test_linear(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(6, 4, bias=False)
    x = torch.randn(shape)
    cache = TensorCache(5)
    cache.put("x", slice(0, 5), x)
    cache.put("y", slice(0, 5), linear(x).detach())
    rows = draw_rows(linear, (cache, "x"), (cache, "y"), seed=1)
    torch.testing.assert_close(rows.product(linear.weight, slice(None)).detach(), rows.targets, rtol=1e-4, atol=1e-5)


def test_all_positions_once_where_they_are_few_and_in_random_order() -> None:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    values = torch.arange(32.0).reshape(2, 1, 4, 4)
    cache = TensorCache(2)
    cache.put("x", slice(0, 2), values)
    drawn = draw_rows(conv, (cache, "x"), (cache, "x"), seed=3).targets[0]
    assert torch.equal(drawn.sort().values, values.flatten())
    assert not torch.equal(drawn, values.flatten())
    assert torch.equal(drawn, draw_rows(conv, (cache, "x"), (cache, "x"), seed=3).targets[0])


def test_many_positions_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.quantization_utils.rows.MOST_ROWS", 10)
    conv = nn.Conv2d(2, 2, 1, bias=False)
    cache = TensorCache(2)
    cache.put("x", slice(0, 2), torch.randn(2, 2, 4, 4))
    assert draw_rows(conv, (cache, "x"), (cache, "x"), seed=3).inputs.shape == (1, 2, 10)
