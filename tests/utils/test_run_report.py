"""The report as text and as a file."""

import json
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.run_report import EXTRA_KEYS, REPORT_KEYS, SAME, format_report, write_json

MEASURED = {
    **{
        "arch": "net",
        "scheme": "uniform4",
        "images": 7,
        "top1_float": 71.0,
        "top1_integer": 70.5,
        "top5_integer": 90.0,
    },
    **{"size_mib": 1.5, "bops_g": 2.25, "agreement_top1": 99.0, "agreement_activations": 95.0, "seconds": 1.0},
    **{
        "commit": "abc",
        "command": "python quant_train.py",
        "agreement_images": 4,
        "agreement_narrow": 97.0,
        "float_islands": ["act (gelu)"],
    },
}


def test_keys_are_distinct_and_stable() -> None:
    assert set(REPORT_KEYS) <= set(MEASURED)
    assert len({*REPORT_KEYS, *EXTRA_KEYS}) == len(REPORT_KEYS) + len(EXTRA_KEYS)


def test_text_shows_every_figure() -> None:
    text = format_report({**MEASURED, SAME: 98.25, "top1_simulation": 70.25}, Path("runs/x"))
    for figure in (
        "71.00 %",
        "70.50 %",
        "90.00 %",
        "99.00 %",
        "95.00 %",
        "97.00 %",
        "98.25 %",
        "70.25 %",
        "1.500 MiB",
        "act (gelu)",
    ):
        assert figure in text
    assert text.endswith("2.250 GBOPS, files in runs/x")


def test_text_names_the_engine() -> None:
    text = format_report({**MEASURED, "engine": "tvm", "images_per_second": 1234.5}, Path("x"))
    assert "tvm, 1234 images/s" in text


def test_what_was_not_measured_is_said_or_left_out() -> None:
    text = format_report({**MEASURED, "top1_integer": None, "top1_float": None}, Path("x"))
    assert "not measured" in text
    assert "integer" not in text
    assert "same class" not in text


def test_file(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {**MEASURED, "path": Path("a")})
    assert json.loads((tmp_path / "r.json").read_text()) == {**MEASURED, "path": "a"}
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "folder", {})
