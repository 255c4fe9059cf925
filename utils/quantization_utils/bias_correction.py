"""Empirical bias correction: each channel of each quantized layer gets the mean it has in the float network.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2 (the version with data).  Layers are corrected in the order
of execution, each on what the corrected layers before it give; a layer's output changes with its bias exactly, so one
pass over the network suffices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from utils.quantization_utils.execution import channel_means, live_elements, run_ops
from utils.quantization_utils.fold_bn import affine_of
from utils.quantization_utils.prepare import LAYER_KINDS, QuantizedModel
from utils.quantization_utils.quant_modules import QuantBatchNorm, QuantLayer

MEMORY = 2 << 30  # bytes of activations held at once


@dataclass(frozen=True)
class Corrected:
    """images: how many the means are over; skipped: layer -> why it keeps its bias."""

    images: int
    layers: tuple[str, ...]
    skipped: dict[str, str]


def limited(model: QuantizedModel, batches: Iterable[Tensor], memory: int = MEMORY) -> list[Tensor]:
    """The first images, in their batches, whose activations fit into so many bytes; at least one image."""
    left = max(1, memory // (4 * live_elements(model.ops)))
    kept: list[Tensor] = []
    for batch in batches:
        kept.append(batch[:left])
        left -= len(kept[-1])
        if left == 0:
            break
    return kept


def float_means(model: QuantizedModel, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean of every layer's output per channel in the float network, float64 [O], by the operator's name.

    Take them before weights are rounded in place.  batches: as for :func:`correct_biases`; the model is left in eval
    mode, quantization off.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    images = 0
    for batch in batches:
        for op, outputs in run_ops(model, [batch], quantized=False):
            if op.kind in LAYER_KINDS:
                sums[op.name] = sums.get(op.name, 0.0) + channel_means(op, outputs) * len(batch)
        images += len(batch)
    return {name: total / images for name, total in sums.items()}


@torch.no_grad()
def correct_biases(model: QuantizedModel, batches: Iterable[Tensor], means: Mapping[str, Tensor]) -> Corrected:
    """Shift biases (beta, behind a BatchNorm) so that the quantized layers' means are ``means``.

    batches: float32 [N, C, H, W], the same images that ``means`` are over; all their activations of one moment are
    held at once, see :func:`limited`.  The model is left in eval mode, quantization on.
    """
    model.eval()
    batches = list(batches)
    shared = shared_biases(model)
    done: list[str] = []
    skipped: dict[str, str] = {}
    bar = tqdm(run_ops(model, batches, quantized=True), "bias correction", len(model.ops), leave=False, disable=None)
    for op, outputs in bar:
        if op.kind not in LAYER_KINDS:
            continue
        assert isinstance(op.module, QuantLayer | QuantBatchNorm)
        difference = (means[op.name] - channel_means(op, outputs).to(means[op.name].device)).float()
        why = "its parameters are used twice" if op.name in shared else _shift(op.module, difference)
        if why is not None:
            skipped[op.attrs["layer"]] = why
            continue
        done.append(op.attrs["layer"])
        for output in outputs:
            output += difference if op.kind == "linear" else difference.reshape(-1, *[1] * (output.dim() - 2))
    model.enable()
    return Corrected(sum(map(len, batches)), tuple(done), skipped)


def _place(layer: QuantLayer | QuantBatchNorm) -> nn.Module:
    """The module whose bias is a layer's last."""
    if isinstance(layer, QuantLayer) and layer.bn is None:
        return layer.module
    assert layer.bn is not None
    return layer.bn


def shared_biases(model: QuantizedModel) -> set[str]:
    """Operators whose bias is that of another one too."""
    places = {op.name: id(_place(op.module)) for op in model.ops if isinstance(op.module, QuantLayer | QuantBatchNorm)}
    counts = Counter(places.values())
    return {name for name, place in places.items() if counts[place] > 1}


def bias_parameter(layer: QuantLayer | QuantBatchNorm) -> nn.Parameter | None:
    """The bias of a layer, or of its BatchNorm, if there is one."""
    found = _bias(layer)
    return None if isinstance(found, str) else found[0]


@torch.no_grad()
def set_bias(layer: QuantLayer, bias: Tensor) -> None:
    """Give a layer that has one a bias [O], counted behind its BatchNorm; the same bits whatever it was before."""
    found = _bias(layer)
    assert not isinstance(found, str)
    found[0].zero_()
    _shift(layer, bias - layer.integer_weights().bias)


def _shift(layer: QuantLayer | QuantBatchNorm, difference: Tensor) -> str | None:
    """Add to a layer's outputs [O], or say why that cannot be."""
    found = _bias(layer)
    if isinstance(found, str):
        return found
    parameter, factor = found
    parameter.add_(difference / factor)
    return None


def _bias(layer: QuantLayer | QuantBatchNorm) -> tuple[nn.Parameter, Tensor | float] | str:
    """The parameter that adds to a layer's outputs and what it is multiplied by, or why there is none."""
    place = _place(layer)
    if isinstance(place, _BatchNorm) and place.bias is None and isinstance(layer, QuantLayer):
        if layer.module.bias is None:
            return "neither it nor its BatchNorm has a bias"
        factor = affine_of(place)[0]
        return layer.module.bias, torch.where(factor == 0, torch.inf, factor)
    return (place.bias, 1.0) if isinstance(place.bias, nn.Parameter) else "it has no bias"
