"""The Python interface on a network of the user's own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from utils import api
from utils.integer_graph.serialize import graph_hash


class Own(nn.Module):
    """Two convolutions with a shortcut, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(x)) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def preprocess() -> api.Preprocess:
    return api.Preprocess(mean=(0.4,) * 3, std=(0.3,) * 3, resize=None, input_size=6)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8)


@pytest.fixture
def model(preprocess: api.Preprocess, images: Tensor) -> api.QuantizedModel:
    found = api.quantize(Own(), torch.zeros(1, 3, 6, 6), "w6a7", preprocess)
    assert api.calibrate(found, api.normalize(images, preprocess).split(10)) == 20
    return found


def test_before_calibration_it_is_the_float_model(preprocess: api.Preprocess, images: Tensor) -> None:
    net = Own().eval()
    inputs = api.normalize(images, preprocess)
    expected = net(inputs)
    torch.testing.assert_close(api.quantize(net, inputs)(inputs), expected)


def test_graph_and_simulation_agree(model: api.QuantizedModel, preprocess: api.Preprocess, images: Tensor) -> None:
    graph = api.convert(model, preprocess, classes=list("abcd"), arch="own")
    assert (graph.meta["arch"], graph.meta["classes"]) == ("own", list("abcd"))
    with torch.no_grad():
        simulated = model(api.normalize(images, preprocess))
    head = next(node for node in graph.nodes if node.op == "linear")
    one_step_everywhere = graph.nodes[-1].arrays["scale"] * abs(head.arrays["weight"].astype(int)).sum(1)
    assert bool(((api.predict(graph, images) - simulated).abs() <= torch.tensor(one_step_everywhere)).all())
    labels = simulated.argmax(1)
    assert api.evaluate(model, [(images, labels)], preprocess).top1 == 100
    assert api.evaluate(graph, [(images, labels)]).images == 20


def test_save_and_load(model: api.QuantizedModel, preprocess: api.Preprocess, tmp_path: Path) -> None:
    graph = api.convert(model, preprocess)
    api.save(graph, tmp_path / "own.safetensors")
    assert graph_hash(api.load(tmp_path / "own.safetensors")) == graph_hash(graph)
    assert graph.meta["arch"] == "Own"


def test_bits_come_from_the_scheme(model: api.QuantizedModel) -> None:
    assert {name: (b.weight, b.activation) for name, b in model.bits.items()} == {
        "first": (8, 8),
        "second": (6, 7),
        "head": (8, 8),
    }


def test_mistakes_are_one_sentence(preprocess: api.Preprocess, images: Tensor) -> None:
    with pytest.raises(api.UserError, match=r"shape \[3, 8, 8\] per image, the preprocessing gives \[3, 6, 6\]"):
        api.quantize(Own(), torch.zeros(1, 3, 8, 8), "uniform8", preprocess)
    model = api.quantize(Own(), torch.zeros(1, 3, 6, 6))
    with pytest.raises(api.UserError, match="call calibrate"):
        api.convert(model, preprocess)
    with pytest.raises(api.UserError, match="give evaluate the preprocess"):
        api.evaluate(model, [(images, torch.zeros(20, dtype=torch.int64))])
    with pytest.raises(api.UserError, match="no quantization scheme 'uniform99' for Own"):
        api.quantize(Own(), torch.zeros(1, 3, 6, 6), "uniform99")


def test_everything_listed_exists() -> None:
    assert all(name in vars(api) for name in api.__all__)
