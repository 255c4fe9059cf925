"""``quant_train.py --ptq-backend``: simulations are evaluated, said to be simulations, and leave no integer graph."""

import json

import numpy as np
import pytest
from PIL import Image

import quant_train
from tests.helpers import refusal
from utils.quantization_utils.backends import BACKENDS
from utils.run_state import BEST, CHECKPOINT, GRAPH

SMALL = ("--ptq", "mse", "--calib-images", "32", "--float-epochs", "2", "--agreement-images", "8")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run(backend, tmp_path, capsys):
    report = tmp_path / "run" / "report.json"
    flags = ("--ptq-backend", backend, "--save-path", str(tmp_path / "run"), "--report", str(report))
    assert quant_train.main([*SMALL, *flags]) == 0
    found, printed = json.loads(report.read_text()), capsys.readouterr().out
    assert found["ptq_backend"] == backend
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"sqnr.png", "scheme.yaml", "arguments.json"} <= files
    if backend == "hawq":
        assert {GRAPH, CHECKPOINT} <= files
        assert found["top1_integer"] is not None
        assert "top1_simulation" not in found
        assert "simulated" not in printed
        return
    assert not files & {GRAPH, CHECKPOINT, BEST}
    assert found["top1_integer"] is None
    assert abs(found["top1_simulation"] - found["top1_float"]) < 5
    assert f"{backend} is simulated in float and has no integer graph" in printed
    assert "top-1 simulation" in printed
    assert "top-1 integer" not in printed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--ptq-backend", "snpe"), "invalid choice: 'snpe'"),
        (("--ptq-backend", "academic"), "--ptq-backend academic needs --ptq to say how, for example --ptq mse"),
        (
            ("--ptq-backend", "tensorrt", "--ptq", "mse+block"),
            "the simulation of tensorrt does not offer; use adaround",
        ),
        (("--ptq-backend", "openvino", "--ptq", "mse", "--epochs", "2"), "is simulated and cannot be trained"),
        (("--ptq-backend", "openvino", "--ptq", "mse", "-e", "--engine", "tvm"), "leave out --engine tvm"),
        (("--ptq-backend", "openvino", "--ptq", "mse", "--strict-integer"), "leave out --strict-integer"),
    ],
)
def test_refusals(flags, sentence, tmp_path, capsys):
    assert sentence in refusal(quant_train.main, [*flags, "--save-path", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_accuracy_on_images_that_did_not_calibrate(tmp_path, capsys):
    for label in range(10):
        (tmp_path / "val" / f"class{label}").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((32, 32, 3), 20 * label + i, np.uint8)).save(
                tmp_path / "val" / f"class{label}" / f"{i}.png"
            )
    report = tmp_path / "run" / "report.json"
    flags = ["-a", "resnet20_cifar10", "--data", str(tmp_path), "--workers", "0", "--ptq", "mse", "--calib-images", "8"]
    flags += ["--ptq-backend", "tensorrt", "--save-path", str(tmp_path / "run"), "--report", str(report)]
    assert quant_train.main(flags) == 0
    found = json.loads(report.read_text())
    assert found["images_unseen"] == 12
    assert 0 <= found["top1_simulation_unseen"] <= 100
    assert "top1_integer_unseen" not in found
    assert "without those calibrated on: float" in capsys.readouterr().out
