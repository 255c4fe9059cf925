"""Whole networks compiled through TVM: every logit and every stored tensor, by equality."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import tvm_equality
from benchmarks.tvm_equality import CASES, Counts, cases_of, compare, main, measure
from tests.tvm_benchmark.kernels import HERE
from utils import api
from utils.errors import UserError
from utils.integer_graph.ir import Graph
from utils.random_networks import calibrated, random_images

pytestmark = pytest.mark.tvm
PREPROCESS = api.Preprocess(resize=None, input_size=13)
LARGE = [(arch, scheme) for arch, schemes in CASES.items() for scheme in schemes]


class Mixture(nn.Module):
    """One of everything that classifiers are made of, on 13x13 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(24, 24, 5, 1, 2, groups=24), nn.BatchNorm2d(24), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1))
        self.grouped = nn.Conv2d(24, 36, 3, 1, 1, groups=3)
        self.left = nn.Conv2d(36, 20, 1)
        self.right = nn.Conv2d(36, 16, (1, 3), 1, (0, 1))
        self.shortcut = nn.Conv2d(36, 36, 1)
        self.final = nn.Linear(36, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        x = functional.max_pool2d(x + y * torch.sigmoid(self.squeeze(y)), 3, 2, 1)
        x = functional.relu(self.grouped(x))
        y = functional.relu(torch.cat([self.left(x), self.right(x)], 1) + self.shortcut(x))
        y = y.reshape(y.shape[0], 2, 18, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.final(functional.avg_pool2d(y, 4).flatten(1))


def mixture(scheme: str) -> Graph:
    """The integer graph of :class:`Mixture`."""
    module = Mixture().eval()
    model = api.quantize(module, torch.zeros(1, 3, 13, 13), scheme, PREPROCESS)
    pixels = random_images((3, 13, 13), 8)
    api.calibrate(model, [api.normalize(pixels, PREPROCESS)])
    return api.convert(model, PREPROCESS)


def equal(graph: Graph, count: int, target: str, batches: tuple[int, ...]) -> Counts:
    """Compare random images; nothing may differ."""
    with torch.inference_mode():
        counts = compare(graph, random_images(graph.nodes[0].type.shape, count, seed=2), target, batches)
    assert (counts.different, counts.first) == (0, "")
    assert counts.tensors > 5
    assert len(counts.compile_s) == len(batches)
    return counts


@pytest.mark.parametrize("target", [row.name for row in HERE])
def test_a_mixture_of_layers_on_every_target_that_runs_here(target: str) -> None:
    equal(mixture("uniform8"), 5, target, (2,))


def test_memory_that_is_used_again() -> None:
    equal(mixture("uniform4"), 5, "auto", (1, 3))


def test_every_logit_of_every_batch_and_thread_count_is_counted() -> None:
    graph = calibrated("digits", "uniform8").convert(())
    one, two = (equal(graph, 6, "auto", batches) for batches in ((1,), (1, 3)))
    assert two.integers - one.integers == 6 * 10 * 2


def test_a_wrong_tensor_is_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = calibrated("digits", "uniform8").convert(())
    run: Callable[..., dict[str, np.ndarray]] = tvm_equality.interpreter.run
    last = graph.nodes[-1].name

    def wrong(*arguments: object, **options: object) -> dict[str, np.ndarray]:
        values = dict(run(*arguments, **options))
        return values | {last: values[last] + 1}

    monkeypatch.setattr(tvm_equality.interpreter, "run", wrong)
    with torch.inference_mode():
        counts = compare(graph, random_images((1, 8, 8), 2), "auto", (1,))
    assert (counts.different, counts.first) == (2 * 10, last)


def test_cases() -> None:
    assert cases_of(["resnet18", "vgg11"], None, ["auto"]) == [
        *(("resnet18", scheme, "auto") for scheme in CASES["resnet18"]),
        ("vgg11", "uniform8", "auto"),
    ]
    with pytest.raises(UserError, match="expected one of auto"):
        cases_of(["resnet18"], None, ["z80"])


def test_a_target_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tvm_equality, "runs_here", lambda target: False)
    assert main(["--targets", "avx2"]) == 2
    assert capsys.readouterr().err == "error: got the target avx2, which this machine does not run; leave it out\n"


@pytest.mark.slow
@pytest.mark.parametrize("target", [row.name for row in HERE])
@pytest.mark.parametrize("scheme", ["uniform8", "uniform4"])
def test_resnet20_on_every_target_that_runs_here(scheme: str, target: str) -> None:
    equal(calibrated("resnet20_cifar10", scheme).convert(()), 8, target, (1, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "scheme"), LARGE)
def test_networks(arch: str, scheme: str) -> None:
    assert measure(arch, scheme, "auto", None)["different"] == 0


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("arch", tvm_equality.TRAINED)
def test_trained_networks(arch: str, shared: Path) -> None:
    if not (shared / "data" / tvm_equality.TRAINED[arch][0]).exists():
        pytest.skip(f"the weights of {arch} are absent")
    assert measure(arch, "uniform8", "auto", shared / "data")["different"] == 0
