"""Dense layers for tests: convolutions from their geometry, random networks of them."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.tvm_benchmark.kernels import clamp_attrs, finished, image, relu, relu6, requantized, unclamped_sum
from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import make_node


@dataclass(frozen=True)
class Shape:
    """A convolution: channels are those of one group, ``padding`` is (top, bottom, left, right)."""

    inputs: int
    outputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    bits: int = 8


def weights(rng: np.random.Generator, x: Node, shape: tuple[int, ...], bits: int) -> dict[str, np.ndarray]:
    """Weights over the whole range of ``bits``, narrower where the accumulator would leave int32."""
    reach = max(abs(x.type.lo), x.type.hi, 1) * int(np.prod(shape[1:]))
    most = min(1 << (bits - 1), (2**31 - 20000) // reach)
    weight = rng.integers(-most, most, shape).astype(np.int8)
    return {"weight": weight, "bias": rng.integers(-9999, 9999, shape[0]).astype(np.int32)}


def conv(name: str, x: Node, shape: Shape, rng: np.random.Generator | None = None) -> Node:
    """The convolution of a shape on a node."""
    rng = rng or np.random.default_rng(0)
    size = (shape.outputs * shape.groups, shape.inputs, *shape.kernel)
    attrs = {"stride": shape.stride, "dilation": shape.dilation, "padding": shape.padding}
    attrs |= {"groups": shape.groups, "weight_bits": shape.bits}
    return make_node(name, "conv2d", [x], attrs=attrs, arrays=weights(rng, x, size, shape.bits))


@dataclass(frozen=True)
class Case:
    """Image (or a slice of it, or of a concat) -> conv -> 16-bit body -> conv of the same shape with a residual ->
    linear.

    view: "whole", "slice" or "concat".  residual: what is added to the second convolution, "stored" (the 16-bit
    tensor), or a shortcut convolution that comes "before" or "after" it.  original: with the arithmetic of the original
    HAWQ, that is halves to even, 31-bit multipliers, accumulators clipped by channels, sums that are not clamped.
    """

    first: Shape
    second: Shape
    size: tuple[int, int]
    view: str
    input_bits: int
    signed: bool
    residual: str
    batch: int
    flat: bool
    seed: int
    original: bool = False


def seen(case: Case) -> list[Node]:
    """Nodes up to what the first convolution reads: the image, a slice of it or a slice of a concat with itself."""
    channels = case.first.inputs * case.first.groups
    extra = 0 if case.view == "whole" else 3
    x = image((channels + extra, *case.size), bits=case.input_bits, signed=case.signed, seed=case.seed)
    if case.view == "whole":
        return [x]
    nodes, first = [x], 2
    if case.view == "concat":
        scale = {f"multiplier{i}": np.full(1, 3 << 18, np.int32) for i in (0, 1)}
        scale |= {f"shift{i}": np.full(1, 20 - i, np.uint8) for i in (0, 1)}
        attrs = clamp_attrs(case.input_bits, case.signed)
        nodes.append(make_node("joined", "concat", [x, x], attrs=attrs, arrays=scale))
        first = channels
    index = np.arange(first, first + channels, dtype=np.int32)
    return [*nodes, make_node("slice", "gather", [nodes[-1]], arrays={"index": index})]


def joined(case: Case, branches: list[Node], rng: np.random.Generator) -> tuple[Node, Node]:
    """The sum of two branches, and that clipped."""
    if case.original:
        total = unclamped_sum("sum", branches, seed=case.seed)
        return total, relu(total)
    scale = {"multiplier0": np.full(1, 1 << 24, np.int32), "shift0": np.full(1, 32, np.uint8)}
    scale |= {"multiplier1": np.full(1, 3 << 20, np.int32), "shift1": np.full(1, 22, np.uint8)}
    total = make_node("sum", "add", branches, attrs=clamp_attrs(16), arrays=scale)
    bounds = {"lo": np.full(1, -30000, np.int32), "hi": rng.integers(0, 30000, 1).astype(np.int32)}
    return total, make_node("clipped", "clip", [total], arrays=bounds)


def graph_of(case: Case) -> Graph:
    """The network of a case, verified."""
    rng = np.random.default_rng(case.seed)
    nodes = seen(case)
    rounding = "even" if case.original else "up"
    one = conv("one", nodes[-1], case.first, rng)
    clips = [relu6(one, case.seed)] if case.original else []
    wide = requantized([one, *clips][-1], bits=16, rounding=rounding, seed=case.seed)
    low = requantized(wide, signed=case.signed, rounding=rounding, seed=case.seed)
    two, other = conv("two", low, case.second, rng), wide
    if case.residual != "stored":
        other = conv("shortcut", nodes[-1], case.first, rng)
    total, clipped = joined(case, [two, other], rng)
    last = requantized(clipped, signed=not case.signed, rounding=rounding, seed=case.seed)
    branches = {"stored": [two], "before": [other, two], "after": [two, other]}[case.residual]
    nodes += [one, *clips, wide, low, *branches, total, clipped, last]
    if case.flat:
        flat = make_node("vector", "reshape", [last], attrs={"shape": [int(np.prod(last.type.shape))]})
        arrays = weights(rng, flat, (int(rng.integers(1, 40)), *flat.type.shape), case.first.bits)
        linear = make_node("linear", "linear", [flat], attrs={"weight_bits": case.first.bits}, arrays=arrays)
        nodes += [flat, linear]
    return finished(nodes)


@st.composite
def shapes(draw: st.DrawFn, size: tuple[int, int], wide: bool) -> Shape:
    """A convolution that fits an image.  wide: 16-bit inputs, which leave room for few channels."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 4, 5)))
    inputs = draw(st.sampled_from((1, 2, 3, 5, 8, 13, 16, 24) if groups > 1 else (1, 3, 4, 16, 30, 64, 70)))
    outputs = draw(st.sampled_from((1, 2, 3, 8, 10, 16, 24) if groups > 1 else (1, 5, 16, 17, 32, 40, 70)))
    kernel, stride, dilation, pads = [], [], [], []
    for extent in size:
        before, after = (draw(st.integers(0, 3)) for _ in range(2))
        step = draw(st.integers(1, 2))
        most = (extent + before + after - 1) // step + 1
        kernel.append(draw(st.integers(1, min(5, most))))
        dilation.append(step)
        stride.append(draw(st.sampled_from((1, 1, 1, 2, 3))))
        pads += [before, after]
    if wide:
        inputs = min(inputs, 16)
    if draw(st.booleans()) and groups == 1:
        kernel, stride, pads = [1, 1], [1, 1], [0, 0, 0, 0]
    outputs += inputs == outputs == 1 < groups  # else it is a depthwise layer
    return Shape(inputs, outputs, groups, tuple(kernel), tuple(stride), tuple(dilation), tuple(pads), 8)


def out_size(shape: Shape, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    free = [
        size[i] + sum(shape.padding[2 * i : 2 * i + 2]) - shape.dilation[i] * (shape.kernel[i] - 1) - 1 for i in (0, 1)
    ]
    return free[0] // shape.stride[0] + 1, free[1] // shape.stride[1] + 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two convolutions, all they can be combined with, and what they read."""
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    input_bits = draw(st.sampled_from((8, 8, 8, 4, 16)))
    one = draw(shapes(size, input_bits == 16))
    bits = draw(st.sampled_from((2, 4, 8, 8)))
    channels = one.outputs * one.groups
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 5) if channels % g == 0 and (g == 1 or g < channels)]))
    kernel = draw(st.tuples(*[st.sampled_from((1, 1, 3, 5))] * 2))
    pads = tuple(k // 2 for k in kernel for _ in (0, 1))
    return Case(
        first=Shape(one.inputs, one.outputs, one.groups, one.kernel, one.stride, one.dilation, one.padding, bits),
        second=Shape(channels // groups, channels // groups, groups, kernel, (1, 1), (1, 1), pads, bits),
        size=size,
        view=draw(st.sampled_from(("whole", "whole", "slice", "concat"))),
        input_bits=input_bits,
        signed=draw(st.booleans()),
        residual=draw(st.sampled_from(("stored", "before", "after"))),
        batch=draw(st.sampled_from((1, 3))),
        flat=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        original=draw(st.booleans()),
    )


def single(shape: Shape, size: tuple[int, int] = (5, 4), view: str = "whole") -> Graph:
    """Image -> convolution "one" -> 8 bits -> logits; ``view`` as in :class:`Case`."""
    case = Case(shape, shape, size, view, 8, False, "stored", 1, False, 3)
    nodes = seen(case)
    one = conv("one", nodes[-1], shape, np.random.default_rng(3))
    return finished([*nodes, one, requantized(one)])
