"""Recorded runs of the original HAWQ, compiled: every stored tensor, by equality."""

from pathlib import Path

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import check_values, stored_values
from tests.utils.hawq import golden
from tvm_benchmark.isa import choose
from tvm_benchmark.plan import make_plan

pytestmark = [pytest.mark.tvm, pytest.mark.data]
QUICK = ("resnet18", "bops_0.5")


def check(shared: Path, arch: str, scheme: str) -> None:
    """Hold what the compiled network stores to the recorded digests and logits, and to the interpreter."""
    recorded = golden.load(shared, arch, scheme)
    graph, images = recorded.graph, recorded.images
    values = stored_values(make_plan(graph, len(images)), choose(), images)
    expected = {name: sha for name, sha in recorded.expected.items() if name in values}
    assert len(expected) > len(recorded.expected) // 2
    assert {name: golden.digest(values[name]) for name in expected} == expected
    logits = values[graph.nodes[-1].name].reshape(len(images), -1)
    np.testing.assert_array_equal(logits, recorded.record["exact_logits"])
    check_values(values, graph, images)


def test_resnet18_of_4_and_8_bits(shared: Path) -> None:
    check(shared, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "scheme"), [row for row in golden.NETWORKS if row != QUICK])
def test_networks(shared: Path, arch: str, scheme: str) -> None:
    check(shared, arch, scheme)
