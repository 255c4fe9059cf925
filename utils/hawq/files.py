"""Files of the original HAWQ: recognised, read without running code, taken apart.

``checkpoint.pth.tar`` and ``model_best.pth.tar`` hold a state_dict with float weights, ranges and derived integers;
``quantized_checkpoint.pth.tar`` five dicts of integers and scales.  Bit widths are in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.hawq.names import COUNTER, DERIVED_ENTRIES, float_key, plain_key
from utils.torch_file import read_torch_file

INTEGER_DICTS = ("convbn_scaling_factor", "fc_scaling_factor", "weight_integer", "bias_integer", "act_scaling_factor")


@dataclass(frozen=True)
class HawqFile:
    """What a file of the original says.

    tensors: entry -> CPU tensor, without the prefix "module.".  integers: whether it is a quantized_checkpoint, which
    has no float weights.  arch: architecture it names.  epoch: the next epoch of its training.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    integers: bool
    arch: str | None = None
    epoch: int = 0

    @property
    def kind(self) -> str:
        """What to call it."""
        return "quantized_checkpoint" if self.integers else "checkpoint"


def read_hawq(path: Path) -> HawqFile | None:
    """The file of the original at ``path``, None if it is something else that torch saved.

    Raises UserError for files that are missing, damaged or hold code.
    """
    return recognise(read_torch_file(path), path)


def recognise(content: Any, path: Path) -> HawqFile | None:
    """The same for what was already read from ``path``."""
    if not isinstance(content, Mapping):
        return None
    if set(INTEGER_DICTS) <= set(content) and all(isinstance(content[key], Mapping) for key in INTEGER_DICTS):
        joined = {plain_key(str(key)): value for part in INTEGER_DICTS for key, value in content[part].items()}
        return HawqFile(path, _tensors(joined, path), True)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not any(_is_derived(str(key)) for key in state):
        return None
    arch, epoch = content.get("arch"), content.get("epoch", 0)
    tensors = _tensors({plain_key(str(key)): value for key, value in state.items()}, path)
    return HawqFile(path, tensors, False, arch if isinstance(arch, str) else None, epoch if type(epoch) is int else 0)


def _is_derived(key: str) -> bool:
    module, _, leaf = key.rpartition(".")
    return bool(module) and leaf in DERIVED_ENTRIES


def _tensors(entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    for key, value in entries.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: its entry {key!r} is {type(value).__name__}, expected a tensor; use another file")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path} has NaN or infinite values in {key}; it is from a run that diverged")
    return dict(entries)


def float_state(file: HawqFile) -> dict[str, Tensor]:
    """Its float weights under the float network's names.  Raises UserError for a file that has none."""
    if file.integers:
        raise UserError(
            f"{file.path} holds integers only, no float weights to start from; give the checkpoint.pth.tar of that run"
        )
    found = ((float_key(key), value) for key, value in file.tensors.items())
    state = {key: value for key, value in found if key is not None}
    return {key: value.long() if key.endswith(COUNTER) else value for key, value in state.items()}
