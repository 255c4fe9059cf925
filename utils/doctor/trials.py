"""What a change would gain, by making it and running the images again; nothing is changed for good.

Every trial compares the quantized network with itself after one change, image by image.  A layer is raised by preparing
the network anew with its weights and the tensor it reads at the larger width, as ``--quant-scheme`` would; ranges of
tensors that had no such width are searched on the images (least squared error), all others stay.  BatchNorm statistics
are re-estimated on one half of the images and tried on the other, and the other way round.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bit_config import Rule, Scheme, resolve
from utils.doctor.observe import Clipping
from utils.doctor.outcomes import Gain, Images, Outcomes, gain, outcomes
from utils.quantization_utils.calibrators import make_observer
from utils.quantization_utils.capture import Captured, capture
from utils.quantization_utils.cost_model import LayerBits
from utils.quantization_utils.observers import is_finite
from utils.quantization_utils.prepare import Network, QuantizedModel, fold_network, prepare
from utils.quantization_utils.quant_modules import Quantizer, QuantLayer
from utils.quantization_utils.training import reestimate_bn

WIDTHS = (4, 8)  # a layer is tried at the larger of these: what kernels compute with
RANGE_IMAGES = 128  # on which ranges of new widths are searched
WIDER = 1.25  # a range is worth a trial where the best one is that much wider


@dataclass(frozen=True)
class Subject:
    """A calibrated network under examination and the images of it.

    before: what the quantized network makes of them.
    """

    model: QuantizedModel
    residual_bits: int
    images: Images
    captured: Captured
    network: Network
    before: Outcomes


def subject(model: QuantizedModel, residual_bits: int, images: Images) -> Subject:
    """Everything trials need.  The model is left in eval mode with quantization on."""
    model.eval()
    model.enable()
    weight = next(model.model.parameters())
    captured = capture(model.model, torch.zeros(1, *model.input_shape, device=weight.device))
    before = outcomes(model, images, "quantized network")
    return Subject(model, residual_bits, images, captured, fold_network(captured), before)


def wider_widths(bits: LayerBits) -> list[int]:
    """The widths a layer could be raised to.

    >>> wider_widths(LayerBits(2, 8, "")), wider_widths(LayerBits(8, 4, "")), wider_widths(LayerBits(8, 8, ""))
    ([4, 8], [8], [])
    """
    return [width for width in WIDTHS if width > min(bits.weight, bits.activation)]


def raised_bits(model: QuantizedModel, layers: Sequence[str], width: int) -> dict[str, LayerBits]:
    """A model's bits with the weights and inputs of some layers at ``width`` where they are narrower.

    As in every scheme, the other layers that read the same tensor get it as wide.
    """
    pairs = {name: (bits.weight, bits.activation) for name, bits in model.bits.items()}
    for layer in layers:
        weight, activation = pairs[layer]
        pairs[layer] = (max(weight, width), max(activation, width))
    rules = tuple(Rule(f"^{re.escape(name)}$", pair) for name, pair in pairs.items())
    return resolve(Scheme("raised", rules, ends="free"), model.layer_table)


def try_raise(subject: Subject, layers: Sequence[str], width: int) -> Gain:
    """What the layers, together at ``width`` bits, would gain."""
    bits = raised_bits(subject.model, layers, width)
    raised = prepare(subject.captured, subject.network, bits, subject.residual_bits).to(_device(subject.model))
    new = _take_over(raised, subject.model)
    raised.eval()
    raised.enable()
    if new:
        _search_ranges(raised, new, subject.images)
    return gain(subject.before, outcomes(raised, subject.images, f"{layers[0]} at {width} bits"))


def is_wider(found: Clipping) -> bool:
    """Whether the range with the least error on the images is clearly wider than the one in use."""
    low, high = (float(v) for v in found.best)
    return max(-low, high) > WIDER * max(-found.low, found.high)


def try_widen(subject: Subject, found: Clipping) -> Gain:
    """What the range with the least error on the images would gain for one quantizer."""
    quantizer = subject.model.activation_quantizers()[found.quantizer]
    old = quantizer.x_min.clone(), quantizer.x_max.clone(), quantizer.learned
    try:
        quantizer.learned = None
        quantizer.set_range(*found.best)
        return gain(subject.before, outcomes(subject.model, subject.images, f"range of {found.quantizer}"))
    finally:
        quantizer.x_min.copy_(old[0])
        quantizer.x_max.copy_(old[1])
        quantizer.learned = old[2]


def try_reestimate(subject: Subject) -> Gain | None:
    """What new BatchNorm statistics would gain; None for a network without BatchNorm or for fewer than 4 images."""
    halves = [subject.images.half(odd) for odd in (False, True)]
    norms = [module for module in subject.model.model.modules() if isinstance(module, _BatchNorm)]
    if not norms or not all(half.count for half in halves):
        return None
    before, after = [], []
    with _statistics_kept(norms):
        for half in halves:
            before.append(outcomes(subject.model, half, "quantized network"))
        for half, other in (halves, halves[::-1]):
            reestimate_bn(subject.model, other.inputs())
            after.append(outcomes(subject.model, half, "BatchNorm re-estimated"))
    return gain(_joined(before), _joined(after))


def _joined(parts: list[Outcomes]) -> Outcomes:
    return Outcomes(torch.cat([p.losses for p in parts]), torch.cat([p.correct for p in parts]))


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    states = [{key: value.clone() for key, value in bn.state_dict().items()} for bn in norms]
    try:
        yield
    finally:
        for bn, state in zip(norms, states, strict=True):
            bn.load_state_dict(state)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _take_over(raised: QuantizedModel, old: QuantizedModel) -> list[Quantizer]:
    """Copy ranges and learned scales to where width and place are the same; returns the quantizers left without."""
    known = _by_place(old)
    missing = []
    for key, quantizer in _by_place(raised).items():
        if key in known:
            quantizer.x_min.copy_(known[key].x_min)
            quantizer.x_max.copy_(known[key].x_max)
            quantizer.learned = known[key].learned
        else:
            missing.append(quantizer)
    before = old.weight_layers()
    for name, layer in raised.weight_layers().items():
        source = before[name]
        if isinstance(layer, QuantLayer) and isinstance(source, QuantLayer):
            layer.per_channel, layer.percentile = source.per_channel, source.percentile
            layer.learned = source.learned if layer.bits == source.bits else None
    return missing


def _by_place(model: QuantizedModel) -> dict[tuple[str, int], Quantizer]:
    """Quantizers by the operator they are behind and their width."""
    by_name = {op.name: op for op in model.ops}
    found = {}
    for name, quantizer in model.activation_quantizers().items():
        op = by_name[name]
        while op.kind == "quantize":
            op = by_name[op.inputs[0]]
        found[op.name, quantizer.bits] = quantizer
    return found


@torch.no_grad()
def _search_ranges(model: QuantizedModel, new: list[Quantizer], images: Images) -> None:
    for quantizer in new:
        quantizer.enabled = False
        quantizer.observer = make_observer("mse", quantizer.bits, quantizer.signed)
    for batch in images.inputs(RANGE_IMAGES):
        model(batch)
    for quantizer in new:
        assert quantizer.observer is not None
        found: tuple[Tensor, Tensor] = quantizer.observer.result()
        quantizer.observer, quantizer.enabled = None, True
        if is_finite(*found):
            quantizer.set_range(*found)
