"""Codes with and without a zero point, against numpy formulas of MQBench's definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.quantization_utils.calibrators import METHODS
from utils.quantization_utils.coded import (
    MIN_SCALE,
    Code,
    CodedLayer,
    CodedQuantizer,
    CodedSearch,
    calibrate_codes,
    least_error_factor,
    make_code,
    observer_for,
)
from utils.quantization_utils.fold_bn import affine_of, fold
from utils.quantization_utils.observers import is_finite
from utils.quantization_utils.quant_modules import Quantizer, QuantLayer

TOLERANCE = 0.005  # of the histogram's error against the values', as stated for the other searches
CODES = {
    "asymmetric": lambda bits: make_code(bits, affine=True, narrow=False),
    "symmetric": lambda bits: make_code(bits, affine=False, narrow=True),
    "full": lambda bits: make_code(bits, affine=False, narrow=False),
}


def numpy_fake(x: np.ndarray, low: float, high: float, bits: int, kind: str) -> np.ndarray:
    """D.1 of the definitions: range with zero, scale, zero point, codes, and back; float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    if kind == "asymmetric":
        qmin, qmax = 0, 2**bits - 1
        scale = max((high - low) / (qmax - qmin), MIN_SCALE)
        zero = np.clip(0 - np.rint(low / scale), qmin, qmax)
    else:
        qmin, qmax = -(2 ** (bits - 1)) + (kind == "symmetric"), 2 ** (bits - 1) - 1
        scale, zero = max(max(-low, high) / ((qmax - qmin) / 2), MIN_SCALE), 0
    return scale * (np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.7), (0.0, 3.1), (-2.2, 0.0), (-0.01, 5.0), (1.0, 2.0)])
def test_activations(kind, bits, low, high):
    code = CODES[kind](bits)
    quantizer = CodedQuantizer(code, bits, signed=True)
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    quantizer.enabled = True
    x = torch.empty(4000).uniform_(-4, 6)
    expected = numpy_fake(x.double().numpy(), low, high, bits, kind)
    step = float(quantizer.scale)
    off = np.abs(quantizer(x).double().numpy() - expected)
    ties = np.abs(np.abs(x.double().numpy() / step % 1) - 0.5) < 1e-4
    assert off[~ties].max() <= 1e-5 * max(1, np.abs(expected).max())
    assert not ties.all()
    assert float(quantizer(torch.zeros(1))) == 0  # zero is a code, so zero padding pads with the zero point
    lo, hi = quantizer.bounds()
    assert hi - lo == code.hi - code.lo
    integers = quantizer.integers(quantizer(x))
    assert lo <= int(integers.min())
    assert int(integers.max()) <= hi


def test_an_empty_range_stays_finite():
    for make in CODES.values():
        scale, zero = make(8).scale_and_zero(torch.zeros(2), torch.zeros(2))
        assert scale.tolist() == [MIN_SCALE] * 2
        assert zero.tolist() == [0] * 2


def conv_and_bn(gamma: torch.Tensor) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, bn = nn.Conv2d(3, len(gamma), 3, bias=False), nn.BatchNorm2d(len(gamma)).eval()
    with torch.no_grad():
        bn.weight.copy_(gamma)
        bn.bias.normal_()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return conv, bn


GAMMA = torch.tensor([1.5, -0.7, 0.3, -2.0, 1e-3, -1.0])


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])  # of full codes every channel's largest weight is a tie
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights(kind, folded, bits):
    conv, bn = conv_and_bn(GAMMA)
    layer = CodedLayer(conv, bn, bits, CODES[kind](bits), folded).eval()
    calibrate_codes(layer, "minmax", 2.0)
    layer.enabled = True
    weight, k = conv.weight.detach().double().numpy(), affine_of(bn)[0].detach().double().numpy()
    source = weight * k.reshape(-1, 1, 1, 1) if folded else weight
    rows = [numpy_fake(row, row.min(), row.max(), bits, kind) for row in source]
    expected = np.stack(rows) * (1 if folded else k.reshape(-1, 1, 1, 1))
    x = torch.randn(2, 3, 5, 5)
    shift = affine_of(bn)[1].double()
    with torch.no_grad():
        result = nn.functional.conv2d(x.double(), torch.from_numpy(expected), shift)
        found = layer(x)
    close = np.isclose(found.numpy(), result.numpy(), atol=1e-4).mean()
    assert close > 0.99  # a weight on a tie may fall to either side
    assert layer.integer_weights().weight.dtype == torch.int16


@torch.no_grad()
def lemma_difference(kind: str, gamma: torch.Tensor, weights: list[float] | None = None) -> float:
    """The largest difference of the folded weights, quantized before and after folding, relative to their scale.

    weights: the values that every channel takes turns with.
    """
    conv, bn = conv_and_bn(gamma)
    if weights is not None:
        conv.weight.copy_(torch.tensor(weights * 27)[:27].reshape(3, 3, 3).expand_as(conv.weight))
    found = []
    for folded in (True, False):
        layer = CodedLayer(conv, bn, 4, CODES[kind](4), folded).eval()
        calibrate_codes(layer, "minmax", 2.0)
        weight, scale = layer.integer_weights().weight, layer.integer_weights().scale
        found.append(weight.double() * scale.double().reshape(-1, 1, 1, 1))
    step = fold(conv.weight, None, bn)[0].abs().amax((1, 2, 3)) / 7
    return float(((found[0] - found[1]).abs() / step.reshape(-1, 1, 1, 1)).max())


def test_folding_changes_nothing_for_symmetric_narrow_ranges():
    assert lemma_difference("symmetric", GAMMA) < 1e-5


def test_folding_changes_full_codes_where_a_factor_is_negative():
    """The lowest code has no counterpart."""
    assert lemma_difference("full", GAMMA.abs(), [7.4, -7.2, 3.0]) < 1e-5
    assert lemma_difference("full", GAMMA, [7.4, -7.2, 3.0]) > 0.9


def test_folding_changes_asymmetric_codes_only_where_the_zero_point_is_a_tie():
    """(high - low) / s is whole, so turned ends give the turned zero point, but for rounding a half."""
    power = torch.tensor([1.0, -1.0, 0.5, -2.0])  # with the running variance below, factors are exact
    assert lemma_difference("asymmetric", GAMMA) < 1e-5
    assert zero_points([-1.4, 13.6, 3.0], power) == [1, 14, 1, 14]
    assert zero_points([-1.5, 13.5, 3.0], power) == [2, 14, 2, 14]  # 15 - 2 is not 14


def zero_points(weights: list[float], gamma: torch.Tensor) -> list[float]:
    """Of weights that are quantized after folding a BatchNorm whose factors are gamma; 4 bits, codes 0 to 15."""
    conv, bn = conv_and_bn(gamma)
    bn.eps = 0.0
    bn.running_var.fill_(1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(weights * 9).reshape(3, 3, 3).expand_as(conv.weight))
    layer = CodedLayer(conv, bn, 4, CODES["asymmetric"](4), folded=True)
    calibrate_codes(layer, "minmax", 2.0)
    return layer.zero.tolist()


def test_symmetric_narrow_codes_are_those_of_the_integer_graph():
    conv, bn = conv_and_bn(GAMMA)
    coded, ours = CodedLayer(conv, bn, 8, CODES["symmetric"](8), folded=True), QuantLayer(conv, bn, 8)
    calibrate_codes(coded, "minmax", 2.0)
    first, second = coded.eval().integer_weights(), ours.eval().integer_weights()
    torch.testing.assert_close(first.scale, second.scale, rtol=1e-6, atol=0)
    assert float((first.weight == second.weight).double().mean()) > 0.99


def test_one_range_for_a_layer():
    conv, bn = conv_and_bn(GAMMA)
    layer = CodedLayer(conv, bn, 4, CODES["asymmetric"](4), folded=False)
    layer.per_channel = False
    for method in ("minmax", "mse"):
        calibrate_codes(layer, method, 2.0)
        assert len(set(layer.learned.tolist())) == len(set(layer.zero.tolist())) == 1
    assert layer.zero.shape == (6,)


def direct_factor(values: np.ndarray, bits: int, kind: str, power: float, candidates: int) -> tuple[float, list[float]]:
    errors = []
    for i in range(candidates):
        low, high = values.min() * (1 - 0.01 * i), values.max() * (1 - 0.01 * i)
        errors.append(float((np.abs(numpy_fake(values, low, high, bits, kind) - values) ** power).mean()))
    return 1 - 0.01 * int(np.argmin(errors)), errors


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_least_error(kind, bits, power):
    rows = torch.randn(3, 500, dtype=torch.float64) + torch.tensor([[0.0], [1.0], [-3.0]], dtype=torch.float64)
    found = least_error_factor(rows, rows.amin(1), rows.amax(1), CODES[kind](bits), 80, power)
    for factor, row in zip(found.tolist(), rows.numpy(), strict=True):
        low, high = min(row.min(), 0), max(row.max(), 0)
        expected, errors = direct_factor(row, bits, kind, power, 80)
        assert factor == pytest.approx(expected), (low, high, errors)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_histogram_is_as_good_as_the_values(kind, bits):
    x = torch.cat([torch.randn(20_000) * 0.7 + 0.8, torch.tensor([9.0])])
    search = CodedSearch(CODES[kind](bits), 2.0)
    for part in x.split(3_000):
        search.update(part)
    low, high = (float(v) for v in search.result())
    values = x.double().numpy()
    error = float(((numpy_fake(values, low, high, bits, kind) - values) ** 2).mean())
    assert error <= min(direct_factor(values, bits, kind, 2.0, 95)[1]) * (1 + TOLERANCE)


def test_averaged_searches():
    code, batches = CODES["asymmetric"](4), [torch.randn(500) + i for i in range(3)]
    observer = observer_for(CodedQuantizer(code, 4, signed=True), "ema_mse", 99.99, 2.0)
    low = high = None
    for batch in batches:
        observer.update(batch)
        search = CodedSearch(code, 2.0)
        search.update(batch)
        new = [float(v) for v in search.result()]
        low, high = new if low is None else (0.9 * low + 0.1 * new[0], 0.9 * high + 0.1 * new[1])
    assert [float(v) for v in observer.result()] == pytest.approx([low, high])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CODES)
def test_odd_batches_give_ranges_or_are_refused(method, kind):
    quantizer = CodedQuantizer(CODES[kind](8), 8, signed=True)
    for batch in (torch.zeros(2, 3), torch.full((2, 3), 2.5), torch.full((1,), -1.0)):
        observer = observer_for(quantizer, method, 99.99, 2.0)
        observer.update(batch)
        quantizer.set_range(*observer.result())
        assert np.isfinite(float(quantizer.scale))
        assert quantizer.bounds()[0] <= 0 <= quantizer.bounds()[1]
    observer = observer_for(quantizer, method, 99.99, 2.0)
    observer.update(torch.tensor([1.0, float("nan")]))
    assert not is_finite(*observer.result())


def test_other_quantizers_have_the_observers_of_the_integer_graph():
    assert not isinstance(observer_for(Quantizer(8, signed=True), "mse", 99.99, 2.0), CodedSearch)
    assert isinstance(observer_for(CodedQuantizer(Code(0, 255, True), 8, True), "mse", 99.99, 2.0), CodedSearch)
