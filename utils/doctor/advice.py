"""What to do about a network, in the order of what it gains: only what was tried and gained more than chance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from utils.doctor.examine import Examination, LayerFacts, Raised, Widened
from utils.doctor.observe import DeadChannels
from utils.doctor.outcomes import Gain

SHOWN_CHANNELS = 8


@dataclass(frozen=True)
class Advice:
    """One step.  text: a whole sentence with its estimate; gain: what the trial gained, None where it only saves."""

    text: str
    gain: Gain | None


def advise(found: Examination) -> list[Advice]:
    """Everything worth doing, the largest gain in top-1 first, what only saves cost last.

    A change is advised where top-1 and loss both gain more than two standard errors.  Each estimate is of that change
    alone, without training after it; they do not add up.
    """
    widened = [widened for widened in found.widened if widened.gain.certain]
    steps = [Advice(_widen_text(step), step.gain) for step in widened]
    steps += [Advice(_raise_text(step), step.gain) for step in _cheapest(found.raised, widened)]
    if found.together and found.together[-1].gain.certain:
        steps.append(Advice(_raise_text(found.together[-1]), found.together[-1].gain))
    again = found.reestimated
    if again is not None and again.certain:
        steps.append(Advice(f"re-estimate BatchNorm statistics (--reestimate-bn 16): {_gain_text(again)}", again))
    steps.sort(key=lambda step: (-step.gain.top1, -step.gain.loss) if step.gain else (0.0, 0.0))
    facts = {fact.layer.name: fact for fact in found.layers}
    removable = [dead for dead in found.observed.dead if dead.dead and not dead.bound]
    removable.sort(key=lambda dead: -len(dead.dead) / dead.channels * facts[dead.layer].bops_share)
    return [*steps, *(Advice(_remove_text(dead, facts), None) for dead in removable)]


def _cheapest(raised: Sequence[Raised], widened: Sequence[Widened]) -> Iterator[Raised]:
    """Of every layer the smallest width that gains as much as the best one, but for one standard error.

    Nothing where another range for the tensor it reads, which costs nothing, does as much.
    """
    ranges = {step.found.quantizer: step.gain for step in widened}
    for _, group in groupby(raised, key=lambda step: step.layers):
        steps = [step for step in group if step.gain.certain]
        if not steps:
            continue
        best = max(steps, key=lambda step: step.gain.top1)
        enough = best.gain.top1 - best.gain.top1_error
        free = ranges.get(best.reads)
        if free is None or free.top1 < enough:
            yield min((step for step in steps if step.gain.top1 >= enough), key=lambda step: step.width)


def _raise_text(step: Raised) -> str:
    cost = f"{step.bops:+.1f} % BOPS, {step.size:+.1f} % size"
    which = (
        step.layers[0] if len(step.layers) == 1 else f"{len(step.layers)} layers together ({', '.join(step.layers)})"
    )
    return f"raise {which} to {step.width} bit: {_gain_text(step.gain)}, {cost}"


def _widen_text(step: Widened) -> str:
    found = step.found
    low, high = (float(v) for v in found.best)
    return (
        f"widen the range behind {found.behind} ({found.quantizer}) from {found.low:.4g}..{found.high:.4g} to "
        f"{low:.4g}..{high:.4g}, where {100 * found.clipped:.2f} % of values are clipped: {_gain_text(step.gain)}; "
        "calibrate again, or train with --act-range lsq"
    )


def _remove_text(dead: DeadChannels, facts: Mapping[str, LayerFacts]) -> str:
    share, fact = len(dead.dead) / dead.channels, facts[dead.layer]
    numbers = ", ".join(map(str, dead.dead[:SHOWN_CHANNELS])) + (", ..." if len(dead.dead) > SHOWN_CHANNELS else "")
    return (
        f"remove {len(dead.dead)} dead of {dead.channels} channels of {dead.layer} (numbers {numbers}): "
        f"+0.0 accuracy here, {-share * fact.bops_share:.1f} % BOPS, "
        f"{-share * fact.size_share:.1f} % size, what reads them not counted"
    )


def _gain_text(gain: Gain) -> str:
    return f"{gain.top1:+.1f} accuracy estimated (± {gain.top1_error:.1f}), loss {-gain.loss:+.4f}"
