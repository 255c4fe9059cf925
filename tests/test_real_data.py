"""The main job on real images and weights, where the data folder beside the project is present."""

import json
import tarfile
from pathlib import Path

import pytest

import quant_train
from tests.helpers import write_cifar

pytestmark = pytest.mark.data
IMAGENET_MEAN_STD = ["--mean", ".485", ".456", ".406", "--std", ".229", ".224", ".225"]


@pytest.fixture(scope="module")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 validation images as JPEG files, 100 per class."""
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(shared, folder, per_class=100)
    return folder


def report_of(tmp_path: Path, *flags: str) -> dict[str, float]:
    report = tmp_path / "report.json"
    arguments = [*flags, "--epochs", "0", "--save-path", str(tmp_path), "--report", str(report), "--seed", "0"]
    assert quant_train.main(arguments) == 0
    found: dict[str, float] = json.loads(report.read_text())
    return found


@pytest.mark.parametrize(("scheme", "largest_loss"), [("uniform8", 0.5), ("uniform4", 4.0)])
def test_calibrated_resnet20(cifar: Path, shared: Path, tmp_path: Path, scheme: str, largest_loss: float) -> None:
    weights = shared / "data" / "cifar10_weights" / "pytorchcv_resnet20_cifar10_jpegft.pth"
    if not weights.exists():
        pytest.skip(f"the weights {weights.name} are absent")
    flags = ["-a", "resnet20_cifar10", "--weights", str(weights), "--data", str(cifar), *IMAGENET_MEAN_STD]
    found = report_of(tmp_path, *flags, "--quant-scheme", scheme)
    assert found["images"] == 1000
    assert found["top1_float"] > 84  # 87.3 on all 10,000
    assert found["top1_integer"] >= found["top1_float"] - largest_loss
    assert found["agreement_top1"] > (98 if scheme == "uniform8" else 90)
    assert found["float_islands"] == []


@pytest.mark.slow
def test_calibrated_mobilenetv2(shared: Path, tmp_path: Path) -> None:
    archive = shared / "data" / "imagenet_samples.tar"
    weights = shared / "data" / "imagenet_weights" / "mobilenetv2_w1.pth"
    if not (archive.exists() and weights.exists()):
        pytest.skip("the ImageNet samples or the MobileNetV2 weights are absent")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    flags = ["-a", "mobilenetv2_w1", "--weights", str(weights), "--data", str(tmp_path / "imagenet_samples")]
    found = report_of(tmp_path, *flags, "--mean", ".5", "--std", ".5", "--rotate180")
    assert found["top1_integer"] >= 86.0
    assert found["same_class_as_float"] >= 97.0
