"""Which network a file of the original is of: names and shapes of its weights against those of the float networks."""

from collections.abc import Mapping

import torch
from torch import nn

from utils.errors import UserError
from utils.hawq.files import HawqFile
from utils.hawq.names import COUNTER, WEIGHTS, float_key, float_module
from utils.hawq.networks import FAMILIES
from utils.models import ModelInfo, create_model

CLASSIFIERS = ("output.weight", "output.fc.weight")


def float_network(file: HawqFile, arch: str | None, num_classes: int | None = None) -> ModelInfo:
    """The float network that the file is of, with as many classes; its parameters are random.

    arch, num_classes: the user's, None for what the file shows.  Raises UserError where they disagree with the file,
    naming the first entry that does and the architectures that would fit.
    """
    name = architecture(file, arch)
    classes = _classes(file)
    if num_classes is not None and classes not in (None, num_classes):
        raise UserError(f"{file.path} is a network of {classes} classes, not of {num_classes}; leave out --num-classes")
    info = create_model(name, classes or num_classes)
    misfit = first_misfit(file, info.module)
    if misfit is not None:
        fitting = ", ".join(fitting_architectures(file))
        advice = f"it fits {fitting}" if fitting else "it fits no network of the original"
        raise UserError(f"{file.path} is no checkpoint of {name}: {misfit}; {advice}")
    return info


def architecture(file: HawqFile, arch: str | None) -> str:
    """The architecture to build: the user's, or the one the file names, or the only one that it fits.

    Raises UserError where user and file disagree, where several fit, and for networks the original does not have.
    """
    if arch is not None and file.arch is not None and arch != file.arch:
        raise UserError(f"{file.path} is a checkpoint of {file.arch}, not of {arch}; give -a {file.arch}")
    name = arch or file.arch
    if name is None:
        fitting = fitting_architectures(file)
        if len(fitting) != 1:
            known = ", ".join(fitting or FAMILIES)
            raise UserError(f"{file.path} does not say which network it is of; give -a, one of {known}")
        name = fitting[0]
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"the original HAWQ has no {name}, so {file.path} cannot be one; it has {known}")
    return name


def fitting_architectures(file: HawqFile) -> list[str]:
    """Architectures of the original with the names and shapes of the file's weights."""
    with torch.device("meta"):
        modules = {name: create_model(name, _classes(file)).module for name in FAMILIES}
    return [name for name, module in modules.items() if first_misfit(file, module) is None]


def first_misfit(file: HawqFile, module: nn.Module) -> str | None:
    """The first entry of the file that a float network has no place for, or the first one missing, in words."""
    expected = {key: tensor.shape for key, tensor in module.state_dict().items() if not key.endswith(COUNTER)}
    if file.integers:
        layers = [name for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        expected = {key: expected[key] for key in (f"{name}.weight" for name in layers)}
    found = set()
    for entry, tensor in file.tensors.items():
        key = _float_key(file, entry, expected)
        if key is None or key.endswith(COUNTER):
            continue
        if key not in expected:
            return f"{entry} {list(tensor.shape)} has no place there"
        if tensor.shape != expected[key]:
            return f"{entry} has shape {list(tensor.shape)}, {list(expected[key])} there"
        found.add(key)
    missing = [key for key in expected if key not in found]
    return f"it has nothing for {missing[0]} {list(expected[missing[0]])}" if missing else None


def _float_key(file: HawqFile, entry: str, expected: Mapping[str, torch.Size]) -> str | None:
    """The float tensor that an entry stands for: one of the weights for integers of a quantized_checkpoint."""
    if not file.integers:
        return float_key(entry)
    module, _, leaf = entry.rpartition(".")
    if leaf != WEIGHTS:
        return None
    path = float_module(module)
    return f"{path}.conv.weight" if f"{path}.conv.weight" in expected else f"{path}.weight"


def _classes(file: HawqFile) -> int | None:
    """Outputs of the classifier, None where the file has none."""
    for entry, tensor in file.tensors.items():
        if _float_key(file, entry, {}) in CLASSIFIERS and tensor.ndim > 0:
            return int(tensor.shape[0])
    return None
