"""Random integer graphs, small and odd, with every operator and rounding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.integer_graph.ir import Graph, Node, int_range
from utils.integer_graph.ops import make_node


class Builder:
    """Adds nodes of random parameters to a list; every choice comes from one seeded generator."""

    def __init__(self, seed: int, rounding: str = "up") -> None:
        self.rng = np.random.default_rng(seed)
        self.rounding = rounding
        self.nodes: list[Node] = []

    def emit(self, op: str, inputs: Sequence[Node] = (), **parts: Any) -> Node:
        """Append a node with a running name."""
        node = make_node(f"{op}{len(self.nodes)}", op, inputs, **parts)
        self.nodes.append(node)
        return node

    def integer(self, low: int, high: int) -> int:
        """A random integer in [low, high]."""
        return int(self.rng.integers(low, high + 1))

    def clamp(self) -> dict[str, Any]:
        """Random storage of a result, with a clamp that fits it."""
        bits, signed = self.integer(2, 8), bool(self.rng.integers(2))
        lo, hi = int_range(bits, signed)
        return {"bits": bits, "signed": signed, "lo": lo, "hi": hi, "rounding": self.rounding}

    def dyadic(self, count: int | tuple[int, ...], reach: int, target: int, suffix: str = "") -> dict[str, np.ndarray]:
        """Random multipliers that bring values up to `reach` to about `target`, at random widths of m."""
        ratios = target / max(reach, 1) * self.rng.uniform(0.5, 3.0, count)
        width = self.rng.choice([8, 15, 24, 31])
        shift = np.clip(width - 1 - np.floor(np.log2(ratios)).astype(np.int64), 1, 62)
        m = np.clip(np.rint(np.ldexp(ratios, shift)), 1, 2**31 - 1)
        if not self.rng.integers(8):  # a dead channel's ratio
            m.flat[0], shift.flat[0] = 1, 62
        return {f"multiplier{suffix}": m.astype(np.int32), f"shift{suffix}": shift.astype(np.uint8)}

    def reach(self, node: Node) -> int:
        """Greatest magnitude of a node's integers."""
        return max(-node.type.lo, node.type.hi, 1)

    def image(self, shape: tuple[int, int, int]) -> Node:
        """Random input table of 8 bits."""
        signed = bool(self.rng.integers(2))
        lo, hi = int_range(8, signed)
        table = self.rng.integers(lo, hi + 1, (shape[0], 256), dtype=np.int16)
        attrs = {"shape": shape, "bits": 8, "signed": signed}
        return self.emit("image", attrs=attrs, arrays={"table": table}, scale=0.125)

    def conv(self, x: Node) -> Node:
        """Random convolution: groups, stride, dilation, asymmetric kernel and padding, 2..8 bits."""
        channels, height, width = x.type.shape
        groups = int(self.rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
        bits, outputs = self.integer(2, 8), groups * self.integer(1, 3)
        lo, hi = int_range(bits, True)
        kernel = [min(self.integer(1, 4), height), min(self.integer(1, 4), width)]
        weight = self.rng.integers(lo, hi + 1, (outputs, channels // groups, *kernel), dtype=np.int8)
        weight[self.rng.integers(outputs)] = 0
        bias = self.rng.integers(-5000, 5000, outputs, dtype=np.int32)
        padding = self.rng.integers(0, 3, 4).tolist()
        room = [height + padding[0] + padding[1], width + padding[2] + padding[3]]
        dilation = [self.integer(1, 2) if (k - 1) * 2 < r else 1 for k, r in zip(kernel, room, strict=True)]
        attrs = {
            "stride": self.rng.integers(1, 4, 2).tolist(),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "weight_bits": bits,
        }
        return self.emit("conv2d", [x], attrs=attrs, arrays={"weight": weight, "bias": bias})

    def requantize(self, x: Node, clamp: dict[str, Any] | None = None) -> Node:
        """Random rescaling, per channel or per tensor."""
        clamp = clamp or self.clamp()
        count = x.type.shape[0] if self.rng.integers(2) else 1
        arrays = self.dyadic(count, self.reach(x), max(-clamp["lo"], clamp["hi"]))
        return self.emit("requantize", [x], attrs=clamp, arrays=arrays, scale=0.5)

    def join(self, op: str, inputs: Sequence[Node]) -> Node:
        """add or concat with random multipliers."""
        clamp, arrays = self.clamp(), {}
        for i, x in enumerate(inputs):
            arrays |= self.dyadic(int(x.type.shape[0]), self.reach(x), max(-clamp["lo"], clamp["hi"]), str(i))
        return self.emit(op, inputs, attrs=clamp, arrays=arrays, scale=0.5)

    def again(self, acc: Node, x: Node) -> Node:
        """A convolution of x like the one that gave ``acc``, with other weights."""
        lo, hi = int_range(acc.attrs["weight_bits"], True)
        weight = self.rng.integers(lo, hi + 1, acc.arrays["weight"].shape, dtype=np.int8)
        bias = self.rng.integers(-5000, 5000, len(weight), dtype=np.int32)
        return self.emit("conv2d", [x], attrs=acc.attrs, arrays={"weight": weight, "bias": bias})

    def unclamped(self, inputs: Sequence[Node]) -> Node:
        """The sum of branches that are rescaled each on its own, to some width, without a clamp, in 32 bits."""
        attrs = {"bits": 32, "signed": True, "lo": None, "hi": None, "rounding": self.rounding}
        arrays, target = {}, 1 << self.integer(10, 27)
        for i, x in enumerate(inputs):
            count = int(x.type.shape[0]) if self.rng.integers(2) else 1
            arrays |= self.dyadic(count, self.reach(x), target, str(i))
        return self.emit("add", inputs, attrs=attrs, arrays=arrays, scale=0.5)

    def relu(self, x: Node) -> Node:
        """A clip at 0 that leaves the rest of the type."""
        most = int_range(x.type.bits, x.type.signed)[1]
        return self.emit("clip", [x], arrays={"lo": np.zeros(1, np.int32), "hi": np.full(1, most, np.int32)})

    def residual(self, x: Node) -> Node:
        """Two unclamped sums, one behind the other: of accumulators and a shortcut (accumulators too, or 16 bits), and
        of the first sum and accumulators."""
        acc = self.conv(x)
        lo, hi = int_range(16, True)
        wide = {"bits": 16, "signed": True, "lo": lo, "hi": hi, "rounding": self.rounding}
        shortcut = self.again(acc, x) if self.rng.integers(2) else self.requantize(acc, wide)
        total = self.relu(self.unclamped([acc, shortcut]))
        return self.requantize(self.relu(self.unclamped([total, self.again(acc, x)])))

    def mul(self, a: Node, b: Node) -> Node:
        """Product with one multiplier."""
        clamp = self.clamp()
        arrays = self.dyadic(1, self.reach(a) * self.reach(b), max(-clamp["lo"], clamp["hi"]))
        return self.emit("mul", [a, b], attrs=clamp, arrays=arrays, scale=0.5)

    def max_pool(self, x: Node) -> Node:
        """Random max pool, ceil mode and dilation included."""
        kernel = [min(self.integer(1, 3), extent) for extent in x.type.shape[1:]]
        dilation = [self.integer(1, 2) if (k - 1) * 2 < e else 1 for k, e in zip(kernel, x.type.shape[1:], strict=True)]
        attrs = {
            "kernel": kernel,
            "stride": self.rng.integers(1, 4, 2).tolist(),
            "padding": [self.integer(0, k // 2) for k in kernel],
            "dilation": dilation,
            "ceil_mode": bool(self.rng.integers(2)),
        }
        return self.emit("max_pool", [x], attrs=attrs)

    def avg_pool(self, x: Node, whole: bool = False) -> Node:
        """Random windows, or one window over everything; some round down."""
        attrs: dict[str, Any] = self.clamp()
        attrs["rounding"] = self.rng.choice([self.rounding, "down"]).item()
        for axis, extent in zip(("row", "col"), x.type.shape[1:], strict=True):
            start = self.rng.integers(0, extent, self.integer(1, 3))
            stop = [self.integer(int(s) + 1, extent) for s in start]
            attrs |= {f"{axis}_start": [0] if whole else start.tolist(), f"{axis}_stop": [extent] if whole else stop}
        size = (len(attrs["row_start"]), len(attrs["col_start"]))
        arrays = self.dyadic(size, self.reach(x) * x.type.shape[1] * x.type.shape[2], 100)
        return self.emit("avg_pool", [x], attrs=attrs, arrays=arrays, scale=0.5)

    def lookup(self, x: Node) -> Node:
        """Random table that covers exactly the input's bounds, or more."""
        offset, count = x.type.lo - self.integer(0, 2), x.type.hi - x.type.lo + 5
        shape = (x.type.shape[0], count) if self.rng.integers(2) else (count,)
        table = self.rng.integers(-128, 128, shape, dtype=np.int16)
        attrs = {"offset": offset, "bits": 8, "signed": True}
        return self.emit("lookup", [x], attrs=attrs, arrays={"table": table}, scale=0.5)

    def clip(self, x: Node) -> Node:
        """Clamp within the input's bounds."""
        count = x.type.shape[0] if self.rng.integers(2) else 1
        ends = np.sort(self.rng.integers(x.type.lo, x.type.hi + 1, (2, count)), axis=0).astype(np.int32)
        return self.emit("clip", [x], arrays={"lo": ends[0], "hi": ends[1]})

    def move(self, x: Node) -> Node:
        """gather (-1: zeros), pad2d, upsample or a reshape there and back."""
        kind = self.integer(0, 3)
        if kind == 0:
            index = self.rng.integers(-1, x.type.shape[0], self.integer(1, 5), dtype=np.int32)
            return self.emit("gather", [x], arrays={"index": index})
        if kind == 1:
            return self.emit("pad2d", [x], attrs={"padding": [1, 0, 2, -1 if x.type.shape[2] > 1 else 0]})
        if kind == 2:
            return self.emit("upsample", [x], attrs={"scale": self.rng.integers(1, 3, 2).tolist()})
        channels, height, width = x.type.shape
        return self.emit("reshape", [x], attrs={"shape": [height, channels, width]})

    def island(self, x: Node) -> Node:
        """Softmax or bilinear interpolation."""
        parameters: dict[str, Any] = {"function": "softmax"}
        if self.rng.integers(2):
            size = self.rng.integers(1, 9, 2).tolist()
            parameters = {"function": "interpolate", "size": size, "align_corners": bool(self.rng.integers(2))}
        attrs = {**self.clamp(), **parameters, "input_scale": float(np.float32(0.03)), "inverse_scale": 64.0}
        return self.emit("float_op", [x], attrs=attrs, scale=1 / 64)

    def classifier(self, x: Node, classes: int) -> Graph:
        """Flatten, linear, logits: the complete graph."""
        flat = self.emit("reshape", [x], attrs={"shape": [int(np.prod(x.type.shape))]})
        bits = self.integer(2, 8)
        lo, hi = int_range(bits, True)
        weight = self.rng.integers(lo, hi + 1, (classes, flat.type.shape[0]), dtype=np.int8)
        bias = self.rng.integers(-5000, 5000, classes, dtype=np.int32)
        out = self.emit("linear", [flat], attrs={"weight_bits": bits}, arrays={"weight": weight, "bias": bias})
        scale = self.rng.uniform(1e-4, 1e-2, classes).astype(np.float32)
        self.emit("logits", [out], arrays={"scale": scale})
        return Graph(tuple(self.nodes), {"arch": "random", "input_size": list(self.nodes[0].type.shape)})


def build(seed: int, rounding: str = "up", length: int = 8, islands: bool = True) -> Graph:
    """A random graph of about three times `length` nodes."""
    b = Builder(seed, rounding)
    x = b.image((b.integer(1, 3), b.integer(1, 11), b.integer(1, 11)))
    for _ in range(length):
        step = b.integer(0, 11)
        if step <= 3:
            x = b.requantize(b.conv(x))
        elif step == 4:
            x = b.join("add" if b.rng.integers(2) else "concat", [x, b.requantize(x), b.lookup(x)])
        elif step == 5:
            x = b.mul(x, b.avg_pool(x, whole=True))
        elif step == 9:
            x = b.island(x) if islands else b.clip(x)
        elif step == 10:
            x = b.residual(x)
        elif step == 11:
            x = b.requantize(b.clip(b.conv(x)))
        elif step == 6:
            x = b.max_pool(x) if b.rng.integers(2) else b.avg_pool(x)
        else:
            x = b.clip(x) if step == 7 else b.move(x)
    return b.classifier(x, b.integer(2, 5))


def pixels(graph: Graph, count: int, seed: int = 0) -> np.ndarray:
    """Random images uint8 [count, C, H, W] for a graph."""
    return np.random.default_rng(seed).integers(0, 256, (count, *graph.nodes[0].type.shape), dtype=np.uint8)
