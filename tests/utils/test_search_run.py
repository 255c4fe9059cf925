"""quant_train.py --search, from the command line to the scheme file."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import quant_train
from bit_config import load_scheme
from tests.helpers import refusal
from utils.errors import EXIT_INTERRUPTED
from utils.layer_latency import write_layer_latency
from utils.provenance import read_csv
from utils.quantization_utils.sensitivity import Sensitivities

LAYERS = ["features.init_block.conv", "features.unit.conv1.conv", "features.unit.conv2.conv", "features.down.conv"]
LAYERS += ["output"]
WIDTHS = (2, 4, 8)
# Least damage for conv1 by far; the ends count at 8 bits only.
DAMAGE = {name: dict(zip(WIDTHS, row, strict=True)) for name, row in zip(LAYERS, [(9, 5, 1)] * 5, strict=True)}
DAMAGE["features.unit.conv1.conv"] = {2: 0.5, 4: 0.25, 8: 0.125}


@pytest.fixture
def sensitivity(tmp_path: Path) -> Path:
    path = tmp_path / "sensitivity.json"
    errors = {name: dict.fromkeys(row, 0.0) for name, row in DAMAGE.items()}
    Sensitivities("trace", "digits", 64, DAMAGE, errors).save(path)
    return path


def run(text: str, *paths: Path) -> int:
    return quant_train.main([word.format(*paths) for word in shlex.split(text)])


def refused(capsys: pytest.CaptureFixture[str], text: str, *paths: Path) -> str:
    return refusal(lambda _: run(text, *paths), [], capsys)


def test_from_sensitivities_to_a_run_under_the_scheme(
    sensitivity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, scheme = tmp_path / "run", tmp_path / "my.yaml"
    flags = "-a digits --search bops=0.5,size=0.9 --search-bits 2,4,8 --sensitivity {0} --pareto 6 --save-path {1} "
    assert run(flags + "--save-scheme {2}", sensitivity, folder, scheme) == 0
    out = capsys.readouterr().out
    assert "digits: 5 layers, bits 2, 4, 8, damage by trace on 64 images" in out
    assert "proved to be the least" in out
    assert f"the scheme is in {scheme}" in out
    assert sorted(path.name for path in folder.iterdir()) == ["log.log", "pareto.csv", "pareto.png", "search.csv"]
    with Image.open(folder / "pareto.png") as image:
        image.verify()
    text = scheme.read_text()
    assert text.startswith("# searched for bops=0.5,size=0.9: damage ")
    assert "# commit: " in text
    _, rows = read_csv(folder / "search.csv")
    chosen = {row["layer"]: int(row["bits"]) for row in rows}
    assert chosen["features.init_block.conv"] == chosen["output"] == 8
    assert chosen["features.unit.conv1.conv"] < 8
    rules = load_scheme(str(scheme), "digits").rules
    assert [rule.bits for rule in rules] == list(chosen.values())
    _, front = read_csv(folder / "pareto.csv")
    assert {row["front"] for row in front} == {"bops", "size"}

    small = "--float-epochs 0 --epochs 0 --calib-images 64 --agreement-images 8 --report {1} --save-path {2}"
    assert run(f"--quant-scheme {{0}} {small}", scheme, tmp_path / "r.json", tmp_path / "trained") == 0
    report: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert report["scheme"] == "my"
    assert report["bops_g"] == pytest.approx(sum(float(row["bops_g"]) for row in rows), rel=1e-9)
    assert report["size_mib"] == pytest.approx(sum(float(row["size_mib"]) for row in rows), rel=1e-9)


def test_without_a_file_the_damage_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--search bits=5 --search-metric fisher --search-images 32 --save-path {0}"
    assert run(flags, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "digits has random weights" in out
    assert "damage by fisher on 32 images" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("log.log", "searched.yaml", "search.csv", "sensitivity.json")
    }
    measured = Sensitivities.load(tmp_path / "run" / "sensitivity.json")
    assert (measured.metric, measured.arch, measured.images) == ("fisher", "digits", 32)
    assert run("--search bits=5 --sensitivity {0} --save-path {1}", tmp_path / "run/sensitivity.json", tmp_path) == 0
    same = [(tmp_path / part / "searched.yaml").read_text().split("\nname:")[1] for part in ("run", ".")]
    assert same[0] == same[1]


def test_an_interrupted_measurement_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any) -> None:
        arguments[5].write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.search_run.measure", stop)
    assert run("--search bits=5 --search-images 8 --save-path {0}", tmp_path) == EXIT_INTERRUPTED
    error = capsys.readouterr().err
    assert f"stopped during the measurement; what was measured is in {tmp_path}" in error
    assert not (tmp_path / "searched.yaml").exists()


def test_latency_budget(sensitivity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 bits are faster for conv1 alone; 2 bits run the kernel of 4."""
    times = {name: {8: 2.0, 4: 1.0 if "conv1" in name else 2.0} for name in LAYERS}
    write_layer_latency(tmp_path / "latency.csv", times)
    flags = "--search latency=9ms --search-bits 2,4,8 --sensitivity {0} --layer-latency {1} --save-path {2}"
    assert run(flags, sensitivity, tmp_path / "latency.csv", tmp_path) == 0
    out = capsys.readouterr().out
    assert "dropped: 4 bit for 2 of 3 searched layers, no cheaper than 8 bit" in out
    assert "dropped: 2 bit for 1 of 3 searched layers, no cheaper than 4 bit" in out
    assert [rule.bits for rule in load_scheme(str(tmp_path / "searched.yaml"), "digits").rules] == [8, 4, 8, 8, 8]


def test_fixed_layers(sensitivity: Path, tmp_path: Path) -> None:
    flags = "--search size=1 --search-bits 2,4,8 --sensitivity {0} --save-path {1} "
    assert run(flags + r"--search-fix unit\.conv=4 --search-fix output=2", sensitivity, tmp_path) == 0
    assert [rule.bits for rule in load_scheme(str(tmp_path / "searched.yaml"), "digits").rules] == [8, 4, 4, 8, 2]


MISTAKES = {
    "infeasible": (
        "--search size=1KiB --sensitivity {0}",
        r"size 1 KiB is asked and size 16\.5 KiB is the least",
    ),
    "metric": ("--search size=0.5 --search-metric hessian", "--search-metric is 'hessian', expected one of trace, "),
    "no such file": ("--search size=0.5 --sensitivity {0}x", "cannot read the sensitivities"),
    "other bits": ("--search size=0.5 --search-bits 3,8 --sensitivity {0}", "no damage of the layer .* at 3 bits"),
    "no latency": (
        "--search latency=1ms --sensitivity {0}",
        "a latency budget needs measured latencies",
    ),
    "latency file": ("--search latency=1ms --layer-latency {0}x --sensitivity {0}", "cannot read the table"),
    "fix": ("--search size=0.5 --search-fix stage9=4 --sensitivity {0}", "'stage9' occurs in no layer name"),
    "folder": ("--search size=0.5 --save-scheme {2}/no/s.yaml --sensitivity {0}", "no does not exist; make it first"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    name: str,
    sensitivity: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence each, and nothing but perhaps a log is written."""
    monkeypatch.chdir(tmp_path)
    flags, sentence = MISTAKES[name]
    assert re.search(sentence, refused(capsys, f"{flags} --save-path {{1}}", sensitivity, tmp_path / "run", tmp_path))
    written = {path.name for path in (tmp_path / "run").glob("*")}
    assert written <= {"log.log"}


def test_sensitivities_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    Sensitivities("kl", "resnet18", 2, {"a": {4: 1.0}}, {"a": {4: 0.0}}).save(path)
    error = refused(capsys, "--search size=0.5 --sensitivity {0} --save-path {1}", path, tmp_path)
    assert "holds sensitivities of resnet18, not of digits" in error


def test_the_originals_tables_give_damage_and_latency(shared: Path, tmp_path: Path) -> None:
    tables = shared / "reference" / "ilp_tables.json"
    scheme = tmp_path / "found.yaml"
    flags = f"-a resnet18 --search latency=0.5 --sensitivity {tables} --layer-latency {tables} --save-scheme {scheme}"
    assert quant_train.main([*flags.split(), "--save-path", str(tmp_path)]) == 0
    assert "of the original's tables" in scheme.read_text()
    assert load_scheme(str(scheme), "resnet18").name == "found"
