"""Recorded runs of the original: every activation, the output and the logits, integer by integer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.utils.hawq import golden
from utils.integer_graph import interpreter
from utils.integer_graph.torch_engine import TorchEngine


def check(values: dict[str, np.ndarray], recorded: golden.Golden) -> None:
    graph, record = recorded.graph, recorded.record
    assert {name: golden.digest(values[name]) for name in recorded.expected} == recorded.expected
    output = values[graph.nodes[-1].inputs[0]].reshape(record["exact_output_int"].shape)
    assert np.array_equal(output, record["exact_output_int"])
    assert np.array_equal(values["logits"], record["exact_logits"])
    assert values["logits"].dtype == record["exact_logits"].dtype


@pytest.mark.data
@pytest.mark.parametrize(("arch", "scheme"), golden.NETWORKS)
def test_torch_engine(shared: Path, arch: str, scheme: str) -> None:
    recorded = golden.load(shared, arch, scheme)
    assert recorded.graph.meta["scheme"] == scheme
    values = TorchEngine(recorded.graph).run(torch.from_numpy(recorded.images))
    check({name: value.numpy() for name, value in values.items()}, recorded)


@pytest.mark.data
@pytest.mark.parametrize(("arch", "scheme"), golden.NETWORKS)
def test_interpreter(shared: Path, arch: str, scheme: str) -> None:
    recorded = golden.load(shared, arch, scheme)
    check(interpreter.run(recorded.graph, recorded.images, keep=True), recorded)
