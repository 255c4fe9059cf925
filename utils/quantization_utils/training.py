"""Settings of quantization-aware training on a prepared model: ranges, weights, BatchNorm, parameter groups."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import UserError
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import RUNNING_MIN_MAX, QuantLayer

ACT_RANGES = ("ema", "lsq")


def configure(
    model: QuantizedModel,
    *,
    act_range: str = "ema",
    act_range_momentum: float = RUNNING_MIN_MAX,
    act_percentile: float = 0.0,
    weight_percentile: float = 0.0,
    channel_wise: bool = True,
) -> None:
    """Choose how ranges behave from here on.

    act_range: ``ema`` follows batch ranges with ``act_range_momentum`` (weight of the old range; -1: running
    extremes); ``lsq`` makes the scales of activations and weights parameters, 16-bit streams still follow the batches.
    Percentiles in (50, 100), 0: off.
    """
    for layer in model.weight_layers().values():
        if isinstance(layer, QuantLayer):
            layer.per_channel = channel_wise
            layer.percentile = weight_percentile
            if act_range == "lsq" and layer.learned is None:
                layer.learn_scale()
    for quantizer in model.activation_quantizers().values():
        quantizer.tracking = act_range == "ema" or quantizer.bits > 8
        quantizer.momentum = act_range_momentum
        quantizer.percentile = act_percentile
        if act_range == "lsq" and quantizer.bits <= 8 and quantizer.learned is None:
            quantizer.learn_scale()


def parameter_groups(model: QuantizedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: the float model's parameters in their own order, then learned scales without decay."""
    weights = list(model.model.parameters())
    scales = [p for _, p in learned_scales(model)]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": weight_decay}]
    return [*groups, {"params": scales, "weight_decay": 0.0}] if scales else groups


def learned_scales(model: QuantizedModel) -> list[tuple[str, nn.Parameter]]:
    """Learned scales by name: quantizers first, then layers."""
    found = [(f"activation:{name}", q.learned) for name, q in model.activation_quantizers().items()]
    found += [(f"weight:{name}", m.learned) for name, m in model.weight_layers().items() if isinstance(m, QuantLayer)]
    return [(name, parameter) for name, parameter in found if parameter is not None]


def freeze_float_bn(model: nn.Module) -> None:
    """Put the BatchNorms of a float model in training mode into eval mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@torch.no_grad()
def reestimate_bn(model: QuantizedModel, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics by the average over some batches of the quantized network as it now is.

    batches: float32 [N, C, H, W], normalised.  Returns the number of batches; the model is left in eval mode.
    Raises UserError, with the statistics unchanged, when there is none.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError("--reestimate-bn got 0 images; give at least one batch of training images")
    norms = [module for module in model.model.modules() if isinstance(module, _BatchNorm)]
    momenta = [bn.momentum for bn in norms]
    for bn in norms:
        bn.reset_running_stats()
        bn.momentum = None  # cumulative average
    count = _run_live(model, chain([first], iterator))
    for bn, momentum in zip(norms, momenta, strict=True):
        bn.momentum = momentum
    return count


def _run_live(model: QuantizedModel, batches: Iterable[Tensor]) -> int:
    """Forward passes with live BatchNorms and fixed ranges; everything else is as before afterwards."""
    tracking = {quantizer: quantizer.tracking for quantizer in model.activation_quantizers().values()}
    frozen = {layer: layer.frozen for layer in model.weight_layers().values()}
    for quantizer in tracking:
        quantizer.tracking = False
    model.freeze_bn(False)
    model.train()
    count = 0
    for batch in batches:
        model(batch)
        count += 1
    model.eval()
    for quantizer, old in tracking.items():
        quantizer.tracking = old
    for layer, was_frozen in frozen.items():
        layer.frozen = was_frozen
    return count
