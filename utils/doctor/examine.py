"""The examination of a calibrated network: damage, cost and time of every layer, what is sick, and what would help."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from utils.doctor.observe import Clipping, Observed, observe
from utils.doctor.outcomes import Gain, Images, Outcomes, gain, outcomes
from utils.doctor.trials import (
    WIDTHS,
    Subject,
    is_wider,
    raised_bits,
    subject,
    try_raise,
    try_reestimate,
    try_widen,
    wider_widths,
)
from utils.quantization_utils.cost_model import Layer, LayerBits, bops_g, size_mib
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.sensitivity_loss import LossIncrease, loss_increase
from utils.quantization_utils.single_layer import sites
from utils.quantization_utils.sqnr import layer_sqnr

SQNR_IMAGES = 64
TRIED = 12  # layers tried at a larger width, and ranges tried wider

# Kind of island -> why integers cannot do it.
ISLAND_REASONS = {
    "softmax": "exponentials divided by their sum over all channels",
    "interpolate": "weights of neighbouring pixels that are no whole steps",
    "instance_norm": "mean and variance of every single image",
    "local_response_norm": "a power of the sum over neighbouring channels",
}


@dataclass(frozen=True)
class LayerFacts:
    """One layer.  damage: of quantizing it alone; sqnr: dB of its output with everything quantized.

    size_mib, bops_g: at its bits, its shares in percent of the network's.  ms: where latencies are known.
    """

    layer: Layer
    bits: LayerBits
    damage: LossIncrease
    sqnr: float
    size_mib: float
    size_share: float
    bops_g: float
    bops_share: float
    ms: float | None


@dataclass(frozen=True)
class Raised:
    """Layers at a larger width, tried; size and bops: change of the whole network's in percent.

    layers: one, or several that were raised together.  reads: quantizer of the tensor the first of them reads.
    """

    layers: tuple[str, ...]
    width: int
    reads: str
    gain: Gain
    size: float
    bops: float


@dataclass(frozen=True)
class Widened:
    """A quantizer with the range that fits the images, tried."""

    found: Clipping
    gain: Gain


@dataclass(frozen=True)
class Island:
    """An operator that stays in float, and why."""

    path: str
    function: str
    reason: str


@dataclass(frozen=True)
class Examination:
    """All findings.  floating, quantized: outcomes of the same weights with quantization off and on.

    images: their number.  raised: single layers.  together: several at once, where single ones help
    too little.  reestimated: None where there is no BatchNorm.
    """

    images: int
    floating: Outcomes
    quantized: Outcomes
    layers: list[LayerFacts]
    islands: list[Island]
    observed: Observed
    raised: list[Raised]
    together: list[Raised]
    widened: list[Widened]
    reestimated: Gain | None


def examine(
    model: QuantizedModel, residual_bits: int, images: Images, latency: Mapping[str, Mapping[int, float]] | None = None
) -> Examination:
    """Examine a calibrated model; it is left as it was, in eval mode with quantization on.

    latency: layer -> weight bits -> milliseconds.  Raises UserError for a model that is not calibrated, and for losses
    that are not finite.
    """
    model.eval()
    damage = loss_increase(model, images)
    model.enable(False)
    floating = outcomes(model, images, "float network")
    patient = subject(model, residual_bits, images)
    observed = observe(model, images.inputs())
    noise = layer_sqnr(model, images.inputs(SQNR_IMAGES))
    raised = _raise_layers(patient, damage)
    return Examination(
        images=images.count,
        floating=floating,
        quantized=patient.before,
        layers=_layer_facts(model, damage, noise, latency or {}),
        islands=_islands(model),
        observed=observed,
        raised=raised,
        together=_raise_together(patient, damage, floating, raised),
        widened=_widen_ranges(patient, observed.clipping),
        reestimated=try_reestimate(patient),
    )


def _layer_facts(
    model: QuantizedModel,
    damage: Mapping[str, LossIncrease],
    noise: Mapping[str, float],
    latency: Mapping[str, Mapping[int, float]],
) -> list[LayerFacts]:
    layers, bits = model.layer_table, model.bits
    size, bops = size_mib(layers, bits), bops_g(layers, bits)
    found = []
    for layer in layers:
        own_size, own_bops, name = size_mib([layer], bits), bops_g([layer], bits), layer.name
        found.append(
            LayerFacts(
                layer=layer,
                bits=bits[name],
                damage=damage[name],
                sqnr=noise[name],
                size_mib=own_size,
                size_share=100 * own_size / size,
                bops_g=own_bops,
                bops_share=100 * own_bops / bops,
                ms=latency.get(name, {}).get(bits[name].weight),
            )
        )
    return found


def _islands(model: QuantizedModel) -> list[Island]:
    ops = [op for op in model.ops if op.kind == "island"]
    return [Island(op.path or op.name, f := op.attrs["function"], ISLAND_REASONS[f]) for op in ops]


def _narrow_layers(model: QuantizedModel, damage: Mapping[str, LossIncrease]) -> list[str]:
    """Layers that are not at 8 bits yet, the most damaging first; a standalone BatchNorm always is."""
    affine = {layer.name for layer in model.layer_table if layer.kind == "affine"}
    narrow = [name for name in damage if wider_widths(model.bits[name]) and name not in affine]
    return sorted(narrow, key=lambda name: -damage[name].loss)


def _raise_layers(patient: Subject, damage: Mapping[str, LossIncrease]) -> list[Raised]:
    """The most damaging layers one by one, at every larger width."""
    worst = _narrow_layers(patient.model, damage)[:TRIED]
    bar = tqdm(worst, desc="larger widths", unit="layer", leave=False, disable=None)
    return [_raised(patient, (name,), width) for name in bar for width in wider_widths(patient.model.bits[name])]


def _raise_together(
    patient: Subject, damage: Mapping[str, LossIncrease], floating: Outcomes, single: Sequence[Raised]
) -> list[Raised]:
    """The 2, 4, 8 ... most damaging layers at 8 bits, until half of what quantization lost is back.

    Nothing where a single layer does that, or where quantization loses no more than chance.
    """
    lost = gain(patient.before, floating)
    worst = _narrow_layers(patient.model, damage)
    best = max((step.gain.top1 for step in single), default=0.0)
    found: list[Raised] = []
    count = 2
    while lost.certain and count < 2 * len(worst) and best < lost.top1 / 2:
        found.append(_raised(patient, tuple(worst[:count]), WIDTHS[-1]))
        best = max(best, found[-1].gain.top1)
        count *= 2
    return found


def _raised(patient: Subject, names: tuple[str, ...], width: int) -> Raised:
    layers, bits, changed = patient.model.layer_table, patient.model.bits, raised_bits(patient.model, names, width)
    return Raised(
        layers=names,
        width=width,
        reads=sites(patient.model)[names[0]].source.name,
        gain=try_raise(patient, names, width),
        size=100 * (size_mib(layers, changed) / size_mib(layers, bits) - 1),
        bops=100 * (bops_g(layers, changed) / bops_g(layers, bits) - 1),
    )


def _widen_ranges(patient: Subject, clipping: Sequence[Clipping]) -> list[Widened]:
    narrow = [found for found in clipping if found.clipped > 0 and is_wider(found)]
    worst = sorted(narrow, key=lambda found: -found.clipped)[:TRIED]
    bar = tqdm(worst, desc="wider ranges", unit="range", leave=False, disable=None)
    return [Widened(found, try_widen(patient, found)) for found in bar]
