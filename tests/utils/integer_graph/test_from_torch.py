"""Conversion: engines agree on every integer, and every integer is what fake quantization gives for its inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bit_config import Rule, Scheme, load_scheme
from utils.data_utils import normalize
from utils.errors import UserError
from utils.experiment import quantize_module
from utils.integer_graph.from_torch import from_torch
from utils.integer_graph.interpreter import run
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.preprocess import Preprocess
from utils.quantization_utils.calibrate import calibrate


def pixels(count, size, seed=0):
    """Smooth random images, which fill activations better than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear") + 0.2 * torch.rand(count, 3, size, size)
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


def randomise(model: nn.Module) -> None:
    """BatchNorms as training may leave them: both signs, zeros, dead channels with next to no variance."""
    for bn in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        bn.running_mean.normal_(0, 0.2)
        bn.running_var.uniform_(0.3, 2)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.2)
        with torch.no_grad():
            bn.weight[:1] *= -1
            bn.weight[1:2] = 0
            bn.running_var[3:4] = 1e-9
            bn.weight[3:4] = 1e-5


def quantized(module, scheme, size, calibration=2):
    """A calibrated model and its preprocessing."""
    preprocess = Preprocess(resize=None, input_size=size)
    model = quantize_module(module, torch.zeros(1, 3, size, size), scheme)[0]
    calibrate(model, [normalize(pixels(calibration, size, seed=1), preprocess)])
    return model, preprocess


def check_engines(graph, images):
    """Interpreter and torch engine give the same integers for every node; returns the interpreter's."""
    expected = run(graph, images.numpy(), keep=True)
    found = TorchEngine(graph).run(images)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name].numpy(), values), name
    for node in graph.nodes[:-1]:
        assert node.type.lo <= expected[node.name].min()
        assert expected[node.name].max() <= node.type.hi
    return expected


def bias_steps(graph, name):
    """How much half a step of the accumulators a node rescales can be, in steps of its result."""
    node = graph.node(name)
    types = {n.name: n.type for n in graph.nodes}
    total = 0.0
    for i, source in enumerate(node.inputs):
        suffix = str(i) if f"multiplier{i}" in node.arrays else ""
        if types[source].bits == 32:
            ratio = node.arrays[f"multiplier{suffix}"] / 2.0 ** node.arrays[f"shift{suffix}"].astype(int)
            total += 0.5 * float(ratio.max())
    return total


@torch.no_grad()
def check_against_simulation(model, graph, integers, images, preprocess):
    """Each quantizer on what the integer graph has in front of it: the integers agree up to the rounding of one step.

    A sum has one rounding for each branch, a layer's bias is rounded to a step of its accumulators.  Multipliers of
    16-bit operands have 15 bits, so their results may be a few of 65536 steps apart.
    """
    model.eval()
    values = {}
    branches = {op.name: len(op.inputs) * op.attrs.get("repeat", 1) for op in model.ops if op.kind == "add"}
    for op in model.ops:
        inputs = [values[i] for i in op.inputs] or [normalize(images, preprocess)]
        values[op.name] = op.run(*[x.clone() if torch.is_tensor(x) else x for x in inputs])
        if op.kind == "quantize" and op.name in integers:
            simulated = op.module.integers(values[op.name]).numpy()
            actual = integers[op.name].reshape(simulated.shape)
            distance = np.abs(actual - simulated).max()
            allowed = branches.get(op.inputs[0], 1) if op.module.bits <= 8 else 6
            allowed += bias_steps(graph, op.name)
            assert distance <= allowed, (op.name, distance)
            values[op.name] = torch.from_numpy(actual).float() * op.module.scale
    # The classifier's bias is rounded to half a step of its accumulators.
    distance = np.abs(integers["logits"] - values[model.ops[-1].name].numpy())
    assert (distance <= 0.51 * graph.nodes[-1].arrays["scale"] + 1e-4 * np.abs(integers["logits"])).all()


NETWORKS = [
    "resnet20_cifar10",
    "preresnet20_cifar10",
    "seresnet20_cifar10",
    "sepreresnet20_cifar10",
    "densenet40_k12_bc_cifar10",
    "xdensenet40_2_k24_bc_cifar10",
    "pyramidnet110_a48_cifar10",
    "resnext20_32x2d_cifar10",
    "diaresnet20_cifar10",
    "diapreresnet20_cifar10",
    "nin_cifar10",
    "resdropresnet20_cifar10",
    "shakedropresnet20_cifar10",
    "shakeshakeresnet20_2x16d_cifar10",
]
MIXED = Scheme("mixed", (Rule(r"conv2", (4, 6)), Rule(r"conv1", (3, 4)), Rule(".*", 5)), residual_bits=8)


@pytest.mark.parametrize("scheme", ["uniform8", "mixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, scheme):
    info = create_model(name)
    randomise(info.module)
    chosen = load_scheme(scheme, name) if scheme != "mixed" else Scheme("mixed", MIXED.rules[-1:], residual_bits=8)
    model, preprocess = quantized(info.module, chosen, 32)
    graph = from_torch(model, preprocess)
    images = pixels(1, 32)
    integers = check_engines(graph, images)
    check_against_simulation(model, graph, integers, images, preprocess)
    assert np.isfinite(integers["logits"]).all()
    assert graph.meta["islands"] == []


LARGE = [
    *("mobilenetv2_wd4", "shufflenet_g3_wd4", "mobilenetv3_small_w7d20", "ghostnet", "efficientnet_b0b", "sqnxt23_w1"),
    *("condensenet74_c4_g4", "cbam_resnet18", "dicenet_wd5", "resnestabc14", "ibn_densenet121", "inceptionv3"),
    *("sknet50", "octresnet10_ad2", "revnet38", "torchvision/mobilenet_v3_small", "torchvision/googlenet"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_networks(name):
    info = create_model(name)
    size = info.preprocess.input_size
    randomise(info.module)
    model, preprocess = quantized(info.module, load_scheme("uniform8", name), size)
    graph = from_torch(model, preprocess)
    images = pixels(1, size)
    check_against_simulation(model, graph, check_engines(graph, images), images, preprocess)


class Net(nn.Module):
    """A body between a convolution and a classifier."""

    def __init__(self, function, channels=6, **modules) -> None:
        super().__init__()
        self.function, self.stem = function, nn.Conv2d(3, 6, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.fc = nn.Linear(channels, 3)

    def forward(self, x):
        return self.fc(self.function(self, self.stem(x)).mean((2, 3)))


def residual(m, x):
    y = torch.relu(x)
    return torch.relu(m.a(y) + y)


BODIES = {
    "asymmetric kernel": (lambda m, x: m.a(x.relu()), 4, {"a": nn.Conv2d(6, 4, (1, 5), (2, 1), (0, 2))}),
    "dilated, grouped": (lambda m, x: m.a(x.relu()), 4, {"a": nn.Conv2d(6, 4, 3, 1, 2, dilation=2, groups=2)}),
    "depthwise": (lambda m, x: m.a(x.relu()), 12, {"a": nn.Conv2d(6, 12, 3, groups=6)}),
    "padding same": (lambda m, x: m.a(x.relu()), 4, {"a": nn.Conv2d(6, 4, (2, 5), padding="same", dilation=(1, 2))}),
    "bias before norm": (lambda m, x: m.b(m.a(x.relu())), 4, {"a": nn.Conv2d(6, 4, 1), "b": nn.BatchNorm2d(4)}),
    "norm alone": (lambda m, x: m.b(x).relu(), 6, {"b": nn.BatchNorm2d(6)}),
    "norm after norm": (lambda m, x: m.b(m.a(x)), 6, {"a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6)}),
    "residual": (residual, 6, {"a": nn.Conv2d(6, 6, 3, padding=1)}),
    "relu6": (lambda m, x: F.relu6(m.a(F.relu6(x * 4))), 4, {"a": nn.Conv2d(6, 4, 1)}),
    "hardtanh": (lambda m, x: m.a(F.hardtanh(x, -0.5, 0.3)), 4, {"a": nn.Conv2d(6, 4, 1)}),
    "functions": (lambda m, x: m.a(torch.tanh(x)) * F.silu(x), 6, {"a": nn.PReLU(6)}),
    "gate": (lambda m, x: x * torch.sigmoid(m.a(x.mean((2, 3), keepdim=True))), 6, {"a": nn.Conv2d(6, 6, 1)}),
    "concat": (lambda m, x: torch.cat([x.relu(), m.a(x), torch.sigmoid(x)], 1), 16, {"a": nn.Conv2d(6, 4, 1)}),
    "difference": (lambda m, x: m.a(x.relu()) - x, 6, {"a": nn.Conv2d(6, 6, 1)}),
    "split and shuffle": (lambda m, x: torch.cat([p * (i + 1) for i, p in enumerate(x.split(2, 1))][::-1], 1), 6, {}),
    "channel padding": (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 2)) + m.a(x), 8, {"a": nn.Conv2d(6, 8, 1)}),
    "pools": (lambda m, x: F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 3, 2, 1, True, False), 6, {}),
    "adaptive": (lambda m, x: m.b(m.a(x)), 6, {"a": nn.AdaptiveAvgPool2d((5, 3)), "b": nn.AdaptiveMaxPool2d(1)}),
    "attention over parts": (
        lambda m, x: (x.view(-1, 2, 3, 8, 8) * torch.softmax(x.mean((2, 3)).view(-1, 2, 3), 1)[..., None, None]).sum(1),
        3,
        {},
    ),
    "spatial gate": (lambda m, x: x * torch.sigmoid(x.max(1)[0][:, None] + x.mean(1, keepdim=True)), 6, {}),
    "resizing": (
        lambda m, x: F.interpolate(F.interpolate(m.a(x), (5, 9)), (8, 8), mode="bilinear") + x,
        6,
        {"a": nn.ReLU()},
    ),
    "spread sum": (lambda m, x: m.a(x.relu().mean((2, 3), keepdim=True)) + x, 6, {"a": nn.ReLU()}),
    "instance norm": (lambda m, x: m.a(x), 6, {"a": nn.InstanceNorm2d(6, affine=True)}),
    "local response": (lambda m, x: F.local_response_norm(x, 3, 0.5, 0.75, 1.0), 6, {}),
    "transposition": (lambda m, x: m.a(x.permute(0, 2, 1, 3).contiguous()), 4, {"a": nn.Conv2d(8, 4, 1)}),
    "conv over channels": (
        lambda m, x: m.a(x.unsqueeze(1)).flatten(1, 2),
        8,
        {"a": nn.Conv3d(1, 2, (2, 1, 1), (2, 1, 1), (1, 0, 0))},
    ),
    "dead": (lambda m, x: m.a((x * 0).relu()) + 1, 4, {"a": nn.Conv2d(6, 4, 1)}),
    "constant": (lambda m, x: m.a(x * 0 + 3), 4, {"a": nn.Conv2d(6, 4, 1)}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("scheme", [Scheme("eight", (Rule(".*", 8),)), Scheme("few", (Rule(".*", (4, 5)),), 8, "free")])
@pytest.mark.parametrize("name", BODIES)
def test_operators(name, scheme):
    function, channels, modules = BODIES[name]
    module = Net(function, channels, **modules)
    randomise(module)
    model, preprocess = quantized(module, scheme, 8)
    graph = from_torch(model, preprocess)
    images = pixels(3, 8)
    check_against_simulation(model, graph, check_engines(graph, images), images, preprocess)


def test_all_zero_weights_and_images():
    module = Net(lambda m, x: m.a(x.relu()), 4, a=nn.Conv2d(6, 4, 1))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    model, preprocess = quantized(module, load_scheme("uniform4", "net"), 8)
    integers = check_engines(from_torch(model, preprocess), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert not integers["logits"].any()


def test_the_input_table_is_the_quantizer_of_every_pixel():
    model, preprocess = quantized(Net(lambda m, x: x), load_scheme("uniform8", "net"), 8)
    table = from_torch(model, preprocess).nodes[0].arrays["table"]
    quantizer = model.quantizers["input_1_q8"]
    for value in range(256):
        image = torch.full((1, 3, 8, 8), value, dtype=torch.uint8)
        expected = quantizer.integers(quantizer(normalize(image, preprocess)))[0, :, 0, 0]
        assert table[:, value].tolist() == expected.tolist()


def test_meta_records_what_was_done():
    model, preprocess = quantized(Net(lambda m, x: m.a(x), a=nn.InstanceNorm2d(6)), load_scheme("w4a8", "net"), 8)
    meta = from_torch(model, preprocess, meta={"arch": "net"}).meta
    assert meta["arch"] == "net"
    assert meta["input_size"] == [3, 8, 8]
    assert meta["layers"] == [["stem", 8, 8], ["fc", 8, 8]]
    assert meta["islands"] == ["a (instance_norm)"]
    assert Preprocess.from_dict(meta["preprocess"]) == preprocess


def test_strict_integer_names_the_islands():
    model, preprocess = quantized(Net(lambda m, x: m.a(x), a=nn.InstanceNorm2d(6)), load_scheme("uniform8", "net"), 8)
    with pytest.raises(UserError, match=r"--strict-integer: these operators stay in float: a \(instance_norm\)"):
        from_torch(model, preprocess, strict_integer=True)


def test_weights_that_are_not_finite():
    module = Net(lambda m, x: x)
    model, preprocess = quantized(module, load_scheme("uniform8", "net"), 8)
    with torch.no_grad():
        module.fc.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the weights of layer 'fc' are not finite"):
        from_torch(model, preprocess)


class Pixels(nn.Module):
    """Logits that are the pixels of a convolution."""

    def __init__(self, size) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, size)

    def forward(self, x):
        return self.conv(x).flatten(1)


def test_logits_of_one_pixel_are_accumulators_and_of_several_are_requantized():
    for size, ops in ((8, ["conv2d", "reshape", "logits"]), (7, ["conv2d", "requantize", "reshape", "logits"])):
        model, preprocess = quantized(Pixels(size), load_scheme("uniform8", "net"), 8)
        graph = from_torch(model, preprocess)
        assert [node.op for node in graph.nodes[1:]] == ops
        images = pixels(2, 8)
        check_against_simulation(model, graph, check_engines(graph, images), images, preprocess)
