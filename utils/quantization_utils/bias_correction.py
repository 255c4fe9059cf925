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
    shared = _shared(model)
    done: list[str] = []
    skipped: dict[str, str] = {}
    bar = tqdm(run_ops(model, batches, quantized=True), "bias correction", len(model.ops), leave=False, disable=None)
    for op, outputs in bar:
        if op.kind not in LAYER_KINDS:
            continue
        assert isinstance(op.module, QuantLayer | QuantBatchNorm)
        difference = (means[op.name] - channel_means(op, outputs).to(means[op.name].device)).float()
        why = "its parameters are used twice" if id(_place(op.module)) in shared else _shift(op.module, difference)
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


def _shared(model: QuantizedModel) -> set[int]:
    counts = Counter(id(_place(layer)) for layer in model.weight_layers().values())
    return {place for place, count in counts.items() if count > 1}


def _shift(layer: QuantLayer | QuantBatchNorm, difference: Tensor) -> str | None:
    """Add to a layer's outputs [O], or say why that cannot be."""
    place = _place(layer)
    if isinstance(place, _BatchNorm) and place.bias is None and isinstance(layer, QuantLayer):
        if layer.module.bias is None:
            return "neither it nor its BatchNorm has a bias"
        k = affine_of(place)[0]
        layer.module.bias.add_(difference / k)
        return None
    if not isinstance(place.bias, nn.Parameter):
        return "it has no bias"
    place.bias.add_(difference)
    return None
