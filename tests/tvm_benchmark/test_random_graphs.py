"""Random networks of every operator and rounding, compiled: every stored tensor equals the interpreter's."""

import pytest

from tests.tvm_benchmark.kernels import HERE, check
from tests.utils.integer_graph.random_graphs import build
from tvm_benchmark.isa import Target
from utils.quantization_utils.dyadic import ROUNDING

pytestmark = pytest.mark.tvm
EACH = pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)


@EACH
@pytest.mark.parametrize("rounding", list(ROUNDING))
@pytest.mark.parametrize("seed", range(2))
def test_random_networks(target: Target, seed: int, rounding: str) -> None:
    check(build(seed, rounding, 6, islands=False), target, batch=1 + seed % 2, seed=seed)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("seed", range(2, 60))
def test_many_random_networks(target: Target, seed: int) -> None:
    check(build(seed, list(ROUNDING)[seed % 3], 8, islands=False), target, batch=1 + seed % 2, seed=seed)
