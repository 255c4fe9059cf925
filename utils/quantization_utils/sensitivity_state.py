"""Settings of a measurement of sensitivities, and how far it has come, in a file."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.state import quantizer_state

KEYS = {"given", "inputs", "position", "values"}
Labelled = tuple[Tensor, Tensor]  # normalised float32 images [N, C, H, W] and int64 labels [N]


@dataclass(frozen=True)
class Settings:
    """How sensitivities are measured.

    arch: name of the network, only noted.  seed: of the probes.  Trace: it stops at a relative standard error of
    ``tolerance`` on the ``largest`` layers by number of weights, or at ``max_probes`` for every image.  calibration:
    how activation ranges are found at widths that are not the model's own, see :func:`calibrate`.  save_seconds:
    between two writes of the state file.
    """

    arch: str = ""
    seed: int = 0
    tolerance: float = 0.05
    largest: int = 10
    max_probes: int = 64
    calibration: str = "mse"
    save_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value, least in (("largest", self.largest, 1), ("max_probes", self.max_probes, 2)):
            if value < least:
                raise UserError(f"{name} is {value}, expected at least {least}")
        if self.tolerance <= 0:
            raise UserError(f"tolerance is {self.tolerance:g}, expected more than 0, for example 0.05")


class Progress:
    """Sums of a measurement, and how many of its steps are in them; in a file if there is one.

    values: tensors that the steps change in place.  given: what must be equal for a file to be gone on with, by name.
    Raises UserError for a file that cannot be read or written, or belongs to another measurement.
    """

    def __init__(
        self, path: Path | None, given: Mapping[str, Any], inputs: str, values: dict[str, Tensor], seconds: float
    ) -> None:
        self.path, self.given, self.inputs = path, dict(given), inputs
        self.values, self.seconds, self.position = values, seconds, 0
        self._saved = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def steps(self, count: int, label: str) -> Iterator[int]:
        """The steps that are still to do, of ``count``; each counts as done when the next one is asked for."""
        bar = tqdm(desc=label, total=count, initial=min(self.position, count), leave=False, disable=None)
        with bar:
            for step in range(self.position, count):
                yield step
                self.position = step + 1
                bar.update()
                if time.monotonic() - self._saved >= self.seconds:
                    self.save()

    def save(self) -> None:
        """Write the file, atomically, if there is one."""
        self._saved = time.monotonic()
        if self.path is not None:
            contents = {"arch": str(self.given["arch"]), "given": self.given, "inputs": self.inputs}
            save_checkpoint(self.path, contents | {"position": self.position, "values": self.values})

    def _read(self, path: Path) -> None:
        found = load_checkpoint(path)
        if not set(found) >= KEYS:
            raise UserError(f"{path} does not hold the state of a sensitivity measurement; give another file")
        for name, value in self.given.items():
            if found["given"].get(name) != value:
                raise UserError(
                    f"{path} was left by a measurement with {name} {found['given'].get(name)}, this one has {value}; "
                    "go on with the same settings, or remove the file"
                )
        shapes = {name: value.shape for name, value in self.values.items()}
        saved: Mapping[str, Tensor] = found["values"]
        if found["inputs"] != self.inputs or {name: value.shape for name, value in saved.items()} != shapes:
            raise UserError(
                f"{path} was left by a measurement of another network, calibration or set of images; remove the file"
            )
        for name, value in saved.items():
            self.values[name].copy_(value)
        self.position = int(found["position"])


def settings_given(settings: Settings, metric: str, widths: Sequence[int]) -> dict[str, Any]:
    """Everything that a result depends on besides network and images, as plain values."""
    chosen = {name: value for name, value in asdict(settings).items() if name != "save_seconds"}
    return {"metric": metric, "widths": list(widths), **chosen}


def digest(model: QuantizedModel, batches: Sequence[Labelled]) -> str:
    """Hash of network, quantizers and images."""
    found = hashlib.sha256()
    state = quantizer_state(model)
    tensors: list[Tensor | None] = [*model.model.state_dict().values(), *(t for batch in batches for t in batch)]
    tensors += [entry["learned"] for entry in state["weights"].values()]
    tensors += [q[key] for q in state["activations"].values() for key in ("x_min", "x_max", "learned")]
    for tensor in tensors:
        if tensor is not None:
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    bits = [(name, entry["bits"]) for part in ("weights", "activations") for name, entry in state[part].items()]
    found.update(str(bits).encode())
    return found.hexdigest()
