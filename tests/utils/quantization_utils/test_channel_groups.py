"""Which tensors are scaled or mixed together."""

import pytest
import torch
from torch import Tensor, nn

from tests.utils.quantization_utils.test_balance import Residual, answers, images, names, network
from utils.quantization_utils.affine import transform_streams
from utils.quantization_utils.balance import balance
from utils.quantization_utils.channel_groups import find_groups
from utils.quantization_utils.equalize import equalize


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


class Traps(nn.Module):
    """Two layers with something between or beside them that makes it wrong to change them."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        self.trap = trap
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.c, self.head, self.norm = nn.Linear(6, 8), nn.Linear(8, 5), nn.BatchNorm2d(6)
        if trap == "parametrization":
            nn.utils.parametrizations.weight_norm(self.a)
        if trap == "shared values":
            self.b.weight = nn.Parameter(self.a.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.norm(self.a(x)) if self.trap == "norm used twice" else self.a(x)
        x = torch.relu(self.b(x))
        x = self.norm(x) if self.trap == "norm used twice" else x
        if self.trap == "weight as a constant":
            x = nn.functional.conv2d(x, self.a.weight)
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        x = x[:, [3, 1, 0, 5, 4, 2], 0, 0] if self.trap == "channels picked" else torch.flatten(x, 1)
        if self.trap == "vector picked":
            x = x[:, [3, 1, 0, 5, 4, 2]]
        if self.trap == "vector shifted":
            x = nn.functional.pad(x, (1, -1))
        return self.head(torch.relu(self.c(x)))


TRAPS = (
    *("channels picked", "vector picked", "vector shifted", "parametrization"),
    *("norm used twice", "weight as a constant", "shared values"),
)


@pytest.mark.parametrize("trap", TRAPS)
def test_what_looks_as_if_it_could_be_changed(trap: str) -> None:
    for change in (transform_streams, balance, lambda model, _: equalize(model)):
        model = network(Traps(trap))
        before = answers(model)
        change(model, [images()])
        assert torch.allclose(answers(model), before, atol=1e-4 * float(before.abs().max()))
