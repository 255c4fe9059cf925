"""Runs small graphs through the compiler and compares every stored tensor with the interpreter."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_benchmark.isa import TARGETS, Target, runs_here
from tvm_benchmark.lowering import Emit, build, lower
from tvm_benchmark.plan import make_plan
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


def clamp_attrs(bits: int = 8, signed: bool = True, rounding: str = "up") -> dict[str, Any]:
    """Attributes of a clamp to a whole type."""
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return {"rounding": rounding, "lo": lo, "hi": hi, "bits": bits, "signed": signed}


def requantized(x: Node, *, bits: int = 8, signed: bool = True, rounding: str = "up", seed: int = 0) -> Node:
    """A requantization for each channel that spreads a tensor over its whole new type."""
    attrs = clamp_attrs(bits, signed, rounding)
    ratio = 1.5 * (attrs["hi"] - attrs["lo"]) / max(x.type.hi - x.type.lo, 1)
    arrays = dyadic_arrays(np.random.default_rng(seed), x.type.shape[0], min(ratio, 1000.0))
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
    import tvm

    first, rng = graph.nodes[0], np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (batch, *first.type.shape)).astype(np.uint8)
    images = pixels if first.op == "image" else (pixels.astype(np.float32) - 128) * np.float32(0.02)
    plan = make_plan(graph, batch)
    lowered = lower(plan, target, emit_conv=emit_conv, keep=True)
    space = tvm.runtime.tensor(rng.integers(0, 256, lowered.space_bytes).astype(np.uint8))
    build(lowered, target)["main"](space, tvm.runtime.tensor(lowered.weights), tvm.runtime.tensor(images.ravel()))
    expected = interpreter.run(graph, images, keep=True)
    memory = space.numpy()
    for name, place in lowered.tensors.items():
        if name in expected:
            np.testing.assert_array_equal(
                _read(memory, place, batch), expected[name].reshape(batch, *place["shape"]), name
            )
    return [step.kind for step in plan.steps]


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
