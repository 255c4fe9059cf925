"""Results carry where they come from."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.provenance import provenance, read_csv, write_csv


def test_rows_and_provenance_survive_a_file(tmp_path: Path) -> None:
    rows = [{"name": "a, b", "value": 1.5}, {"name": "c", "value": None}]
    write_csv(tmp_path / "new" / "t.csv", rows)
    origin, read = read_csv(tmp_path / "new" / "t.csv")
    assert read == [{"name": "a, b", "value": "1.5"}, {"name": "c", "value": ""}]
    assert origin == provenance()
    assert origin["python"] == platform.python_version()
    assert origin["torch"] == torch.__version__.split("+")[0] or origin["torch"] == torch.__version__
    assert all(origin[key] for key in ("cpu", "threads", "commit", "command"))


def test_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setattr(sys, "argv", [str(root / "benchmarks/qat_step.py"), "--rounds", "3"])
    assert provenance()["command"] == "python benchmarks/qat_step.py --rounds 3"
    monkeypatch.setattr(sys, "argv", ["/somewhere/else/pytest"])
    assert provenance()["command"] == "python pytest"
    monkeypatch.setattr("sys.argv", ["/somewhere/pytest", "--data", "/home/somebody/images", "-a", "net"])
    assert provenance()["command"] == "python pytest --data images -a net"


def test_command_of_a_module_is_the_one_that_runs_it(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "shows.py").write_text("from utils.provenance import provenance\nprint(provenance()['command'])\n")
    command = [sys.executable, "-m", "shows", "--rounds", "3"]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    assert found.stdout == "python -m shows --rounds 3\n"


def test_unreadable_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the table"):
        read_csv(tmp_path / "absent.csv")
