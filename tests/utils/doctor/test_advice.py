"""Networks made sick on purpose: the sickness is found, named first, and its cure advised; a healthy one gets none."""

import re

import pytest
import torch

from bit_config import Rule, Scheme
from tests.utils.doctor.patients import images, labelled, narrow, network
from utils.doctor.advice import Advice, advise
from utils.doctor.examine import Examination, Raised, examine
from utils.doctor.outcomes import Gain
from utils.quantization_utils.prepare import QuantizedModel


def diagnose(model: QuantizedModel) -> tuple[Examination, list[Advice]]:
    found = examine(model, 16, images())
    return found, advise(found)


def gains(texts: list[Advice]) -> list[float]:
    return [step.gain.top1 for step in texts if step.gain is not None]


def test_healthy_network_needs_nothing() -> None:
    found, steps = diagnose(network())
    assert steps == []
    assert found.quantized.top1 > 80
    assert found.raised == []
    assert found.islands == []


def test_one_layer_at_2_bits_is_named_first_and_raised() -> None:
    healthy = examine(network(), 16, images()).quantized.top1
    found, steps = diagnose(network(narrow("block2", 2)))
    assert found.quantized.top1 < healthy - 8
    assert max(found.layers, key=lambda fact: fact.damage.loss).layer.name == "block2.0"
    assert re.match(r"raise block2\.0 to (4|8) bit: \+\d+\.\d accuracy estimated \(± \d\.\d\)", steps[0].text)
    assert [step.text for step in steps if step.text.startswith("raise")] == [steps[0].text]
    assert steps[0].gain is not None
    assert steps[0].gain.top1 == pytest.approx(healthy - found.quantized.top1, abs=5)


def test_layers_that_only_help_together_are_raised_together() -> None:
    """Every layer at 2 bits: no single one brings back half of the loss, so several are tried, the worst first."""
    low = network(Scheme("low", (Rule(".*", 2),), ends="free"))
    found, steps = diagnose(low)
    lost = found.floating.top1 - found.quantized.top1
    assert lost > 40
    ranked = sorted(found.layers, key=lambda fact: -fact.damage.loss)
    last = found.together[-1]
    assert last.layers == tuple(fact.layer.name for fact in ranked[: len(last.layers)])
    assert last.gain.top1 > lost / 2
    assert all(step.gain.top1 < lost / 2 for step in [*found.raised, *found.together[:-1]])
    names = ", ".join(last.layers)
    assert steps[0].text.startswith(f"raise {len(last.layers)} layers together ({names}) to 8 bit: +")
    assert all(len(step.layers) == 1 for step in found.raised)


def test_cost_of_a_raise_is_that_of_the_whole_network() -> None:
    found, steps = diagnose(network(narrow("block2", 2)))
    (facts,) = [fact for fact in found.layers if fact.layer.name == "block2.0"]
    for step in found.raised:
        factor = step.width / 2
        assert step.bops == pytest.approx(facts.bops_share * (factor - 1))
        assert step.size == pytest.approx(facts.size_share * (factor - 1))
    advised = next(step for step in found.raised if f" {step.width} bit" in steps[0].text)
    assert f"{advised.bops:+.1f} % BOPS, {advised.size:+.1f} % size" in steps[0].text


def test_clipped_quantizer_is_named_first_and_widened() -> None:
    model = network()
    name, quantizer = next((n, q) for n, q in model.activation_quantizers().items() if n.startswith("block2"))
    quantizer.set_range(quantizer.x_min, quantizer.x_max / 25)
    found, steps = diagnose(model)
    worst = max(found.observed.clipping, key=lambda clipping: clipping.clipped)
    assert worst.quantizer == name
    assert worst.behind == "block2.0"
    assert worst.clipped > 0.2
    assert steps[0].text.startswith(f"widen the range behind block2.0 ({name}) from 0..{worst.high:.4g} to 0..")
    assert gains(steps) == sorted(gains(steps), reverse=True)
    assert float(quantizer.x_max) == pytest.approx(worst.high, rel=1e-5), "the trial must put the range back"


def test_drifted_batchnorm_is_named_first_and_reestimated() -> None:
    model = network()
    bn = model.model.block2[1]
    with torch.no_grad():
        bn.running_mean += 3 * bn.running_var.sqrt()
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    found, steps = diagnose(model)
    worst = max(found.observed.drift, key=lambda drift: drift.rms)
    assert worst.layer == "block2.0"
    assert worst.rms == pytest.approx(3, abs=0.4)
    assert steps[0].text.startswith("re-estimate BatchNorm statistics (--reestimate-bn 16): +")
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_dead_channels_are_named_and_removed() -> None:
    model = network()
    with torch.no_grad():
        model.model.block2[0].weight[[1, 4]] = 0
        model.model.block1[1].weight[2] = 0
        model.model.block1[1].bias[2] = -1
    found, steps = diagnose(model)
    dead = {layer.layer: layer for layer in found.observed.dead}
    assert (dead["block2.0"].zero, dead["block2.0"].bound) == ((1, 4), False)
    assert set(dead["block2.0"].constant) == {1, 4}
    assert 2 in dead["block1.0"].dead
    texts = [step.text for step in steps if step.gain is None]
    share = next(fact for fact in found.layers if fact.layer.name == "block2.0").bops_share
    expected = f"remove 2 dead of 12 channels of block2.0 (numbers 1, 4): +0.0 accuracy here, {-share / 6:.1f} % BOPS"
    assert any(text.startswith(expected) for text in texts)
    assert steps[-1].gain is None, "what only saves comes last"


def test_examination_leaves_the_model_as_it_was() -> None:
    model = network(narrow("block2", 4))
    pixels, _ = labelled(16, 9)
    before = model(pixels)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    examine(model, 16, images(64))
    assert torch.equal(model(pixels), before)
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def certain(top1: float, error: float = 0.5) -> Gain:
    return Gain(1.0, 0.1, top1, error)


def test_cheapest_width_within_one_standard_error() -> None:
    found = examine(network(), 16, images(64))
    four, eight = Raised(("a",), 4, "q", certain(9.6), 1, 1), Raised(("a",), 8, "q", certain(10.0), 2, 2)
    more = Raised(("b",), 8, "r", certain(20.0), 2, 2)
    chance = Raised(("c",), 8, "s", certain(0.9), 2, 2)
    raised = [four, eight, more, chance]
    texts = [step.text for step in advise(Examination(**{**vars(found), "raised": raised, "reestimated": None}))]
    assert [text.split(":")[0] for text in texts] == ["raise b to 8 bit", "raise a to 4 bit"]


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (Gain(1.0, 0.4, 3.0, 1.4), True),
        (Gain(1.0, 0.6, 3.0, 1.4), False),
        (Gain(1.0, 0.4, 3.0, 1.6), False),
        (Gain(-1.0, 0.1, 3.0, 1.0), False),
        (Gain(0.0, 0.0, 0.0, 0.0), False),
        (Gain(1.0, float("inf"), 100.0, float("inf")), False),
    ],
)
def test_certain_is_two_standard_errors_in_both(gain: Gain, expected: bool) -> None:
    assert gain.certain is expected
