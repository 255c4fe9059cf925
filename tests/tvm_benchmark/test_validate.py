"""The compiled model in the place of the torch engine: compiled once, compared with it, never trusted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tvm_benchmark.small_graphs import images, small_graph
from tvm_benchmark.artifact import CompiledModel
from tvm_benchmark.validate import Checked, compiled
from utils.errors import UserError
from utils.integer_graph.torch_engine import TorchEngine

pytestmark = pytest.mark.tvm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """A small model, batches of 4."""
    return compiled(small_graph(), tmp_path_factory.mktemp("model"), 4, 1, lambda line: None)


def test_logits_are_those_of_torch(model: CompiledModel) -> None:
    engine, pixels = TorchEngine(small_graph()), torch.from_numpy(images(11))
    checked = Checked(model, engine, 6)
    assert torch.equal(checked(pixels), engine(pixels))
    assert checked.unchecked == 0


def test_only_the_first_images_are_compared(model: CompiledModel) -> None:
    engine, seen = TorchEngine(small_graph()), list[int]()

    def reference(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return engine(pixels)

    checked = Checked(model, reference, 6)
    for _ in range(3):
        checked(torch.from_numpy(images(4)))
    assert seen == [4, 2]


def test_a_difference_is_an_error(model: CompiledModel) -> None:
    engine = TorchEngine(small_graph(1))
    with pytest.raises(UserError, match=r"the compiled model is wrong: .* and evaluate with --engine torch"):
        Checked(model, engine, 6)(torch.from_numpy(images(4)))


def test_compiles_again_only_for_something_else(tmp_path: Path) -> None:
    said: list[str] = []
    for seed, batch, expected in ((0, 2, True), (0, 2, False), (1, 2, True), (1, 99, True), (1, 50, False)):
        said.clear()
        model = compiled(small_graph(seed), tmp_path, batch, 1, said.append)
        assert bool(said) == expected
        assert model.batch == min(batch, 8)
    (tmp_path / "model.json").write_text("{}")
    said.clear()
    compiled(small_graph(1), tmp_path, 50, 1, said.append)
    assert said[0].startswith("compiling for ")
    assert said[0].endswith(f"batches of 8, into {tmp_path}")
