"""Fixtures for every test: fixed seeds, one torch thread, reference data, layers of PyTorchCV networks."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pytorchcv.model_provider import get_model
from torch import nn

from utils.quantization_utils.cost_model import Layer

torch.set_num_threads(1)

INPUT_SIZES = {"inceptionv3": 299}


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds of Python, numpy and torch, the same before every test."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  for code under test that draws from the global generator
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data and weights beside the project; a test that needs it skips where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the reference data in ../shared are absent")
    return path


class Network(NamedTuple):
    """Layers of a float network in the order of execution, and its number of parameters."""

    layers: list[Layer]
    parameters: int


@pytest.fixture(scope="session")
def network() -> Callable[[str], Network]:
    """network("resnet18"): a PyTorchCV network at its published input size, measured with forward hooks."""
    return functools.cache(_measure)


def _measure(arch: str) -> Network:
    """Runs the network on the meta device, which computes shapes only."""
    with torch.device("meta"):
        model = get_model(arch).eval()
        size = INPUT_SIZES.get(arch, 224)
        image = torch.empty(1, 3, size, size)
    calls: list[tuple[str, nn.Module, torch.Tensor, torch.Tensor]] = []  # keeps the tensors: their ids stay unique
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, inputs, output, name=name: calls.append((name, m, inputs[0], output))
            )
    model(image)
    layers = [_layer(call, image, last=call is calls[-1]) for call in calls]
    return Network(layers, sum(p.numel() for p in model.parameters()))


def _layer(call: tuple[str, nn.Module, torch.Tensor, torch.Tensor], image: torch.Tensor, *, last: bool) -> Layer:
    name, module, x, y = call
    weights = sum(p.numel() for key, p in module.named_parameters() if key == "weight")
    kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
    return Layer(name, kind, weights, y.numel() * weights // y.shape[1], y.shape[1], f"t{id(x)}", x is image, last)
