"""Files of layer latencies."""

from pathlib import Path

import pytest

from utils.errors import UserError
from utils.layer_latency import latency_path, read_layer_latency, write_layer_latency


def test_round_trip_and_widths_between(tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    write_layer_latency(path, {"conv": {8: 0.5, 4: 0.25}, "bn": {8: 0.125}})
    text = path.read_text()
    assert text.startswith("# cpu: ")
    assert text.endswith("layer,bits,ms\nconv,4,0.250000\nconv,8,0.500000\nbn,8,0.125000\n")
    assert read_layer_latency(path) == {
        "conv": {2: 0.25, 3: 0.25, 4: 0.25, 5: 0.5, 6: 0.5, 7: 0.5, 8: 0.5},
        "bn": {5: 0.125, 6: 0.125, 7: 0.125, 8: 0.125},
    }


def test_one_file_for_each_network_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.layer_latency.provenance", lambda: {"cpu": "AMD EPYC 9B45 (2 cores)"})
    assert latency_path("torchvision/resnet18") == Path("runs/latency/torchvision_resnet18_AMD_EPYC_9B45_2_cores.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no table of layer latencies: got no rows, expected layer, bits, ms; measure again with python -m"),
        ("layer,ms\na,1\n", "no table of layer latencies: got layer, ms, expected layer, bits, ms"),
        ("layer,bits,ms\na,8,1\na,6,1\n", "row 2 of .*net.csv has bits '6' and ms '1', expected 4 or 8 and a positive"),
        ("layer,bits,ms\na,8,fast\n", "row 1 of .* has bits '8' and ms 'fast'"),
        ("layer,bits,ms\na,8,-1\n", "row 1 of .* has bits '8' and ms '-1'"),
        ("layer,bits,ms\na,8,nan\n", "row 1 of .* has bits '8' and ms 'nan'"),
        ("layer,bits,ms\na,8\n", "row 1 of .* has bits '8' and ms None"),
        ("layer,bits,ms\na,8,1\na,8,2\n", "has the layer a at 8 bits twice; measure again"),
    ],
)
def test_files_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_layer_latency(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the table"):
        read_layer_latency(tmp_path / "none.csv")
