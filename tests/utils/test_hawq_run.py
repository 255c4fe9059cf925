"""quant_train.py with files of the original HAWQ: its commands, its numbers, and one sentence for what cannot be."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import quant_train
from tests.helpers import refusal
from tests.utils.hawq.original import Original, network
from utils.checkpoint import load_checkpoint
from utils.integer_graph.serialize import load
from utils.integer_graph.torch_engine import TorchEngine

CLASSES, EDGE, EPOCH = 4, 256, 3
RESNET, MOBILENET = ("resnet18", "bops_0.5"), ("mobilenetv2_w1", "uniform4")
TINY = (
    "--resize",
    "32",
    "--input-size",
    "32",
    "--workers",
    "0",
    "--batch-size",
    "4",
)  # for integers: float networks pool 7x7
TRAINING = ("--workers", "0", "--batch-size", "4", "--calib-images", "4", "--agreement-images", "1", "--lr", "0.001")


def original_of(arch: str, scheme: str) -> Original:
    return network(arch, scheme, CLASSES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the original would have saved, and float checkpoints; nothing else may appear in it."""
    folder = tmp_path_factory.mktemp("files")
    for arch, scheme in (RESNET, MOBILENET):
        original = original_of(arch, scheme)
        torch.save(original.checkpoint(epoch=EPOCH), folder / f"{arch}.pth.tar")
        torch.save(original.quantized_checkpoint(), folder / f"{arch}_quantized.pth.tar")
    whole = (folder / "mobilenetv2_w1.pth.tar").read_bytes()
    (folder / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    module = original_of(*MOBILENET).module
    torch.save({"epoch": 90, "arch": MOBILENET[0], "state_dict": module.state_dict()}, folder / "float.pth.tar")
    return folder


@pytest.fixture(autouse=True)
def nothing_beside_the_files(files: Path) -> Any:
    """No test adds to the folder or changes a file in it."""
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image a class for training and one for validation, as large as ImageNet's after the resize."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
            coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(EDGE // 8, 0).repeat(EDGE // 8, 1)
            noise = random.integers(0, 60, coarse.shape)
            pixels = (coarse * 0.75 + noise).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"class{label}" / "0.png")
    return root


def centre_crops(images: Path, size: int) -> Tensor:
    """Validation images, uint8 [N, 3, size, size], in the order of their classes."""
    low = (EDGE - size) // 2
    crops = [
        np.asarray(Image.open(path))[low : low + size, low : low + size] for path in sorted(images.glob("val/*/*"))
    ]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def top1(logits: Tensor) -> float:
    return 100 * float((logits.argmax(1) == torch.arange(len(logits))).double().mean())


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_the_published_evaluation_command(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    """All its flags as the model zoo prints them; the numbers are those of the original's forward."""
    run, report = tmp_path / "run", tmp_path / "report.json"
    argv = ["-a", "resnet18", "--epochs", "1", "--lr", "0.0001", "--batch-size", "128", "--data", str(images)]
    argv += ["--save-path", str(run), "--act-range-momentum=0.99", "--wd", "1e-4", "--data-percentage", "0.0001"]
    argv += ["--fix-BN", "--checkpoint-iter", "-1", "--quant-scheme", "bops_0.5"]
    argv += ["--resume", str(files / "resnet18.pth.tar"), "--resume-quantize", "-e"]
    assert quant_train.main([*argv, "--report", str(report)]) == 0

    text = capsys.readouterr().out
    announced = r"resnet18, scheme bops_0\.5, of the original HAWQ, on cpu, engine torch; images: .*4"
    assert re.search(announced, text)
    assert re.search(announced, text).start() < text.index("top-1 integer")  # type: ignore[union-attr]
    pixels = centre_crops(images, 224)
    logits = original_of(*RESNET).forward(normalised(pixels))
    assert torch.equal(TorchEngine(load(run / "model.safetensors"))(pixels), logits)
    found = json.loads(report.read_text())
    assert (found["top1_integer"], found["images"], found["engine"]) == (top1(logits), CLASSES, "torch")
    assert (found["arch"], found["scheme"]) == RESNET
    assert os.listdir(run) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["resnet18", "resnet18_quantized"])
def test_network_and_scheme_come_from_the_file(
    name: str, files: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without -a, --quant-scheme and --save-path; integers alone need no --resume-quantize.  Both give one graph."""
    monkeypatch.chdir(tmp_path)
    argv = ["--resume", str(files / f"{name}.pth.tar"), "-e", "--data", str(images), *TINY]
    assert quant_train.main([*argv, *([] if "quantized" in name else ["--resume-quantize"])]) == 0
    graph = load(tmp_path / "runs" / "resnet18_bops_0.5" / "model.safetensors")
    assert (graph.meta["arch"], graph.meta["scheme"], graph.meta["num_classes"]) == (*RESNET, CLASSES)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(TorchEngine(graph)(pixels), original_of(*RESNET).forward(normalised(pixels)))


def test_evaluation_of_the_float_weights(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    """-e without --resume-quantize: quantized by our own calibration, not by the file's ranges."""
    argv = ["--resume", str(files / "mobilenetv2_w1.pth.tar"), "-e", "--data", str(images), *TRAINING]
    report = tmp_path / "r.json"
    assert quant_train.main([*argv, "--save-path", str(tmp_path / "run"), "--report", str(report)]) == 0
    text = capsys.readouterr().out
    assert "its float weights are taken (--resume-quantize would evaluate its own integers)" in text
    assert "of the original HAWQ, on" not in text
    assert json.loads(report.read_text())["scheme"] == "uniform8"
    assert "arithmetic" not in load(tmp_path / "run" / "model.safetensors").meta


def test_summary_evaluates_nothing(files: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["--resume", str(files / "mobilenetv2_w1.pth.tar"), "--resume-quantize", "-e", "--summary"]
    assert quant_train.main([*argv, "--save-path", str(tmp_path / "run")]) == 0
    assert "features.stage2.unit1.conv1.conv" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


@pytest.mark.tvm
def test_the_compiled_network(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["--resume", str(files / "mobilenetv2_w1.pth.tar"), "--resume-quantize", "-e", "--data", str(images), *TINY]
    found = {}
    for engine in ("torch", "tvm"):
        flags = ["--engine", engine, "--save-path", str(tmp_path / engine), "--report", str(tmp_path / "r.json")]
        assert quant_train.main([*argv, *flags]) == 0
        found[engine] = json.loads((tmp_path / "r.json").read_text())
        assert f"of the original HAWQ, on cpu, engine {engine}; images: " in capsys.readouterr().out
    for key in ("images", "top1_integer", "top5_integer", "size_mib"):
        assert found["tvm"][key] == found["torch"][key]
    assert sorted(os.listdir(tmp_path / "tvm")) == ["model.safetensors", "tvm"]


# ---- training -------------------------------------------------------------------------------------------------------


def saved(run: Path) -> dict[str, Any]:
    return load_checkpoint(run / "checkpoint.pth.tar")


def test_float_weights_start_a_new_training(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["--resume", str(files / "mobilenetv2_w1.pth.tar"), "--data", str(images), *TRAINING]
    argv += ["--save-path", str(tmp_path / "run")]
    assert quant_train.main([*argv, "--epochs", "0"]) == 0
    expected, contents = original_of(*MOBILENET).module.state_dict(), saved(tmp_path / "run")
    assert (contents["arch"], contents["scheme"], contents["num_classes"]) == (MOBILENET[0], "uniform8", CLASSES)
    assert contents["trainer"] is None
    assert contents["state_dict"].keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in contents["state_dict"].items())

    assert quant_train.main([*argv, "--epochs", "1", "--quant-scheme", "uniform4"]) == 0
    contents = saved(tmp_path / "run")
    assert (contents["scheme"], contents["trainer"]["epoch"], contents["trainer"]["step"]) == ("uniform4", 1, 1)
    key = "features.stage1.unit1.conv1.conv.weight"
    assert not torch.equal(contents["state_dict"][key], expected[key])
    text = capsys.readouterr().out
    assert "is a checkpoint of the original HAWQ: its float weights are taken, ranges are calibrated anew" in text


def test_training_goes_on_with_scheme_and_epoch(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    """One of EPOCH + 1 epochs is left.  Then there is none, whatever --epochs says."""
    argv = ["--resume", str(files / "mobilenetv2_w1.pth.tar"), "--resume-quantize", "--data", str(images), *TRAINING]
    argv += ["--save-path", str(tmp_path / "run")]
    assert quant_train.main([*argv, "--epochs", str(EPOCH + 1)]) == 0
    text, contents = capsys.readouterr().out, saved(tmp_path / "run")
    assert f"its float weights, scheme uniform4 and epoch {EPOCH} are taken" in text
    assert (contents["arch"], contents["scheme"], contents["num_classes"]) == (*MOBILENET, CLASSES)
    assert (contents["trainer"]["epoch"], contents["trainer"]["step"]) == (EPOCH + 1, 1)

    assert quant_train.main([*argv, "--epochs", "1"]) == 0
    assert f"all 1 epochs are done; --epochs {EPOCH + 1} would go on" in capsys.readouterr().out
    assert saved(tmp_path / "run")["trainer"]["step"] == 0


def test_a_float_checkpoint_of_the_original(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["--resume", str(files / "float.pth.tar"), "--num-classes", str(CLASSES), "--data", str(images), *TRAINING]
    assert quant_train.main([*argv, "--epochs", "0", "--save-path", str(tmp_path / "run")]) == 0
    assert "float.pth.tar is a float checkpoint: its weights are taken" in capsys.readouterr().out
    assert saved(tmp_path / "run")["arch"] == MOBILENET[0]


# ---- refusals -------------------------------------------------------------------------------------------------------

QUANTIZED = ("--resume-quantize",)
EVALUATE = ("--resume-quantize", "-e")
REFUSALS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "other arch": (
        "resnet18",
        (*EVALUATE, "-a", "resnet50"),
        r"resnet18\.pth\.tar is a checkpoint of resnet18, not of resnet50; give -a resnet18$",
    ),
    "other arch of integers": (
        "resnet18_quantized",
        (*EVALUATE, "-a", "resnet50"),
        r"is no checkpoint of resnet50: stage1\.unit1\.quant_convbn1\.weight_integer has shape .*; it fits resnet18$",
    ),
    "other arch to train": ("resnet18", ("-a", "mobilenetv2_w1"), "is a checkpoint of resnet18, not of mobilenetv2_w1"),
    "other scheme": (
        "resnet18",
        (*EVALUATE, "--quant-scheme", "uniform8"),
        r"resnet18\.pth\.tar was not made with the scheme uniform8: stage1\.unit2\.quant_convbn2\.weight_integer has 4 "
        r"bits there, 8 in the scheme; it fits bops_0\.5$",
    ),
    "other scheme to train": (
        "mobilenetv2_w1",
        (*QUANTIZED, "--quant-scheme", "uniform8"),
        r"was not made with the scheme uniform8: .* has 4 bits there, 8 in the scheme; it fits uniform4$",
    ),
    "unknown scheme": (
        "resnet18",
        (*EVALUATE, "--quant-scheme", "bops_0.6"),
        r"no quantization scheme 'bops_0\.6' for resnet18: expected bops_0\.5, ",
    ),
    "float scheme": (
        "resnet18",
        (*EVALUATE, "--quant-scheme", "float"),
        r"--quant-scheme float has no bit widths, .*resnet18\.pth\.tar is quantized; leave it out, or leave out --re",
    ),
    "float scheme to train": ("resnet18", (*QUANTIZED, "--quant-scheme", "float"), "float has no bit widths, "),
    "other classes": (
        "resnet18",
        (*EVALUATE, "--num-classes", "10"),
        "is a network of 4 classes, not of 10; leave out --num-classes$",
    ),
    "cut": ("cut", EVALUATE, r"cut\.pth\.tar is damaged, cut short or not a file saved by torch\.save"),
    "cut to train": ("cut", (), r"cut\.pth\.tar is damaged, cut short or not a file saved by torch\.save"),
    "integers to train": (
        "resnet18_quantized",
        QUANTIZED,
        r"holds integers only, which can be evaluated \(-e\) but not trained; give the checkpoint\.pth\.tar of that",
    ),
    "integers that lack a scale": (
        "mobilenetv2_w1_quantized",
        EVALUATE,
        r"lacks the weight scale of output, which the original does not write .*give the checkpoint\.pth\.tar of that",
    ),
    "per tensor": (
        "resnet18",
        (*EVALUATE, "--no-channel-wise"),
        "quant_init_block_convbn has 64 weight scales; leave out --no-channel-wise",
    ),
    "floats as quantized": ("float", QUANTIZED, "holds a float network, leave out --resume-quantize"),
    "floats of other classes": ("float", (), r"output\.weight has shape .*number of classes\) that the file was made"),
    "no file": ("absent", EVALUATE, r"the file .*absent\.pth\.tar does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence(name: str, files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    file, flags, sentence = REFUSALS[name]
    argv = ["--resume", str(files / f"{file}.pth.tar"), "--data", str(images), *TINY, *flags]
    assert re.search(sentence, refusal(quant_train.main, [*argv, "--save-path", str(tmp_path / "run")], capsys))
    assert os.listdir(tmp_path) == []


def test_images_of_other_classes(files: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    """The network has the file's classes, four; a folder with three would count wrong ones."""
    for label in range(CLASSES - 1):
        (tmp_path / "data" / "val").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "val" / f"class{label}").symlink_to(images / "val" / f"class{label}")
    argv = ["--resume", str(files / "resnet18.pth.tar"), *EVALUATE, "--data", str(tmp_path / "data"), *TINY]
    error = refusal(quant_train.main, [*argv, "--save-path", str(tmp_path / "run")], capsys)
    assert "has 3 classes, the network 4" in error
    assert os.listdir(tmp_path) == ["data"]
