"""Where quantizers go, how wide and how signed they are, and that the prepared float network is the float network."""

import pytest
import torch
from torch import nn

from bit_config import Rule, Scheme, load_scheme
from utils.experiment import quantize_module
from utils.models import create_model
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.capture import capture
from utils.quantization_utils.prepare import describe_layers, fold_network


class Block(nn.Module):
    """A basic residual block; one ReLU module at two sites."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        same = inputs == outputs
        self.short = None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.short is None else self.short(x)))


class SmallResNet(nn.Module):
    """Stem, a block with an identity, a block with a shortcut convolution, pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.block1, self.block2 = Block(8, 8, 1), Block(8, 16, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.block2(self.block1(self.relu(self.bn(self.stem(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))


def prepared(module, scheme, size=8):
    return quantize_module(module, torch.zeros(1, 3, size, size), scheme)[0]


def placement(model):
    """(what it reads, bits, signed, relu absorbed) of every quantizer, in order."""
    found = [(op.inputs[0], op.module) for op in model.ops if op.kind == "quantize"]
    return [(source, q.bits, q.signed, q.relu) for source, q in found]


def reads(model):
    """Layer or sum -> what it reads."""
    return {op.attrs.get("layer", op.name): op.inputs for op in model.ops if op.kind in ("conv", "linear", "add")}


def four(residual_bits=16, *rules):
    return Scheme("four", (*rules, Rule(".*", 4)), residual_bits)


@pytest.mark.parametrize("stream", [16, 8])
def test_placement_on_a_small_resnet(stream):
    model = prepared(SmallResNet(), four(stream))
    wide = stream == 16
    assert placement(model) == [
        ("input_1", 8, True, False),  # first layer: 8 bit
        ("stem", stream, wide, True),  # read by the sum: the stream's width, ReLU absorbed
        (f"stem_q{stream}", 4, False, False),  # and once more, narrow, for the convolution
        ("block1_conv1", 4, False, True),
        ("add", stream, wide, True),
        (f"add_q{stream}", 4, False, False),  # one for both layers that read it
        ("block2_conv1", 4, False, True),
        ("add_1", stream, wide, True),
        ("pool", 8, False, False),  # in front of the classifier: 8 bit
    ]
    found = reads(model)
    assert found["add"] == ["block1_conv2", f"stem_q{stream}"]  # the accumulator itself
    assert found["add_1"] == ["block2_conv2", "block2_short_0"]
    assert found["block2.conv1"] == found["block2.short.0"] == [f"add_q{stream}_q4"]


def test_layers_that_read_one_tensor_share_the_widest_activation():
    rules = (Rule(r"block2\.conv1", (4, 4)), Rule(r"block2\.short", (4, 6)))
    model = prepared(SmallResNet(), four(16, *rules))
    assert model.bits["block2.conv1"].activation == model.bits["block2.short.0"].activation == 6
    assert reads(model)["block2.conv1"] == reads(model)["block2.short.0"] == ["add_q16_q6"]


def test_layer_table():
    captured = capture(SmallResNet(), torch.zeros(1, 3, 8, 8))
    layers = {layer.name: layer for layer in describe_layers(fold_network(captured))}
    assert list(layers) == [
        "stem",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "block2.short.0",
        "fc",
    ]
    assert [name for name, layer in layers.items() if layer.first] == ["stem"]
    assert [name for name, layer in layers.items() if layer.last] == ["fc"]
    assert layers["block2.conv1"].reads == layers["block2.short.0"].reads != layers["block2.conv2"].reads
    assert layers["stem"].weights == 8 * 3 * 9
    assert layers["stem"].macs == 8 * 3 * 9 * 8 * 8
    assert layers["block2.conv2"].macs == 16 * 16 * 9 * 4 * 4
    assert layers["fc"].macs == layers["fc"].weights == 80


class Signs(nn.Module):
    """Tensors of every sign."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.out = nn.ModuleList([nn.Conv2d(4, 2, 1) for _ in range(6)])
        self.join = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        positive, either = torch.relu(x), nn.functional.leaky_relu(x)
        tensors = [
            positive,
            either,
            torch.sigmoid(x),
            nn.functional.max_pool2d(positive, 3, 1, 1),
            nn.functional.avg_pool2d(positive, 3, 1, 1),
            positive * torch.sigmoid(x),
        ]
        total = sum(conv(t) for conv, t in zip(self.out, tensors, strict=True))
        return (total + self.join(torch.cat([positive, either], 1))).mean((2, 3))


def test_only_tensors_that_may_be_negative_are_signed():
    model = prepared(Signs(), load_scheme("uniform8", "net"))
    quantizer_of = {layer: model.quantizers[inputs[0]] for layer, inputs in reads(model).items() if "." in layer}
    signs = [quantizer_of[f"out.{i}"].signed for i in range(6)]
    assert signs[1:] == [True, False, False, False, False]
    assert model.quantizers[reads(model)["join"][0]].signed  # a concat with one signed branch


def test_sixteen_bit_streams_are_signed_even_behind_a_relu():
    model = prepared(SmallResNet(), four())
    assert all(q.signed for q in model.activation_quantizers().values() if q.bits == 16)


class SharedBn(nn.Module):
    """A convolution read twice: its BatchNorm must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x)
        return self.fc((self.bn(y) + y).mean((2, 3)))


def test_a_convolution_with_two_readers_keeps_its_bn_apart():
    model = prepared(SharedBn(), load_scheme("uniform8", "net"))
    assert [layer.kind for layer in model.layer_table] == ["conv", "affine", "linear"]


def test_reading_the_batch_size_is_no_use_of_a_tensor():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8)

        def forward(self, x):
            y = self.conv(x)
            return y.view(y.size(0), -1)

    model = prepared(Flat(), load_scheme("uniform8", "net"))
    assert placement(model) == [("input_1", 8, True, False)]  # the logits are the accumulators


NETWORKS = ["resnet20_cifar10", "densenet40_k12_bc_cifar10", "seresnet20_cifar10", "diaresnet20_cifar10", "rir_cifar10"]


def randomise(model: nn.Module) -> None:
    """BatchNorm statistics and factors of all kinds."""
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean.normal_(0, 0.1)
        bn.running_var.uniform_(0.5, 2)
        nn.init.uniform_(bn.weight, -1.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_quantization_the_prepared_network_is_the_float_network(name):
    module = create_model(name).module
    randomise(module)
    model = prepared(module, load_scheme("uniform4", name), 32).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected, found = module(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not torch.equal(found, torch.zeros_like(found))


def test_enable_and_disable_are_inverse():
    model = prepared(SmallResNet(), four())
    x = torch.randn(2, 3, 8, 8)
    calibrate(model, [x])
    with torch.no_grad():
        quantized = model(x)
        model.enable(False)
        plain = model(x)
        torch.testing.assert_close(plain, model.model(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(plain, quantized)
        model.enable()
        assert torch.equal(model(x), quantized)


def test_training_mode_uses_batch_statistics_and_updates_them():
    module = SmallResNet()
    model = prepared(module, four())
    x = torch.randn(4, 3, 8, 8)
    calibrate(model, [x])
    model.enable(False)
    model.train()
    before = module.bn.running_mean.clone()
    torch.testing.assert_close(model(x), module.train()(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(module.bn.running_mean, before)
    model.freeze_bn()
    frozen = module.bn.running_mean.clone()
    model(x)
    assert torch.equal(module.bn.running_mean, frozen)


def test_every_parameter_trains():
    model = prepared(SmallResNet(), four())
    x = torch.randn(4, 3, 8, 8)
    calibrate(model, [x])
    model.train()
    model(x).square().sum().backward()
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A bias in front of a BatchNorm on batch statistics has no influence.
        assert name == "block2.short.0.bias" or parameter.grad.abs().sum() > 0, name


def test_activation_integers_fit_their_bits():
    model = prepared(SmallResNet(), four())
    x = torch.randn(4, 3, 8, 8)
    calibrate(model, [x])
    for name, values in model.activation_integers(x).items():
        if name != "logits":
            lo, hi = model.quantizers[name].bounds()
            assert lo <= int(values.min()) <= int(values.max()) <= hi
