"""Which tensors are scaled or mixed together."""

import pytest
import torch
from torch import Tensor, nn

from tests.utils.quantization_utils.test_balance import Residual, names, network
from utils.quantization_utils.channel_groups import find_groups


class Others(nn.Module):
    """What must not be scaled: parts of a concatenation, a product, a weight used twice, what a sigmoid reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3 if i == 0 else 4, 4, 1) for i in range(4))
        self.shared, self.tail, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 8), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.relu(self.shared(torch.relu(self.shared(x)))) * torch.sigmoid(self.b(x))
        return self.head(torch.flatten(torch.relu(self.tail(torch.cat((self.c(x), self.d(x)), 1))), 1))


def test_groups_of_a_residual_network() -> None:
    stream, *inner = [names(group) for group in find_groups(network(Residual()))]
    assert sorted(stream[0]) == ["project.0.0", "project.1.0", "stem.0"]
    assert stream[1] == ["expand.0.0", "expand.1.0", "last.0"]
    # A depthwise layer gains nothing, nor does the classifier with its 8 bits.
    assert inner == [([f"deep.{i}.0"], [f"project.{i}.0"]) for i in range(2)]


def test_what_is_not_linear_is_not_scaled() -> None:
    found = [names(group) for group in find_groups(network(Others()))]
    assert found == []


@pytest.mark.parametrize("between", [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 1, groups=2)])
def test_only_factors_pass(between: nn.Module) -> None:
    model = network(nn.Sequential(nn.Conv2d(3, 6, 1), between, nn.Conv2d(6, 6, 3), nn.Flatten(), nn.LazyLinear(5)))
    groups = find_groups(model)
    assert groups
    assert not any(group.mixable for group in groups)


@pytest.mark.parametrize("between", [nn.Identity(), nn.AvgPool2d(2)])
def test_any_matrix_passes(between: nn.Module) -> None:
    model = network(nn.Sequential(nn.Conv2d(3, 6, 1), between, nn.Conv2d(6, 6, 3), nn.Flatten(), nn.LazyLinear(5)))
    assert find_groups(model)[0].mixable
