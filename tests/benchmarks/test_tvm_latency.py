"""The table of compiled latencies, made in parts, and the memory beside it."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tvm_latency, tvm_memory
from benchmarks.tvm_latency import COLUMNS, KEY, main, merged, subjects
from tvm_benchmark.peers import Missing, PeerKind, Workload
from utils.provenance import read_csv, write_csv

pytestmark = pytest.mark.tvm


class Peer:
    def __init__(self, name: str, precision: str) -> None:
        self.name, self.precision = name, precision

    def run(self) -> object:
        return None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that do nothing, and turns of a few runs."""

    def build(workload: Workload, kinds: list[PeerKind]) -> tuple[list[Peer], list[Missing]]:
        peers = [Peer(name, kind.precision) for kind in kinds for name in kind.names if name != "onnxruntime"]
        return peers, [Missing("onnxruntime", "fp32", "not installed")]

    monkeypatch.setattr(tvm_latency, "build_peers", build)
    monkeypatch.setattr("tvm_benchmark.timing.WARM_SECONDS", 0.0)
    monkeypatch.setattr("tvm_benchmark.timing.TURN_SECONDS", 0.0001)


@pytest.mark.usefixtures("quick")
def test_all_schemes_and_peers_of_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tvm")
    path = tmp_path / "latency.csv"
    flags = ["--archs", "digits", "--seconds", "0.001", "--output", str(path)]
    assert main([*flags, "--cases", "b1t2", "--schemes", "uniform8", "uniform8r8"]) == 0
    assert main([*flags, "--cases", "b1t1", "--schemes", "uniform4"]) == 0
    assert "without onnxruntime (fp32): not installed" in capsys.readouterr().err
    rows = read_csv(path)[1]
    assert all(tuple(row) == COLUMNS for row in rows)
    ours = [row for row in rows if row["engine"] == "hawq-tvm"]
    found = [(row["scheme"], row["residual_bits"], row["batch"], row["threads"]) for row in ours]
    assert found == [("uniform4", "16", "1", "1"), ("uniform8", "16", "1", "2"), ("uniform8", "8", "1", "2")]
    assert all((row["equal"], row["compared"]) == ("True", "32") for row in ours)
    assert [bool(row["best_fp32_ms"]) for row in ours] == [True, False, False]
    assert [bool(row["over_one_thread"]) for row in ours] == [False, True, True]
    (absent,) = (row for row in rows if row["engine"] == "onnxruntime" and row["threads"] == "1")
    assert absent["min_ms"] == ""


def rows(ms: float, **changes: Any) -> list[dict[str, Any]]:
    key = dict(zip(KEY, ("resnet50", "uniform8", 16, 1, 1, "hawq-tvm", "uniform8"), strict=True))
    return [dict.fromkeys(COLUMNS, "") | key | {"min_ms": ms} | changes]


def test_a_part_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    write_csv(path, rows(1.0) + rows(2.0, residual_bits=8))
    both = merged(path, rows(3.0) + rows(4.0, arch="resnet18") + rows(5.0, engine="openvino", precision="int8"))
    assert [float(row["min_ms"]) for row in both] == [4.0, 3.0, 2.0, 5.0]


def test_another_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    write_csv(path, [{"scheme": "uniform8"}])
    assert main(["--output", str(path)]) == 2
    assert "error: " in (message := capsys.readouterr().err)
    assert "other.csv has the columns scheme, not this program's; remove it or give another --output" in message


def test_networks_without_residual_sums_are_measured_once() -> None:
    assert [s.graph.meta["residual_bits"] for s in subjects("digits", ["uniform8", "uniform8r8"])] == [16, 8]
    assert len(subjects("torchvision/squeezenet1_1", ["uniform8", "uniform8r8"])) == 1


def test_unknown_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--archs", "nonet", "--output", str(tmp_path / "x.csv")]) == 2
    assert "error: unknown architecture 'nonet'" in capsys.readouterr().err


def test_memory_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tvm_memory.peak_mib("none", tmp_path)
    monkeypatch.setitem(tvm_memory.PROGRAMS, "none", "a = np.ones(100 << 20, np.uint8)")
    assert 80 < tvm_memory.peak_mib("none", tmp_path) - alone < 120


def test_a_process_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(tvm_memory.UserError, match=r"the process of hawq-tvm failed: .*model\.json is missing"):
        tvm_memory.peak_mib("hawq-tvm", tmp_path)
