"""An examination as a document: every number is formatted here, once, for text and HTML alike."""

from collections.abc import Iterable

from utils.doctor.advice import Advice
from utils.doctor.document import Chart, Document, Section
from utils.doctor.examine import Examination, LayerFacts
from utils.doctor.observe import Clipping, DeadChannels
from utils.doctor.outcomes import CERTAIN

Row = dict[str, str]
SHOWN_CHANNELS = 6


def report(found: Examination, steps: list[Advice], *, name: str, source: str) -> Document:
    """The whole document.  name: network and scheme; source: where the images come from, both for people."""
    layers = sorted(found.layers, key=lambda fact: -fact.damage.loss)
    sections = [
        _summary(found, source),
        _advice(found, steps),
        _damage(layers),
        _cost(sorted(found.layers, key=lambda fact: (-fact.bops_g, -fact.size_mib))),
        *_time(found.layers),
        _tried(found),
        _islands(found),
        _dead(found.observed.dead),
        _clipping(found.observed.clipping),
        _drift(found),
    ]
    return Document(f"Doctor's report: {name}", sections)


def _summary(found: Examination, source: str) -> Section:
    floating, quantized = found.floating, found.quantized
    size, bops = (sum(getter(fact) for fact in found.layers) for getter in (_size, _bops))
    items = [
        f"{found.images} images of {source}",
        f"top-1 {quantized.top1:.2f} % quantized, {floating.top1:.2f} % with the same weights in float",
        f"loss {quantized.loss:.4f} quantized, {floating.loss:.4f} with the same weights in float",
        f"{len(found.layers)} layers, {size:.3f} MiB, {bops:.3f} GBOPS",
    ]
    note = (
        "All of it was measured on the simulation of quantization, which differs from the integer graph by roundings."
    )
    return Section("What was examined", note, items)


def _size(fact: LayerFacts) -> float:
    return fact.size_mib


def _bops(fact: LayerFacts) -> float:
    return fact.bops_g


def _advice(found: Examination, steps: list[Advice]) -> Section:
    note = (
        "Each change was made alone and the images were run again, without training after it; gains do not add up. "
        f"Advised is what gains more than {CERTAIN:g} standard errors in top-1 and in loss on these {found.images} "
        "images; more images (--calib-images) show smaller gains.  The best of many trials looks a little better than "
        "it is."
    )
    return Section("Advice", note, [step.text for step in steps], empty="nothing: no change gained more than chance")


def _damage(layers: list[LayerFacts]) -> Section:
    rows = []
    for fact in layers:
        damage = fact.damage
        rows.append(
            {
                "layer": fact.layer.name,
                "W": str(fact.bits.weight),
                "A": str(fact.bits.activation),
                "loss": f"{damage.loss:+.5f}",
                "± loss": f"{damage.loss_error:.5f}",
                "top-1": f"{damage.top1:+.2f}",
                "± top-1": f"{damage.top1_error:.2f}",
                "SQNR dB": f"{fact.sqnr:.1f}",
            }
        )
    note = (
        "Change of loss and top-1 (points, with standard errors) when this layer alone is quantized, its weights (W "
        "bits) and the tensor it reads (A bits).  SQNR: of its output with all layers in front quantized too."
    )
    return Section("Layers by damage", note, rows=rows, chart=Chart("layer", "loss"))


def _cost(layers: list[LayerFacts]) -> Section:
    rows = [
        {
            "layer": fact.layer.name,
            "weights": f"{fact.layer.weights:,}",
            "MACs M": f"{fact.layer.macs / 1e6:,.3f}",
            "size KiB": f"{1024 * fact.size_mib:,.2f}",
            "size %": f"{fact.size_share:.1f}",
            "MBOPS": f"{1000 * fact.bops_g:,.2f}",
            "BOPS %": f"{fact.bops_share:.1f}",
        }
        for fact in layers
    ]
    note = "size: weights times their bits; BOPS: multiply-adds of one image times the bits of weight and input."
    return Section("Layers by bit operations and size", note, rows=rows, chart=Chart("layer", "BOPS %"))


def _time(layers: list[LayerFacts]) -> list[Section]:
    known = [(fact.ms, fact) for fact in layers if fact.ms is not None]
    if not known:
        return []
    total = sum(ms for ms, _ in known)
    rows = [
        {"layer": fact.layer.name, "W": str(fact.bits.weight), "ms": f"{ms:.4f}", "time %": f"{100 * ms / total:.1f}"}
        for ms, fact in sorted(known, key=lambda pair: -pair[0])
    ]
    missing = len(layers) - len(known)
    note = f"One image, from --layer-latency: {total:.3f} ms." + (f"  {missing} layers are not in it." * bool(missing))
    return [Section("Layers by time", note, rows=rows, chart=Chart("layer", "ms"))]


def _tried(found: Examination) -> Section:
    rows = []
    changes = [(f"{step.layers[0]} to {step.width} bit", step.gain) for step in found.raised]
    together = ((f"the {len(step.layers)} most damaging layers to {step.width} bit", step) for step in found.together)
    changes += [(text, step.gain) for text, step in together]
    changes += [(f"range behind {step.found.behind}", step.gain) for step in found.widened]
    if found.reestimated is not None:
        changes.append(("BatchNorm statistics re-estimated", found.reestimated))
    for text, gain in sorted(changes, key=lambda pair: -pair[1].top1):
        rows.append(
            {
                "change": text,
                "top-1": f"{gain.top1:+.2f}",
                "± top-1": f"{gain.top1_error:.2f}",
                "loss": f"{-gain.loss:+.5f}",
                "± loss": f"{gain.loss_error:.5f}",
            }
        )
    note = (
        "The layers with the most damage at larger widths, several together where single ones bring back less than "
        "half of what quantization lost; clipped tensors at the range with the least error; BatchNorm statistics of "
        "half of the images, tried on the other half."
    )
    return Section("Changes that were tried", note, rows=rows, chart=Chart("change", "top-1"))


def _islands(found: Examination) -> Section:
    rows = [{"module": i.path, "operation": i.function, "why": i.reason} for i in found.islands]
    return Section("Float islands", "Operators that compute in float between two integer layers.", rows=rows)


def _dead(dead: list[DeadChannels]) -> Section:
    rows = [
        {
            "layer": layer.layer,
            "channels": str(layer.channels),
            "all weights 0": str(len(layer.zero)),
            "constant": str(len(layer.constant)),
            "removable": "no, part of a sum or output" if layer.bound else "yes",
            "numbers": _some(layer.dead),
        }
        for layer in sorted(dead, key=lambda layer: -len(layer.dead))
        if layer.dead
    ]
    note = (
        "Channels whose integer weights are all 0, or whose output (behind the ReLU) is one value at every position of "
        "every image here."
    )
    return Section("Dead channels", note, rows=rows, chart=Chart("layer", "constant"))


def _some(numbers: Iterable[int]) -> str:
    shown = list(map(str, numbers))
    return " ".join(shown[:SHOWN_CHANNELS]) + " ..." * (len(shown) > SHOWN_CHANNELS)


def _clipping(clipping: list[Clipping]) -> Section:
    rows: list[Row] = []
    for found in sorted(clipping, key=lambda found: -found.clipped):
        rows.append(
            {
                "behind": found.behind,
                "quantizer": found.quantizer,
                "bits": str(found.bits),
                "range": f"{found.low:.4g}..{found.high:.4g}",
                "seen": f"{found.seen[0]:.4g}..{found.seen[1]:.4g}",
                "clipped %": f"{100 * found.clipped:.3f}",
                "unused codes %": "-" if found.unused is None else f"{100 * found.unused:.1f}",
            }
        )
    note = "Values more than half a step beyond the range (behind the ReLU), and codes that no value took."
    return Section("Ranges of activations", note, rows=rows, chart=Chart("behind", "clipped %"))


def _drift(found: Examination) -> Section:
    rows = [
        {
            "layer": drift.layer,
            "drift": f"{drift.rms:.3f}",
            "worst": f"{drift.worst:+.3f}",
            "channel": str(drift.channel),
            "sigma": f"{drift.spread:.3f}",
        }
        for drift in sorted(found.observed.drift, key=lambda drift: -drift.rms)
    ]
    note = (
        "Mean of each BatchNorm's input in the quantized network against its running mean, in running sigmas: root "
        "mean square over channels and the worst channel.  sigma: median over channels of deviation / running sigma."
    )
    return Section("BatchNorm drift", note, rows=rows, chart=Chart("layer", "drift"), empty="no BatchNorm")
