"""The benchmark of calibration's cost: rows for every job, and refusals."""

import pytest

from benchmarks.calibration_cost import PLAIN, WEIGHTS, main
from utils.provenance import read_csv

SMALL = ("--arch", "resnet20_cifar10", "--images", "3", "--batch", "2", "--rounds", "1")


def test_rows(tmp_path):
    output = tmp_path / "cost.csv"
    assert main([*SMALL, "--methods", "ema", "kl", "--output", str(output)]) == 0
    origin, rows = read_csv(output)
    assert [row["job"] for row in rows] == [PLAIN, "ema", "kl", WEIGHTS]
    assert {row["images"] for row in rows} == {"3"}
    assert rows[0]["ratio"] == "1.0"
    assert all(float(row["seconds"]) >= 0 for row in rows)
    assert "threads" in origin


@pytest.mark.parametrize("flag", ["--images", "--batch", "--rounds"])
def test_nothing_to_measure(flag, tmp_path, capsys):
    assert main([*SMALL, flag, "0", "--output", str(tmp_path / "cost.csv")]) == 2
    assert capsys.readouterr().err == f"error: {flag} is 0, give at least 1\n"


def test_an_unknown_network(capsys):
    assert main(["--arch", "resnet5000"]) == 2
    assert "unknown architecture 'resnet5000'" in capsys.readouterr().err
