"""Networks by name: preprocessing, class counts, weights, and sentences for what cannot be had."""

import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from utils import models
from utils.data_utils import normalize
from utils.errors import UserError
from utils.models import create_model, model_families, model_names
from utils.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess


@pytest.mark.parametrize(
    ("name", "source", "expected", "classes"),
    [
        ("resnet10", "pytorchcv", Preprocess(), 1000),
        ("inceptionv3", "pytorchcv", Preprocess(resize=342, input_size=299), 1000),
        ("efficientnet_b1", "pytorchcv", Preprocess(resize=273, input_size=240), 1000),  # 240 / 0.882
        ("resnet18_cub", "pytorchcv", Preprocess(), 200),
        (
            "resnet20_cifar100",
            "pytorchcv",
            Preprocess((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), resize=None, input_size=32),
            100,
        ),
        ("torchvision/resnet18", "torchvision", Preprocess(), 1000),
        ("squeezenet1_1", "torchvision", Preprocess(), 1000),
        ("mobilenet_v2", "torchvision", Preprocess(resize=232), 1000),
        ("googlenet", "torchvision", Preprocess((0.5,) * 3, (0.5,) * 3), 1000),
    ],
)
def test_sources_and_preprocessing(name: str, source: str, expected: Preprocess, classes: int) -> None:
    info = create_model(name)
    assert (info.name, info.source, info.preprocess, info.num_classes) == (name, source, expected, classes)
    assert not info.module.training


@pytest.mark.parametrize("name", ["digits", "resnet10", "torchvision/squeezenet1_1"])
def test_number_of_classes_can_be_chosen(name: str) -> None:
    info = create_model(name, num_classes=13)
    assert info.num_classes == 13
    assert info.module(torch.zeros(2, *info.preprocess.input_shape)).shape == (2, 13)


def test_auxiliary_classifiers_are_absent() -> None:
    for name in ("googlenet", "inception_v3"):
        module = create_model(name).module
        assert not any("aux" in key for key in module.state_dict())
        assert module.train()(torch.zeros(2, 3, 299, 299)).shape == (2, 1000)


def test_transform_input_equals_half_half() -> None:
    """The rescaling inside torchvision's googlenet, which we switch off, is the same as mean = std = 0.5."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    inside = torchvision.models.get_model("googlenet", weights=None, aux_logits=False, init_weights=False)
    inside.transform_input = True
    published = inside._transform_input(normalize(images, Preprocess(IMAGENET_MEAN, IMAGENET_STD)))
    ours = normalize(images, create_model("googlenet").preprocess)
    torch.testing.assert_close(ours, published, atol=8 * torch.finfo(torch.float32).eps, rtol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet188", "unknown architecture 'resnet188'; did you mean resnet18 or"),
        ("ResNet18", "did you mean resnet18"),
        ("torchvision/resnet19", "did you mean torchvision/resnet1"),
        ("digit", "did you mean digits"),
        ("@@@@", "unknown architecture '@@@@'; see PyTorchCV's model list"),
        ("superpointnet", "superpointnet of PyTorchCV is not an image classifier"),
        ("pspnet_resnetd50b_voc", "unknown architecture"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name)


def test_model_names() -> None:
    names = model_names()
    assert {"digits", "resnet18", "mobilenet_v2", "resnet20_svhn"} <= set(names)
    assert list(names) == sorted(set(names))


def test_constructors_that_refuse() -> None:
    with pytest.raises(UserError, match=r"cannot build resnet20_cifar10 with 13 classes \(AssertionError\)"):
        create_model("resnet20_cifar10", num_classes=13)


def test_contradictions() -> None:
    with pytest.raises(UserError, match="give only one of them"):
        create_model("digits", pretrained=True, weights=Path("w.pth"))
    with pytest.raises(UserError, match="got 1 classes for digits, expected at least 2"):
        create_model("digits", num_classes=1)
    with pytest.raises(UserError, match="no published weights for digits"):
        create_model("digits", pretrained=True)
    with pytest.raises(UserError, match="PyTorchCV publishes no weights for diaresnet10"):
        create_model("diaresnet10", pretrained=True)


def offline(*_: object, **__: object) -> None:
    """Stands for every download."""
    raise urllib.error.URLError("no network")


def test_offline_pytorchcv_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PYTORCHCV_FOLDER", tmp_path)
    monkeypatch.setattr(models.pytorchcv_store, "_download", offline)
    with pytest.raises(UserError, match=rf"get the file resnet10-\d{{4}}-[0-9a-f]{{8}}\.pth .* folder {tmp_path}$"):
        create_model("resnet10", pretrained=True)


def test_offline_torchvision_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = rf"get the file squeezenet1_1-[0-9a-f]{{8}}\.pth .* folder {tmp_path / 'checkpoints'}$"
    with pytest.raises(UserError, match=message):
        create_model("torchvision/squeezenet1_1", pretrained=True)


def place_by_hand(module: nn.Module, folder: Path, name: str) -> None:
    """Put the parameters of `module` and of an auxiliary classifier where torchvision keeps its downloads."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    (folder / "checkpoints").mkdir()
    torch.save(module.state_dict() | {"aux1.weight": torch.zeros(3)}, folder / "checkpoints" / url.rsplit("/", 1)[-1])


def test_published_file_placed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    source = create_model("squeezenet1_1").module
    place_by_hand(source, tmp_path, "squeezenet1_1")
    loaded = create_model("squeezenet1_1", pretrained=True).module
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(UserError, match=r"classifier.1.weight of shape \[1000, .*expected \[7, .*number of classes"):
        create_model("squeezenet1_1", num_classes=7, pretrained=True)


@pytest.mark.data
def test_given_weights_have_the_published_accuracy(shared: Path) -> None:
    """The first 512 test images give a top-1 within five standard errors of the 87.34 % measured on all."""
    info = create_model(
        "resnet20_cifar10", weights=shared / "data/cifar10_weights/pytorchcv_resnet20_cifar10_jpegft.pth"
    )
    images, labels = cifar_images(shared / "data/cifar10_val.npz", 512)
    preprocess = info.preprocess.override(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with torch.inference_mode():
        correct = (info.module(normalize(images, preprocess)).argmax(1) == labels).float().mean().item()
    assert abs(correct - 0.8734) < 5 * (0.8734 * (1 - 0.8734) / 512) ** 0.5


def cifar_images(path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images spread evenly over the file: uint8 [count, 3, 32, 32] and their labels."""
    with np.load(path) as data:
        chosen = np.linspace(0, len(data["labels"]) - 1, count).astype(int)
        jpeg, offsets, labels = data["jpeg"], data["offsets"], data["labels"]
    images = [torchvision.io.decode_jpeg(torch.from_numpy(jpeg[offsets[i] : offsets[i + 1]].copy())) for i in chosen]
    return torch.stack(images), torch.from_numpy(labels[chosen].astype(np.int64))


@pytest.mark.data
def test_weights_of_another_architecture_name_a_key(shared: Path) -> None:
    path = shared / "data/cifar10_weights/pytorchcv_resnet56_cifar10.pth"
    with pytest.raises(
        UserError, match=r"does not fit resnet20_cifar10: features\.stage1\.unit4\.\S+ .* is unexpected"
    ):
        create_model("resnet20_cifar10", weights=path)


def test_every_name_belongs_to_one_family():
    families = model_families()
    names = [name for members in families.values() for name in members]
    assert len(set(names)) == len(names)
    assert set(names) >= {name for name in model_names() if name.endswith("_cifar10")}
    assert families["pytorchcv/resnet_cifar"][0] == "resnet20_cifar10"
    assert "torchvision/resnet18" in families["torchvision/resnet"]
    assert not any(family.endswith(("/jasper", "/bisenet", "/raft")) for family in families)
