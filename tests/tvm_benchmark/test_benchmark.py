"""The benchmark's command line, with a fake compiler, and once with the real one."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_benchmark import benchmark
from tvm_benchmark.benchmark import OURS, main, speedup
from tvm_benchmark.peers import Missing
from utils.provenance import read_csv
from utils.random_networks import calibrated

Install = Callable[..., Any]
FAST = ["--seconds", "0.001", "--images", "3", "-a", "digits", "--quant-scheme", "w4a8"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on the machine's peak; times are taken by turns of one run."""
    monkeypatch.setattr(benchmark, "machine_peaks", lambda threads: {"avx2": 4e-9 * threads, "portable": 1e-9})
    monkeypatch.setattr("tvm_benchmark.timing.WARM_SECONDS", 0.0)
    monkeypatch.setattr("tvm_benchmark.timing.TURN_SECONDS", 0.0001)


def measure(tmp_path: Path, *flags: str) -> dict[str, Any]:
    report = tmp_path / "report.json"
    assert main([*FAST, "--report", str(report), "--output", str(tmp_path / "rows.csv"), *flags]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.usefixtures("quick")
def test_report_and_table(install_fake: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install_fake(benchmark)
    report = measure(tmp_path, "--batch-size", "2", "--threads", "1")
    assert report["equal"] is True
    assert report["compared"] == 4  # three images, in whole batches of two
    (row,) = report["rows"]
    assert {key: row[key] for key in ("engine", "precision", "batch", "threads")} == {
        "engine": OURS,
        "precision": "w4a8",
        "batch": 2,
        "threads": 1,
    }
    assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
    assert report["speedup_over_best_fp32"] is None
    cost = calibrated("digits", "w4a8").cost()
    assert (report["size_mib"], report["bops_g"]) == (round(cost.size_mib, 4), round(cost.bops_g, 4))
    assert {"cpu", "commit", "command", "torch", "threads"} <= set(report["provenance"])
    origin, rows = read_csv(tmp_path / "rows.csv")
    assert "commit" in origin
    assert rows == [{key: str(value) for key, value in row.items()}]
    assert "logits equal to the integer graph's on 4 images" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_steps_have_speed_and_share_of_the_targets_peak(install_fake: Install, tmp_path: Path) -> None:
    install_fake(benchmark)
    pool, *layers = measure(tmp_path)["steps"]
    assert (pool["ms"], pool["gops"], pool["peak_share"]) == (500.0, None, None)
    for layer in layers:
        # The fake's step takes 1 s for each weight and does 1000 MACs; the peak of its target is 4 operations/s.
        assert layer["peak_share"] == pytest.approx(2000 / (layer["ms"] / 1000) / 4, abs=1e-4)


@pytest.mark.usefixtures("quick")
def test_a_wrong_model_ends_the_program(
    install_fake: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(logits: np.ndarray) -> np.ndarray:
        logits[0, 3] += 1
        return logits

    install_fake(benchmark, change)
    report = tmp_path / "report.json"
    assert main([*FAST, "--report", str(report)]) == 1
    found = json.loads(report.read_text())
    assert (found["equal"], found["rows"], found["speedup_over_best_fp32"]) == (False, [], None)
    message = capsys.readouterr().err
    assert "the compiled model is wrong: 3 of 30 logits of 3 images differ" in message
    assert "Traceback" not in message


class Peer:
    def __init__(self, name: str, precision: str) -> None:
        self.name, self.precision = name, precision

    def run(self) -> object:
        return None


@pytest.mark.usefixtures("quick")
def test_peers_are_in_the_same_run(
    install_fake: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = [Peer("openvino", "int8"), Peer("pytorch", "fp32")]
    missing = [Missing("onnxruntime", "fp32", "not installed (onnx): pip install 'hawq[peers]'")]
    monkeypatch.setattr(benchmark, "build_peers", lambda workload: (engines, missing))
    install_fake(benchmark)
    report = measure(tmp_path, "--peers")
    assert [row["engine"] for row in report["rows"]] == [OURS, "openvino", "pytorch", "onnxruntime"]
    assert report["rows"][-1]["min_ms"] is None
    assert report["missing"][0]["reason"] == missing[0].reason
    # Peers that do nothing are faster than ours.
    assert 0 <= report["speedup_over_best_fp32"] < 1
    assert 0 <= report["speedup_over_openvino_int8"] < 1
    assert "without onnxruntime (fp32): not installed (onnx): pip install 'hawq[peers]'" in capsys.readouterr().err


def test_speedup_is_over_the_fastest_that_ran() -> None:
    times = {(OURS, "uniform8"): 2.0, ("openvino", "fp32"): 9.0, ("pytorch", "fp32"): 8.0, ("onnx", "fp32"): None}
    rows = [{"engine": engine, "precision": precision, "min_ms": ms} for (engine, precision), ms in times.items()]
    assert speedup(rows, None, "fp32", "min_ms") == 4.0
    assert speedup(rows, ["openvino"], "fp32", "min_ms") == 4.5
    assert speedup(rows, ["onnx"], "fp32", "min_ms") is None
    assert speedup(rows, None, "int8", "min_ms") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: nothing to measure; give an architecture with -a"),
        (["-a", "resnet1800"], "error: unknown architecture 'resnet1800'"),
        (["-a", "digits", "--quant-scheme", "bops_0.5"], "error: no quantization scheme 'bops_0.5' for digits"),
        (["--graph", "no_such_file"], "error: "),
        (["--layer-latency", "--peers", "--graph", "x"], "error: --layer-latency has no use for --graph, --peers"),
        (["--layer-latency"], "error: layer latencies are measured on an architecture with random weights"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(message)
    assert "\n" not in error


@pytest.mark.parametrize("flags", [["--threads", "0"], ["--seconds", "-1"], ["--graph", "a", "--checkpoint", "b"]])
def test_flags_that_argparse_refuses(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flags)


def test_help_names_the_peers_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("OpenVINO", "ONNX Runtime", "torch.compile", "exit status", "examples:"))


@pytest.mark.tvm
@pytest.mark.usefixtures("quick")
def test_real_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tvm") is None:
        pytest.skip("TVM is not installed")
    report = measure(tmp_path, "--target", "portable")
    assert report["equal"] is True
    assert report["target"] == "portable"
    assert all(step["ms"] > 0 for step in report["steps"])
