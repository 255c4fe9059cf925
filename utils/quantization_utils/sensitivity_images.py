"""Sensitivities that are means over images: loss increase, KL divergence, noise of the logits, empirical Fisher."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.quantization_utils.hessian_trace import Unknowns
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.sensitivity_loss import check_finite, mean_and_error
from utils.quantization_utils.sensitivity_state import Labelled, Progress
from utils.quantization_utils.single_layer import Ranges, logits_alone, sites

# (float logits, logits with one layer quantized, labels) -> damage of every image, float64 [N]
Compare = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss_difference(reference: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Increase of the cross-entropy in nats."""
    after, before = (F.cross_entropy(x.double(), labels, reduction="none") for x in (logits, reference))
    return after - before


def divergence(reference: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the quantized output distribution from the float one, in nats."""
    p, q = (F.log_softmax(x.double(), 1) for x in (reference, logits))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def noise(reference: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of the logits."""
    return (logits.double() - reference.double()).square().sum(1)


COMPARISONS: Mapping[str, Compare] = {"loss": loss_difference, "kl": divergence, "sqnr": noise}


def new_values(model: QuantizedModel, widths: Sequence[int], images: int) -> dict[str, Tensor]:
    """Zeros for the values of every layer, width and image, float64, and for the power of the float logits."""
    return {
        "damage": torch.zeros(len(sites(model)), len(widths), images, dtype=torch.float64),
        "power": torch.zeros(images, dtype=torch.float64),
    }


def compare_outputs(
    model: QuantizedModel,
    batches: Sequence[Labelled],
    metric: str,
    widths: Sequence[int],
    ranges: Ranges,
    progress: Progress,
) -> None:
    """Fill in the values of ``metric``, one of ``COMPARISONS``: each layer quantized alone at each width.

    progress: holds :func:`new_values`.  The model must be inside ``untouched``.  Raises UserError for values that are
    not finite.
    """
    rows = {name: row for row, name in enumerate(sites(model))}
    starts = [0, *accumulate(len(images) for images, _ in batches)]
    for step in progress.steps(len(batches), f"sensitivity ({metric})"):
        images, labels = batches[step]
        place = slice(starts[step], starts[step + 1])
        reference = torch.empty(0)
        for name, bits, logits in logits_alone(model, images, dict.fromkeys(rows, widths), ranges):
            if not name:
                reference = logits
                progress.values["power"][place] = logits.double().square().sum(1).cpu()
            value = COMPARISONS[metric](reference, logits, labels)
            check_finite(value, name)
            if bits is not None:
                progress.values["damage"][rows[name], widths.index(bits), place] = value.cpu()
    progress.save()


def fisher(
    model: QuantizedModel,
    batches: Sequence[Labelled],
    widths: Sequence[int],
    errors: Mapping[str, Mapping[int, Tensor]],
    progress: Progress,
) -> None:
    """Fill in the empirical Fisher damage of every image: the sum over weights of (gradient * weight error) ** 2.

    errors: from :func:`weight_errors`.  The gradient is that of the image's cross-entropy with its own label, with
    respect to the folded weights.  Otherwise as :func:`compare_outputs`.
    """
    model.enable(False)
    unknowns = Unknowns(model, activations=False)
    squares = {name: torch.stack([errors[name][bits].square() for bits in widths]) for name in unknowns.names}
    rows = {name: row for row, name in enumerate(sites(model))}
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for step in progress.steps(len(images), "sensitivity (fisher)"):
        with torch.enable_grad():
            logits, leaves = unknowns.forward(images[step : step + 1])
            loss = F.cross_entropy(logits, labels[step : step + 1])
        check_finite(loss.detach(), "")
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            products = (squares[name] * gradient.square()).flatten(1).sum(1, dtype=torch.float64)
            progress.values["damage"][rows[name], :, step] = products.cpu()
    progress.save()


def summarise(values: Mapping[str, Tensor], metric: str) -> tuple[Tensor, Tensor]:
    """Damage and its standard error over the images, [layers, widths] each.

    ``sqnr``: noise over signal, both summed over all images; its error is that of a ratio, to first order.
    """
    damage = values["damage"]
    if metric != "sqnr":
        return mean_and_error(damage)
    power = values["power"].mean().clamp_min(math.ulp(0.0))
    ratio = damage.mean(-1) / power
    _, error = mean_and_error(damage - ratio.unsqueeze(-1) * values["power"])
    return ratio, error / power
