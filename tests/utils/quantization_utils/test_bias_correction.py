"""Bias correction removes a bias that rounding was made to have, layer after layer, down to the integer graph."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.api import Preprocess, calibrate, convert, normalize, quantize
from utils.quantization_utils.bias_correction import correct_biases, float_means, limited
from utils.quantization_utils.execution import channel_means, live_elements, run_ops
from utils.quantization_utils.prepare import LAYER_KINDS, QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer

PREPROCESS = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, resize=None, input_size=6)
LAYERS = ("first", "second.0", "norm", "head")
STEP = 0.25  # of the weights; all are rounded up by 0.4 steps


class Net(nn.Module):
    """A layer with a bias, one with a BatchNorm, a BatchNorm of its own behind a sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(x) + x))
        return self.head(x.mean((2, 3)))


def pixels(count: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


def batches(sizes: int | list[int] = 8) -> list[Tensor]:
    return list(normalize(pixels(), PREPROCESS).split(sizes))


def rounded_up(module: nn.Module, scheme: str = "w4a8") -> QuantizedModel:
    """Calibrated; every weight lies 0.6 of a step above an integer, so all of them grow when they are rounded."""
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.weight is not None):
            norm.weight.uniform_(0.5, 1)
            norm.weight[0] = -0.7
            norm.bias.uniform_(0, 1)
        for layer in (m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
            layer.weight.copy_((torch.randint_like(layer.weight, -3, 4) + 0.6) * STEP)
    model = quantize(module, torch.zeros(1, 3, 6, 6), scheme).eval()
    for layer in model.weight_layers().values():
        if isinstance(layer, QuantLayer):
            layer.bits = 4
            layer.learned = nn.Parameter(torch.full((len(layer.module.weight),), STEP))
    calibrate(model, batches())
    return model


def quantized_means(model: QuantizedModel, sizes: int | list[int] = 8) -> dict[str, Tensor]:
    """By operator name, computed image by image of one batch: another way than that of the module under test."""
    found = {}
    for op, outputs in run_ops(model, batches(sizes), quantized=True):
        if op.kind in LAYER_KINDS:
            values = torch.cat(outputs).double()
            found[op.name] = values.mean([axis for axis in range(values.dim()) if axis != 1])
    return found


def errors(means: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of a channel's mean in each layer."""
    return {name: float((means[name] - expected[name]).abs().max()) for name in expected}


def test_a_constructed_bias_is_removed() -> None:
    model = rounded_up(Net())
    means = float_means(model, batches())
    before = errors(quantized_means(model), means)
    done = correct_biases(model, batches(), means)
    after = errors(quantized_means(model), means)
    assert (done.images, done.layers, done.skipped) == (24, LAYERS, {})
    for name in means:
        assert before[name] > 0.1
        assert after[name] < 0.01 * before[name]


def test_float_means_are_those_of_the_float_network() -> None:
    module = Net()
    model = rounded_up(module)
    found = float_means(model, batches([5, 19]))
    with torch.no_grad():
        x = torch.cat(batches())
        first = module.first(x)
        second = module.second(torch.relu(first))
        norm = module.norm(second + torch.relu(first))
        head = module.head(torch.relu(norm).mean((2, 3)))
    for mean, expected in zip(found.values(), (first, second, norm, head), strict=True):
        axes = (0, 2, 3) if expected.dim() == 4 else (0,)
        np.testing.assert_allclose(mean, expected.double().mean(axes), rtol=1e-5, atol=1e-6)
    assert not any(q.enabled for q in model.activation_quantizers().values())


def test_later_layers_see_corrected_ones() -> None:
    """The second layer's shift is what is left once the first is corrected, not what was there in the beginning."""
    model = rounded_up(Net())
    module = model.model
    means = float_means(model, batches())
    untouched = quantized_means(model)
    beta = module.second[1].bias.detach().clone()
    correct_biases(model, batches(), means)
    shift = module.second[1].bias.detach() - beta
    with torch.no_grad():
        module.second[1].bias.copy_(beta)
    remaining = quantized_means(model)  # the first layer is corrected, the second not
    expected = means["second_0"] - remaining["second_0"]
    torch.testing.assert_close(shift.double(), expected, rtol=1e-3, atol=1e-3)
    all_at_once = means["second_0"] - untouched["second_0"]
    assert float((shift - all_at_once).abs().max()) > 0.1


def test_batches_of_any_size_give_the_same_biases() -> None:
    shifted = []
    for sizes in (24, [5, 19]):
        torch.manual_seed(2)
        model = rounded_up(Net())
        given = list(normalize(pixels(), PREPROCESS).split(sizes))
        correct_biases(model, given, float_means(model, given))
        shifted.append(model.model.state_dict())
    for key in ("first.bias", "second.1.bias", "norm.bias", "head.bias"):
        torch.testing.assert_close(shifted[0][key], shifted[1][key], rtol=1e-4, atol=1e-4)


class Bare(nn.Module):
    """No bias, no factors, a layer used twice; only the last layer can be corrected."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.shared = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3, affine=False), nn.Linear(3, 5)
        self.folded, self.behind = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False)
        self.biased, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(x))
        x = torch.relu(self.norm(self.shared(torch.relu(self.shared(x))) + x))
        x = torch.relu(self.behind(self.folded(x)))
        x = torch.relu(self.after(self.biased(x)))
        return self.head(x.mean((2, 3)))


def test_layers_that_cannot_be_corrected_are_named() -> None:
    model = rounded_up(Bare())
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    means = float_means(model, batches())
    uncorrected = errors(quantized_means(model), means)
    done = correct_biases(model, batches(), means)
    assert done.skipped == {
        "plain": "it has no bias",
        "shared": "its parameters are used twice",
        "shared#2": "its parameters are used twice",
        "norm": "it has no bias",
        "folded": "neither it nor its BatchNorm has a bias",
    }
    assert done.layers == ("biased", "head")
    changed = {key for key, value in model.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"biased.bias", "head.bias"}
    after = errors(quantized_means(model), means)
    assert after["plain"] == uncorrected["plain"] > 0.1
    for name in done.layers:  # the first one's bias went through the factors of a BatchNorm
        assert after[name] < 0.02 * uncorrected[name]


def test_the_integer_graph_has_the_corrected_biases() -> None:
    model = rounded_up(Net())
    before = {node.name: node.arrays["bias"] for node in convert(model, PREPROCESS).nodes if "bias" in node.arrays}
    correct_biases(model, batches(), float_means(model, batches()))
    graph = convert(model, PREPROCESS)
    nodes = [node for node in graph.nodes if "bias" in node.arrays]
    assert len(nodes) == len(LAYERS)
    for node, layer in zip(nodes, model.weight_layers().values(), strict=True):
        parts = layer.integer_weights()
        source = graph.node(node.inputs[0])
        assert source.scale is not None
        steps = parts.scale.double().numpy() * np.float32(source.scale).astype(np.float64)
        assert np.array_equal(node.arrays["bias"], np.rint(parts.bias.detach().double().numpy() / steps))
        assert not np.array_equal(node.arrays["bias"], before[node.name])


def test_images_are_limited_by_memory() -> None:
    model = rounded_up(Net())
    room = 4 * live_elements(model.ops)
    assert live_elements(model.ops) >= 2 * 4 * 36  # both operands of the sum
    for memory, sizes in ((10 * room, [8, 2]), (16 * room, [8, 8]), (10**9, [8, 8, 8]), (1, [1])):
        assert [len(batch) for batch in limited(model, batches(), memory)] == sizes


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_channel_means_of_a_layer(kind: str) -> None:
    model = rounded_up(Net())
    op = next(op for op in model.ops if op.kind == kind)
    outputs = [torch.randn(2, 4, 3, 3), torch.randn(5, 4, 3, 3)] if kind == "conv" else [torch.randn(7, 4)]
    together = torch.cat(outputs).double()
    expected = together.mean((0, 2, 3)) if kind == "conv" else together.mean(0)
    torch.testing.assert_close(channel_means(op, outputs), expected, rtol=1e-6, atol=1e-7)


def test_one_image_is_enough() -> None:
    model = rounded_up(Net())
    one = [batches()[0][:1]]
    means = float_means(model, one)
    assert correct_biases(model, one, means).images == 1
    assert all(bool(torch.isfinite(value).all()) for value in model.model.state_dict().values())
