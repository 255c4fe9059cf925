"""Convolutions and matrix products: the geometry of a layer, its packed weights, its tiles, its register kernels.

A kernel computes tiles of R pixels x NB blocks of 16 output channels.  The reduction runs over *segments*, runs of
bytes that are contiguous in NHWC: one for each kernel row (kernel width x channels), or one for each tap where pixels
have gaps.  Weights are packed once as [group][block][segment][step][16 outputs][bytes of a step]; a step is as many
bytes as the target's dot product takes.  What a segment reads beyond its end meets zero weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from tvm_benchmark.epilogue import Epilogue
from tvm_benchmark.isa import Target
from tvm_benchmark.layout import Shape3, View
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Value, blocks
from tvm_benchmark.source import Source
from utils.integer_graph.ir import Node

TILE_BYTES = 64  # reduction bytes of one tile register
PREFETCH_FROM = 100_000  # bytes of weights from which the next panel is fetched ahead
Site = tuple[str, str, str]  # expressions of image, row and column
JOBS = 8  # at least so many independent pieces of work, where the layer has them


@dataclass(frozen=True)
class Tiling:
    """How a layer is cut.

    pixels: pixels of one tile, at most.  tiles: tiles computed together (tile registers only).  panel: blocks of 16
    output channels computed together.  order: "panels" keeps one panel of weights and walks over the pixels,
    "pixels" keeps one block of pixels and walks over the panels.  kernel: "registers" or "tiles" (AMX).  walk:
    "rows" or "long" (see ``Walk``; rows where the layer has stride).
    """

    pixels: int
    panel: int
    tiles: int = 1
    order: str = "panels"
    kernel: str = "registers"
    walk: str = "rows"


@dataclass(frozen=True)
class Layer:
    """A conv2d or linear node as a kernel sees it, small groups merged until 16 outputs are whole blocks.

    weight: int8 [outputs, inputs / groups, kh, kw].  segment: bytes (input elements) of one run of the reduction.
    row_step, column_step: elements from one segment to the next.  start: elements from a pixel to its first tap.
    """

    weight: np.ndarray
    bias: np.ndarray
    groups: int
    stride: tuple[int, int]
    view: View
    bits: int
    merged: bool  # whole kernel rows are one segment
    dilation: tuple[int, int]
    padding: tuple[int, int]  # top, left

    @property
    def outputs(self) -> int:
        """Of one group."""
        return len(self.weight) // self.groups

    @property
    def inputs(self) -> int:
        """Of one group."""
        return int(self.weight.shape[1])

    @property
    def segments(self) -> tuple[int, int]:
        """Rows and columns of segments."""
        kh, kw = self.weight.shape[2:]
        return (kh, 1) if self.merged else (kh, kw)

    @property
    def segment(self) -> int:
        return self.inputs * (self.weight.shape[3] if self.merged else 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Elements between rows of segments and between columns of segments."""
        return self.dilation[0] * self.view.buffer.row, self.dilation[1] * self.view.buffer.pitch

    @property
    def is_point(self) -> bool:
        """Whether every output pixel reads the same pixel of the input, and no other."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def start(self) -> int:
        return -(self.padding[0] * self.view.buffer.row + self.padding[1] * self.view.buffer.pitch)


def layers_of(plan: Plan, step: Step) -> list[Layer]:
    """The layers of a conv or linear step: its anchor's and, where it has one, the second's."""
    return [_layer(node, plan.views[name]) for node, name in zip(step.anchors, step.inputs, strict=True)]


def _layer(node: Node, view: View) -> Layer:
    weight = node.arrays["weight"]
    weight = weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))
    attrs = {"stride": [1, 1], "dilation": [1, 1], "padding": [0] * 4, "groups": 1, **node.attrs}
    bias = node.arrays["bias"].astype(np.int64) - view.storage.zero * weight.astype(np.int64).sum((1, 2, 3))
    weight, groups = merge_groups(weight, attrs["groups"])
    dense = view.channels == view.buffer.pitch and groups == 1 and attrs["dilation"][1] == 1
    return Layer(
        weight=weight,
        bias=bias.astype(np.int32),
        groups=groups,
        stride=tuple(attrs["stride"]),
        view=view,
        bits=attrs["weight_bits"],
        merged=dense,
        dilation=tuple(attrs["dilation"]),
        padding=(attrs["padding"][0], attrs["padding"][2]),
    )


def merge_groups(weight: np.ndarray, groups: int) -> tuple[np.ndarray, int]:
    """Join neighbouring groups (zeros off the diagonal) until one has whole blocks of 16 outputs.

    weight: int8 [O, I / groups, kh, kw].  Returns int8 [O, I / merged groups, kh, kw] and the number of groups left.
    """
    outputs, inputs = len(weight) // groups, weight.shape[1]
    if groups == 1:
        return weight, 1
    factor = next((f for f in range(1, groups + 1) if groups % f == 0 and f * outputs % LANES == 0), groups)
    joined = np.zeros((len(weight), factor * inputs, *weight.shape[2:]), weight.dtype)
    for o in range(len(weight)):
        at = (o // outputs) % factor * inputs
        joined[o, at : at + inputs] = weight[o]
    return joined, groups // factor


def pack_weights(layer: Layer, group_bytes: int, step_bytes: int, four_bit: bool) -> np.ndarray:
    """Weights int8 [groups][blocks][segments][steps][16][group_bytes], flat.

    A segment is padded with zeros to a multiple of step_bytes.  four_bit: two neighbouring steps share their bytes,
    the first in the low nibbles; a segment then has an even number of steps.
    """
    pad = step_bytes * (2 if four_bit and step_bytes == group_bytes else 1)
    length = -(-layer.segment // pad) * pad
    w = layer.weight.transpose(0, 2, 3, 1)  # outputs, kh, kw, inputs
    w = w.reshape(len(w), -1, layer.segment)
    w = np.pad(w, ((0, 0), (0, 0), (0, length - layer.segment)))
    count = blocks(layer.outputs)
    start = np.minimum(np.arange(count) * LANES, max(layer.outputs - LANES, 0))
    channel = start[:, None] + np.arange(LANES)
    valid = channel < layer.outputs
    channel = np.arange(layer.groups)[:, None, None] * layer.outputs + np.minimum(channel, layer.outputs - 1)
    w = w[channel] * valid[None, :, :, None, None]  # groups, blocks, 16, segments, length
    w = w.reshape(layer.groups, count, LANES, -1, length // group_bytes, group_bytes)
    w = np.ascontiguousarray(w.transpose(0, 1, 3, 4, 2, 5)).astype(np.int8)
    if not four_bit:
        return w.ravel()
    pairs = w.reshape(-1, 2, LANES * group_bytes).view(np.uint8)
    return ((pairs[:, 0] & 15) | (pairs[:, 1] << 4)).view(np.int8).ravel()


@dataclass(frozen=True)
class Walk:
    """The output pixels of a step cut into tiles of R pixels; the last tile of a run overlaps its neighbour.

    A run is a row of the output, or, for stride 1, the whole image along the rows of the input ("long"): pixel v of
    a run is then row v / row_length, column v % row_length, and columns beyond the output are computed and dropped.
    linear: all pixels of all images follow each other in every view, so that no coordinates are needed.

    images, runs: runs of all images.  length: pixels of a run.  row_length: 0 for runs that are rows.
    """

    images: int
    runs: int
    length: int
    pixels: int
    row_length: int
    shape: Shape3
    linear: bool

    @property
    def per_run(self) -> int:
        return -(-self.length // self.pixels)

    @property
    def tiles(self) -> int:
        return self.images * self.runs * self.per_run

    def site(self, source: Source, tile: str) -> Site:
        """Image, run and first pixel of a tile, as expressions."""
        n, run, first = "0", "0", "0"
        if self.per_run > 1:
            place = f"T.truncmod({tile}, {self.per_run})" if self.images * self.runs > 1 else tile
            first = source.let(f"T.min(({place})*{self.pixels}, {self.length - self.pixels})", "w")
            tile = f"T.truncdiv({tile}, {self.per_run})"
        if self.runs > 1:
            run = source.let(f"T.truncmod({tile}, {self.runs})" if self.images > 1 else tile, "h")
            tile = f"T.truncdiv({tile}, {self.runs})"
        if self.images > 1:
            n = source.let(tile, "n")
        return n, run, first

    def at(self, view: View, site: Site) -> str:
        """Element offset of an output pixel in a view."""
        n, h, w = site
        return view.at(w, "0", "0") if self.linear and view.buffer.shape[1:] == (1, 1) else view.at(n, h, w)

    @contextmanager
    def pixel(self, source: Source, site: Site, i: str) -> Iterator[Site]:
        """Coordinates of the i-th pixel of a tile, inside a condition where it may be none of the output."""
        n, h, w = site
        v = f"{w} + {i}"
        if self.linear or not self.row_length:
            yield n, h, v
            return
        _, height, width = self.shape
        v = source.let(v, "v")
        row, column = source.let(f"T.truncdiv({v}, {self.row_length})", "h"), f"T.truncmod({v}, {self.row_length})"
        column = source.let(column, "w")
        if self.row_length == width and self.length > height * width:  # images follow each other
            yield f"T.truncdiv({row}, {height})", f"T.truncmod({row}, {height})", column
        elif self.row_length == width:
            yield n, row, column
        else:
            with source.block(f"if {column} < {width}:"):
                yield n, row, column


def walks_of(plan: Plan, step: Step, layers: Sequence[Layer], pixels: int) -> dict[str, Walk]:
    """The ways to cut the pixels of a step into tiles of at most ``pixels``, by name: "rows" and, for stride 1,
    "long"."""
    _, height, width = step.shape
    views = [plan.views[name] for name in (*step.inputs, *step.reads, *step.writes)]
    layer = layers[0]
    point = all(x.is_point for x in layers)
    packed = point and all(x.view.is_dense for x in layers)
    walks = {"rows": Walk(plan.batch, height, width, _even(width, pixels), 0, step.shape, False)}
    if layer.stride != (1, 1) or (len(layers) > 1 and not packed):
        return walks
    row = layer.view.buffer.row // layer.view.buffer.pitch
    if point and all(v.is_dense and v.buffer.shape[1:] == (height, width) for v in views):
        length = plan.batch * height * width
        walks["long"] = Walk(1, 1, length, _even(length, pixels), width, step.shape, True)
    elif packed:
        length = plan.batch * height * width
        walks["long"] = Walk(1, 1, length, _even(length, pixels), width, step.shape, False)
    else:
        length = (height - 1) * row + width
        walks["long"] = Walk(plan.batch, 1, length, _even(length, pixels), row, step.shape, False)
    return walks


def _even(length: int, pixels: int) -> int:
    """Pixels of a tile: as few tiles as ``pixels`` allows, all of one size."""
    return -(-length // -(-length // pixels))


@dataclass(frozen=True)
class Dot:
    """A row of the table of dot products: bytes of the reduction per step, the vectors that hold 16 accumulators,
    and the expression that adds one step: ``add(acc, activation, weights)``.

    activation(pointer, offset): the broadcast operand.  lanes: accumulators of one vector.
    """

    step: int
    lanes: int
    activation: Callable[[str, str], str]
    add: Callable[[str, str, str], str]


def _broadcast4(lanes: int) -> Callable[[str, str], str]:
    def activation(pointer: str, offset: str) -> str:
        four = f'T.reinterpret("int32", {pointer}[T.Ramp({offset}, 1, 4)])'
        return f'T.reinterpret("int8x{4 * lanes}", T.Broadcast({four}, {lanes}))'

    return activation


def _vpdpbusd(lanes: int) -> Callable[[str, str, str], str]:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return lambda acc, a, w: f'T.call_llvm_pure_intrin("int32x{lanes}", "{name}", {acc}, {a}, {w})'


def _broadcast_pair(pointer: str, offset: str) -> str:
    low, high = (f'T.cast({pointer}[{offset} + {i}], "int32")' for i in (0, 1))
    return f'T.reinterpret("int16x16", T.Broadcast(T.bitwise_or({low}, T.shift_left({high}, 16)), 8))'


def _pmaddwd(acc: str, a: str, w: str) -> str:
    wide = f'T.cast({w}, "int16x16")'
    return f'{acc} + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", {a}, {wide})'


DOTS: Mapping[str, Dot] = {
    "avx512": Dot(4, 16, _broadcast4(16), _vpdpbusd(16)),
    "avxvnni": Dot(4, 8, _broadcast4(8), _vpdpbusd(8)),
    "avx2": Dot(2, 8, _broadcast_pair, _pmaddwd),
    "portable": Dot(
        1,
        16,
        lambda pointer, offset: f'T.Broadcast(T.cast({pointer}[{offset}], "int32"), 16)',
        lambda acc, a, w: f'{acc} + {a} * T.cast({w}, "int32x16")',
    ),
}


@dataclass(frozen=True)
class Units:
    """The units of a job: how many, their group, their panel where it is one for all, and ``locate(unit)``: first
    block of the panel and block of pixels."""

    count: int | str
    group: str
    panel: str | None
    locate: Callable[[str], tuple[str, str]]


class Kernel:
    """One dense kernel under construction: what the register and the tile kernels have in common."""

    def __init__(self, plan: Plan, step: Step, target: Target, tiling: Tiling):
        self.plan, self.step, self.target = plan, step, target
        self.source = Source()
        self.layers = layers_of(plan, step)
        self.outputs, self.groups = self.layers[0].outputs, self.layers[0].groups
        walks = walks_of(plan, step, self.layers, tiling.pixels)
        self.walk = walks.get(tiling.walk, walks["rows"])
        self.tiles = min(tiling.tiles, self.walk.tiles)
        self.order = tiling.order
        self.blocks = blocks(self.outputs)
        self.panel = min(tiling.panel, self.blocks)
        self.panels = -(-self.blocks // self.panel)
        self.pixel_blocks = -(-self.walk.tiles // self.tiles)
        self.pointers = [self.source.tensor(n, v.view) for n, v in zip(step.inputs, self.layers, strict=True)]
        self.epilogue = Epilogue(self.source, plan, step, target)

    @property
    def pixels(self) -> int:
        """Pixels of one tile."""
        return self.walk.pixels

    @property
    def unit_vectors(self) -> int:
        """Vectors of 16 accumulators of one unit."""
        return self.tiles * self.pixels * self.panel

    def emit_jobs(self, prepare: Callable[[], None], run: Callable[["Units"], None]) -> None:
        """The loop over jobs, which may run at the same time, each a row of units: a panel and a block of pixels.

        prepare(): emitted at the start of a job.  run(units): emits all units of a job.
        """
        groups, source = self.groups, self.source
        by_panel = self.order == "panels"
        outer = groups * self.panels if by_panel else groups
        chunks = min(self.pixel_blocks, -(-JOBS // outer))
        size = -(-self.pixel_blocks // chunks)
        chunks = -(-self.pixel_blocks // size)
        with source.loop("job", outer * chunks, "parallel") as job:
            prepare()
            place = job if chunks == 1 else source.let(f"T.truncdiv({job}, {chunks})", "place")
            first = "0" if chunks == 1 else source.let(f"T.truncmod({job}, {chunks})*{size}", "first")
            even = self.pixel_blocks % size == 0
            extent: int | str = size if even else source.let(f"T.min({size}, {self.pixel_blocks} - {first})", "extent")
            if not by_panel:
                group = place if groups > 1 else "0"
                count = extent * self.panels if isinstance(extent, int) else f"{extent}*{self.panels}"
                run(Units(count, group, None, lambda unit: self._locate(unit, first)))
                return
            group = source.let(f"T.truncdiv({place}, {self.panels})", "g") if groups > 1 else "0"
            start = self._panel_start(f"T.truncmod({place}, {self.panels})" if groups > 1 else place)
            run(Units(extent, group, start, lambda unit: (start, f"{first} + {unit}")))

    def _locate(self, unit: str, first: str) -> tuple[str, str]:
        """First block of the panel and block of pixels of a unit, where panels change fastest."""
        if self.panels == 1:
            return "0", f"{first} + {unit}"
        start = self._panel_start(f"T.truncmod({unit}, {self.panels})")
        return start, f"{first} + T.truncdiv({unit}, {self.panels})"

    def _panel_start(self, panel: str) -> str:
        if self.panels == 1:
            return "0"
        exact = self.blocks % self.panel == 0
        text = f"({panel})*{self.panel}"
        return self.source.let(text if exact else f"T.min({text}, {self.blocks - self.panel})", "o")

    def channel(self, group: str, block: str) -> tuple[str, str]:
        """Block number and first channel among all outputs."""
        if self.groups > 1:
            whole = self.source.let(f"({group})*{self.blocks} + {block}", "blk")
            return whole, f"({whole})*{LANES}"
        channels = self.outputs
        if channels <= LANES:
            return "0", "0"
        start = f"({block})*{LANES}"
        return block, start if channels % LANES == 0 else f"T.min({start}, {channels - LANES})"

    def tile_of(self, block: str, tile: int | str) -> str:
        """Number of a tile of a pixel block."""
        if self.tiles == 1:
            return block
        first = f"({block})*{self.tiles}"
        if self.walk.tiles % self.tiles:
            first = f"T.min({first}, {self.walk.tiles - self.tiles})"
        return f"{first} + {tile}"

    def input_offset(self, layer: Layer, group: str, site: Site) -> str:
        """Element of the first tap of a tile's first pixel."""
        n, h, w = site
        sh, sw = layer.stride
        at = self.walk.at(layer.view, (n, f"({h})*{sh}" if h != "0" else h, f"({w})*{sw}" if w != "0" else w))
        parts = [at] + ([f"({group})*{layer.inputs}"] if layer.groups > 1 else [])
        return self.source.let(f"{' + '.join(parts)} + {layer.start}", "a")

    def number(self, group: str, block: str) -> str:
        """Number of a block among the blocks of all groups, as the weights are packed."""
        return self.channel(group, block)[0] if self.groups > 1 else block

    def finish_pixel(self, scratches: Sequence[str], site: Site, i: str, channel: str) -> None:
        """Take 16 channels of the i-th pixel from a site on through the epilogue.

        scratches: for each layer the expression of its accumulators, a vector.
        """
        with self.walk.pixel(self.source, site, i) as pixel:
            values = {
                node.name: Value(self.source.let(scratch, "acc"))
                for node, scratch in zip(self.step.anchors, scratches, strict=True)
            }
            self.epilogue.finish(values, partial(self.walk.at, site=pixel), channel)


class RegisterKernel(Kernel):
    """Accumulators in vector registers, one dot product instruction for each step, pixel and vector."""

    def __init__(self, plan: Plan, step: Step, target: Target, tiling: Tiling):
        super().__init__(plan, step, target, tiling)
        self.dots = [DOTS[target.dot if layer.view.storage.dtype == "uint8" else "portable"] for layer in self.layers]
        pairs = list(zip(self.layers, self.dots, strict=True))
        packed = [pack_weights(layer, dot.step, dot.step, layer.bits <= 4) for layer, dot in pairs]
        self.weights = [self.source.constant(array) for array in packed]
        self.biases = [self.source.constant(block_bias(layer)) for layer in self.layers]

    def emit(self) -> Source:
        self.emit_jobs(lambda: None, self._run)
        return self.source

    def _run(self, units: Units) -> None:
        with self.source.loop("b", units.count) as unit:
            self._unit(units.group, *units.locate(unit))

    def _unit(self, group: str, first: str, block: str) -> None:
        source = self.source
        site, number = self.walk.site(source, block), self.number(group, first)
        scratches = []
        for index, layer in enumerate(self.layers):
            acc = self._reduce(index, self.input_offset(layer, group, site), number)
            scratches.append(self._scratch(index, acc))
        with source.loop("j", self.panel) as j:
            block_number, channel = self.channel(group, f"{first} + {j}")
            channel = source.let(channel, "ch")
            self.epilogue.begin(block_number)
            with source.loop("i", self.pixels) as i:
                vectors = [f"{scratch}[({i})*{self.panel} + {j}]" for scratch in scratches]
                self.finish_pixel(vectors, site, i, channel)

    def _scratch(self, index: int, acc: str) -> str:
        """The accumulators as whole vectors in memory, [pixel][panel]."""
        parts = LANES // self.dots[index].lanes
        scratch = self.source.local(self.unit_vectors, f"int32x{LANES}", "scratch")
        for i in range(self.unit_vectors):
            pieces = [f"{acc}[{i * parts + part}]" for part in range(parts)]
            whole = pieces[0] if parts == 1 else f"T.Shuffle([{', '.join(pieces)}], {list(range(LANES))})"
            self.source.line(f"{scratch}[{i}] = {whole}")
        return scratch

    def _reduce(self, index: int, base: str, number: str) -> str:
        """Accumulators of one layer, an array [pixel][panel][part] of vectors."""
        layer, dot, source = self.layers[index], self.dots[index], self.source
        parts, lanes = LANES // dot.lanes, dot.lanes
        acc = source.local(self.unit_vectors * parts, f"int32x{lanes}", "acc")
        for slot in range(self.panel * parts):
            at = f"({number} + {slot // parts})*{LANES} + {slot % parts * lanes}"
            bias = source.let(f"{self.biases[index]}[T.Ramp({at}, 1, {lanes})]")
            for i in range(self.pixels):
                source.line(f"{acc}[{i * self.panel * parts + slot}] = {bias}")
        per_turn = 2 if layer.bits <= 4 else 1
        vector = LANES * dot.step
        turns = -(-layer.segment // (dot.step * per_turn))
        (rows, columns), (row_step, column_step) = layer.segments, layer.steps
        with source.loop("r", rows) as r, source.loop("s", columns) as s, source.loop("k", turns) as k:
            at = source.let(f"(({r})*{columns} + {s})*{turns * vector} + ({k})*{vector}", "at")
            size = rows * columns * turns * vector
            weights = [self._weights(index, f"({number} + {n})*{size} + {at}") for n in range(self.panel)]
            place = f"{base} + ({r})*{row_step} + ({s})*{column_step} + ({k})*{dot.step * per_turn}"
            offset = source.let(place, "off")
            for turn in range(per_turn):
                for i in range(self.pixels):
                    pixel = i * layer.stride[1] * layer.view.buffer.pitch + turn * dot.step
                    a = source.let(dot.activation(self.pointers[index], f"{offset} + {pixel}"), "x")
                    for slot in range(self.panel * parts):
                        place = f"{acc}[{i * self.panel * parts + slot}]"
                        source.line(f"{place} = {dot.add(place, a, weights[slot // parts][turn][slot % parts])}")
        return acc

    def _weights(self, index: int, offset: str) -> list[list[str]]:
        """Weight vectors [turn][part] at an offset; two turns share the bytes of 4-bit weights."""
        dot, source, four_bit = self.dots[index], self.source, self.layers[index].bits <= 4
        size = dot.lanes * dot.step
        turns: list[list[str]] = [[], []] if four_bit else [[]]
        for part in range(LANES // dot.lanes):
            raw = source.let(f"{self.weights[index]}[T.Ramp({offset} + {part * size}, 1, {size})]", "w")
            if not four_bit:
                turns[0].append(raw)
                continue
            four = f"T.Broadcast(T.int8(4), {size})"
            turns[0].append(source.let(f"T.shift_right(T.shift_left({raw}, {four}), {four})", "w"))
            turns[1].append(source.let(f"T.shift_right({raw}, {four})", "w"))
        return turns


def block_bias(layer: Layer) -> np.ndarray:
    """Bias int32 [groups * blocks * 16], in the order of the packed blocks."""
    count = blocks(layer.outputs)
    start = np.minimum(np.arange(count) * LANES, max(layer.outputs - LANES, 0))
    channel = np.minimum(start[:, None] + np.arange(LANES), layer.outputs - 1)
    return layer.bias[np.arange(layer.groups)[:, None, None] * layer.outputs + channel].ravel().astype(np.int32)
