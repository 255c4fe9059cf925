"""The benchmark of the search: its rows say what was solved, with proof."""

from pathlib import Path

import pytest

from benchmarks.bit_width_search import main
from utils.provenance import read_csv


def test_rows(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = shared / "reference" / "ilp_tables.json"
    output = tmp_path / "bench.csv"
    assert main(["--tables", str(tables), "--output", str(output), "--points", "3", "--repeats", "1"]) == 0
    _, rows = read_csv(output)
    assert len(rows) == 2 * (9 + 3 + 1)
    assert {row["gap"] for row in rows} == {"0"}
    (row,) = [row for row in rows if (row["arch"], row["budgets"]) == ("resnet50", "size=0.25")]
    assert (row["gain"], row["layers_at_4"]) == ("0.83139", "19")
    assert "resnet50" in capsys.readouterr().out


def test_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tables", str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the search tables")
