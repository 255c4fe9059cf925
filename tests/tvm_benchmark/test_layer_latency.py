"""Layer latencies: what is measured at which width, and what the bit-width search reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_benchmark import benchmark, layer_latency
from utils.layer_latency import read_layer_latency
from utils.random_networks import calibrated

Install = Callable[..., Any]


def test_file_holds_each_layer_at_both_widths(install_fake: Install, tmp_path: Path) -> None:
    install_fake(layer_latency)
    path = tmp_path / "digits.csv"
    assert layer_latency.main(["-a", "digits", "--output", str(path)]) == 0
    found = read_layer_latency(path)
    layers = calibrated("digits", "uniform8").layers
    assert list(found) == [layer.name for layer in layers]
    for layer in layers:
        # The fake's step takes a second for each weight, the first and the last layer are measured at 4 bits too.
        assert found[layer.name] == dict.fromkeys(range(2, 9), 1e3 * layer.weights)


def test_standalone_bn_has_8_bits_alone(install_fake: Install, tmp_path: Path) -> None:
    install_fake(layer_latency)
    measured = layer_latency.measure("preresnet20_cifar10")
    affine = [layer.name for layer in calibrated("preresnet20_cifar10", "uniform8").layers if layer.kind == "affine"]
    assert affine
    assert all(set(times) == ({8} if name in affine else {4, 8}) for name, times in measured.items())


def test_two_layers_of_one_step_share_its_time(install_fake: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install_fake(layer_latency)

    def load(folder: Path, threads: int) -> Any:
        model = fake.load(folder, threads)
        pool, first, second, *others = model.info["steps"]
        model.info["steps"] = [pool, {**first, "layers": [first["name"], second["name"]]}, *others]
        times = [0.5, 4.0, *(1.0 for _ in others)]
        monkeypatch.setattr(model, "step_times", lambda rounds: times)
        return model

    monkeypatch.setattr(layer_latency, "CompiledModel", load)
    measured = layer_latency.measure("digits")
    first, second, *others = calibrated("digits", "uniform8").layers
    assert list(measured) == [layer.name for layer in (first, second, *others)]
    both = first.macs + second.macs
    for layer in (first, second):
        assert measured[layer.name][8] == pytest.approx(4000 * layer.macs / both)
    assert all(measured[layer.name] == {8: 1000, 4: 1000} for layer in others)


def test_from_the_benchmark_with_the_default_path(
    install_fake: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_fake(layer_latency)
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["-a", "digits", "--layer-latency"]) == 0
    (path,) = (tmp_path / "runs" / "latency").glob("digits_*.csv")
    assert len(read_layer_latency(path)) == 5
    assert f"{path.relative_to(tmp_path)}: 5 layers" in capsys.readouterr().out


def test_a_wrong_model_is_exit_code_1(
    install_fake: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(logits: np.ndarray) -> np.ndarray:
        return logits + 1

    install_fake(layer_latency, change)
    assert layer_latency.main(["-a", "digits", "--output", str(tmp_path / "x.csv")]) == 1
    assert "error: the compiled model is wrong" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_unknown_network_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert layer_latency.main(["-a", "nonet"]) == 2
    assert "error: unknown architecture 'nonet'" in capsys.readouterr().err


@pytest.mark.tvm
def test_real_compiler() -> None:
    pytest.importorskip("tvm")
    measured = layer_latency.measure("digits", target="portable")
    assert len(measured) == 5
    assert all(0 < ms < 1000 for times in measured.values() for ms in times.values())
