"""The demo from end to end, with one epoch of everything."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    assert demo.main(["--save-path", str(path), "--float-epochs", "1", "--epochs", "1"]) == 0
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def read_report(folder: Path, run: str) -> dict[str, Any]:
    return dict(json.loads((folder / run / "report.json").read_text()))


def test_table_holds_the_values_of_the_reports(folder: Path) -> None:
    rows = read_rows(folder / "table.csv")
    reports = {("float", "training"): read_report(folder, "float")}
    for scheme in ("uniform8", "mixed", "uniform4", "uniform2"):
        reports[scheme, "calibration"] = read_report(folder, f"{scheme}_calibrated")
        reports[scheme, "QAT"] = read_report(folder, f"{scheme}_qat")
    assert [(row["scheme"], row["how"]) for row in rows] == list(reports)
    for row in rows[1:]:
        report = reports[row["scheme"], row["how"]]
        assert row["top-1 integer %"] == f"{report['top1_integer']:.2f}"
        assert row["top-1 float %"] == f"{report['top1_float']:.2f}"
        assert row["simulation agrees %"] == f"{report['agreement_top1']:.2f}"
        assert float(row["size KiB"]) == pytest.approx(report["size_mib"] * 2**10, abs=0.051)
        assert float(row["MBOPS"]) == pytest.approx(report["bops_g"] * 1e3, abs=0.051)


def test_costs_follow_the_bits(folder: Path) -> None:
    rows = {row["scheme"]: row for row in read_rows(folder / "table.csv")}
    sizes = [float(rows[name]["size KiB"]) for name in ("float", "uniform8", "mixed", "uniform4", "uniform2")]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["float"]["compression"] == "1.00x"


def test_report_and_picture(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["schemes"]["mixed"]["bits"]["features.unit.conv1.conv"] == [4, 4]
    assert report["schemes"]["mixed"]["bits"]["features.down.conv"] == [8, 8]
    assert report["provenance"]["torch"]
    with Image.open(folder / "demo.png") as image:
        image.verify()
    assert (folder / "table.md").read_text().count("\n") == 2 + len(read_rows(folder / "table.csv"))


def test_bad_flags_end_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert demo.main(["--save-path", str(tmp_path / "file"), "--float-epochs", "1", "--epochs", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
