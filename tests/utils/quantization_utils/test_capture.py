"""Capture against the eager model: bitwise equal outputs, untouched model, and refusals that name the place."""

import pytest
import torch
from torch import Tensor, fx, nn

from utils.errors import UserError
from utils.models import create_model
from utils.quantization_utils.capture import Captured, capture


def interpret(captured: Captured, x: Tensor) -> Tensor:
    """Run the captured graph itself."""
    root = nn.Module()
    graph = fx.Graph()
    names = {n: f"constant{i}" for i, n in enumerate(n for n in captured.graph.nodes if n.op == "get_attr")}
    for node, name in names.items():
        vars(root)[name] = node.meta["value"]
    copied: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node in names:
            copied[node].target = names[node]
    for name, module in captured.model.named_children():
        root.add_module(name, module)
    result: Tensor = fx.GraphModule(root, graph)(x)
    return result


NETWORKS = (
    "resnet20_cifar10",
    "densenet40_k12_bc_cifar10",
    "seresnet20_cifar10",
    "pyramidnet110_a48_cifar10",
    "diaresnet20_cifar10",
    "xdensenet40_2_k24_bc_cifar10",
    "msdnet22_cifar10",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_captured_graph_equals_the_eager_model_bit_by_bit_at_any_batch(name):
    model = create_model(name).module.eval()
    captured = capture(model, torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = torch.randn(batch, 3, 32, 32)
            assert torch.equal(interpret(captured, x), model(x))


@pytest.mark.parametrize("name", ["mobilenetv3_small_w7d20", "condensenet74_c4_g4"])
def test_model_and_its_names_stay_as_they_are(name):
    model = create_model(name).module
    keys, attributes = list(model.state_dict()), set(vars(model))
    captured = capture(model, torch.zeros(1, 3, 224, 224))
    assert list(model.state_dict()) == keys
    assert set(vars(model)) == attributes
    assert captured.model is model
    paths = {node.target for node in captured.graph.nodes if node.op == "call_module"}
    assert paths <= {path for path, _ in model.named_modules()}


class Guarded(nn.Module):
    """Takes a branch that depends on the batch."""

    def forward(self, x, flag=True):
        y = x.sum(dim=(1, 2, 3))
        return x + 1 if flag and bool(y.shape[0] > 1) and y.size(0) > 1 else x


def test_decisions_on_values_are_recorded_as_guards():
    captured = capture(Guarded(), torch.zeros(1, 3, 4, 4))
    assert len(captured.guards) == 2
    assert all("bool" in guard and "was True" in guard for guard in captured.guards)


def test_unguarded_models_have_no_guards():
    model = create_model("resnet20_cifar10").module
    assert capture(model, torch.zeros(1, 3, 32, 32)).guards == ()


class Shapes(nn.Module):
    """Shape arithmetic in Python: padding computed as TensorFlow does, loops over parts, integers of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x):
        height, width = x.shape[2], x.size(3)
        pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in (height, width)]
        x = self.conv(
            nn.functional.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        )
        parts = [part * (i + 1) for i, part in enumerate(torch.chunk(x, 2, dim=1))]
        assert len(x) > 0
        assert x.dim() == 4
        return torch.cat(parts, 1).view(x.shape[0], -1, int(x.shape[2]) * x.shape[-1])


@pytest.mark.parametrize("size", [7, 8])
def test_value_dependent_shapes(size):
    model = Shapes().eval()
    captured = capture(model, torch.zeros(1, 3, size, size))
    x = torch.randn(5, 3, size, size)
    assert torch.equal(interpret(captured, x), model(x))


def test_nodes_say_where_they_are_and_what_they_hold():
    model = create_model("seresnet20_cifar10").module
    captured = capture(model, torch.zeros(1, 3, 32, 32))
    named = {node.name: node for node in captured.graph.nodes}
    assert named["mul"].meta["path"] == "features.stage1.unit1.se"
    assert named["mul"].meta["shape"] == (16, 32, 32)
    assert named["size"].meta["holds"] == "host"
    assert not any(node.meta.get("constant") for node in captured.graph.nodes)


class Constant(nn.Module):
    """A constant that is no parameter, and an expression of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))
        self.order = [torch.tensor([2, 0, 1])]

    def forward(self, x):
        x = torch.index_select(x, 1, self.order[0])
        return nn.functional.conv2d(x, self.weight.mul(2)[: self.weight.shape[0]])


def test_constants_are_marked_and_do_not_stay_on_the_model():
    model = Constant()
    captured = capture(model, torch.zeros(1, 3, 4, 4))
    constant = [node.name for node in captured.graph.nodes if node.meta.get("constant")]
    assert constant == ["_tensor_constant0", "weight", "mul", "getitem"]
    assert not any(name.startswith("_tensor") for name in vars(model))


class Numpy(nn.Module):
    """Leaves torch."""

    def forward(self, x):
        return torch.from_numpy(x.detach().numpy()) + 1


def test_refusal_names_operator_and_module():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Numpy()))
    with pytest.raises(
        UserError, match=r"cannot capture module '1\.0' \(Numpy\) for an input of shape \(3, 4, 4\): \w+"
    ):
        capture(model, torch.zeros(1, 3, 4, 4))


def test_refusal_of_a_wrong_input_size():
    model = create_model("resnet10").module
    with pytest.raises(UserError, match=r"cannot capture module 'features\.final_pool' \(AvgPool2d\).*input size"):
        capture(model, torch.zeros(1, 3, 64, 64))


def test_reversible_blocks_compute_what_they_do_eagerly():
    model = create_model("revnet38").module.eval()
    captured = capture(model, torch.zeros(1, 3, 224, 224))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(interpret(captured, x), model(x.clone()))
