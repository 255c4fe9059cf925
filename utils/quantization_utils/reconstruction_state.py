"""Finished units of a reconstruction in a file, so that a later run goes on from there."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.reconstruction_fit import Settings
from utils.quantization_utils.state import quantizer_state

FREE = ("cache_gib", "state")  # settings that change no result
KEYS = {"settings", "inputs", "units"}


class FinishedUnits:
    """Plain entries by the name of the unit; without a path nothing is kept.

    Raises UserError for a file that cannot be read or written, and for one that another network, other images or
    other settings left behind.
    """

    def __init__(self, settings: Settings, model: QuantizedModel, images: Tensor) -> None:
        self.path: Path | None = settings.state
        self._contents: dict[str, Any] = {}
        if self.path is None:
            return
        given = {name: value for name, value in asdict(settings).items() if name not in FREE}
        arch, inputs = type(model.model).__name__, _digest(model, images)
        self._contents = {"arch": arch, "settings": given, "inputs": inputs, "units": {}}
        if self.path.exists():
            self._contents["units"] = self._read(self.path, given, inputs)

    def find(self, name: str) -> dict[str, Any] | None:
        """What was kept for a unit."""
        return self._contents["units"].get(name) if self._contents else None

    def keep(self, name: str, entry: Mapping[str, Any]) -> None:
        """Add a unit to the file, atomically."""
        if self.path is not None:
            self._contents["units"][name] = dict(entry)
            save_checkpoint(self.path, self._contents)

    @staticmethod
    def _read(path: Path, given: Mapping[str, Any], inputs: str) -> dict[str, Any]:
        found = load_checkpoint(path)
        if not set(found) >= KEYS:
            raise UserError(f"{path} does not hold the state of a reconstruction; give another file")
        saved = found["settings"]
        for name in given:
            if saved.get(name) != given[name]:
                raise UserError(
                    f"{path} was left by a reconstruction with {name} {saved.get(name)}, this one has {given[name]}; "
                    "go on with the same settings, or remove the file"
                )
        if found["inputs"] != inputs:
            raise UserError(
                f"{path} was left by a reconstruction of another network, calibration or set of images; remove the file"
            )
        units: dict[str, Any] = found["units"]
        return units


def _digest(model: QuantizedModel, images: Tensor) -> str:
    """Hash of all that a reconstruction starts from."""
    digest = hashlib.sha256()
    state = quantizer_state(model)
    tensors: list[Tensor | None] = [images, *model.model.state_dict().values()]
    tensors += [entry["learned"] for entry in state["weights"].values()]
    tensors += [q[key] for q in state["activations"].values() for key in ("x_min", "x_max", "learned")]
    for tensor in tensors:
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(str([(name, entry["bits"]) for name, entry in state["weights"].items()]).encode())
    return digest.hexdigest()
