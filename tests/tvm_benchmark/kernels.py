"""Runs small graphs through the compiler and compares every stored tensor with the interpreter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_benchmark.isa import TARGETS, Target, runs_here
from tvm_benchmark.lowering import Emit, build, lower
from tvm_benchmark.plan import Plan, make_plan
from utils.integer_graph import interpreter
from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.ops import make_node, verify

HERE = [target for target in TARGETS.values() if runs_here(target)]
KERNEL_TARGETS = [target for target in HERE if not target.amx]  # tile registers matter to dense layers alone


def image(shape: tuple[int, int, int], *, bits: int = 8, signed: bool = False, seed: int = 0) -> Node:
    """An input whose table spreads pixels over the whole range of a type."""
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    table = np.random.default_rng(seed).integers(lo, min(hi, 32767), (shape[0], 256), endpoint=True).astype(np.int16)
    return make_node("image", "image", attrs={"shape": shape, "bits": bits, "signed": signed}, arrays={"table": table})


def dyadic_arrays(rng: np.random.Generator, count: int, ratio: float, suffix: str = "") -> dict[str, np.ndarray]:
    """Multipliers m / 2**e around a ratio, every other one with shift 32."""
    e = rng.integers(20, 45, count)
    e[::2] = 32
    m = np.clip(ratio * rng.uniform(0.5, 1.5, count) * 2.0**e, 1, 2**31 - 1)
    return {f"multiplier{suffix}": m.astype(np.int32), f"shift{suffix}": e.astype(np.uint8)}


def wide_arrays(rng: np.random.Generator, count: int, ratio: float, suffix: str = "") -> dict[str, np.ndarray]:
    """Multipliers m / 2**e around a ratio, m in [2**30, 2**31) as the original HAWQ has them; if several, one is the
    smallest of all, that of a dead channel."""
    fraction, exponent = np.frexp(ratio * rng.uniform(0.5, 1.5, count))
    m, e = np.floor(fraction * 2.0**31), 31 - exponent
    if count > 1:
        m[-1], e[-1] = 1, 62
    return {f"multiplier{suffix}": m.astype(np.int32), f"shift{suffix}": e.astype(np.uint8)}


def unclamped_sum(name: str, branches: Sequence[Node], reach: int = 1 << 17, seed: int = 0) -> Node:
    """Branches rescaled to values of up to about ``reach``, halves to even, added, in 32 bits."""
    attrs = {"rounding": "even", "lo": None, "hi": None, "bits": 32, "signed": True}
    arrays, rng = {}, np.random.default_rng(seed)
    for i, x in enumerate(branches):
        ratio = min(reach / max(-x.type.lo, x.type.hi, 1), 1000.0)
        arrays |= wide_arrays(rng, x.type.shape[0] if x.op == "conv2d" else 1, ratio, str(i))
    return make_node(name, "add", branches, attrs=attrs, arrays=arrays)


def relu(x: Node) -> Node:
    """A clip at 0 that leaves the rest of the type."""
    most = (1 << (x.type.bits - x.type.signed)) - 1
    return make_node(
        f"{x.name}.relu", "clip", [x], arrays={"lo": np.zeros(1, np.int32), "hi": np.full(1, most, np.int32)}
    )


def relu6(x: Node, seed: int = 0) -> Node:
    """A clip at 0 and at another bound for each channel, within the reach of x."""
    channels, most = x.type.shape[0], max(x.type.hi, 2)
    hi = np.random.default_rng(seed).integers(most // 4, most, channels).astype(np.int32)
    return make_node(f"{x.name}.relu6", "clip", [x], arrays={"lo": np.zeros(channels, np.int32), "hi": hi})


def clamp_attrs(bits: int = 8, signed: bool = True, rounding: str = "up") -> dict[str, Any]:
    """Attributes of a clamp to a whole type."""
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return {"rounding": rounding, "lo": lo, "hi": hi, "bits": bits, "signed": signed}


def requantized(x: Node, *, bits: int = 8, signed: bool = True, rounding: str = "up", seed: int = 0) -> Node:
    """A requantization for each channel that spreads a tensor over its whole new type; 31-bit multipliers where halves
    go to even."""
    attrs = clamp_attrs(bits, signed, rounding)
    ratio = 1.5 * (attrs["hi"] - attrs["lo"]) / max(x.type.hi - x.type.lo, 1)
    multipliers = wide_arrays if rounding == "even" else dyadic_arrays
    arrays = multipliers(np.random.default_rng(seed), x.type.shape[0], min(ratio, 1000.0))
    return make_node(f"{x.name}.q", "requantize", [x], attrs=attrs, arrays=arrays)


def depthwise(
    x: Node,
    kernel: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Node:
    """A depthwise convolution with weights over the whole int8 range."""
    rng, channels = np.random.default_rng(seed), x.type.shape[0]
    weight = rng.integers(-128, 127, (channels, 1, *kernel), endpoint=True).astype(np.int8)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels, "weight_bits": 8}
    bias = rng.integers(-9999, 9999, channels).astype(np.int32)
    return make_node(f"{x.name}.dw", "conv2d", [x], attrs=attrs, arrays={"weight": weight, "bias": bias})


def finished(nodes: Sequence[Node], last: Node | None = None) -> Graph:
    """A graph that ends in the logits of the flattened last node."""
    x = last or nodes[-1]
    flat = make_node("flat", "reshape", [x], attrs={"shape": [int(np.prod(x.type.shape))]})
    logits = make_node("logits", "logits", [flat], arrays={"scale": np.array([0.37], np.float32)})
    graph = Graph((*nodes, flat, logits), {})
    verify(graph)
    return graph


def check(graph: Graph, target: Target, *, batch: int = 1, seed: int = 0, emit_conv: Emit | None = None) -> list[str]:
    """Compile (dense layers with ``emit_conv``), run, compare every stored tensor.  Returns the kinds of the steps."""
    first, rng = graph.nodes[0], np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (batch, *first.type.shape)).astype(np.uint8)
    images = pixels if first.op == "image" else (pixels.astype(np.float32) - 128) * np.float32(0.02)
    plan = make_plan(graph, batch)
    check_values(stored_values(plan, target, images, emit_conv=emit_conv), graph, images)
    return [step.kind for step in plan.steps]


def check_values(values: Mapping[str, np.ndarray], graph: Graph, images: np.ndarray) -> None:
    """Compare what a compiled graph stored for images with the interpreter's tensors of the same names."""
    expected = interpreter.run(graph, images, keep=True)
    assert graph.nodes[-1].name in values
    for name, value in values.items():
        if name in expected:
            np.testing.assert_array_equal(value, expected[name].reshape(value.shape), name)


def stored_values(
    plan: Plan, target: Target, images: np.ndarray, *, emit_conv: Emit | None = None
) -> dict[str, np.ndarray]:
    """Compile and run: every tensor that the plan stores, [N, C, H, W], int64 (the logits float32)."""
    import tvm

    lowered = lower(plan, target, emit_conv=emit_conv, keep=True)
    rubbish = np.random.default_rng(0).integers(0, 256, lowered.space_bytes, dtype=np.uint8)
    space = tvm.runtime.tensor(rubbish)
    build(lowered, target)["main"](space, tvm.runtime.tensor(lowered.weights), tvm.runtime.tensor(images.ravel()))
    memory = space.numpy()
    return {name: _read(memory, place, plan.batch) for name, place in lowered.tensors.items()}


def _read(memory: np.ndarray, place: dict[str, Any], batch: int) -> np.ndarray:
    """A stored tensor as integers (floats for the logits) [N, C, H, W]."""
    c, h, w = place["shape"]
    top, bottom, left, right = place["halo"]
    rows, columns, dtype = h + top + bottom, w + left + right, np.dtype(place["dtype"])
    count = batch * rows * columns * place["pitch"]
    values = memory[place["offset"] : place["offset"] + count * dtype.itemsize].view(dtype)
    values = values.reshape(batch, rows, columns, place["pitch"])
    values = values[:, top : top + h, left : left + w, place["first"] : place["first"] + c].transpose(0, 3, 1, 2)
    return values if dtype == np.float32 else values.astype(np.int64) - place["zero"]
