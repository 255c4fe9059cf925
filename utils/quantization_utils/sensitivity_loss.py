"""What quantizing one layer alone does to the loss and to the predictions, image by image."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.single_layer import logits_alone, require_calibrated, sites, untouched

LabelledBatches = Iterable[tuple[Tensor, Tensor]]  # normalised float32 images [N, C, H, W] and int64 labels [N]


@dataclass(frozen=True)
class LossIncrease:
    """What one quantized layer changes against the float network on the same images.

    loss: increase of the mean cross-entropy in nats (above zero is worse).  top1: change in percentage points (below
    zero is worse).  loss_error, top1_error: standard errors over the images, of the paired differences.
    """

    loss: float
    loss_error: float
    top1: float
    top1_error: float


def loss_increase(
    model: QuantizedModel, batches: LabelledBatches, only: Mapping[str, int] | None = None
) -> dict[str, LossIncrease]:
    """Quantize each layer of a calibrated model alone: its weights, and the tensor it reads for this layer alone.

    batches: on the model's device.  only: layers and the bits of their weights and input (a standalone BatchNorm keeps
    its 8); without it every layer at the bits it has.  The model is left as it was.  Raises UserError for no images, a
    model that is not calibrated, an unknown layer, and a loss that is not finite.
    """
    require_calibrated(model)
    names = list(sites(model))
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise UserError(f"the network has no layer {unknown[0]!r}; it has {', '.join(names)}")
    widths = {name: (None if only is None else only[name],) for name in names if only is None or name in only}
    differences: dict[str, list[Tensor]] = {name: [] for name in widths}
    with untouched(model):
        for images, labels in tqdm(batches, desc="single layers", unit="batch", leave=False, disable=None):
            reference = torch.empty(0)
            for name, _, logits in logits_alone(model, images, widths):
                now = loss_and_hits(name, logits, labels)
                if name:
                    differences[name].append((now - reference).cpu())
                else:
                    reference = now
    if not all(differences.values()):
        raise UserError("the losses of single layers got 0 images; give at least one batch")
    return {name: _summary(torch.cat(parts, dim=1)) for name, parts in differences.items()}


def loss_and_hits(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (row 0) and whether the class is right (row 1) of every image, float64 [2, N].

    name: of the layer that is quantized, for the message; "" is the float network.  Raises UserError for a loss that
    is not finite.
    """
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    check_finite(losses, name)
    return torch.stack([losses, (logits.argmax(1) == labels).double()])


def check_finite(values: Tensor, name: str) -> None:
    """Raise UserError where a loss is NaN or infinite.  name: of the quantized layer, "" for the float network."""
    if not bool(torch.isfinite(values).all()):
        where = f"with {name!r} alone quantized" if name else "of the float network"
        raise UserError(f"the loss {where} is not finite; check the weights and the images for NaN or infinity")


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last axis and its standard error; infinite for a single value."""
    count = values.shape[-1]
    if count == 1:
        return values[..., 0], torch.full_like(values[..., 0], math.inf)
    return values.mean(-1), values.std(-1) / math.sqrt(count)


def _summary(differences: Tensor) -> LossIncrease:
    means, errors = (values.tolist() for values in mean_and_error(differences))
    return LossIncrease(means[0], errors[0], 100 * means[1], 100 * errors[1])
