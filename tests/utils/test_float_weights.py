"""Strict loading of float weights: accepted containers and one sentence for each thing that does not fit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.digits_net import DigitsNet
from utils.errors import UserError
from utils.float_weights import load_float_weights

State = dict[str, Any]


def saved(tmp_path: Path, content: object) -> Path:
    """The path of `content` saved by torch."""
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "best_prec1": 91.78},
        lambda state: {"model": state},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"state_dict": {"module." + key: value for key, value in state.items()}, "epoch": 3},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["plain", "state_dict", "model", "prefix", "both", "without counters"],
)
def test_accepted_containers(tmp_path: Path, wrap: Callable[[State], State]) -> None:
    source, target = DigitsNet(), DigitsNet()
    load_float_weights(target, saved(tmp_path, wrap(source.state_dict())), "digits")
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


KEY = "features.unit.conv1.conv.weight"


def changed(**entries: object) -> State:
    """A state_dict of the digits network with one tensor replaced (None: removed)."""
    state: State = DigitsNet().state_dict()
    for value in entries.values():
        if value is None:
            del state[KEY]
        else:
            state[KEY] = value
    return state


def with_nan(value: float) -> torch.Tensor:
    """A weight of the right shape with one bad value."""
    weight = torch.zeros(32, 32, 3, 3)
    weight[3, 1, 2, 0] = value
    return weight


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(w=None), rf"does not fit digits: {KEY} \[32, 32, 3, 3\] is missing"),
        (changed(w=torch.zeros(32, 32, 1, 1)), rf"{KEY} has shape \[32, 32, 1, 1\], expected \[32, 32, 3, 3\]"),
        (changed(w=torch.zeros(32, 32, 3, 3, dtype=torch.int8)), f"{KEY} has type torch.int8, expected torch.float32"),
        (changed() | {"extra.weight": torch.zeros(2)}, r"extra.weight \[2\] is unexpected"),
        (changed(w=with_nan(float("nan"))), f"NaN or infinite values in {KEY}"),
        (changed(w=with_nan(float("-inf"))), f"NaN or infinite values in {KEY}"),
        (torch.zeros(3), "holds no weights but Tensor"),
        ({}, "holds no weights"),
        ({"epoch": 3, "w": torch.zeros(1)}, "is not a state_dict: its entry 'epoch' is int, expected a tensor"),
    ],
)
def test_refused_content(tmp_path: Path, content: object, message: str) -> None:
    path = saved(tmp_path, content)
    model = DigitsNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        load_float_weights(model, path, "digits")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
