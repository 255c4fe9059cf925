"""The board on a tiny folder: rows with and without weights, resumed, refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.models import create_model
from utils.provenance import read_csv
from utils.quantization_utils import board_network
from utils.quantization_utils.backends import BACKENDS
from utils.quantization_utils.ptq_board import NONE, main
from utils.random_networks import spread_statistics

ARCH, OTHER = "resnet20_cifar10", "resnet18"
CALIBRATORS = ("minmax/ema", "mse/ema_mse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """val/ with ten classes of two 32x32 images, and w/ with random weights of one network."""
    root, random = tmp_path_factory.mktemp("board"), np.random.default_rng(0)
    for label in range(10):
        (root / "val" / f"class{label}").mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(0, 100 + 15 * label, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / f"class{label}" / f"{i}.png")
    (root / "w").mkdir()
    torch.manual_seed(0)
    info = create_model(ARCH)
    spread_statistics(info.module, torch.randn(8, 3, 32, 32))
    torch.save(info.module.state_dict(), root / "w" / f"{ARCH}.pth")
    return root


def flags(folder, output, *more):
    common = ("--data", str(folder), "--weights-dir", str(folder / "w"), "--output", str(output), "--workers", "0")
    return [*common, "--calib-images", "8", *more]


def some(folder, output, *more):
    rows = ("--archs", ARCH, "--calibrators", *CALIBRATORS, "--bits", "w4a8")
    return flags(folder, output, *rows, *more)


@pytest.fixture
def counted(monkeypatch):
    """How often a network was quantized."""
    calls = []
    original = board_network.quantize_after_training

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(board_network, "quantize_after_training", counting)
    return calls


def test_end_to_end(folder, tmp_path, capsys, counted):
    output = tmp_path / "board.csv"
    backends = ("--backends", *BACKENDS)
    assert main(some(folder, output, *backends, "--archs", ARCH, OTHER)) == 0
    origin, rows = read_csv(output)
    assert len(counted) == len(BACKENDS) * len(CALIBRATORS)
    assert str(folder) not in output.read_text()
    assert "commit" in origin
    assert len(rows) == 2 * len(BACKENDS) * len(CALIBRATORS)
    for row in rows:
        if row["arch"] == OTHER:
            assert row["note"] == f"no weights: {OTHER}.pth is not in w/"
            assert row["top1"] == row["drop"] == row["seconds"] == NONE
            continue
        assert row["evaluated"] == ("integer" if row["backend"] == "hawq" else "simulation")
        assert (row["images"], row["images_unseen"], row["published_drop"]) == ("20", "12", NONE)
        assert float(row["drop"]) == pytest.approx(float(row["top1_float"]) - float(row["top1"]))
        assert row["note"] == NONE
    academic = [r for r in rows if (r["arch"], r["backend"]) == (OTHER, "academic")]
    assert [row["published_drop"] for row in academic] == ["18.81", "16.10"]
    printed = capsys.readouterr().out
    assert output.with_suffix(".md").read_text() in printed
    assert "Published: MQBench 0.0.5" in printed


def test_finished_rows_are_not_run_again(folder, tmp_path, counted):
    output = tmp_path / "board.csv"
    assert main(some(folder, output, "--backends", "hawq")) == 0
    first = read_csv(output)[1]
    assert len(counted) == 2
    assert main(some(folder, output, "--backends", "tensorrt", "hawq")) == 0
    assert len(counted) == 4  # tensorrt alone
    rows = read_csv(output)[1]
    assert rows[:2] == first
    assert main(some(folder, output, "--backends", "hawq", "--seed", "1")) == 0  # other images
    assert len(counted) == 6
    no_weights = [flag if flag != str(folder / "w") else str(tmp_path) for flag in some(folder, output)]
    assert main([*no_weights, "--backends", "tensorrt"]) == 0
    assert [row["top1"] for row in read_csv(output)[1]].count(NONE) == 0  # kept


def test_rows_that_are_not_offered_say_why(folder, tmp_path, counted):
    output = tmp_path / "board.csv"
    rows = ("--archs", ARCH, "--backends", "academic", "--calibrators", "mse+block", "--bits", "w4a4")
    assert main(flags(folder, output, *rows)) == 0
    assert read_csv(output)[1][0]["note"].startswith("block learns activation scales, which the simulation of academic")
    assert not counted


def test_published_combinations_by_default(folder, tmp_path):
    output = tmp_path / "board.csv"
    assert main(flags(folder, output, "--archs", OTHER)) == 0
    rows = [(row["backend"], row["bits"], row["calibrator"]) for row in read_csv(output)[1]]
    assert len(rows) == 7 + 2 + 7
    assert ("tensorrt", "w8a8", "mse/ema_mse") in rows
    assert ("hawq", "w4a8", "mse/ema_mse+adaround") in rows


def test_without_a_folder_of_weights(folder, tmp_path):
    output = tmp_path / "board.csv"
    flags = ("--data", str(folder), "--output", str(output), "--archs", "resnet18", "--backends", "tensorrt")
    assert main(flags) == 0
    assert {row["note"] for row in read_csv(output)[1]} == {"no weights: resnet18.pth is not given (--weights-dir)"}


def test_an_interrupt_keeps_finished_rows(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "board.csv"
    original = board_network.BoardNetwork.measure

    def measure(network, backend, bits, calibrator, state):
        if calibrator == CALIBRATORS[1]:
            raise KeyboardInterrupt
        return original(network, backend, bits, calibrator, state)

    monkeypatch.setattr(board_network.BoardNetwork, "measure", measure)
    assert main(some(folder, output, "--backends", "hawq")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(read_csv(output)[1]) == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--calibrators", "best"), "--ptq 'best' does not know the part 'best'; give one calibrator"),
        (("--bits", "w9a8"), "no quantization scheme 'w9a8'"),
        (("--backends", "snpe"), "invalid choice: 'snpe'"),
        (("--calib-images", "0"), "0 is not a positive number"),
        (("--output", "board.md"), "is the name of the Markdown file beside the CSV"),
        (("--data", "nowhere"), "nowhere"),
        (("--mean", "0.5"), None),
    ],
)
def test_refusals(folder, tmp_path, capsys, more, sentence):
    output = tmp_path / "board.csv"
    code = main(some(folder, output, "--backends", "hawq", *more))
    error = capsys.readouterr().err
    if sentence is None:
        assert code == 0  # one number for all channels
        return
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not list(tmp_path.iterdir())


def test_a_table_of_something_else_is_not_overwritten(folder, tmp_path, capsys):
    output = tmp_path / "other.csv"
    output.write_text("a,b\n1,2\n")
    assert main(some(folder, output)) == 2
    assert "is not a table of this command; give another --output" in capsys.readouterr().err
    assert output.read_text() == "a,b\n1,2\n"
