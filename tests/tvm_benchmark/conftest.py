"""A compiled model as the benchmark sees it, computed by the torch engine, for tests without TVM."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from utils.integer_graph.info import layer_nodes
from utils.integer_graph.ir import Graph
from utils.integer_graph.torch_engine import TorchEngine

Change = Callable[[np.ndarray], np.ndarray]
Install = Callable[..., "FakeCompiler"]


def _same(logits: np.ndarray) -> np.ndarray:
    return logits


class FakeCompiler:
    """``compile_graph`` and ``CompiledModel`` in one: remembers the graph of each folder.

    change: what happens to the logits, to play a wrong model.
    """

    def __init__(self, change: Change = _same) -> None:
        self.change = change
        self.graphs: dict[Path, tuple[Graph, int]] = {}

    def compile_graph(self, graph: Graph, folder: Path, **options: Any) -> None:
        self.graphs[folder] = (graph, options.get("batch", 1))

    def load(self, folder: Path, threads: int = 1) -> "FakeModel":
        return FakeModel(*self.graphs[folder], threads, self.change)


class FakeModel:
    """Takes a second for every weight of a step; a pool comes first."""

    def __init__(self, graph: Graph, batch: int, threads: int, change: Change) -> None:
        self.batch, self.threads, self.change = batch, threads, change
        self._engine = TorchEngine(graph)
        self._layers = layer_nodes(graph)
        sizes = {"weight_bytes": 64, "input_bytes": 32, "output_bytes": 16}
        pool = {"name": "pool", "kind": "max_pool", "macs": 0, "weight_bits": 0, "kernel": "k0", "layers": [], **sizes}
        steps = [
            {
                **pool,
                **{"name": node.name, "kind": "conv", "macs": 1000, "layers": [node.name]},
                "weight_bits": node.attrs["weight_bits"],
            }
            for node in self._layers
        ]
        self.info = {
            "target": "avx2",
            "graph_hash": "0" * 64,
            "weight_bytes": 1 << 20,
            "space_bytes": 1 << 19,
            "steps": [pool, *steps],
        }

    def __call__(self, images: np.ndarray) -> np.ndarray:
        assert images.shape[0] == self.batch
        self._images = torch.from_numpy(images)
        return self.change(self._engine(self._images).numpy())

    def run(self) -> None:
        self._engine(self._images)

    def step_times(self, rounds: int) -> list[float]:
        return [0.5, *(float(node.arrays["weight"].size) for node in self._layers)]


@pytest.fixture
def install_fake(monkeypatch: pytest.MonkeyPatch) -> Install:
    """install_fake(module, change): the module compiles with a fake compiler from now on."""

    def install(module: ModuleType, change: Change = _same) -> FakeCompiler:
        fake = FakeCompiler(change)
        monkeypatch.setattr(module, "compile_graph", fake.compile_graph)
        monkeypatch.setattr(module, "CompiledModel", fake.load)
        return fake

    return install
