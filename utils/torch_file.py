"""Reads tensors from a file that may come from anywhere: never runs code, refuses damaged files with one sentence."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError

PICKLE_START = b"\x80"
ZIP_START = b"PK"


def read_torch_file(path: Path) -> Any:
    """Content of a `torch.save` file on the CPU: tensors and plain Python values (`weights_only=True`).

    The checksums that a zip file (torch >= 1.6) carries are verified, which `torch.load` itself does not do.

    Raises UserError, naming the file, when it is missing, a folder, unreadable, damaged, or holds code.
    """
    start = _first_bytes(path)
    try:
        if start.startswith(ZIP_START):
            _verify_checksums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"not enough memory to read {path}") from error
    except Exception as error:  # torch.load reports damage by at least six unrelated exception types
        raise UserError(_explain(path, start, error)) from error


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(2)
    except FileNotFoundError as error:
        raise UserError(f"the file {path} does not exist; give the path of a file saved by torch.save") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the path of a file saved by torch.save") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _verify_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path} is damaged (checksum of its part {damaged} is wrong); copy or download it again")


def _explain(path: Path, start: bytes, error: Exception) -> str:
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and found:
        return (
            f"{path} holds Python code or objects ({found.group(1)}), which is never run; "
            "save a state_dict of tensors and plain values instead"
        )
    if "TorchScript" in text:
        return f"{path} is a TorchScript program, which is never run; save the state_dict of the model instead"
    if isinstance(error, pickle.UnpicklingError) and start.startswith(PICKLE_START):
        return f"{path} is a Python pickle, which could run code, not a file of tensors; save it with torch.save"
    return f"{path} is damaged, cut short or not a file saved by torch.save; copy or download it again"
