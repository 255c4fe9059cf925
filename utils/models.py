"""Float networks by name: PyTorchCV, torchvision and our own network for the digits, with their preprocessing."""

import contextlib
import csv
import difflib
import functools
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from pytorchcv import model_provider as pytorchcv_models
from pytorchcv.models.common import model_store as pytorchcv_store
from torch import nn

from utils.digits_net import DIGITS_CLASSES, DIGITS_PREPROCESS, DigitsNet
from utils.errors import UserError
from utils.float_weights import load_float_weights
from utils.preprocess import Preprocess
from utils.torch_file import read_torch_file

TORCHVISION_PREFIX = "torchvision/"
DIGITS = "digits"
IMAGENET_CLASSES = 1000
SMALL_INPUT = 64  # pixels; networks for inputs up to this size take the image as it is, without a resize
SMALL_MEAN = (0.4914, 0.4822, 0.4465)  # PyTorchCV's own training on CIFAR-10, CIFAR-100 and SVHN
SMALL_STD = (0.2023, 0.1994, 0.2010)
DEFAULT_SCALE = 0.875  # centre crop / shortest edge: 224 / 256 and 299 / 342
OTHER_TASKS = ("_voc", "_coco", "_ade20k", "_cityscapes", "_widerface")
OTHER_FAMILIES = (  # of PyTorchCV: segmentation, speech, faces, image matching and video
    *("bisenet", "jasper", "jasperdr", "quartznet", "prnet", "pfpcnet", "voca", "nvpattexp", "visemenet"),
    *("superpointnet", "raft", "propainter", "propainter_ip", "propainter_rfc"),
)
TENSORFLOW_STYLE = ("googlenet", "inception_v3")  # torchvision's weights of these expect pixels scaled to -1..1
PYTORCHCV_FOLDER = Path("~/.torch/models")


@dataclass(frozen=True)
class ModelInfo:
    """A float network in evaluation mode on the CPU and what has to be known to feed it.

    name: as the user gave it; source: "pytorchcv", "torchvision" or "own".
    module: float32 [N, channels, input_size, input_size] -> logits float32 [N, num_classes].
    """

    name: str
    source: str
    module: nn.Module
    preprocess: Preprocess
    num_classes: int


def create_model(
    name: str, num_classes: int | None = None, pretrained: bool = False, weights: Path | None = None
) -> ModelInfo:
    """Build a network by name, with random, published (`pretrained`) or the user's own (`weights`) parameters.

    name: a PyTorchCV classifier, `torchvision/NAME` (or NAME alone where PyTorchCV has none of that name), or `digits`.
    num_classes: None keeps the number of the architecture.

    Raises UserError for an unknown name (with the closest known ones), for published weights that cannot be had, and
    for a weight file that cannot be used (see `load_float_weights`).
    """
    if pretrained and weights is not None:
        raise UserError(f"got both published weights and the file {weights} for {name}; give only one of them")
    if num_classes is not None and num_classes < 2:
        raise UserError(f"got {num_classes} classes for {name}, expected at least 2")
    source, short_name = _resolve(name)
    info = _BUILDERS[source](short_name, num_classes)
    if weights is not None:
        load_float_weights(info.module, weights, name)
    if pretrained:
        _load_published(info, short_name)
    info.module.eval()
    return ModelInfo(name, source, info.module, info.preprocess, info.num_classes)


@functools.cache
def model_names() -> tuple[str, ...]:
    """Every name that `create_model` knows without a prefix, sorted; torchvision's come where PyTorchCV has none."""
    return tuple(sorted({DIGITS, *_pytorchcv_names(), *_torchvision_names()}))


@functools.cache
def model_families() -> dict[str, tuple[str, ...]]:
    """Names that `create_model` knows by family, in the libraries' order: pytorchcv/FAMILY and torchvision/FAMILY.

    A family is the Python module that defines its networks; families that classify no images are left out.
    """
    found: dict[str, list[str]] = {}
    for name, constructor in pytorchcv_models._models.items():
        family = constructor.__module__.rsplit(".", 1)[-1]
        if name in _pytorchcv_names() and family not in OTHER_FAMILIES:
            found.setdefault(f"pytorchcv/{family}", []).append(name)
    for name in sorted(_torchvision_names()):
        family = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]
        found.setdefault(f"torchvision/{family}", []).append(TORCHVISION_PREFIX + name)
    return {family: tuple(names) for family, names in found.items()}


@functools.cache
def _pytorchcv_names() -> frozenset[str]:
    # The table of constructors is the only list of names that PyTorchCV has.
    return frozenset(name for name in pytorchcv_models._models if not name.endswith(OTHER_TASKS))


@functools.cache
def _torchvision_names() -> frozenset[str]:
    return frozenset(torchvision.models.list_models(module=torchvision.models))


def _resolve(name: str) -> tuple[str, str]:
    """(source, name there) of a name the user gave."""
    short_name = name.removeprefix(TORCHVISION_PREFIX)
    if short_name == name and name == DIGITS:
        return "own", name
    if short_name == name and name in _pytorchcv_names():
        return "pytorchcv", name
    if short_name in _torchvision_names():
        return "torchvision", short_name
    prefix = TORCHVISION_PREFIX if short_name != name else ""
    known = sorted(_torchvision_names()) if prefix else list(model_names())
    close = difflib.get_close_matches(short_name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(prefix + match for match in close)}?" if close else "see PyTorchCV's model list"
    raise UserError(f"unknown architecture {name!r}; {hint}")


def _build_own(name: str, num_classes: int | None) -> ModelInfo:
    classes = num_classes or DIGITS_CLASSES
    return ModelInfo(name, "own", DigitsNet(classes), DIGITS_PREPROCESS, classes)


def _build_pytorchcv(name: str, num_classes: int | None) -> ModelInfo:
    constructor: Callable[..., nn.Module] = pytorchcv_models._models[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = constructor() if num_classes is None else constructor(num_classes=num_classes)
        except Exception as error:  # a constructor of someone else's, on the user's wish
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            kind = name if num_classes is None else f"{name} with {num_classes} classes"
            raise UserError(f"PyTorchCV cannot build {kind} ({reason}); choose another architecture") from error
    attributes = vars(module)
    size, classes = attributes.get("in_size"), attributes.get("num_classes")
    if not isinstance(size, tuple) or not isinstance(classes, int):
        raise UserError(f"{name} of PyTorchCV is not an image classifier; choose an architecture that is")
    return ModelInfo(name, "pytorchcv", module, _pytorchcv_preprocess(name, int(size[0])), classes)


def _pytorchcv_preprocess(name: str, input_size: int) -> Preprocess:
    if input_size <= SMALL_INPUT:
        return Preprocess(mean=SMALL_MEAN, std=SMALL_STD, resize=None, input_size=input_size)
    return Preprocess(resize=math.ceil(input_size / _crop_scales().get(name, DEFAULT_SCALE)), input_size=input_size)


@functools.cache
def _crop_scales() -> dict[str, float]:
    """Network -> centre crop / shortest edge, from the table that PyTorchCV ships."""
    with open(pytorchcv_store.get_model_metainfos_file_path(), encoding="utf-8", newline="") as file:
        return {row["model_name"]: float(row["img_scale"]) for row in csv.DictReader(file) if row["img_scale"] != "NA"}


def _build_torchvision(name: str, num_classes: int | None) -> ModelInfo:
    classes = num_classes or IMAGENET_CLASSES
    if name in TENSORFLOW_STYLE:
        module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, aux_logits=False, init_weights=True, transform_input=False
        )
    else:
        module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return ModelInfo(name, "torchvision", module, _torchvision_preprocess(name), classes)


def _torchvision_preprocess(name: str) -> Preprocess:
    """What torchvision publishes beside its weights.

    googlenet and inception_v3 rescale their normalised input inside (`transform_input`); that is the same as 0.5 here.
    """
    published = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    rescaled = name in TENSORFLOW_STYLE
    return Preprocess(
        mean=(0.5, 0.5, 0.5) if rescaled else tuple(published.mean),
        std=(0.5, 0.5, 0.5) if rescaled else tuple(published.std),
        resize=published.resize_size[0],
        input_size=published.crop_size[0],
        interpolation=published.interpolation.value,
    )


_BUILDERS: dict[str, Callable[[str, int | None], ModelInfo]] = {
    "own": _build_own,
    "pytorchcv": _build_pytorchcv,
    "torchvision": _build_torchvision,
}


def _load_published(info: ModelInfo, short_name: str) -> None:
    if info.source == "own":
        raise UserError(f"there are no published weights for {info.name}; train it or give a file of weights")
    path = _pytorchcv_file(short_name) if info.source == "pytorchcv" else _torchvision_file(short_name)
    content = read_torch_file(path)
    expected = info.module.state_dict()
    # Auxiliary classifiers, which we do not build, are in the published files.
    state = {key: value for key, value in content.items() if key in expected}
    for key, tensor in expected.items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise UserError(f"{path} does not fit {short_name}: {key} {list(tensor.shape)} is missing; delete the file")
        if key in state and state[key].shape != tensor.shape:
            got, wanted = list(state[key].shape), list(tensor.shape)
            message = f"the published weights of {short_name} have {key} of shape {got}, expected {wanted}"
            raise UserError(f"{message}; they are for another number of classes, leave it at its default")
    info.module.load_state_dict(state, strict=False)


def _pytorchcv_file(name: str) -> Path:
    """Path of PyTorchCV's published weights, downloaded where needed; the SHA-1 is verified by PyTorchCV."""
    published = pytorchcv_store.get_model_metainfo_dict().get(name)
    if published is None or published[1] == "NA":
        raise UserError(f"PyTorchCV publishes no weights for {name}; give a file of weights or train from scratch")
    _, error_value, checksum, _ = published
    folder = PYTORCHCV_FOLDER.expanduser()
    path = folder / f"{name}-{error_value}-{checksum[:8]}.pth"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(pytorchcv_store.get_model_file(name, str(folder)))
    except (OSError, RuntimeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.zip")
        raise UserError(_by_hand(name, path)) from error


def _torchvision_file(name: str) -> Path:
    """Path of torchvision's published weights, downloaded where needed; a part of their SHA-256 is verified."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(_by_hand(name, path)) from error
    return path


def _by_hand(name: str, path: Path) -> str:
    return (
        f"cannot download the published weights of {name}; get the file {path.name} on another machine "
        f"and place it in the folder {path.parent}"
    )
