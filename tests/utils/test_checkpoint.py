"""Checkpoints: round trip, random state, kills, and refusals."""

import argparse
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from utils.digits_net import DigitsNet
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_model_and_optimizer_come_back(tmp_path: Path) -> None:
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pth.tar"
    contents = {
        "arch": "digits",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng_state(),
        "position": (3, 17),
        "args": {"lr": 0.1, "data": "digits", "resume": None, "evaluate": False},
    }
    save_checkpoint(path, contents)
    loaded = load_checkpoint(path, "digits")
    assert loaded["args"] == contents["args"]
    assert loaded["position"] == (3, 17)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded["state_dict"].items())
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(loaded["optimizer"]["state"][key]["momentum_buffer"], state["momentum_buffer"])


def draws() -> list[float]:
    """One number of each generator."""
    return [random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(1).item()]  # noqa: NPY002


def test_random_state_survives_a_file(tmp_path: Path) -> None:
    draws()  # leaves half of a pair of normal numbers in Python's and numpy's generators
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, {"arch": "digits", "rng": rng_state()})
    expected = [draws(), draws()]
    set_rng_state(load_checkpoint(path)["rng"])
    assert [draws(), draws()] == expected


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float64(1.0), "checkpoint['x']['y'][1] is of type float64"),
        (Path("a"), "checkpoint['x']['y'][1] is of type PosixPath"),
        (argparse.Namespace(), "checkpoint['x']['y'][1] is of type Namespace"),
        ({(1, 2): 3}, "checkpoint['x']['y'][1] has the key (1, 2) of type tuple"),
    ],
)
def test_values_that_would_not_load_are_not_saved(tmp_path: Path, value: object, where: str) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    with pytest.raises(TypeError, match=re.escape(where)):
        save_checkpoint(path, {"arch": "digits", "x": {"y": [1, value]}})
    assert not path.exists()
    with pytest.raises(TypeError, match="needs the entry 'arch'"):
        save_checkpoint(path, {"x": 1})


def refused(path: Path, message: str, arch: str = "digits") -> None:
    """Loading fails with one line that names the file."""
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        load_checkpoint(path, arch)
    assert "\n" not in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    refused(path, "does not exist")
    save_checkpoint(path, {"arch": "resnet18"})
    refused(path, "is a checkpoint of resnet18, not of digits")
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "damaged")
    torch.save({"state_dict": {}}, path)
    refused(path, "is not a training checkpoint of this program")
    torch.save([1, 2], path)
    refused(path, "is not a training checkpoint of this program")
    torch.save({"args": argparse.Namespace()}, path)
    refused(path, "holds Python code or objects")


def test_unknown_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, {"arch": "digits"})
    contents: dict[str, Any] = load_checkpoint(path)
    torch.save(contents | {"version": contents["version"] + 1}, path)
    refused(path, f"has checkpoint version {contents['version'] + 1}, this program reads {contents['version']}")


SAVES_AND_DIES = """
import os, signal, sys, time
from pathlib import Path
import torch
from utils.checkpoint import save_checkpoint
torch.set_num_threads(1)
path = Path(sys.argv[1])

def save_forever(run):
    for step in range(10**9):
        tensors = {f"t{i}": torch.full((100, 1000), float(step)) for i in range(5)}
        save_checkpoint(path, {"arch": "digits", "run": run, "step": step, "state_dict": tensors})

for run, line in enumerate(sys.stdin):
    child = os.fork()
    if child == 0:
        save_forever(run)
    while not path.exists():
        time.sleep(0.001)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def test_killed_while_saving_the_checkpoint_is_whole(tmp_path: Path) -> None:
    """A process saves without pause and is killed, thirty times; what lies there afterwards always loads."""
    path = tmp_path / "checkpoint.pth.tar"
    moments, runs = random.Random(1), set()
    command = [sys.executable, "-c", SAVES_AND_DIES, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(30):
            print(moments.uniform(0, 0.1), file=process.stdin, flush=True)
            assert process.stdout.readline() == "killed\n"
            contents = load_checkpoint(path, "digits")
            expected = torch.full((100, 1000), float(contents["step"]))
            assert [torch.equal(tensor, expected) for tensor in contents["state_dict"].values()] == [True] * 5
            runs.add(contents["run"])
    assert len(runs) > 10  # most processes lived long enough to replace the file


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path(sys.argv[1]), {"arch": "digits", "w": torch.zeros(100_000)})
except UserError as error:
    sys.exit(f"error: {error}")
"""


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, {"arch": "digits", "step": 7})
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: cannot write {path}: File too large;")
    assert run.stderr.count("\n") == 1
    assert load_checkpoint(path)["step"] == 7
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
