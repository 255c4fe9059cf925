"""Calibration: run the float network over a few batches, then fix every activation range."""

from collections.abc import Iterable

import torch
from torch import Tensor

from utils.errors import UserError, not_finite
from utils.quantization_utils.coded import observer_for
from utils.quantization_utils.observers import Range, is_finite
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer


@torch.no_grad()
def calibrate(
    model: QuantizedModel,
    batches: Iterable[Tensor],
    method: str = "mse",
    percentile: float = 99.99,
    power: float = 2.0,
) -> int:
    """Observe the float network's activations and switch quantization on with the ranges found.

    batches: float32 [N, C, H, W], normalised, on the model's device; order and size matter for the averaging
    methods.  method: one of ``calibrators.METHODS``; percentile and power belong to the methods ``percentile`` and
    ``mse``.  Returns the number of images seen; the model is left in eval mode.  Raises UserError for no images, or
    for values that are not finite.
    """
    model.eval()
    model.enable(False)
    quantizers = model.activation_quantizers()
    for quantizer in quantizers.values():
        quantizer.observer = observer_for(quantizer, method, percentile, power)
    images = 0
    try:
        for batch in filter(len, batches):  # an empty one says nothing
            model(batch)
            images += batch.shape[0]
        if images == 0:
            raise UserError("calibration got 0 images; give at least one, for example --calib-images 256")
        for name, quantizer in quantizers.items():
            assert quantizer.observer is not None
            _fix(name, quantizer.observer.result(), quantizer)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    model.enable()
    return images


def _fix(name: str, found: Range, quantizer: Quantizer) -> None:
    x_min, x_max = found
    if not is_finite(x_min, x_max):
        raise not_finite("calibration", f"{name!r} (range {float(x_min)} to {float(x_max)})")
    quantizer.set_range(x_min, x_max)
