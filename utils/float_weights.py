"""Loads float weights into a network strictly: every tensor present, of the right shape, finite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError
from utils.hawq.files import float_state, recognise
from utils.torch_file import read_torch_file

CONTAINER_KEYS = ("state_dict", "model")
PARALLEL_PREFIX = "module."
COUNTER_SUFFIX = "num_batches_tracked"


def load_float_weights(model: nn.Module, path: Path, name: str) -> None:
    """Copy the state_dict in `path` into `model`, in place. name: what the user calls the network, for messages.

    Accepts a plain state_dict, one inside a dict under "state_dict" or "model", and keys with the "module." that
    torch.nn.DataParallel puts in front. BN's num_batches_tracked may be absent (files before torch 0.4.1). Of a
    checkpoint of the original HAWQ, the float weights are taken.

    Raises UserError, naming the file, if it is missing, damaged or holds code, if a key is missing, unexpected or of
    another shape or kind (the first one is named), or if a floating-point tensor holds NaN or infinity.
    """
    content = read_torch_file(path)
    original = recognise(content, path)
    state = _state_dict_of(content, path) if original is None else float_state(original)
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key.endswith(COUNTER_SUFFIX):
            state.setdefault(key, torch.zeros_like(tensor))
    _check_keys(state, expected, path, name)
    check_finite(state, path)
    model.load_state_dict(state)


def check_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError naming the first floating-point tensor of `state` (read from `path`) with NaN or infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{path} has NaN or infinite values in {key}; it is from a run that diverged, use another file"
            )


def _state_dict_of(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for key in CONTAINER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no weights but {type(content).__name__}, expected a state_dict of named tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            message = f"{path} is not a state_dict: its entry {key!r} is {type(value).__name__}, expected a tensor"
            raise UserError(message)
    prefix = PARALLEL_PREFIX if all(key.startswith(PARALLEL_PREFIX) for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _check_keys(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path, name: str) -> None:
    start = f"{path} does not fit {name}"
    end = "give the architecture (and number of classes) that the file was made for"
    for key, tensor in expected.items():
        if key not in state:
            raise UserError(f"{start}: {key} {list(tensor.shape)} is missing; {end}")
        if state[key].shape != tensor.shape:
            raise UserError(f"{start}: {key} has shape {list(state[key].shape)}, expected {list(tensor.shape)}; {end}")
        if state[key].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{start}: {key} has type {state[key].dtype}, expected {tensor.dtype}; {end}")
    for key, tensor in state.items():
        if key not in expected:
            raise UserError(f"{start}: {key} {list(tensor.shape)} is unexpected; {end}")
