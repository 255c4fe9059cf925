"""Compiling: whole networks equal the interpreter, a failure leaves the older model, every mistake is one sentence."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import sentence_of
from tests.tvm_benchmark.small_graphs import images, small_graph
from tvm_benchmark import compile as compiler
from tvm_benchmark import tune
from tvm_benchmark.artifact import FIELDS, CompiledModel
from tvm_benchmark.compile import compile_graph, main
from tvm_benchmark.isa import TARGETS, choose, runs_here
from utils.errors import UserError
from utils.integer_graph import interpreter
from utils.integer_graph.ir import Graph
from utils.integer_graph.ops import make_node
from utils.integer_graph.serialize import graph_hash, save
from utils.random_networks import calibrated, random_images

pytestmark = pytest.mark.tvm


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is compiled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "batch"), [("uniform8", 1), ("uniform4", 3)])
def test_digits_network_equals_the_interpreter(scheme: str, batch: int, tmp_path: Path) -> None:
    graph = calibrated("digits", scheme).convert(())
    compile_graph(graph, tmp_path, batch=batch)
    pixels = random_images((1, 8, 8), 7).numpy()
    for threads in (1, 2):
        logits = CompiledModel(tmp_path, threads).predict(pixels)
        np.testing.assert_array_equal(logits, interpreter.run(graph, pixels))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["uniform8", "uniform4"])
def test_resnet20_equals_the_interpreter(scheme: str, tmp_path: Path) -> None:
    graph = calibrated("resnet20_cifar10", scheme).convert(())
    compile_graph(graph, tmp_path, batch=3)
    pixels = random_images((3, 32, 32), 8).numpy()
    for threads in (1, 2):
        logits = CompiledModel(tmp_path, threads).predict(pixels)
        np.testing.assert_array_equal(logits, interpreter.run(graph, pixels))


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if runs_here(row)])
def test_every_target_that_runs_here(target: str, tmp_path: Path) -> None:
    graph = small_graph()
    compile_graph(graph, tmp_path, batch=2, target=target)
    model = CompiledModel(tmp_path)
    assert (model.info["target"], model.info["flags"]) == (target, list(TARGETS[target].flags))
    np.testing.assert_array_equal(model.predict(images(5)), interpreter.run(graph, images(5)))


def test_description(tmp_path: Path) -> None:
    graph, said = small_graph(), list[str]()
    compile_graph(graph, tmp_path / "a" / "b", batch=2, say=said.append)
    info = json.loads((tmp_path / "a/b/model.json").read_text())
    assert set(info) == {"format", "version", *FIELDS}
    expected = {
        "arch": "small",
        "scheme": "uniform8",
        "input_shape": [3, 7, 6],
        "input_dtype": "uint8",
        "classes": list("abcde"),
        "outputs": 5,
        "batch": 2,
        "target": choose().name,
        "graph_hash": graph_hash(graph),
    }
    assert {key: info[key] for key in expected} == expected
    assert set(info["versions"]) == {"hawq", "tvm", "tvm_ffi"}
    assert info["arena_offset"] % 4096 == 0
    assert os.path.getsize(tmp_path / "a/b/model.so") == info["arena_offset"] + info["weight_bytes"]
    assert sum(step["macs"] for step in info["steps"]) > 0
    assert [line.split()[0] for line in said] == ["planned:", "generated"]


def test_search_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tune.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setattr(tune, "MAX_CANDIDATES", 2)
    graph = small_graph()
    compile_graph(graph, tmp_path / "model", tune=True)
    found = files(tmp_path / "cache" / "tilings")
    assert len(found) == 3
    compile_graph(graph, tmp_path / "model", tune=True)
    assert files(tmp_path / "cache" / "tilings") == found
    model = CompiledModel(tmp_path / "model")
    np.testing.assert_array_equal(model(images(1)), interpreter.run(graph, images(1)))


# ---- failures -------------------------------------------------------------------------------------------------------


class _Broken:
    """A library whose export fails half-way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def export_library(self, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("ld failed")])
def test_failure_leaves_the_older_model(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph(small_graph(), tmp_path / "old")
    before = files(tmp_path / "old")
    monkeypatch.setattr(compiler, "build", lambda *_: _Broken(error))
    for name in ("old", "new"):
        with pytest.raises(UserError if isinstance(error, OSError) else RuntimeError) as caught:
            compile_graph(small_graph(1), tmp_path / name)
        if isinstance(error, OSError):
            assert f"cannot write {tmp_path / name}: No space left on device; free space" in str(caught.value)
    assert files(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("")
    text = sentence_of(lambda: compile_graph(small_graph(), path / "out"))
    assert text == f"cannot write {path / 'out'}: {path} is not a folder; give another place"
    monkeypatch.setattr(os, "access", lambda *_: False)
    text = sentence_of(lambda: compile_graph(small_graph(), tmp_path / "out"))
    assert text == f"cannot write {tmp_path / 'out'}: no permission to write there; give another place"


def test_without_a_c_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    text = sentence_of(lambda: compile_graph(small_graph(), tmp_path / "out"))
    assert "needs a C compiler to link the library, and the PATH has neither g++, gcc nor clang; install one" in text
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "got no-such-compiler" in sentence_of(lambda: compile_graph(small_graph(), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save(small_graph(), tmp_path / "g.safetensors")
    for missing in ("tvm_ffi", "tvm"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            assert main(["--graph", str(tmp_path / "g.safetensors"), "-o", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: compiled models need TVM, which this Python does not have (")
        assert error.endswith('pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"\n')
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_values_that_make_no_sense(tmp_path: Path) -> None:
    graph = small_graph()
    text = sentence_of(lambda: compile_graph(graph, tmp_path, batch=0))
    assert text == "got a batch of 0 images, expected at least 1"
    text = sentence_of(lambda: compile_graph(graph, tmp_path, target="gpu"))
    assert text == "got --target gpu, expected one of auto, amx, avx512vnni, avxvnni, avx2, portable"


def test_search_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "runs_here", lambda target: False)
    text = sentence_of(lambda: compile_graph(small_graph(), tmp_path, tune=True))
    assert "--tune measures, and this machine does not run the target" in text


def test_float_island(tmp_path: Path) -> None:
    first, *_ = small_graph().nodes
    attrs = {"function": "softmax", "input_scale": 0.125, "inverse_scale": 255.0, "lo": 0, "hi": 255}
    island = make_node("attention", "float_op", [first], attrs={**attrs, "bits": 8, "signed": False})
    flat = make_node("flat", "reshape", [island], attrs={"shape": [126]})
    logits = make_node("logits", "logits", [flat], arrays={"scale": np.ones(1, np.float32)})
    text = sentence_of(lambda: compile_graph(Graph((first, island, flat, logits)), tmp_path))
    assert "attention computes softmax in float32" in text


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: Any) -> None:
    save(small_graph(), tmp_path / "g.safetensors")
    argv = ["--graph", str(tmp_path / "g.safetensors"), "-o", str(tmp_path / "out"), "--batch-size", "2"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"target {choose().name} ({choose().mcpu}): the best that this machine runs"
    assert lines[-1].startswith(f"wrote {tmp_path / 'out' / 'model.so'} (0.")
    model = CompiledModel(tmp_path / "out")
    np.testing.assert_array_equal(model(images(2)), interpreter.run(small_graph(), images(2)))
    assert main([*argv, "--target", "portable"]) == 0
    assert ", as asked; this machine runs it" in capsys.readouterr().out


def test_command_says_what_cannot_run_here(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cpu_flags", frozenset)
    monkeypatch.setattr(compiler, "runs_here", lambda target: False)
    save(small_graph(), tmp_path / "g.safetensors")
    assert main(["--graph", str(tmp_path / "g.safetensors"), "-o", str(tmp_path), "--target", "avx2"]) == 0
    assert "this machine cannot run it: it lacks avx2, fma" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "g.safetensors is missing; give an integer graph's file"), (b"x" * 100, "not a complete safetensors file")],
)
def test_graph_that_cannot_be_read(content: bytes | None, words: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "g.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main(["--graph", str(path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "python -m tvm_benchmark.compile --graph runs/resnet18_uniform8/model.safetensors -o resnet18" in text
    assert all(name in text for name in TARGETS)
