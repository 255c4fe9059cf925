"""The float graph computes what the model computes; each refusal names its operator and module."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.models import create_model
from utils.quantization_utils.capture import capture
from utils.quantization_utils.float_graph import float_graph


class Forward(nn.Module):
    """A model that is one function of the image."""

    def __init__(self, function, **modules) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def translate(model: nn.Module, shape=(4, 6, 6)):
    return float_graph(capture(model, torch.zeros(1, *shape)))


def evaluate(ops, x: Tensor) -> Tensor:
    """Run the operators in order."""
    values: dict = {}
    for op in ops:
        values[op.name] = op.run(*[values[i] for i in op.inputs]) if op.inputs else op.run(x)
    return values[ops[-1].name]


def kinds(ops) -> list[str]:
    return [op.kind for op in ops[1:-1] if op.kind != "host"]


def normed(channels):
    bn = nn.BatchNorm2d(channels)
    bn.running_mean.normal_()
    return bn


CASES = {
    "conv": (lambda m, x: m.a(x), {"a": nn.Conv2d(4, 4, (1, 3), 2, (0, 1), 1, 2)}, ["conv"]),
    "conv same": (lambda m, x: m.a(x), {"a": nn.Conv2d(4, 4, (2, 5), padding="same", dilation=2)}, ["conv"]),
    "called twice": (lambda m, x: m.a(m.a(x)), {"a": nn.Conv2d(4, 4, 1)}, ["conv", "conv"]),
    "computed weight": (
        lambda m, x: F.conv2d(x, m.a.weight[:2] * 2, m.a.bias[:2], padding=1),
        {"a": nn.Conv2d(4, 4, 3)},
        ["conv"],
    ),
    "conv over channels": (
        lambda m, x: m.a(x.unsqueeze(1)).flatten(1, 2),
        {"a": nn.Conv3d(1, 2, (2, 1, 1), (2, 1, 1), (1, 0, 0))},
        ["move", "move", "conv", "move", "move"],
    ),
    "norm": (lambda m, x: m.a(x), {"a": normed(4)}, ["affine"]),
    "clips": (
        lambda m, x: torch.clamp(F.hardtanh(F.relu6(m.a(F.relu(x))), -2, 3), min=0.1, max=0.9),
        {"a": nn.ReLU6()},
        ["clip"] * 5,
    ),
    "functions": (
        lambda m, x: m.c(m.b(torch.tanh(F.leaky_relu(m.a(torch.sigmoid(x)), 0.2)))) ** 2,
        {"a": nn.Hardswish(), "b": nn.PReLU(4), "c": nn.SiLU()},
        ["function"] * 7,
    ),
    "numbers": (
        lambda m, x: 3 - (2 * x / 4 + 1) * -1 - 2,
        {},
        ["scale", "scale", "function", "function", "function", "function"],
    ),
    "number by x": (lambda m, x: 2 / (x.abs() + 1), {}, ["function"] * 3),
    "sums": (lambda m, x: x + x + m.a(x) - x, {"a": nn.Identity()}, ["add", "identity", "add", "function", "add"]),
    "broadcast sum": (lambda m, x: x + m.a(x), {"a": nn.AdaptiveAvgPool2d(1)}, ["avg_pool", "move", "add"]),
    "products": (lambda m, x: x * x * m.a(x), {"a": nn.AdaptiveAvgPool2d(1)}, ["mul", "avg_pool", "mul"]),
    "concat": (lambda m, x: torch.cat([x, m.a(x), x], 1), {"a": nn.ReLU()}, ["clip", "concat"]),
    "stack and sum": (
        lambda m, x: (torch.stack([x, m.a(x)], 1) * 2).sum(1),
        {"a": nn.ReLU()},
        ["clip", "concat", "move", "scale", "move", "move", "add"],
    ),
    "sum of one": (lambda m, x: x[:, :1].sum(1, keepdim=True), {}, ["move", "move"]),
    "stack in front": (
        lambda m, x: torch.stack([x, m.a(x)], 0).mean(0),
        {"a": nn.ReLU()},
        ["clip", "add", "scale"],
    ),
    "pools": (
        lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(m.a(x), 2, 1), 2, 1, 1, False, False)),
        {"a": nn.MaxPool2d(3, 2, 1, ceil_mode=True), "b": nn.AdaptiveAvgPool2d((2, 3))},
        ["max_pool", "max_pool", "avg_pool", "avg_pool"],
    ),
    "means": (lambda m, x: x.mean((2, 3), keepdim=True) + x.mean([-1, -2])[..., None, None], {}, None),
    "over channels": (
        lambda m, x: x.max(1)[0].unsqueeze(1) * x.mean(1, keepdim=True),
        {},
        ["move", "max_pool", "move", "move", "move", "move", "avg_pool", "move", "mul"],
    ),
    "maxima": (lambda m, x: m.a(x), {"a": nn.AdaptiveMaxPool2d((2, 3))}, ["max_pool"]),
    "moves": (
        lambda m, x: F.pad(x.chunk(2, 1)[1].transpose(2, 3).contiguous().view(x.size(0), 4, -1), (1, 1)),
        {},
        ["move"] * 6,
    ),
    "islands": (
        lambda m, x: torch.softmax(m.a(F.interpolate(x, (9, 5), mode="bilinear")), 1),
        {"a": nn.InstanceNorm2d(4, affine=True)},
        ["island"] * 3,
    ),
    "local response": (lambda m, x: F.local_response_norm(x, 3, alpha=0.1, beta=0.5, k=2.0), {}, ["island"]),
    "identities": (lambda m, x: m.a(F.dropout(x, training=False)), {"a": nn.Dropout()}, ["identity", "identity"]),
    "zeros": (lambda m, x: torch.zeros_like(x).expand_as(x) + x, {}, ["move", "move", "add"]),
    "unused": (lambda m, x: (m.a(x), x.relu())[1], {"a": nn.Conv2d(4, 4, 1)}, ["clip"]),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_torch_computes(name):
    function, modules, expected = CASES[name]
    model = Forward(function, **modules).eval()
    ops = translate(model)
    if expected is not None:
        assert kinds(ops) == expected
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(evaluate(ops, x.clone()), model(x), rtol=1e-5, atol=1e-6)
    names = [op.name for op in ops]
    assert len(set(names)) == len(names)
    for op in ops[1:-1]:
        if op.kind not in ("host", "island") and op.shape:
            assert all(side > 0 for side in op.shape)


NETWORKS = ["condensenet74_c4_g4", "sepreresnet20_cifar10", "shakeshakeresnet20_2x16d_cifar10", "wrn20_10_1bit_cifar10"]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    info = create_model(name)
    size = info.preprocess.input_size
    ops = translate(info.module, (3, size, size))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = info.module(x)
        torch.testing.assert_close(evaluate(ops, x), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_layers_are_named_by_their_path_and_call():
    model = Forward(lambda m, x: m.inner(m.inner(x)), inner=nn.Sequential(nn.Conv2d(4, 4, 1)))
    assert [op.attrs["layer"] for op in translate(model) if op.kind == "conv"] == ["inner.0", "inner.0#2"]


def test_computed_weights_train():
    model = Forward(lambda m, x: F.conv2d(x, m.a.weight * 2), a=nn.Conv2d(4, 2, 1, bias=False))
    (conv,) = (op for op in translate(model) if op.kind == "conv")
    conv.module(torch.randn(1, 4, 6, 6)).sum().backward()
    assert model.a.weight.grad is not None
    with torch.no_grad():
        model.a.weight.zero_()
    assert not conv.module.weight.any()


class Custom(nn.Module):
    """An operator nobody knows."""

    def forward(self, x):
        return torch.erfinv(x)


REFUSALS = {
    "unknown module": (
        lambda m, x: m.a(x),
        {"a": nn.LayerNorm(6)},
        r"operator LayerNorm in module 'a' cannot be quantized",
    ),
    "unknown function": (lambda m, x: m.a(x), {"a": Custom()}, r"operator erfinv in module 'a' cannot be quantized"),
    "conv in space": (lambda m, x: m.a(x[:, None])[:, 0], {"a": nn.Conv3d(1, 1, 3)}, "only kernels over the first"),
    "padding mode": (lambda m, x: m.a(x), {"a": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")}, "'reflect'"),
    "no statistics": (
        lambda m, x: m.a(x),
        {"a": nn.BatchNorm2d(4, track_running_stats=False)},
        "keeps no running statistics",
    ),
    "linear on images": (lambda m, x: m.a(x), {"a": nn.Linear(6, 2)}, "a linear layer needs vectors"),
    "alpha": (lambda m, x: torch.add(x, x.relu(), alpha=3), {}, "a factor alpha is not supported, multiply"),
    "alpha of a difference": (lambda m, x: torch.sub(x, x.relu(), alpha=3), {}, "a factor alpha is not supported"),
    "division": (lambda m, x: x / (x + 1), {}, "operator truediv in the model's forward .* division by a tensor"),
    "parameter": (lambda m, x: x + m.a.bias.sum(), {"a": nn.Conv2d(4, 4, 1)}, "operand is a parameter or a constant"),
    "two outputs": (lambda m, x: (x, x), {}, "the model Forward cannot be quantized: it returns several values"),
    "concat of rows": (lambda m, x: torch.cat([x, x.relu()], 2), {}, r"only channels \(dim 1\)"),
    "mean of rows": (lambda m, x: x.mean(2), {}, r"mean over dimensions \[2\]"),
    "positions": (lambda m, x: x.max(1)[1], {}, "positions of maxima"),
    "bicubic": (lambda m, x: F.interpolate(x, (9, 9), mode="bicubic"), {}, "interpolation mode 'bicubic'"),
    "softmax of rows": (lambda m, x: x.softmax(2), {}, "softmax over dimension 2"),
    "uneven maxima": (lambda m, x: m.a(x), {"a": nn.AdaptiveMaxPool2d(4)}, "windows of unequal size"),
    "in place, read later": (
        lambda m, x: m.a(x) + x,
        {"a": nn.ReLU(inplace=True)},
        "operator ReLU in module 'a' .* inplace",
    ),
    "in place, unread": (lambda m, x: (x.add_(1), x)[1], {}, "operator add_ .* works in place"),
    "long sum": (lambda m, x: x.repeat(1, 16, 1, 1).sum(1), {}, "a sum over 64 slices is too long"),
    "weights of images": (lambda m, x: F.conv2d(x, x[:4]), {}, "its weights depend on the image"),
    "constants alone": (
        lambda m, x: x + m.a.bias[None, :, None, None].expand(x.size(0), 4, 6, 6),
        {"a": nn.Conv2d(4, 4, 1)},
        "constants and the batch size",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence_that_names_the_place(name):
    function, modules, message = REFUSALS[name]
    with pytest.raises(UserError, match=message) as caught:
        translate(Forward(function, **modules).eval())
    assert "\n" not in str(caught.value)


def test_in_place_modules_are_replayed_out_of_place():
    model = Forward(lambda m, x: m.a(m.b(x)), a=nn.ReLU(inplace=True), b=nn.LeakyReLU(0.1, inplace=True))
    x = torch.randn(1, 4, 6, 6)
    kept = x.clone()
    evaluate(translate(model), x)
    assert torch.equal(x, kept)


def test_the_output_has_the_shape_of_the_logits():
    ops = translate(nn.Sequential(nn.Flatten(), nn.Linear(144, 7)))
    assert (ops[-1].kind, ops[-1].shape) == ("output", (7,))
