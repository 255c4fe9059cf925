"""Compiled models on disk and in memory: what they compute, and one sentence for all that cannot be used."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import sentence_of
from tests.tvm_benchmark.small_graphs import CLASSES, SHAPE, float_graph, images, small_graph
from tvm_benchmark import artifact, runtime
from tvm_benchmark.artifact import CompiledModel
from tvm_benchmark.compile import compile_graph
from utils.integer_graph import interpreter

pytestmark = pytest.mark.tvm
BATCH = 3
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, compiled with everything that can be looked into."""
    path = tmp_path_factory.mktemp("compiled")
    compile_graph(small_graph(), path, batch=BATCH, steps=True, keep=True)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder: Path, **entries: Any) -> Path:
    """Change entries of model.json."""
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_those_of_the_interpreter(folder: Path, threads: int) -> None:
    model, graph = CompiledModel(folder, threads), small_graph()
    for seed in range(4):
        batch = images(BATCH, seed)
        np.testing.assert_array_equal(model(batch), interpreter.run(graph, batch))


def test_models_with_different_threads_take_turns(folder: Path) -> None:
    one, two = CompiledModel(folder, 1), CompiledModel(folder, 2)
    count = runtime.runtime().get_global_func("runtime.NumThreads")
    for model in (one, two, one):
        model.run()
        assert count() == model.threads


def test_every_stored_tensor_is_that_of_the_interpreter(folder: Path) -> None:
    model, batch = CompiledModel(folder), images(BATCH)
    model(batch)
    values = interpreter.run(small_graph(), batch, keep=True)
    names = set(model.info["tensors"])
    assert {"image", "conv1.q", "conv2.q", "logits"} <= names
    for name in names:
        found = model.tensor(name)
        np.testing.assert_array_equal(found, values[name].reshape(found.shape))
        assert found.dtype == (np.float32 if name == "logits" else np.int64)


def test_any_number_of_images(folder: Path) -> None:
    model, batch = CompiledModel(folder), images(2 * BATCH + 1)
    np.testing.assert_array_equal(model.predict(batch), interpreter.run(small_graph(), batch))
    assert model.predict(batch[:0]).shape == (0, CLASSES)


def test_results_are_new_arrays_and_runs_repeat(folder: Path) -> None:
    model = CompiledModel(folder)
    first = model(images(BATCH, 0))
    kept = first.copy()
    second = model(images(BATCH, 1))
    assert (second != first).any()
    np.testing.assert_array_equal(first, kept)
    model.run()
    np.testing.assert_array_equal(model(images(BATCH, 1)), second)


def test_images_may_be_a_view(folder: Path) -> None:
    model, batch = CompiledModel(folder), images(2 * BATCH)
    expected = interpreter.run(small_graph(), batch[::2])
    np.testing.assert_array_equal(model(batch[::2]), expected)


def test_time_of_every_step(folder: Path) -> None:
    model = CompiledModel(folder)
    times = model.step_times(3)
    assert len(times) == len(model.info["steps"])
    assert all(0 < seconds < 1 for seconds in times)


def test_float_images(tmp_path: Path) -> None:
    graph = float_graph()
    compile_graph(graph, tmp_path, batch=2)
    model = CompiledModel(tmp_path)
    batch = np.random.default_rng(0).normal(1, 2, (2, *SHAPE)).astype(np.float32)
    batch[0, 0, 0, :3] = [np.inf, -np.inf, 1e30]
    np.testing.assert_array_equal(model(batch), interpreter.run(graph, batch))
    batch[1, 0, 0, 0] = np.nan
    assert sentence_of(lambda: model(batch)) == "the images hold NaN, expected numbers"


def test_memory_is_shared_with_tvm() -> None:
    for size in (1, 100, 3 << 20):
        array = runtime.memory(size)
        assert (array.nbytes, array.ctypes.data % 64, int(array.max())) == (size, 0, 0)
        assert np.from_dlpack(runtime.shared_tensor(array)).ctypes.data == array.ctypes.data


def test_replaced_library_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    """The system's loader would give the library that it has under the same path."""
    batch, models = images(1), []
    for seed in (0, 1):
        compile_graph(small_graph(seed), tmp_path)
        models.append(CompiledModel(tmp_path))
    for seed, model in enumerate(models):
        np.testing.assert_array_equal(model(batch), interpreter.run(small_graph(seed), batch))


def test_two_threads_work(folder: Path) -> None:
    """Another thread than the main one spends time, in a process without torch."""
    code = f"""
        import sys
        sys.modules["torch"] = None
        import threading
        from pathlib import Path
        from tvm_benchmark.artifact import CompiledModel
        def spent():
            tasks = Path("/proc/self/task").iterdir()
            return {{t.name: sum(map(int, (t / "stat").read_text().rsplit(")")[1].split()[11:13])) for t in tasks}}
        model = CompiledModel({str(folder)!r}, 2)
        before = spent()
        for _ in range(20000):
            model.run()
        after = spent()
        busy = [name for name in after if after[name] - before.get(name, 0) >= 2]
        assert len(busy) == 2, (before, after)
        assert "tvm" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_wrong_shape_or_dtype(folder: Path) -> None:
    model = CompiledModel(folder)
    text = sentence_of(lambda: model(images(2)))
    assert text == "got images uint8 [2, 3, 7, 6], expected uint8 [3, 3, 7, 6]; predict() takes any number of images"
    assert "got images float64 [3, 3, 7, 6], expected uint8" in sentence_of(lambda: model(images(BATCH) / 255))
    wrong = np.zeros((BATCH, 1, 7, 6), np.uint8)
    assert sentence_of(lambda: model(wrong)) == "got images uint8 [3, 1, 7, 6], expected uint8 [3, 3, 7, 6]"
    assert "expected uint8 [3, 3, 7, 6]" in sentence_of(lambda: model.predict(wrong))


@pytest.mark.parametrize("name", ["model.so", "model.json"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{name} is missing; give a folder that" in sentence_of(lambda: CompiledModel(copy))


def test_no_folder(tmp_path: Path) -> None:
    assert "model.json is missing" in sentence_of(lambda: CompiledModel(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"format": "something else"}', "\udcff"])
def test_foreign_or_damaged_description(copy: Path, text: str) -> None:
    (copy / "model.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    sentence = sentence_of(lambda: CompiledModel(copy))
    assert "cannot read" in sentence or "does not describe a compiled model" in sentence


def test_unknown_version(copy: Path) -> None:
    assert "has format version 99, this program reads 1" in sentence_of(lambda: CompiledModel(change(copy, version=99)))


@pytest.mark.parametrize("key", sorted(artifact.FIELDS))
def test_entry_of_another_kind(copy: Path, key: str) -> None:
    assert f"is damaged: '{key}' is not valid" in sentence_of(lambda: CompiledModel(change(copy, **{key: 1.5})))


@pytest.mark.parametrize("place", [100, -1])
def test_changed_library(copy: Path, place: int) -> None:
    content = bytearray((copy / "model.so").read_bytes())
    content[place] ^= 1
    (copy / "model.so").write_bytes(content)
    text = sentence_of(lambda: CompiledModel(copy))
    assert "model.so is not the file that model.json describes: it was changed; compile the model again" in text


def test_another_cpu(copy: Path) -> None:
    text = sentence_of(lambda: CompiledModel(change(copy, flags=["avx999", "fma"])))
    assert "this machine lacks avx999; compile it again here: python -m tvm_benchmark.compile --graph" in text
    assert text.endswith(f"-o {copy} --batch-size 3")
    text = sentence_of(lambda: CompiledModel(change(copy, flags=[], machine="aarch64")))
    assert "this machine lacks the architecture aarch64 (this is" in text


def test_tiles_that_the_system_refuses(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "request_tiles", lambda: False)
    changed = change(copy, flags=[], target="amx")
    assert "lacks the system's permission to use AMX tiles" in sentence_of(lambda: CompiledModel(changed))


def test_too_many_threads(folder: Path) -> None:
    assert "got 1000 threads, but TVM's thread pool in this process has" in sentence_of(
        lambda: CompiledModel(folder, 1000)
    )
    assert sentence_of(lambda: CompiledModel(folder, 0)) == "got 0 threads, expected at least 1"


def test_steps_and_tensors_only_where_compiled(tmp_path: Path, folder: Path) -> None:
    compile_graph(small_graph(), tmp_path)
    model = CompiledModel(tmp_path)
    assert "compile it with steps=True" in sentence_of(lambda: model.step_times(1))
    assert "compile it with keep=True" in sentence_of(lambda: model.tensor("logits"))
    assert "the tensor 'conv1' is not stored" in sentence_of(lambda: CompiledModel(folder).tensor("conv1"))


def test_without_tvm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    text = sentence_of(lambda: CompiledModel(folder))
    assert 'pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"' in text


def test_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"no library")
    assert "cannot load the library" in sentence_of(lambda: runtime.load_library(path))
