"""The runtimes beside ours: they compute the float network, and their absence costs one line."""

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tvm_benchmark import peers
from tvm_benchmark.peers import Engine, Missing, PeerKind, Workload, build_peers
from utils.random_networks import calibrated, random_images


@pytest.fixture(scope="module")
def workload() -> Workload:
    experiment = calibrated("digits", "uniform8")
    images = random_images(experiment.preprocess.input_shape, 4)
    return Workload(experiment.info.module.eval(), experiment.preprocess, images[:2], images, threads=1)


def expected(workload: Workload) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = workload.module(workload.inputs).numpy()
    return logits


def built(workload: Workload, name: str, precision: str) -> list[Engine]:
    kinds = [kind for kind in peers.PEERS if name in kind.names and kind.precision == precision]
    engines, missing = build_peers(workload, kinds)
    assert not missing
    return engines


def outputs(engine: Engine) -> np.ndarray:
    found = engine.run()
    if isinstance(found, torch.Tensor):
        return found.numpy()
    return np.asarray(found[0])  # type: ignore[index]


def test_pytorch_runs_the_float_network(workload: Workload) -> None:
    (engine,) = built(workload, "pytorch", "fp32")
    assert np.array_equal(outputs(engine), expected(workload))


def test_openvino_fp32_computes_the_float_network(workload: Workload) -> None:
    pytest.importorskip("openvino")
    (engine,) = built(workload, "openvino", "fp32")
    np.testing.assert_allclose(outputs(engine), expected(workload), atol=1e-4)


ENGINES_THEN_A_SIGNAL = """
import faulthandler, gc, signal, subprocess
import numpy as np, openvino
from openvino import opset13
from tvm_benchmark.peers import OpenVinoEngine

faulthandler.enable()  # signals have a stack of their own
def engine():
    x = opset13.parameter([1, 4], np.float32)
    return OpenVinoEngine(openvino.Model([opset13.relu(x)], [x]), np.ones((1, 4), np.float32), "relu", "fp32", 1)
engines = [engine(), engine()]
while engines:
    del engines[0]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("signal"))
subprocess.run(["true"])
"""


def test_signals_arrive_after_openvino_is_done() -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", ENGINES_THEN_A_SIGNAL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "signal\n"), done.stderr


def test_both_int8_forms_of_openvino_compute_the_network(workload: Workload) -> None:
    pytest.importorskip("nncf")
    from_floats, from_pixels = built(workload, "openvino", "int8")
    assert (from_floats.name, from_pixels.name) == ("openvino", "openvino (uint8 input)")
    wanted = expected(workload)
    assert np.corrcoef(outputs(from_floats).ravel(), wanted.ravel())[0, 1] > 0.9
    np.testing.assert_allclose(outputs(from_pixels), outputs(from_floats), atol=0.02 * np.abs(wanted).max())


def test_onnxruntime_computes_the_float_network(workload: Workload) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (engine,) = built(workload, "onnxruntime", "fp32")
    np.testing.assert_allclose(outputs(engine), expected(workload), atol=1e-4)


def test_a_peer_that_is_not_installed_is_one_line(workload: Workload) -> None:
    def absent(_: Workload) -> Sequence[Engine]:
        raise ModuleNotFoundError("No module named 'quickrt'", name="quickrt")

    engines, missing = build_peers(workload, [PeerKind(("a", "b"), "int8", absent)])
    assert engines == []
    reason = "not installed (quickrt): pip install 'hawq[peers]'"
    assert missing == [Missing("a", "int8", reason), Missing("b", "int8", reason)]


def test_a_peer_that_fails_when_it_runs_is_one_line(workload: Workload) -> None:
    class Broken:
        name, precision = "broken", "fp32"

        def run(self) -> object:
            raise RuntimeError("\n  no such operator: frobnicate\nmore")

    kind = PeerKind(("broken",), "fp32", lambda _: [Broken()])
    engines, missing = build_peers(workload, [kind, kind])
    assert engines == []
    assert missing[0].reason == "cannot run this network (RuntimeError: no such operator: frobnicate)"
    assert len(missing) == 2


def test_without_a_network_every_peer_is_missing() -> None:
    missing = peers.without_network("no such architecture")
    assert {m.name for m in missing} == {name for kind in peers.PEERS for name in kind.names}
    assert {m.reason for m in missing} == {"no such architecture"}
