"""The quantizer side of a checkpoint: ranges and learned scales, by the names of tensors and layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer

State = dict[str, dict[str, Any]]


def quantizer_state(model: QuantizedModel) -> dict[str, Any]:
    """Ranges (0-d float32) and learned scales, and whether quantization is on; plain values and tensors."""
    activations: State = {
        name: {"x_min": q.x_min.clone(), "x_max": q.x_max.clone(), "learned": _copy(q.learned), "bits": q.bits}
        for name, q in model.activation_quantizers().items()
    }
    weights: State = {
        name: {"learned": _copy(layer.learned), "bits": layer.bits, "narrow_range": layer.narrow_range}
        for name, layer in model.weight_layers().items()
        if isinstance(layer, QuantLayer)
    }
    enabled = any(q.enabled for q in model.activation_quantizers().values())
    return {"enabled": enabled, "activations": activations, "weights": weights}


def load_quantizer_state(model: QuantizedModel, state: Mapping[str, Any]) -> None:
    """Restore :func:`quantizer_state`; raises UserError naming the first entry that does not belong to this model."""
    quantizers, layers = model.activation_quantizers(), model.weight_layers()
    for name, saved in _matching(state["activations"], set(quantizers), "activation quantizer"):
        quantizer = quantizers[name]
        _same_bits(name, saved["bits"], quantizer.bits)
        quantizer.x_min.copy_(saved["x_min"])
        quantizer.x_max.copy_(saved["x_max"])
        quantizer.learned = _parameter(saved["learned"], quantizer.x_min.device)
    own = {name for name, layer in layers.items() if isinstance(layer, QuantLayer)}
    for name, saved in _matching(state["weights"], own, "quantized layer"):
        layer = layers[name]
        assert isinstance(layer, QuantLayer)
        _same_bits(name, saved["bits"], layer.bits)
        layer.learned = _parameter(saved["learned"], layer.module.weight.device)
        layer.narrow_range = saved.get("narrow_range", True)  # absent in files of earlier versions
    model.enable(state["enabled"])


def _matching(saved: State, own: set[str], what: str) -> list[tuple[str, dict[str, Any]]]:
    different = sorted(set(saved) ^ own)
    if different:
        side = "the checkpoint" if different[0] in saved else "this network"
        raise UserError(
            f"the {what} {different[0]!r} exists only in {side}; "
            "resume with the --arch and --quant-scheme it was saved with"
        )
    return list(saved.items())


def _same_bits(name: str, saved: int, own: int) -> None:
    if saved != own:
        raise UserError(
            f"{name!r} has {saved} bits in the checkpoint and {own} here; resume with the scheme it was saved with"
        )


def _copy(parameter: nn.Parameter | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().clone()


def _parameter(value: Tensor | None, device: torch.device) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.to(device))
