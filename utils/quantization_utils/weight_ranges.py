"""Ranges of weights by least error, searched on the folded weights and kept as the layers' learned scales.

A layer whose scale is ``learned`` clips its weights to (-hi, hi), quantizes the unfolded and the folded weights alike,
is saved and restored with checkpoints, and trains on from there; nothing else needs to know where a scale came from.
"""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import UserError
from utils.quantization_utils.coded import CodedLayer, calibrate_codes
from utils.quantization_utils.fold_bn import affine_of, fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.quant_primitives import MIN_WEIGHT_SCALE, int_range, weight_scale
from utils.quantization_utils.range_search import CHANNEL_CANDIDATES, TENSOR_CANDIDATES, least_error

PIECE = 1 << 18  # weights searched at a time: they stay in the cache


@torch.no_grad()
def calibrate_weights(model: QuantizedModel, method: str = "mse", power: float = 2.0, per_channel: bool = True) -> None:
    """Choose the weight range of every layer: ``minmax``, or ``mse`` with the mean error ``|w_hat - w| ** power``.

    per_channel: a range for each output channel, or one for each layer.  Replaces ranges learned before.  Raises
    UserError for weights that are not finite.
    """
    layers = [(name, layer) for name, layer in model.weight_layers().items() if isinstance(layer, QuantLayer)]
    for name, layer in tqdm(layers, desc=f"weight ranges ({method})", unit="layer", leave=False, disable=None):
        if not bool(torch.isfinite(fold(layer.module.weight, None, layer.bn)[0]).all()):
            raise UserError(f"the weights of layer {name!r} are not finite; check the network for NaN or infinity")
        layer.per_channel = per_channel
        if isinstance(layer, CodedLayer):
            calibrate_codes(layer, method, power)
            continue
        layer.learned = nn.Parameter(unfolded_scale(layer, folded_mse_scale(layer, power))) if method == "mse" else None


@torch.no_grad()
def folded_mse_scale(layer: QuantLayer, power: float = 2.0) -> Tensor:
    """The scale [O] of a layer's folded weights with the least error; all equal unless ``layer.per_channel``."""
    weight, _ = fold(layer.module.weight.detach(), None, layer.bn)
    hi = int_range(layer.bits, True)[1]
    rows = weight.reshape(weight.shape[0] if layer.per_channel else 1, -1)
    candidates = CHANNEL_CANDIDATES if layer.per_channel else TENSOR_CANDIDATES
    size = max(1, PIECE // rows.shape[1])
    parts = [least_error(part, part.abs().amax(1), (-hi, hi), candidates, power) for part in rows.split(size)]
    return (torch.cat(parts) / hi).expand(weight.shape[0])


@torch.no_grad()
def unfolded_scale(layer: QuantLayer, folded: Tensor) -> Tensor:
    """The scale [O] of the unfolded weights that belongs to one of the folded weights: divided by the BN's |factor|.

    A channel whose factor is zero has no folded weights; it takes the range of its unfolded ones.
    """
    if layer.bn is None:
        return folded.clamp_min(MIN_WEIGHT_SCALE)
    k = affine_of(layer.bn)[0].abs()
    own = weight_scale(layer.module.weight, layer.bits)
    return torch.where(k > MIN_WEIGHT_SCALE, folded / k.clamp_min(MIN_WEIGHT_SCALE), own).clamp_min(MIN_WEIGHT_SCALE)
