"""Training checkpoints: written atomically, read without running code, with the state of all random generators."""

import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from utils.atomic_file import write_atomically
from utils.errors import UserError
from utils.torch_file import read_torch_file

FORMAT = "hawq training checkpoint"
VERSION = 1
PLAIN_TYPES = (bool, int, float, str, torch.Tensor, type(None))


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write tensors and plain values (dict, list, tuple, str, int, float, bool, None); replaces an old file atomically.

    contents: must have "arch", the name of the network, which `load_checkpoint` compares. "format" and "version" are
    added. The file is serialised in memory first, so as much memory as the file is long is needed.

    Raises UserError when the file cannot be written (the old one is then unchanged), TypeError for other values.
    """
    if not isinstance(contents.get("arch"), str):
        raise TypeError("a checkpoint needs the entry 'arch', the name of the network")
    everything = {"format": FORMAT, "version": VERSION, **contents}
    _check_plain(everything, "checkpoint")
    buffer = io.BytesIO()
    torch.save(everything, buffer)

    def write(file: BinaryIO) -> None:
        file.write(buffer.getbuffer())

    write_atomically(path, write)


def load_checkpoint(path: Path, arch: str | None = None) -> dict[str, Any]:
    """What `save_checkpoint` wrote; tensors on the CPU. arch: the network it must belong to, None accepts any.

    Raises UserError, naming the file, if it is missing, damaged, holds code, is not such a checkpoint, of a version
    this program does not know, or of another network.
    """
    return checked_checkpoint(read_torch_file(path), path, arch)


def checked_checkpoint(contents: Any, path: Path, arch: str | None = None) -> dict[str, Any]:
    """What was read from ``path``, if it is such a checkpoint; raises UserError like :func:`load_checkpoint`."""
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a training checkpoint of this program; give a file that a training run saved")
    if contents.get("version") != VERSION:
        got = contents.get("version")
        raise UserError(
            f"{path} has checkpoint version {got}, this program reads {VERSION}; use the program that wrote it"
        )
    if arch is not None and contents.get("arch") != arch:
        raise UserError(
            f"{path} is a checkpoint of {contents.get('arch')}, not of {arch}; give that architecture instead"
        )
    return contents


def _check_plain(value: Any, where: str) -> None:
    """Raise TypeError for what `torch.load(weights_only=True)` would refuse, before it is too late to notice."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}, expected str or int")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (*PLAIN_TYPES, torch.nn.Parameter):
        raise TypeError(f"{where} is of type {type(value).__name__}, expected a tensor or a plain value")


def rng_state() -> dict[str, Any]:
    """State of the generators of Python, numpy, torch and all CUDA devices, as plain values for `save_checkpoint`."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": (version, list(words), gauss),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned. States of CUDA devices are restored where as many devices are present."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
