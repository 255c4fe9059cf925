"""Reports as tables and pictures."""

import json
from pathlib import Path
from typing import Any

import pytest

from tvm_benchmark.report import KEYS, as_markdown, as_text, main, read_report, title
from utils.errors import UserError


def row(engine: str, precision: str, *times: float | None) -> dict[str, Any]:
    names = ("min_ms", "median_ms", "p95_ms")
    return {"engine": engine, "precision": precision, "batch": 2, "threads": 1, **dict(zip(names, times, strict=True))}


@pytest.fixture
def report() -> dict[str, Any]:
    step = {"name": "conv", "kind": "conv", "macs": 2_000_000, "weight_bits": 4, "kernel": "k", "weight_bytes": 2048}
    pool = {"name": "pool", "kind": "max_pool", "macs": 0, "weight_bits": 0, "kernel": "k", "weight_bytes": 0}
    moved = {"input_bytes": 1024, "output_bytes": 512}
    rows = [row("hawq-tvm", "bops_0.5", 2.0, 2.5, 3.0), row("openvino", "int8", 3.0, 4.0, 5.0)]
    return {
        "equal": True,
        "compared": 32,
        "rows": [*rows, row("openvino", "fp32", 8.0, 9.0, 10.0), row("onnxruntime", "fp32", None, None, None)],
        "speedup_over_best_fp32": 4.0,
        "speedup_over_openvino_int8": 1.5,
        "median_speedup_over_best_fp32": 3.6,
        "median_speedup_over_openvino_int8": 1.6,
        "size_mib": 11.14,
        "bops_g": 116.1,
        "arch": "resnet18",
        "scheme": "bops_0.5",
        "compile_s": 3.21,
        "target": "avx2",
        "weight_bytes": 3 << 20,
        "space_bytes": 1 << 20,
        "missing": [{"engine": "onnxruntime", "precision": "fp32", "reason": "not installed"}],
        "peaks_gops": {"avx2": 154.2},
        "steps": [
            {**pool, **moved, "ms": 0.25, "gops": None, "peak_share": None},
            {**step, **moved, "ms": 0.5, "gops": 8.0, "peak_share": 0.0519},
        ],
        "provenance": {"cpu": "Some CPU", "commit": "abc1234", "command": "python x.py"},
    }


def saved(folder: Path, report: Any, name: str = "report.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(report))
    return path


def test_markdown(report: dict[str, Any]) -> None:
    text = as_markdown([report])
    assert text.startswith("## resnet18, bops_0.5: 2 images, 1 thread, Some CPU\n")
    assert "| hawq-tvm | bops_0.5 | 2.000 | 2.500 | 3.000 | 1000.0 |" in text
    assert "| onnxruntime | fp32 | - | - | - | - |" in text
    assert "* speed-up over the best fp32: 4.00x by minima, 3.60x by medians" in text
    assert "* without onnxruntime (fp32): not installed" in text
    assert "| pool | max_pool | - | - | 0.2500 | - | - | 0.0 | 1.0 | 0.5 |" in text
    assert "| conv | conv | 4 | 2.00 | 0.5000 | 8.0 | 5.2% | 2.0 | 1.0 | 0.5 |" in text
    assert "| sum |  |  | 2.00 | 0.7500 | 10.7 |" in text
    assert text.endswith("commit abc1234; command python x.py\n")


def test_text_without_peers(report: dict[str, Any]) -> None:
    nothing = dict.fromkeys(key for key in report if "speedup" in key)
    text = as_text({**report, **nothing, "rows": report["rows"][:1], "missing": []})
    assert text.startswith("resnet18, bops_0.5: 2 images, 1 thread, Some CPU\n")
    assert "speed-up over the best fp32: not measured" in text


def test_command_line_writes_both_files(report: dict[str, Any], tmp_path: Path) -> None:
    other = saved(tmp_path, {**report, "arch": "resnet50"}, "other.json")
    markdown, picture = tmp_path / "all.md", tmp_path / "all.png"
    flags = ["--markdown", str(markdown), "--picture", str(picture)]
    assert main([str(saved(tmp_path, report)), str(other), *flags]) == 0
    assert markdown.read_text() == as_markdown([report, {**report, "arch": "resnet50"}])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_are_printed_without_a_file(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(saved(tmp_path, report))]) == 0
    assert capsys.readouterr().out == as_markdown([report])


def test_title_counts(report: dict[str, Any]) -> None:
    report["rows"][0] |= {"batch": 1, "threads": 2}
    assert title(report) == "resnet18, bops_0.5: 1 image, 2 threads, Some CPU"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the report .*; give a file that benchmark --report wrote"),
        ("[1]", "is not a report of the benchmark; give a file that benchmark --report wrote"),
        (json.dumps({"equal": True}), "is not a report of the benchmark"),
        (json.dumps(dict.fromkeys(KEYS)), "has no times: the compiled model was not equal to the graph"),
        (json.dumps(dict.fromkeys(KEYS, 1)), "lacks arch, compile_s, .*; measure again with this version"),
    ],
)
def test_files_that_are_no_reports(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_report(path)


def test_missing_file_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the report")
