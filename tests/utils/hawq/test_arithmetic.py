"""The original's formulas against recorded vectors of its functions, and against small cases worked out by hand."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from utils.hawq import arithmetic
from utils.hawq.arithmetic import Options
from utils.quantization_utils.dyadic import dyadic_array, floor_dyadic, requantize_down, requantize_even

Arrays = dict[str, np.ndarray]
PER_CHANNEL = (1, -1, 1, 1)
WIDE = 16  # multipliers of the original have 31 bits, whatever the output


@pytest.fixture(scope="module")
def units(shared: Path) -> Arrays:
    with np.load(shared / "reference" / "hawq_golden" / "units.npz") as file:
        return dict(file)


def part(units: Arrays, name: str) -> Arrays:
    return {key.removeprefix(f"{name}/"): value for key, value in units.items() if key.startswith(f"{name}/")}


def rescaled(z: np.ndarray, a: np.ndarray, w: np.ndarray, out: np.ndarray) -> np.ndarray:
    ratio = arithmetic.rescaling_ratio(np.float32(a), w, np.float32(out))
    m, e = (x.astype(np.int64).reshape(PER_CHANNEL) for x in dyadic_array(ratio, output_bits=WIDE))
    result: np.ndarray = requantize_even(z.astype(np.int64), m, e)
    return result


# ---- recorded vectors -----------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights(units: Arrays, bits: int) -> None:
    integers, scale = arithmetic.weight_integers(units["weight"], bits, Options())
    np.testing.assert_array_equal(integers, units[f"weight_{bits}/q"], strict=True)
    np.testing.assert_array_equal(scale, units[f"weight_{bits}/scale"], strict=True)


@pytest.mark.data
@pytest.mark.parametrize(("name", "bits"), [("act", 8), ("relu_act", 4)])
def test_activations(units: Arrays, name: str, bits: int) -> None:
    x, recorded = units["act"], part(units, f"{name}_{bits}")
    x = np.maximum(x, 0) if name == "relu_act" else x
    scale = arithmetic.activation_scale(x.min(), x.max(), bits)
    assert scale.dtype == np.float32
    assert scale == recorded["scale"]
    lo, hi = (0, 15) if arithmetic.is_unsigned(bits) else (-128, 127)
    np.testing.assert_array_equal(np.clip(np.rint(np.float32(1) / scale * x), lo, hi), recorded["q"])


@pytest.mark.data
def test_multipliers(units: Arrays) -> None:
    """As rational numbers: a recorded multiplier of 2^31 is 2^30 with the next smaller shift here."""
    recorded = part(units, "frexp")
    m, e = dyadic_array(recorded["scale"], output_bits=WIDE)
    ours = [Fraction(int(a), 1 << int(b)) for a, b in zip(m, e, strict=True)]
    theirs = [Fraction(int(a), 1 << int(b)) for a, b in zip(recorded["m"], recorded["e"], strict=True)]
    assert ours == theirs
    assert (recorded["m"] == 1 << 31).any()
    assert m.min() >= 1 << 30


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "lo", "hi"),
    [
        ("requant_4_asymmetric", 0, 15),
        ("requant_8_asymmetric", 0, 255),
        ("requant_8_symmetric", -128, 127),
        ("requant_16_symmetric", -32768, 32767),
    ],
)
def test_requantize(units: Arrays, name: str, lo: int, hi: int) -> None:
    u = part(units, name)
    free = rescaled(u["z_int"], u["a"], u["w"], u["out_scale"])
    np.testing.assert_array_equal(np.clip(free, lo, hi), u["y"])


@pytest.mark.data
@pytest.mark.parametrize("name", ["add_plain", "add_conv"])
def test_add_is_not_clamped(units: Arrays, name: str) -> None:
    u = part(units, name)
    identity = rescaled(u["wx"], u["ia"], u["iw"], u["out_scale"])
    main = rescaled(u["wy"], u["a"], u["w"], u["out_scale"])
    np.testing.assert_array_equal(identity + main, u["y"])
    assert np.abs(u["y"]).max() > 1 << 15


@pytest.mark.data
def test_average_pool(units: Arrays) -> None:
    u = part(units, "avgpool")
    total = u["int"].astype(np.int64).sum((2, 3), keepdims=True)
    m, e = floor_dyadic(49, int(total.max()))
    np.testing.assert_array_equal(requantize_down(total, m, e), u["y_int"])


@pytest.mark.data
@pytest.mark.parametrize("percentile", [99.9, 99, 90])
def test_percentiles_of_a_tensor(units: Arrays, percentile: float) -> None:
    low, high = arithmetic.weight_bounds(units["act"], Options(percentile, channel_wise=False))
    np.testing.assert_array_equal([low[0], high[0]], units[f"percentile_{percentile:g}/sym"])


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_fill_the_range_of_each_channel(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    steps = np.arange(-top, top + 1, dtype=np.float32)
    weight = np.stack([steps * 0.25, steps * 0.5])
    integers, scale = arithmetic.weight_integers(weight, bits, Options())
    np.testing.assert_array_equal(integers, np.stack([steps, steps]))
    np.testing.assert_array_equal(scale, np.array([0.25, 0.5], np.float32), strict=True)
    integers, scale = arithmetic.weight_integers(weight, bits, Options(channel_wise=False))
    np.testing.assert_array_equal(integers, np.stack([np.rint(steps / 2), steps]))
    np.testing.assert_array_equal(scale, np.array([0.5, 0.5], np.float32), strict=True)


def test_a_percentile_clamps_one_beyond_the_least() -> None:
    weight = np.array([[*range(-10, 90), -1000, 1000]], np.float32)
    low, high = arithmetic.weight_bounds(weight, Options(99))
    assert (low, high) == (-10, 89)  # the 2nd and the 101st of 102: ceil(1.02), ceil(100.98)
    integers, scale = arithmetic.weight_integers(weight, 8, Options(99))
    assert scale == np.float32(89) / np.float32(127)
    assert (integers.min(), integers.max()) == (-128, 127)


def test_indices_of_percentiles() -> None:
    weight = np.arange(25, dtype=np.float32).reshape(1, 25)
    assert [float(x[0]) for x in arithmetic.weight_bounds(weight, Options(90))] == [2, 22]  # ceil(2.5), ceil(22.5)
    tensor = Options(90, channel_wise=False)
    assert [float(x[0]) for x in arithmetic.weight_bounds(weight, tensor)] == [3, 21]  # 22.5 to even, from both ends
    tensor = Options(100, channel_wise=False)
    assert [float(x[0]) for x in arithmetic.weight_bounds(weight, tensor)] == [0, 24]
    assert [float(x[0]) for x in arithmetic.weight_bounds(-weight - 1, tensor)] == [0, -1]  # least: always 0


def test_an_empty_channel_has_the_smallest_scale() -> None:
    integers, scale = arithmetic.weight_integers(np.zeros((1, 4), np.float32), 8, Options())
    assert not integers.any()
    assert scale == np.float32(1e-8) / np.float32(127)


@pytest.mark.parametrize(
    ("low", "high", "bits", "expected"),
    [
        (-1, 3, 8, np.float32(3) / np.float32(127)),
        (-4, 3, 8, np.float32(4) / np.float32(127)),
        (-4, 3, 16, np.float32(4) / np.float32(32767)),
        (0, 3, 4, np.float32(3) / np.float32(15)),
        (-3, 3, 4, np.float32(6) / np.float32(15)),  # unsigned, but as wide as the whole range
        (0, 3, 3, np.float32(1)),
        (0, 0, 8, np.float32(1e-8) / np.float32(127)),
        (0, 0, 4, np.float32(1e-8) / np.float32(15)),
    ],
)
def test_scales_of_activations(low: float, high: float, bits: int, expected: np.float32) -> None:
    scale = arithmetic.activation_scale(np.float32(low), np.float32(high), bits)
    assert scale == expected
    assert scale.dtype == np.float32


def test_only_4_bits_are_unsigned() -> None:
    assert [bits for bits in range(2, 17) if arithmetic.is_unsigned(bits)] == [4]


def test_fold_rounds_after_every_operation() -> None:
    f32 = np.float32
    gamma, beta, mean, var = (np.array([x], np.float32) for x in (-0.7, 0.3, 0.11, 0.9))
    weight, bias = arithmetic.fold(np.full((1, 1, 1, 2), 0.37, np.float32), gamma, beta, mean, var, 1e-5)
    factor = f32(gamma[0] / f32(np.sqrt(f32(var[0] + f32(1e-5)))))
    assert (weight == f32(f32(0.37) * factor)).all()
    assert bias == f32(f32(-mean[0] * factor) + beta[0])
    assert weight.dtype == bias.dtype == np.float32


def test_fold_of_a_variance_below_zero_is_not_finite() -> None:
    one = np.ones(1, np.float32)
    weight, _ = arithmetic.fold(np.ones((1, 1, 1, 1), np.float32), one, one, one, -one, 1e-5)
    assert np.isnan(weight).all()


def test_biases_multiply_by_the_reciprocal_and_stop_at_2_to_31() -> None:
    scale, a = np.array([0.5, 0.5, 0.5, 1e-10, 1e-10], np.float32), np.float32(0.5)
    bias = np.array([0.125, 0.375, 0.625, 1, -1], np.float32)  # 0.5, 1.5 and 2.5 steps: halves to even
    result = arithmetic.bias_integers(bias, scale, a)
    assert result.tolist() == [0, 2, 2, 2**31, -(2**31)]
    f32 = np.float32
    s, b = f32(0.0371), f32(4.2)
    expected = np.rint(f32(f32(1) / f32(s * a)) * b)
    assert arithmetic.bias_integers(np.array([b]), np.array([s]), a) == expected


def test_the_product_of_scales_is_rounded_to_float32() -> None:
    a, w, out = np.float32(0.0371), np.float32(0.00236864), np.float32(0.51478654)
    ratio = arithmetic.rescaling_ratio(a, np.array([w]), out)
    assert ratio == float(np.float32(float(a) * float(w))) / float(out)
    assert ratio != float(a) * float(w) / float(out)


def test_relu6_bound_rounds_in_float32() -> None:
    a, w = np.float32(0.0371), np.linspace(1e-4, 3e-3, 500, dtype=np.float32)
    bounds = arithmetic.relu6_bound(a, w)
    assert bounds.dtype == np.float32
    assert [float(b) for b in bounds] == [float(np.rint(np.float32(np.float32(6) / a) / x)) for x in w]
    assert np.isinf(arithmetic.relu6_bound(np.float32(1e-20), np.array([1e-30], np.float32))).all()
