"""``quant_train.py --explain`` as a stranger uses it."""

import re
import shutil
from pathlib import Path

import pytest

import quant_train
from tests.helpers import refusal
from tests.utils.doctor.test_document import Page, assert_stands_alone
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.layer_latency import write_layer_latency

FILES = ("explain.html", "explain.txt")
SMALL = ("--calib-images", "96")


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a command is refused with."""
    return refusal(quant_train.main, argv, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    flags = ("--float-epochs", "3", "--epochs", "1", "--quant-scheme", "w4a8", "--save-path", str(folder))
    assert quant_train.main([*flags, "--calib-images", "128", "--agreement-images", "8"]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("file", ["", "model_best.pth.tar"])
def test_digits_end_to_end(file: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in run.iterdir())
    checkpoint = (run / "checkpoint.pth.tar").read_bytes()
    assert quant_train.main(["--explain", str(run / file), *SMALL]) == 0
    assert sorted(path.name for path in run.iterdir()) == sorted([*before, *FILES])
    assert (run / "checkpoint.pth.tar").read_bytes() == checkpoint
    printed, text, html = capsys.readouterr().out, *((run / name).read_text() for name in reversed(FILES))
    assert text in printed, "five layers fit on the terminal as they are"
    assert "Doctor's report: digits, scheme w4a8" in text
    assert "96 images of digits, validation" in text
    for layer in load_checkpoint(run / "checkpoint.pth.tar")["bits"]:
        assert text.count(layer) >= 2
    assert_stands_alone(Page(html), html)


def test_same_report_twice(run: Path) -> None:
    texts = []
    for _ in range(2):
        assert quant_train.main(["--explain", str(run), *SMALL]) == 0
        texts.append([(run / name).read_bytes() for name in FILES])
    assert texts[0] == texts[1]


def test_latencies_and_another_folder(run: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "latency.csv", tmp_path / "out"
    before = sorted(run.iterdir())
    write_layer_latency(table, {"features.unit.conv1.conv": {4: 0.25, 8: 0.5}, "output": {8: 0.75}})
    flags = ["--explain", str(run), "--layer-latency", str(table), "--save-path", str(out), *SMALL]
    assert quant_train.main(flags) == 0
    text = (out / "explain.txt").read_text()
    assert re.search(r"output +8 +0\.7500 +75\.0\nfeatures\.unit\.conv1\.conv +4 +0\.2500 +25\.0\n", text)
    assert sorted(run.iterdir()) == before


def test_no_run(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty is no run: it has no checkpoint.pth.tar" in refused(["--explain", str(empty)], capsys)
    assert "gone does not exist" in refused(["--explain", str(tmp_path / "gone")], capsys)
    text = tmp_path / "text"
    text.write_text("hello")
    assert "text is damaged, cut short or not a file" in refused(["--explain", str(text)], capsys)
    for name in FILES:
        assert not (run / name).exists()
        assert not (empty / name).exists()


def test_changed_and_float_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoint.pth.tar"
    saved = load_checkpoint(path)
    save_checkpoint(path, {key: value for key, value in saved.items() if key != "quantizers"})
    assert "does not hold a whole run" in refused(["--explain", str(run)], capsys)
    save_checkpoint(path, {**saved, "scheme": "float"})
    assert "holds a float network; --explain examines quantized ones" in refused(["--explain", str(run)], capsys)


def test_images_that_moved_or_do_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoint.pth.tar"
    saved = load_checkpoint(path)
    gone = {**saved["arguments"], "data": str(tmp_path / "gone")}
    save_checkpoint(path, {**saved, "arguments": gone})
    sentence = r"gone does not exist.*the --data of the run; give --data where the images are now"
    assert re.search(sentence, refused(["--explain", str(run)], capsys))
    assert quant_train.main(["--explain", str(run), "--data", "digits", *SMALL]) == 0


def test_latencies_of_another_network(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "latency.csv"
    write_layer_latency(table, {"stage1": {8: 1.0}})
    error = refused(["--explain", str(run), "--layer-latency", str(table)], capsys)
    assert "latency.csv has no layer of digits; measure with python -m tvm_benchmark.layer_latency -a digits" in error


@pytest.mark.parametrize(
    "flags",
    [["--resume", "x"], ["-e"], ["--quant-scheme", "uniform4"], ["--weights", "w"], ["--ptq", "mse"], ["--summary"]],
)
def test_flags_that_do_not_go_with_it(flags: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = {"-e": "--evaluate"}.get(flags[0], flags[0])
    error = refused(["--explain", str(run), *flags], capsys)
    assert f"--explain examines a run as it is; leave out {name}" in error
