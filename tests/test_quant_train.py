"""quant_train.py as a stranger uses it: every mistake is one sentence, every run can be stopped and continued."""

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bit_config
import quant_train
from tests.helpers import refusal
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.digits_net import DigitsNet
from utils.errors import EXIT_INTERRUPTED
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import graph_hash, load
from utils.run_report import EXTRA_KEYS, REPORT_KEYS
from utils.run_state import Run
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--batch-size", "100", "--data-percentage", "0.28", "--calib-images", "64", "--agreement-images", "8")
STEPS_PER_EPOCH = round(0.28 * 1437) // 100
CLASSES = tuple(f"class{i}" for i in range(10))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run on the digits: a few float epochs, a quantized one at 4 bits."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--float-epochs", "5", "--epochs", "1", "--quant-scheme", "uniform4", "--save-path", str(folder))
    assert quant_train.main([*SMALL[4:], *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def weights(trained: Path) -> list[str]:
    """Flags of a run on the digits that starts from trained weights."""
    return ["--weights", str(trained / "checkpoint.pth.tar"), *SMALL]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like CIFAR-10's: 32x32 images of ten classes, 30 for training, 10 for validation."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(15 * label, 15 * label + 100, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command is refused with; it must be one line and leave nothing behind."""
    return refusal(quant_train.main, argv, capsys)


# ---- mistakes -------------------------------------------------------------------------------------------------------

CIFAR = ("-a", "resnet20_cifar10", "--epochs", "0", "--workers", "0")


def _yaml(folder: Path) -> list[str]:
    (folder / "s.yaml").write_text("rules:\n- [stage9, 4]\n- ['.*', 8]\n")
    return ["--quant-scheme", str(folder / "s.yaml")]


def _truncated(folder: Path, run: Path) -> list[str]:
    content = (run / "checkpoint.pth.tar").read_bytes()
    (folder / "cut.pth.tar").write_bytes(content[: len(content) // 2])
    return ["--resume", str(folder / "cut.pth.tar")]


class _Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch executed",)


def _code(folder: Path) -> list[str]:
    (folder / "evil.pth.tar").write_bytes(pickle.dumps(_Code()))
    return ["--resume", str(folder / "evil.pth.tar")]


def _torch_code(folder: Path) -> list[str]:
    torch.save({"state_dict": _Code()}, folder / "evil.pth")
    return ["--weights", str(folder / "evil.pth")]


def _nan(folder: Path) -> list[str]:
    state = DigitsNet().state_dict()
    state["output.weight"][0, 0] = float("nan")
    torch.save(state, folder / "nan.pth")
    return ["--weights", str(folder / "nan.pth")]


def _corrupt(folder: Path, images: Path) -> list[str]:
    shutil.copytree(images, folder / "data")
    (folder / "data/val/class3/0.png").write_bytes(b"no image")
    return ["--data", str(folder / "data"), *CIFAR]


def _empty_class(folder: Path, images: Path) -> list[str]:
    shutil.copytree(images, folder / "data")
    (folder / "data/train/eel").mkdir()
    return ["--data", str(folder / "data"), *CIFAR]


def _no_images(folder: Path) -> list[str]:
    (folder / "data/val").mkdir(parents=True)
    return ["--data", str(folder / "data"), *CIFAR]


def _too_large(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--save-path", str(folder / "file" / "run")]


MISTAKES: dict[str, tuple[Callable[[Path, Path, Path], list[str]], str]] = {
    "scheme": (
        lambda f, r, t: ["--quant-scheme", "uniform9"],
        "no quantization scheme 'uniform9' for digits: expected",
    ),
    "rule": (lambda f, r, t: _yaml(f), "rule 'stage9' .* occurs in no layer name of this network"),
    "arch": (
        lambda f, r, t: ["-a", "resnet19", "--data", "x"],
        "unknown architecture 'resnet19'; did you mean resnet18",
    ),
    "no data": (lambda f, r, t: ["-a", "resnet18"], "--data is missing: give the folder with the images for resnet18"),
    "no weights": (lambda f, r, t: ["--weights", str(f / "w.pth")], "w.pth does not exist"),
    "truncated": (lambda f, r, t: _truncated(f, r), "cut.pth.tar is damaged, cut short or not a file saved by"),
    "other arch": (
        lambda f, r, t: ["-a", "resnet20_cifar10", "--data", str(t), "--resume", str(r / "checkpoint.pth.tar")],
        "is a checkpoint of digits, not of resnet20_cifar10",
    ),
    "other scheme": (
        lambda f, r, t: ["--quant-scheme", "uniform8", "--resume", str(r / "checkpoint.pth.tar")],
        "saved with the scheme uniform4, not uniform8: the layer .* has the bits .4, 4. .* there and .8, 8. here",
    ),
    "float scheme": (
        lambda f, r, t: ["--quant-scheme", "float", "--resume", str(r / "checkpoint.pth.tar")],
        "saved with the scheme uniform4, not float; leave out",
    ),
    "code": (lambda f, r, t: _code(f), "evil.pth.tar is a Python pickle, which could run code"),
    "torch code": (lambda f, r, t: _torch_code(f), "evil.pth holds Python code or objects .*, which is never run"),
    "not a checkpoint": (lambda f, r, t: ["--resume", _nan(f)[1]], "nan.pth is"),
    "NaN": (lambda f, r, t: _nan(f), "nan.pth has NaN or infinite values in output.weight"),
    "folder": (lambda f, r, t: ["--data", str(f / "none"), *CIFAR], "the image folder .*none does not exist"),
    "no images": (lambda f, r, t: _no_images(f), "data/val has no images, expected one folder per class"),
    "corrupt": (lambda f, r, t: _corrupt(f, t), "cannot decode the image .*val/class3/0.png"),
    "empty class": (lambda f, r, t: _empty_class(f, t), "the class folder .*train/eel is empty"),
    "classes": (lambda f, r, t: ["-a", "resnet56_cifar100", "--data", str(t)], "has 10 classes, the network 100"),
    "published": (lambda f, r, t: ["--pretrained"], "there are no published weights for digits"),
    "report folder": (
        lambda f, r, t: ["--report", str(f / "no" / "r.json")],
        "the folder .*no does not exist; make it",
    ),
    "report is a folder": (lambda f, r, t: ["--report", str(f)], "is a folder; give the name of a file in it"),
    "save path": (lambda f, r, t: _too_large(f), "--save-path .*: .*file is not a folder"),
    "device": (lambda f, r, t: ["--device", "tpu9"], "--device tpu9 is no device; give cpu, cuda or cuda:N"),
    "other device": (lambda f, r, t: ["--device", "meta"], "--device meta is not supported"),
    "processes": (lambda f, r, t: ["--world-size", "4"], "ask for 4 training processes"),
    "flag": (lambda f, r, t: ["--batchsize", "4"], "unrecognized arguments: --batchsize 4; see --help"),
    "value": (lambda f, r, t: ["--lr", "0"], "argument --lr/--learning-rate: 0 is not a positive number"),
    "engine of training": (lambda f, r, t: ["--engine", "tvm"], "--engine tvm evaluates only: give -e with it"),
    "engine of floats": (
        lambda f, r, t: ["--engine", "tvm", "-e", "--quant-scheme", "float"],
        "--engine tvm runs integers, the scheme float has none",
    ),
    "graph to train": (
        lambda f, r, t: ["--resume", str(r / "model.safetensors")],
        "is an integer graph, which can be evaluated .-e. but not trained; give the checkpoint",
    ),
    "graph and input": (
        lambda f, r, t: ["--resume", str(r / "model.safetensors"), "-e", "--input-size", "9"],
        "model.safetensors brings its own --input-size; leave that flag out",
    ),
    "two sources": (lambda f, r, t: ["--weights", "w", "--resume", "r"], "--resume brings its own weights"),
    "resume-quantize": (lambda f, r, t: ["--resume-quantize"], "--resume-quantize needs --resume"),
    "share": (lambda f, r, t: ["--data-percentage", "1.5"], "--data-percentage is 1.5, expected a share"),
    "momentum": (lambda f, r, t: ["--act-range-momentum", "2"], "--act-range-momentum is 2.0, expected -1 or 0 to 1"),
    "alpha": (lambda f, r, t: ["--distill-method", "KD_naive", "--distill-alpha", "2"], "distillation loss is 2.0"),
    "teacher": (
        lambda f, r, t: [
            "--distill-method",
            "KD_naive",
            "--teacher-arch",
            "resnet20_cifar10",
            "--teacher-weights",
            "w",
        ],
        "the file w does not exist",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_sentence(
    name: str, tmp_path: Path, trained: Path, tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    make, sentence = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    argv = make(tmp_path, trained, tree)
    before = sorted(tmp_path.rglob("*"))
    if "--save-path" not in argv:
        argv += ["--save-path", str(tmp_path / "run")]
    assert re.search(sentence, refused(argv, capsys))
    left = {path for path in tmp_path.rglob("*") if path not in before}
    # A damaged image is met when images are read, after the log was begun.
    assert left <= ({tmp_path / "run", tmp_path / "run" / "log.log"} if name == "corrupt" else set())


def test_teacher_for_other_images(tmp_path: Path, tree: Path, trained: Path, capsys: Any, monkeypatch: Any) -> None:
    state = quant_train.create_model("resnet20_cifar10").module.state_dict()
    torch.save(state, tmp_path / "t.pth")
    flags = ["--distill-method", "KD_naive", "--teacher-arch", "resnet20_cifar10", "--teacher-weights"]
    error = refused([*flags, str(tmp_path / "t.pth"), "--save-path", str(tmp_path / "run")], capsys)
    assert "the teacher resnet20_cifar10 takes images of 3 channels, digits of 1" in error


def test_changed_checkpoint(tmp_path: Path, trained: Path, capsys: Any) -> None:
    contents = load_checkpoint(trained / "checkpoint.pth.tar")
    path = tmp_path / "changed.pth.tar"
    for key, sentence in (("trainer", "has no entry 'trainer'"), ("state_dict", "does not fit digits")):
        changed = {k: v for k, v in contents.items() if k != key}
        if key == "state_dict":
            changed[key] = {k: v for k, v in contents[key].items() if k != "output.bias"}
        save_checkpoint(path, changed)
        assert sentence in refused(["--resume", str(path)], capsys)


def test_report_beside_the_run_may_name_its_future_folder(tmp_path: Path, weights: list[str]) -> None:
    run = tmp_path / "a" / "b"
    argv = [*weights, "--epochs", "0", "--save-path", str(run), "--report", str(run / "report.json")]
    assert quant_train.main(argv) == 0
    assert (run / "report.json").exists()


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, trained: Path, capsys: Any, monkeypatch: Any) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    before, names = checkpoint.read_bytes(), sorted(os.listdir(tmp_path / "run"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    error = refused([*SMALL, "--resume", str(checkpoint), "--epochs", "2"], capsys)
    assert re.search(r"cannot write .*\.pth\.tar: No space left on device", error)
    assert checkpoint.read_bytes() == before
    assert sorted(os.listdir(tmp_path / "run")) == names


def test_diverging_loss(tmp_path: Path, weights: list[str], capsys: Any) -> None:
    error = refused([*weights, "--lr", "1e20", "--save-path", str(tmp_path)], capsys)
    assert re.search(r"the training loss became (nan|inf) in epoch 1, batch \d; lower the learning rate", error)
    saved = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert all(bool(t.isfinite().all()) for t in saved["state_dict"].values())


def test_weights_that_became_nan_are_not_saved(
    tmp_path: Path, weights: list[str], capsys: Any, monkeypatch: Any
) -> None:
    def poison(self: Trainer, hooks: Run) -> None:
        next(self.model.model.parameters()).data.fill_(float("nan"))
        hooks.save()

    assert quant_train.main([*weights, "--epochs", "0", "--save-path", str(tmp_path)]) == 0
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    monkeypatch.setattr(Trainer, "fit", poison)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    error = refused([*SMALL, "--resume", str(checkpoint), "--epochs", "1", "--save-path", str(tmp_path / "b")], capsys)
    assert "features.init_block.conv.weight has become NaN or infinite" in error
    assert checkpoint.read_bytes() == before


def test_evaluation_of_a_graph_file(tmp_path: Path, trained: Path, capsys: Any) -> None:
    before = (trained / "model.safetensors").read_bytes()
    assert quant_train.main(["--resume", str(trained / "checkpoint.pth.tar"), "-e", *SMALL[-2:]]) == 0
    expected = re.findall(r"top-1 integer .*", capsys.readouterr().out)
    argv = ["--resume", str(trained / "model.safetensors"), "-e", "--save-path", str(tmp_path)]
    assert quant_train.main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("digits uniform4: 360 images, ")
    assert re.findall(r"top-1 integer .*", text) == expected
    assert (trained / "model.safetensors").read_bytes() == before


@pytest.mark.tvm
def test_evaluation_of_the_compiled_network(tmp_path: Path, trained: Path, capsys: Any, monkeypatch: Any) -> None:
    argv = ["--resume", str(trained / "checkpoint.pth.tar"), "-e", "--save-path", str(tmp_path / "run")]
    reports = {}
    for engine in ("torch", "tvm"):
        path = tmp_path / f"{engine}.json"
        assert quant_train.main([*argv, "--engine", engine, "--report", str(path), *SMALL[-2:]]) == 0
        reports[engine] = json.loads(path.read_text())
        assert reports[engine]["engine"] == engine
    assert "compiling for" in capsys.readouterr().out
    for key in ("images", "top1_integer", "top5_integer"):
        assert reports["tvm"][key] == reports["torch"][key]
    assert set(os.listdir(tmp_path / "run" / "tvm")) == {"model.so", "model.json"}
    assert quant_train.main([*argv, "--engine", "tvm", *SMALL[-2:]]) == 0
    assert "compiling for" not in capsys.readouterr().out

    graph = ["--resume", str(tmp_path / "run" / "model.safetensors"), "-e", "--engine", "tvm"]
    assert quant_train.main([*graph, "--report", str(tmp_path / "g.json")]) == 0
    assert "compiling for" not in capsys.readouterr().out
    found = json.loads((tmp_path / "g.json").read_text())
    assert set(REPORT_KEYS) <= set(found)
    for key in ("arch", "scheme", "images", "top1_integer", "top5_integer", "size_mib"):
        assert found[key] == reports["torch"][key]

    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    assert 'pip install "apache-tvm==0.27.0.post1"' in refused([*argv, "--engine", "tvm"], capsys)


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_report_has_the_stable_keys(tmp_path: Path, weights: list[str]) -> None:
    report = tmp_path / "r.json"
    argv = [*weights, "--epochs", "0", "--save-path", str(tmp_path / "run"), "--report", str(report)]
    assert quant_train.main([*argv, "--fixed-point-quantization"]) == 0
    found = json.loads(report.read_text())
    assert set(found) == {*REPORT_KEYS, *EXTRA_KEYS}
    assert all(found[key] is not None for key in found)
    assert found["command"] == shlex.join(["python", "quant_train.py", *argv, "--fixed-point-quantization"])
    assert quant_train.main([*argv, "--quant-scheme", "float"]) == 0
    plain = json.loads(report.read_text())
    assert set(REPORT_KEYS) <= set(plain)
    assert (plain["top1_integer"], plain["agreement_top1"]) == (None, None)
    assert plain["top1_float"] == found["top1_float"]


def test_files_of_a_run(trained: Path) -> None:
    files = {
        "checkpoint.pth.tar",
        "model_best.pth.tar",
        "model.safetensors",
        "scheme.yaml",
        "arguments.json",
        "log.log",
    }
    assert set(os.listdir(trained)) == files
    saved = load_checkpoint(trained / "checkpoint.pth.tar", "digits")
    arguments = json.loads((trained / "arguments.json").read_text())
    assert arguments["flags"]["quant_scheme"] == "uniform4"
    scheme = bit_config.read_scheme(trained / "scheme.yaml")
    assert {rule.pattern: list(rule.pair) for rule in scheme.rules} == {
        f"^{re.escape(name)}$": bits for name, bits in saved["bits"].items()
    }
    assert isinstance(load(trained / "model.safetensors"), Graph)
    assert "float epoch 5: top-1" in (trained / "log.log").read_text()


def test_first_line_says_what_runs_where(tmp_path: Path, weights: list[str], capsys: Any) -> None:
    assert quant_train.main([*weights, "--epochs", "0", "--save-path", str(tmp_path)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "digits, scheme uniform8, on cpu with 1 threads; images: 360 validation, 64 calibration"


def test_validation_images_calibrate_only_without_train(tmp_path: Path, tree: Path, capsys: Any) -> None:
    shutil.copytree(tree / "val", tmp_path / "data" / "val")
    argv = ["--data", str(tmp_path / "data"), *CIFAR, "-e", "--save-path", str(tmp_path / "run")]
    assert quant_train.main(argv) == 0
    out = capsys.readouterr().out
    assert "has no folder train/: calibrating on validation images" in out
    assert "resnet20_cifar10 starts from random weights" in out
    assert set(os.listdir(tmp_path / "run")) == {"log.log", "model.safetensors"}


def test_summary_shows_both_conventions(capsys: Any) -> None:
    assert quant_train.main(["-a", "resnet50", "--quant-scheme", "bops_0.5", "--summary"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bops_0.5 "))
    published_size, published_bops = (float(row.split()[i]) for i in (2, 4))
    assert (round(published_size, 1), round(published_bops)) == (18.7, 154)  # the model zoo of the original
    assert float(row.split()[1]) != published_size


def test_evaluation_of_a_checkpoint(tmp_path: Path, trained: Path, capsys: Any) -> None:
    """Architecture and scheme come from the file, the float top-1 too, and the integer graph is the run's."""
    report, checkpoint = tmp_path / "r.json", trained / "checkpoint.pth.tar"
    before = checkpoint.read_bytes()
    argv = ["-e", "--resume", str(checkpoint), "--report", str(report), "--save-path", str(tmp_path / "run"), *SMALL]
    assert quant_train.main(argv) == 0
    found, saved = json.loads(report.read_text()), load_checkpoint(checkpoint)
    assert (found["arch"], found["scheme"]) == ("digits", "uniform4")
    assert found["top1_float"] == saved["top1_float"]
    assert graph_hash(load(tmp_path / "run/model.safetensors")) == graph_hash(load(trained / "model.safetensors"))
    assert checkpoint.read_bytes() == before


def test_default_folder_of_a_resumed_run_is_its_own(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "mine")
    assert quant_train.main(["--resume", "mine/checkpoint.pth.tar", "-e"]) == 0
    assert os.listdir(tmp_path) == ["mine"]


# ---- switching quantization on --------------------------------------------------------------------------------------


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Graph, float]]:
    """(epoch, integer graph, top-1) of every validation."""
    seen: list[tuple[float, Graph, float]] = []
    validate = Run.validate

    def record(self: Run, epoch: float) -> None:
        validate(self, epoch)
        assert self.graph is not None
        assert self.last is not None
        seen.append((epoch, self.graph, self.last.top1))

    monkeypatch.setattr(Run, "validate", record)
    return seen


@pytest.mark.parametrize("bits", [4, 8])
def test_training_starts_from_the_calibrated_graph(
    bits: int, tmp_path: Path, weights: list[str], validated: list[tuple[float, Graph, float]]
) -> None:
    report, scheme = tmp_path / "r.json", ["--quant-scheme", f"uniform{bits}"]
    argv = [*weights, *scheme, "--save-path", str(tmp_path), "--report", str(report)]
    assert quant_train.main([*argv, "--epochs", "0"]) == 0
    calibrated, top1 = load(tmp_path / "model.safetensors"), json.loads(report.read_text())["top1_integer"]
    for act_range in ("ema", "lsq"):
        validated.clear()
        assert quant_train.main([*argv, "--epochs", "1", "--act-range", act_range]) == 0
        epoch, graph, first = validated[0]
        assert (epoch, first) == (0, top1)
        if act_range == "ema":
            assert graph_hash(graph) == graph_hash(calibrated)
        else:
            same_but_for_rounding(graph, calibrated)


def same_but_for_rounding(graph: Graph, other: Graph) -> None:
    """A learned weight scale is (max|w| / n) * |k|, a range's is max|w * k| / n: equal up to float32 rounding."""
    assert [(node.name, node.op) for node in graph.nodes] == [(node.name, node.op) for node in other.nodes]
    for a, b in zip(graph.nodes, other.nodes, strict=True):
        for key, array in a.arrays.items():
            np.testing.assert_allclose(array, b.arrays[key], rtol=2.0**-20, atol=1)


def test_float_checkpoint_quantizes_as_weights(tmp_path: Path, weights: list[str], capsys: Any) -> None:
    argv = [*weights, "--quant-scheme", "float", "--epochs", "1", "--save-path", str(tmp_path)]
    assert quant_train.main(argv) == 0
    checkpoint = str(tmp_path / "checkpoint.pth.tar")
    error = refused(["--resume", checkpoint, "--quant-scheme", "uniform4"], capsys)
    assert (
        "saved with the scheme float, not uniform4; leave out --quant-scheme to go on, or give the file to --w" in error
    )
    assert quant_train.main(["--weights", checkpoint, "--epochs", "0", "--save-path", str(tmp_path / "q"), *SMALL]) == 0


# ---- stop and continue ----------------------------------------------------------------------------------------------


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal during the given training batch."""
    loss, count = Trainer._loss, [0]

    def counting(self: Trainer, *arguments: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        if count[0] == batches:
            os.kill(os.getpid(), number)
        return loss(self, *arguments)

    monkeypatch.setattr(Trainer, "_loss", counting)


def assert_equal(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Bit for bit, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


RESUMES = {
    "ema": ["--quant-scheme", "uniform4", "--act-range", "ema"],
    "lsq": ["--quant-scheme", "uniform4", "--act-range", "lsq", "--lr-schedule", "cosine", "--warmup-epochs", "0.5"],
    "moving average, frozen from batch 5 on, more validations": [
        *("--quant-scheme", "w4a8", "--act-range-momentum", "0.9", "--fix-BN-threshold", "5"),
        *("--evaluate-times", "2", "--reestimate-bn", "2"),
    ],
    "accumulation": ["--accumulate", "2", "--quant-scheme", "uniform8", "--checkpoint-iter", "2"],
    "float": ["--quant-scheme", "float"],
}


@pytest.mark.parametrize("name", RESUMES)
def test_resume_is_bit_for_bit(name: str, tmp_path: Path, weights: list[str], monkeypatch: Any, capsys: Any) -> None:
    """Straight through two epochs, or stopped in the middle of the first, continued past its end."""
    flags = [*SMALL, *RESUMES[name], "--epochs", "2"]
    assert quant_train.main([*weights[:2], *flags, "--save-path", str(tmp_path / "straight")]) == 0
    straight = load_checkpoint(tmp_path / "straight" / "checkpoint.pth.tar")
    assert (straight["trainer"]["step"], straight["trainer"]["epoch"]) == (2 * STEPS_PER_EPOCH, 2)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        interrupted = quant_train.main([*weights[:2], *flags, "--save-path", str(tmp_path / "parts")])
    assert interrupted == EXIT_INTERRUPTED
    path = tmp_path / "parts" / "checkpoint.pth.tar"
    half = load_checkpoint(path)["trainer"]
    assert (half["step"], half["epoch"], half["batch"]) == (2, 0, 2)
    torch.manual_seed(1)
    assert quant_train.main([*flags, "--resume", str(path)]) == 0
    continued = load_checkpoint(path)
    for checkpoint in (straight, continued):
        del checkpoint["arguments"]
    assert_equal(continued, straight)


def test_resume_with_augmented_images(tmp_path: Path, tree: Path, monkeypatch: Any) -> None:
    flags = ["--data", str(tree), *CIFAR[:2], "--workers", "0", "-b", "10", "--epochs", "2", "--agreement-images", "2"]
    assert quant_train.main([*flags, "--save-path", str(tmp_path / "straight")]) == 0
    with monkeypatch.context() as patch:
        stop_after(3, patch)  # the last batch of the epoch
        assert quant_train.main([*flags, "--save-path", str(tmp_path / "parts")]) == EXIT_INTERRUPTED
    path = tmp_path / "parts" / "checkpoint.pth.tar"
    assert load_checkpoint(path)["trainer"]["epoch"] == 1
    assert quant_train.main([*flags, "--resume", str(path)]) == 0
    straight, continued = load_checkpoint(tmp_path / "straight" / "checkpoint.pth.tar"), load_checkpoint(path)
    for key in ("state_dict", "quantizers", "trainer"):
        assert_equal(continued[key], straight[key], key)


def test_finished_run_goes_on_with_more_epochs(tmp_path: Path, weights: list[str], capsys: Any) -> None:
    flags = [*SMALL, "--quant-scheme", "uniform4"]
    for epochs in ("1", "1", "2"):
        resumed = ["--resume", str(tmp_path / "b" / "checkpoint.pth.tar")] if (tmp_path / "b").exists() else weights[:2]
        assert quant_train.main([*flags, *resumed, "--epochs", epochs, "--save-path", str(tmp_path / "b")]) == 0
    assert "all 1 epochs are done; --epochs 2 would go on" in capsys.readouterr().out
    assert quant_train.main([*flags, *weights[:2], "--epochs", "2", "--save-path", str(tmp_path / "a")]) == 0
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in "ab")
    assert_equal(b["state_dict"], a["state_dict"])


@pytest.mark.parametrize("act_range", ["ema", "lsq"])
def test_resumed_run_keeps_its_range_mode(act_range: str, tmp_path: Path, weights: list[str]) -> None:
    flags = [*SMALL, "--save-path", str(tmp_path), "--epochs"]
    assert quant_train.main([*flags, "1", *weights[:2], "--act-range", act_range]) == 0
    assert quant_train.main([*flags, "2", "--resume", str(tmp_path / "checkpoint.pth.tar")]) == 0
    saved = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert saved["arguments"]["act_range"] == act_range
    learned = [row["learned"] is not None for row in saved["quantizers"]["weights"].values()]
    assert learned == [act_range == "lsq"] * len(learned)


def test_calibrated_checkpoint_starts_training(tmp_path: Path, weights: list[str]) -> None:
    """--epochs 0, then --resume --epochs 1 is --epochs 1; the first may have been long ago, with another range mode."""
    flags = [*SMALL, "--quant-scheme", "uniform4", "--act-range", "lsq", "--save-path"]
    assert quant_train.main([*flags, str(tmp_path / "a"), *weights[:2], "--epochs", "1"]) == 0
    assert quant_train.main([*flags, str(tmp_path / "b"), *weights[:2], "--epochs", "0"]) == 0
    checkpoint = str(tmp_path / "b" / "checkpoint.pth.tar")
    assert quant_train.main([*flags, str(tmp_path / "b"), "--resume", checkpoint, "--epochs", "1"]) == 0
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in "ab")
    for key in ("state_dict", "quantizers", "top1_float"):
        assert_equal(b[key], a[key], key)


def test_changed_flags_are_said(tmp_path: Path, trained: Path, capsys: Any) -> None:
    argv = [*SMALL, "--resume", str(trained / "checkpoint.pth.tar"), "--lr", "0.5", "--wd", "0.001"]
    assert quant_train.main([*argv, "--save-path", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "resumed after 1 epochs and 0 batches" in out
    assert "lr 0.5 (was 0.01), wd 0.001 (was 0.0001)" in out


def test_interrupt_tells_the_command_that_continues(
    tmp_path: Path, trained: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The printed line, pasted as it is, finishes the run; a folder with a space in its name needs quotes."""
    folder = tmp_path / "my run"
    argv = ["--weights", str(trained / "checkpoint.pth.tar"), *SMALL, "--save-path", str(folder), "--no-channel-wise"]
    with monkeypatch.context() as patch:
        stop_after(2, patch, signal.SIGINT)
        assert quant_train.main([*argv, "--epochs", "1", "--mean", "0.25"]) == EXIT_INTERRUPTED
    error = capsys.readouterr().err
    assert "stopped during the training, saved; to continue: python " in error
    words = shlex.split(error.strip().split("to continue: python ")[1])
    assert Path(words[0]).resolve() == ROOT / "quant_train.py"
    assert quant_train.main(words[1:]) == 0
    saved = load_checkpoint(folder / "checkpoint.pth.tar")
    assert (saved["trainer"]["epoch"], saved["preprocess"]["mean"]) == (1, [0.25])
    assert saved["arguments"]["channel_wise"] == "False"


@pytest.mark.parametrize(
    ("function", "phase"),
    [
        ("quant_train._train_float", "evaluation of the float network"),
        ("utils.calibration_run.calibrate", "calibration"),
        ("quant_train._report", "last evaluation"),
    ],
)
def test_interrupt_elsewhere(
    function: str, phase: str, tmp_path: Path, weights: list[str], capsys: Any, monkeypatch: Any
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupt)
    argv = [*weights, "--epochs", "0", "--save-path", str(tmp_path)]
    assert quant_train.main(argv) == EXIT_INTERRUPTED
    error = capsys.readouterr().err.strip()
    saved = "saved; to continue: python" if function.endswith("_report") else "nothing was saved"
    assert f"stopped during the {phase}" in error
    assert saved in error
    assert "\n" not in error


def test_interrupt_during_validation_ends_it_at_once(tmp_path: Path, weights: list[str], monkeypatch: Any) -> None:
    """What was trained is saved; the validation is made up for after the resume."""
    validate = Run.validate

    def slow(self: Run, epoch: float) -> None:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the signal did not end the validation")
        validate(self, epoch)

    flags = [*SMALL, "--quant-scheme", "uniform4", "--epochs", "1", "--save-path", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "validate", slow)
        assert quant_train.main([*flags, *weights[:2]]) == EXIT_INTERRUPTED
    saved = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (saved["trainer"]["epoch"], saved["trainer"]["step"]) == (1, STEPS_PER_EPOCH)
    report = tmp_path / "r.json"
    resumed = ["--resume", str(tmp_path / "checkpoint.pth.tar"), "--report", str(report)]
    assert quant_train.main([*flags, *resumed]) == 0
    assert json.loads(report.read_text())["best_top1"] == load_checkpoint(tmp_path / "model_best.pth.tar")["best_top1"]


def test_control_c_in_another_process(tmp_path: Path) -> None:
    """The real thing: a signal from outside, the exit code, one line, no traceback."""
    folder = tmp_path / "run"
    flags = ["--float-epochs", "0", "--epochs", "100000", "--save-path", str(folder), "--threads", "1", *SMALL]
    command = [sys.executable, "-u", str(ROOT / "quant_train.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch 1:"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        error = process.stderr.read()
    assert process.returncode == EXIT_INTERRUPTED
    assert error.strip().startswith("stopped during the training, saved; to continue: python ")
    assert error.strip().count("\n") == 0
    assert load_checkpoint(folder / "checkpoint.pth.tar")["trainer"]["step"] > 0


# ---- distillation ---------------------------------------------------------------------------------------------------


def test_distillation_runs(tmp_path: Path, weights: list[str], monkeypatch: Any) -> None:
    teacher = ["--distill-method", "KD_naive", "--teacher-arch", "digits", "--teacher-weights", weights[1]]
    argv = [*weights, "--epochs", "1", "--quant-scheme", "uniform4", "--save-path"]
    assert quant_train.main([*argv, str(tmp_path / "a"), *teacher]) == 0
    assert quant_train.main([*argv, str(tmp_path / "b")]) == 0
    assert quant_train.main([*argv, str(tmp_path / "c"), *teacher, "--distill-alpha", "0"]) == 0
    a, b, c = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar")["state_dict"] for name in "abc")
    assert any(not torch.equal(a[key], b[key]) for key in a)
    for key in b:  # without the teacher's term it is the plain loss
        torch.testing.assert_close(c[key], b[key])


def test_help_needs_nothing(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        quant_train.main(["--help"])
    assert "in the original" in capsys.readouterr().out
