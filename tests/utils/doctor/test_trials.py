"""A trial is what the changed network gives, and everything is back as it was afterwards."""

import pytest
import torch

from bit_config import Rule, Scheme
from tests.utils.doctor.patients import Small, images, narrow, network, trained_state
from tests.utils.doctor.test_observe import Branches
from utils.api import calibrate, quantize
from utils.doctor.observe import observe
from utils.doctor.outcomes import Gain, gain, outcomes
from utils.doctor.trials import is_wider, raised_bits, subject, try_raise, try_reestimate, try_widen
from utils.experiment import quantize_module
from utils.quantization_utils.training import configure


def same(found: Gain, expected: Gain) -> None:
    for name, value in vars(expected).items():
        assert vars(found)[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("learned", [False, True])
def test_raised_weights_give_the_network_of_that_scheme(learned: bool) -> None:
    """Only the weights were narrow, so no new ranges are needed: the network at 8 bits is known exactly."""
    eight, sick = network(), network(narrow("block2", 2))
    if learned:
        configure(eight, act_range="lsq")
        configure(sick, act_range="lsq")
        layer = eight.weight_layers()["block2.0"]
        layer.learned = None
    seen = images(96)
    before = outcomes(sick.eval(), seen)
    same(try_raise(subject(sick, 16, seen), ["block2.0"], 8), gain(before, outcomes(eight.eval(), seen)))


def test_raised_input_gets_a_range_of_its_own() -> None:
    """The tensor in front of block2 had 2 bits; the trial needs its range at 8 bits, which is searched."""
    scheme = Scheme("narrow", (Rule("block2", (8, 2)), Rule(".*", 8)))
    sick, healthy = network(scheme), network()
    seen = images(192)
    before, full = outcomes(sick.eval(), seen), outcomes(healthy.eval(), seen)
    lost = before.loss - full.loss
    assert lost > 0.03
    found = try_raise(subject(sick, 16, seen), ["block2.0"], 8)
    assert found.loss == pytest.approx(lost, rel=0.2)


def test_layers_that_read_one_tensor_are_raised_together() -> None:
    torch.manual_seed(0)
    low = Scheme("low", (Rule(".*", 4),), ends="free")
    model, _, _ = quantize_module(Branches(), torch.zeros(1, 2, 4, 4), low)
    bits = raised_bits(model, ["left"], 8)
    assert (bits["left"].weight, bits["left"].activation) == (8, 8)
    assert (bits["right"].weight, bits["right"].activation) == (4, 8)
    assert (bits["free"].weight, bits["free"].activation) == (4, 4)


def test_widened_range_is_tried_and_put_back() -> None:
    model = network()
    name, quantizer = next((n, q) for n, q in model.activation_quantizers().items() if n.startswith("block1"))
    configure(model, act_range="lsq")
    assert quantizer.learned is not None
    full = float(quantizer.scale)
    short = full / 10
    with torch.no_grad():
        quantizer.learned.fill_(short)
    seen = images(96)
    patient = subject(model, 16, seen)
    clipping = next(c for c in observe(model, seen.inputs()).clipping if c.quantizer == name)
    assert is_wider(clipping)
    found = try_widen(patient, clipping)
    assert float(quantizer.scale) == pytest.approx(short)
    with torch.no_grad():
        quantizer.learned.fill_(full)
    assert found.top1 == pytest.approx(gain(patient.before, outcomes(model, seen)).top1, abs=3)
    fits = next(c for c in observe(model, seen.inputs()).clipping if c.quantizer == name)
    assert not is_wider(fits)


def test_reestimation_uses_the_other_half() -> None:
    """Each half is judged with the mean and variance of the other one, so nothing is tried on what it was fitted to."""
    model = network()
    norms = [m for m in model.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    seen = images(128)
    patient = subject(model, 16, seen)
    found = try_reestimate(patient)
    assert found is not None
    assert [int(bn.num_batches_tracked) for bn in norms] == [60, 60, 60]
    assert not found.certain, "the statistics were right already"
    with torch.no_grad():
        norms[0].running_mean += 3 * norms[0].running_var.sqrt()
    sick = try_reestimate(subject(model, 16, seen))
    assert sick is not None
    assert sick.certain


def test_reestimation_needs_batchnorms_and_images() -> None:
    model = quantize(Branches(), torch.zeros(1, 2, 4, 4), "uniform8")
    calibrate(model, [torch.randn(8, 2, 4, 4)])
    few = images(2)
    assert try_reestimate(subject(network(), 16, few)) is None
    pixels = type(few)([(torch.randn(8, 2, 4, 4), torch.arange(8) % 3)], lambda x: x)
    assert try_reestimate(subject(model, 16, pixels)) is None


def test_subject_is_the_quantized_network() -> None:
    """Outcomes differ from those of the float network it was made of."""
    module = Small()
    module.load_state_dict(trained_state())
    seen = images(96)
    low = network(Scheme("low", (Rule(".*", 3),), ends="free"))
    low.enable(False)
    patient = subject(low, 16, seen)
    assert patient.before.loss != pytest.approx(outcomes(module.eval(), seen).loss, rel=1e-3)
