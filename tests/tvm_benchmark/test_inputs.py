"""Images become integers as the interpreter says."""

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import KERNEL_TARGETS, check, clamp_attrs, depthwise, finished, image
from tvm_benchmark.isa import Target
from utils.integer_graph.ops import make_node

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=lambda target: target.name)
FIRST = pytest.mark.parametrize("target", KERNEL_TARGETS[:1], ids=lambda target: target.name)


@EACH
@pytest.mark.parametrize("signed", [False, True])
def test_photographs(target: Target, signed: bool) -> None:
    check(finished([image((3, 5, 70), signed=signed)]), target, batch=3)


@FIRST
@pytest.mark.parametrize("shape", [(1, 4, 20), (3, 3, 16), (3, 4, 33), (3, 2, 7), (1, 1, 1), (2, 3, 64)], ids=str)
def test_shapes(target: Target, shape: tuple[int, int, int]) -> None:
    check(finished([image(shape)]), target, batch=2)


@FIRST
@pytest.mark.parametrize(("bits", "signed"), [(4, True), (16, True), (16, False)])
def test_storage(target: Target, bits: int, signed: bool) -> None:
    check(finished([image((3, 4, 20), bits=bits, signed=signed)]), target)


@FIRST
def test_a_halo_is_left_alone(target: Target) -> None:
    x = image((3, 5, 20), signed=True)
    check(finished([x, depthwise(x, (3, 3), padding=(1, 1, 1, 1))]), target, batch=2)


@EACH
@pytest.mark.parametrize(
    ("shape", "signed"),
    [([3, 4, 19], True), ([1, 3, 5], False), ([11], True), ([3, 3, 224], True), ([3, 2, 299], True)],
)
def test_floats_are_rounded_to_even_and_clamped(target: Target, shape: list[int], signed: bool) -> None:
    """Images are multiples of 0.02 in [-2.56, 2.54]; 25 makes every other one a half."""
    lo, hi = (-50, 60) if signed else (0, 255)
    attrs = {"shape": shape, "inverse_scale": 25.0, "lo": lo, "hi": hi, "bits": 8, "signed": signed}
    check(finished([make_node("in", "quantize", attrs=attrs)]), target, batch=2)


@EACH
@pytest.mark.parametrize("inverse", [0.3, 1000.0, 3e38])
def test_floats_of_any_scale(target: Target, inverse: float) -> None:
    """Products that are not exact, and infinite ones; read by a convolution that wants a frame of zeros."""
    attrs = {"shape": [3, 5, 18], "inverse_scale": float(np.float32(inverse)), **clamp_attrs()}
    x = make_node("in", "quantize", attrs=attrs)
    check(finished([x, depthwise(x, (3, 3), padding=(1, 1, 1, 1))]), target, batch=2)
