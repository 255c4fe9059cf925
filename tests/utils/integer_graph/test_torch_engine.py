"""The torch engine equals the interpreter on every node, integer by integer."""

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.integer_graph import interpreter
from utils.integer_graph.ir import Graph, int_range
from utils.integer_graph.ops import OPS, verify
from utils.integer_graph.torch_engine import PRECISIONS, TorchEngine, exact_algorithms
from utils.integer_graph.torch_steps import STEPS
from utils.quantization_utils.dyadic import ROUNDING, floor_dyadic


def assert_equal_everywhere(graph, images):
    """Every node of both engines, by equality; the logits by bits."""
    expected = interpreter.run(graph, images, keep=True)
    engine = TorchEngine(graph)
    got = engine.run(torch.from_numpy(images))
    assert list(got) == list(expected)
    for node in graph.nodes:
        value = got[node.name].numpy()
        assert value.dtype == expected[node.name].dtype
        np.testing.assert_array_equal(value, expected[node.name], err_msg=f"{node.name} {dict(node.attrs)}")
    last = expected[graph.nodes[-1].name]
    np.testing.assert_array_equal(engine(torch.from_numpy(images)).numpy(), last)
    np.testing.assert_array_equal(interpreter.run(graph, images), last)


@pytest.mark.parametrize("rounding", list(ROUNDING))
@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed, rounding, random_graph, random_images):
    graph = random_graph(seed, rounding)
    verify(graph)
    assert_equal_everywhere(graph, random_images(graph, 3))


def test_every_op_has_a_step():
    assert set(STEPS) == set(OPS)


def widened(b, x, bits, signed=True):
    """Requantize to a wide activation that nearly fills its range."""
    lo, hi = int_range(bits, signed)
    attrs = {"bits": bits, "signed": signed, "lo": lo, "hi": hi, "rounding": b.rounding}
    ratio = hi // b.reach(x) or 1
    arrays = {"multiplier": np.array([ratio << 10], np.int32), "shift": np.array([10], np.uint8)}
    return b.emit("requantize", [x], attrs=attrs, arrays=arrays, scale=0.5)


@pytest.mark.parametrize("rounding", list(ROUNDING))
@pytest.mark.parametrize("seed", range(15))
def test_wide_activations_take_every_kind_of_split(seed, rounding, builder, random_images):
    """16-bit inputs of convolutions, unclamped sums beyond 2**24, accumulators of several pieces."""
    b = builder(seed, rounding)
    x = widened(b, b.image((b.integer(1, 6), 6, 5)), 16, bool(seed % 2))
    y = b.conv(x)
    unclamped = {"bits": 32, "signed": True, "lo": None, "hi": None, "rounding": rounding}
    arrays = b.dyadic(1, 2, 1, "0") | b.dyadic(int(y.type.shape[0]), 2, 1, "1")
    y = b.emit("add", [y, y], attrs=unclamped, arrays=arrays)
    y = b.clip(b.emit("gather", [y], arrays={"index": np.array([0, 0], np.int32)}))
    graph = b.classifier(b.mul(b.requantize(y), b.requantize(y)), 3)
    assert_equal_everywhere(graph, random_images(graph, 2))


@pytest.mark.parametrize(("kernel", "padding"), [(7, 0), (3, 1)])
def test_average_pools_round_down(kernel, padding, builder, random_images):
    """16-bit integers, one multiplier for all windows, zeros of the padding counted: the floor of the mean."""
    b = builder(kernel, "even")
    x = b.relu(widened(b, b.image((4, 7, 7)), 16))
    area = kernel * kernel
    m, e = floor_dyadic(area, area * x.type.hi)
    starts = range(-padding, 7 + padding - kernel + 1)
    attrs = {"rounding": "down", "lo": x.type.lo, "hi": x.type.hi, "bits": 16, "signed": True}
    for axis in ("row", "col"):
        ends = {"start": [max(s, 0) for s in starts], "stop": [min(s + kernel, 7) for s in starts]}
        attrs |= {f"{axis}_{end}": values for end, values in ends.items()}
    arrays = {"multiplier": np.full((1, 1), m, np.int32), "shift": np.full((1, 1), e, np.uint8)}
    y = b.emit("avg_pool", [x], attrs=attrs, arrays=arrays)
    graph, images = b.classifier(b.requantize(y), 3), random_images(Graph((b.nodes[0],)), 3)
    values = interpreter.run(graph, images, keep=True)
    padded = torch.from_numpy(np.pad(values[x.name], [(0, 0), (0, 0), (padding,) * 2, (padding,) * 2]))
    sums = padded.unfold(2, kernel, 1).unfold(3, kernel, 1).sum((-1, -2)).numpy()
    np.testing.assert_array_equal(values[y.name], sums // area)
    assert_equal_everywhere(graph, images)


def test_a_clip_above_all_values_and_above_float32(builder, random_images):
    """The results are the lower bounds, which float32 cannot hold, of inputs that it can."""
    b = builder(0, "even")
    x = b.unclamped([b.image((2, 3, 3))])
    assert x.type.hi < 2**28
    lo, hi = np.array([2**28 + 1, 2**29 + 3], np.int32), np.full(2, 2**31 - 1, np.int32)
    y = b.emit("clip", [x], arrays={"lo": lo, "hi": hi})
    graph = b.classifier(b.requantize(y), 2)
    assert_equal_everywhere(graph, random_images(graph, 2))


@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize("channels", [64, 600])
def test_sums_beyond_float32_are_split(value, channels, builder):
    """All-equal weights and inputs at their bound: a single float32 sum would lose the last bit."""
    b = builder(0)
    table = np.full((channels, 256), 255, np.int16)
    table[0, :] = 254  # an odd sum, so that rounding to even would show
    attrs = {"shape": [channels, 5, 5], "bits": 8, "signed": False}
    x = b.emit("image", attrs=attrs, arrays={"table": table}, scale=1.0)
    weight = np.full((3, channels, 3, 3), value, np.int8)
    arrays = {"weight": weight, "bias": np.array([1, 2, 3], np.int32)}
    attrs = {"stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1], "groups": 1, "weight_bits": 8}
    graph = b.classifier(b.requantize(b.emit("conv2d", [x], attrs=attrs, arrays=arrays)), 2)
    assert_equal_everywhere(graph, np.zeros((2, channels, 5, 5), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("width", "kernel", "dilation", "sides"), [(4, 2, 1, 0), (7, 3, 2, 0), (2, 3, 1, 1), (1, 1, 1, 1)]
)
def test_results_of_one_column(channels, width, kernel, dilation, sides, builder, random_images):
    """One step of a column stride is never taken; torch 2.11 gets it wrong where there is one channel."""
    b = builder(0)
    attrs = {"stride": [1, 5], "padding": [0, 0, sides, sides], "dilation": [1, dilation], "groups": 1}
    weight = b.rng.integers(-128, 128, (8, channels, 2, kernel), dtype=np.int8)
    arrays = {"weight": weight, "bias": b.rng.integers(-9, 9, 8, dtype=np.int32)}
    x = b.image((channels, 6, width))
    y = b.emit("conv2d", [x], attrs={**attrs, "weight_bits": 8}, arrays=arrays)
    assert y.type.shape == (8, 5, 1)
    graph = b.classifier(b.requantize(y), 2)
    assert_equal_everywhere(graph, random_images(graph, 3))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (1, 1)])
def test_standalone_batch_norms(bits, stride, padding, builder, random_images):
    """A depthwise 1x1 convolution, which is a product where nothing moves."""
    b = builder(0)
    x = widened(b, b.image((5, 4, 3)), bits)
    attrs = {"stride": [stride] * 2, "padding": [padding] * 4, "dilation": [1, 1], "groups": 5, "weight_bits": 8}
    weight = b.rng.integers(-128, 128, (5, 1, 1, 1), dtype=np.int8)
    arrays = {"weight": weight, "bias": b.rng.integers(-9, 9, 5, dtype=np.int32)}
    graph = b.classifier(b.requantize(b.emit("conv2d", [x], attrs=attrs, arrays=arrays)), 2)
    assert_equal_everywhere(graph, random_images(graph, 3))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_of_any_size_give_the_same_rows(count, random_graph, random_images):
    graph = random_graph(11)
    engine, images = TorchEngine(graph), torch.from_numpy(random_images(graph, 5))
    np.testing.assert_array_equal(engine(images[:count]).numpy(), engine(images)[:count].numpy())


def test_float_inputs(builder):
    b = builder(5)
    attrs = {"shape": [2, 6, 6], "inverse_scale": 30.5, "lo": -128, "hi": 127, "bits": 8, "signed": True}
    graph = b.classifier(b.requantize(b.conv(b.emit("quantize", attrs=attrs, scale=1 / 30.5))), 3)
    images = np.random.default_rng(0).normal(size=(3, 2, 6, 6)).astype(np.float32)
    images[0, 0, 0] = np.arange(6) / np.float32(61)  # halves, before rounding
    assert_equal_everywhere(graph, images)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="holds NaN"):
        TorchEngine(graph)(torch.from_numpy(images))


def precisions():
    return [backend.fp32_precision for backend in PRECISIONS]


@pytest.fixture(params=["highest", "medium"])
def user_precision(request):
    """A user's setting, which "medium" makes bfloat16 and TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_settings_are_restored_even_after_an_error(user_precision):
    before = precisions()

    def fail():
        with exact_algorithms():
            assert not torch.backends.cudnn.enabled
            assert set(precisions()) == {"ieee"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert precisions() == before
    assert torch.backends.cudnn.enabled
    assert torch.get_float32_matmul_precision() == user_precision


def test_reduced_precision_does_not_leak_in(user_precision, random_graph, random_images):
    graph = random_graph(4)
    expected = interpreter.run(graph, random_images(graph, 3))
    got = TorchEngine(graph)(torch.from_numpy(random_images(graph, 3)))
    np.testing.assert_array_equal(got.numpy(), expected)


def test_images_that_do_not_fit_are_refused(random_graph):
    graph = random_graph(0)
    shape = graph.nodes[0].type.shape
    with pytest.raises(UserError, match="got images float32"):
        TorchEngine(graph)(torch.zeros(2, *shape))
    with pytest.raises(UserError, match="got images uint8"):
        TorchEngine(graph)(torch.zeros(2, shape[0] + 1, *shape[1:], dtype=torch.uint8))


def test_gradients_and_inputs_are_left_alone(random_graph, random_images):
    graph = random_graph(6)
    images = torch.from_numpy(random_images(graph, 2))
    copy = images.clone()
    assert not TorchEngine(graph)(images).requires_grad
    assert torch.equal(images, copy)


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(40))
def test_a_gpu_gives_the_same_integers(seed, random_graph, random_images):
    graph = random_graph(seed, ["up", "even"][seed % 2])
    images = random_images(graph, 3)
    expected = interpreter.run(graph, images, keep=True)
    got = TorchEngine(graph, "cuda").run(torch.from_numpy(images))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name].cpu().numpy(), value, err_msg=name)
