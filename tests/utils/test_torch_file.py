"""Files that must be refused with one sentence, and that refusing never runs their code."""

import argparse
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.torch_file import read_torch_file

CONTENT = {"a": torch.arange(1000.0)}


class RunsCode:
    """Its pickle calls os.mkdir when loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_back(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_torch_file(path)["a"], CONTENT["a"])


def refused(path: Path, message: str) -> None:
    """The file is refused with one line that names it and says `message`."""
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "does not exist")
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    torch.save({"a": RunsCode(made)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"holds Python code or objects \((posix|nt)\.mkdir\)")
    assert not made.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    path, made = tmp_path / "evil.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps(RunsCode(made), protocol=protocol))
    refused(path, "(code|pickle)")
    assert not made.exists()


def test_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "objects.pth"
    torch.save({"args": argparse.Namespace(a=1)}, path)
    refused(path, r"argparse\.Namespace")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_script_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    refused(path, "TorchScript")


@pytest.mark.parametrize("zipped", [True, False])
def test_every_cut_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "")


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pth"
    torch.save(CONTENT, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(CONTENT["a"].numpy().tobytes()[100:200])] ^= 1
    path.write_bytes(whole)
    refused(path, "checksum")


@pytest.mark.parametrize("garbage", [b"", b"hello world\n" * 10, bytes(range(256)) * 4, b"PK\x03\x04 no zip file"])
def test_garbage_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "garbage.pth"
    path.write_bytes(garbage)
    refused(path, "damaged, cut short or not a file saved by torch.save")
