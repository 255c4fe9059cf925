"""How far quantization moves the weights of a layer, and the tensor it reads, at any width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.observers import Range
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.quant_primitives import per_channel
from utils.quantization_utils.single_layer import Ranges, quantized_input, set_bits, sites, untouched

NARROW = 8  # wider tensors are residual streams, whose width no search changes


def ranges_at(model: QuantizedModel, batches: Sequence[Tensor], widths: Sequence[int], method: str) -> Ranges:
    """Activation ranges calibrated anew at each width; the model is left as it was.

    batches: normalised images.  method: see :func:`calibrate`, which raises UserError for values that are not finite.
    """
    found: dict[int, dict[str, Range]] = {}
    for bits in widths:
        with untouched(model):
            quantizers = model.activation_quantizers()
            for quantizer in quantizers.values():
                if quantizer.bits <= NARROW:
                    quantizer.bits, quantizer.learned = bits, None
            calibrate(model, batches, method)
            found[bits] = {name: (q.x_min.clone(), q.x_max.clone()) for name, q in quantizers.items()}
    return found


@torch.no_grad()
def weight_errors(model: QuantizedModel, widths: Sequence[int], ranges: Ranges) -> dict[str, dict[int, Tensor]]:
    """Quantized minus folded weights, in the weights' shape, by layer and bits; standalone BatchNorms have none."""
    found: dict[str, dict[int, Tensor]] = {}
    for site in sites(model).values():
        layer = site.layer
        if not isinstance(layer, QuantLayer):
            continue
        weight, _ = fold(layer.module.weight, layer.module.bias, layer.bn)
        for bits in widths:
            with untouched(model):
                set_bits(site, bits, ranges)
                integer = layer.integer_weights()
            exact = integer.weight.to(weight.dtype) * per_channel(integer.scale, weight)
            found.setdefault(site.name, {})[bits] = exact - weight
    return found


@torch.no_grad()
def activation_errors(
    model: QuantizedModel, batches: Sequence[Tensor], widths: Sequence[int], ranges: Ranges
) -> dict[str, dict[int, float]]:
    """Squared error of the tensor a layer reads, per image, mean over the images, by layer and bits."""
    total = {name: dict.fromkeys(widths, 0.0) for name in sites(model)}
    with untouched(model):
        model.enable(False)
        for images in batches:
            values: dict[str, Any] = {}
            for op in model.ops:
                values[op.name] = op.run(*[values[name] for name in op.inputs] if op.inputs else [images])
            for site in sites(model).values():
                for bits in widths:
                    with untouched(model):
                        set_bits(site, bits, ranges)
                        error = quantized_input(site, values) - values[site.op.inputs[0]]
                    total[site.name][bits] += float(error.square().sum(dtype=torch.float64))
    count = sum(len(images) for images in batches)
    return {name: {bits: value / count for bits, value in errors.items()} for name, errors in total.items()}
