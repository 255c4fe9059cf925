"""Depthwise convolutions on 64 bytes at a time: rows interleaved for the dot product of four bytes (AVX512-VNNI).

Up to four rows of 64 channels are interleaved, so that each int32 lane holds the four bytes of one channel; one
vpdpbusd then adds four taps of one kernel column.  A column is interleaved once for all outputs that read it.  The
interleave leaves the channels of each 128-bit lane in four registers, four by four; packing to bytes with saturation
undoes it, and is most of the clamp.  Where 64 does not divide the channels, neighbouring pixels fill whole registers
together if they can; else the last register overlaps the one before it, or a part of it is stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from tvm_benchmark.epilogue import Epilogue
from tvm_benchmark.isa import Target
from tvm_benchmark.layout import View
from tvm_benchmark.loops import image_rows
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Constants, Rescale, Value, rescale_mode
from tvm_benchmark.source import Source
from tvm_benchmark.vectors import BYTES, ByteTable, span, widest
from utils.integer_graph.ir import Node

QUADS = 4  # registers of int32 for 64 channels
DEPTH = 4  # rows of one dot product
SHUFFLES, FINISH = 8, 27  # vector instructions that interleave four rows, and that requantize and pack 64 outputs


@dataclass(frozen=True)
class Tile:
    """Outputs computed together: rows x columns of registers."""

    rows: int
    columns: int


TILES = (Tile(1, 1), Tile(1, 2), Tile(1, 4), Tile(2, 1), Tile(2, 2), Tile(4, 1))


def pixels_together(plan: Plan, step: Step, node: Node) -> int:
    """Neighbouring pixels whose channels fill whole registers, where that is less work than a register that is partly
    empty or overlaps the one before it."""
    channels, _, width = step.shape
    pixels = BYTES // gcd(channels, BYTES)
    views = [plan.views[name] for name in (*step.inputs, *step.writes)]
    whole = all(view.channels == view.buffer.pitch for view in views) and is_packed(step)
    if not whole or node.attrs["stride"][1] != 1 or pixels > width:
        return 1
    together = -(-width // pixels) * (pixels * channels // BYTES)
    return pixels if together < width * -(-channels // BYTES) else 1


class Reach:
    """What a tile reads: groups of up to four input rows, input columns (offsets from the tile's corner), and the
    uses, pairs (output row, group) that have taps in common."""

    def __init__(self, node: Node, tile: Tile, pixels: int):
        (self.sh, self.sw), (self.dh, self.dw) = node.attrs["stride"], node.attrs["dilation"]
        self.kh, self.kw = node.arrays["weight"].shape[2:]
        self.pixels = pixels
        rows = sorted({r * self.sh + i * self.dh for r in range(tile.rows) for i in range(self.kh)})
        self.groups = [rows[i : i + DEPTH] for i in range(0, len(rows), DEPTH)]
        steps = [t * pixels * self.sw for t in range(tile.columns)]
        self.columns = sorted({step + j * self.dw for step in steps for j in range(self.kw)})
        pairs = [(r, g) for r in range(tile.rows) for g in range(len(self.groups))]
        self.uses = [(r, g) for r, g in pairs if any(tap is not None for tap in self.taps(r, g))]

    def taps(self, row: int, group: int) -> list[int | None]:
        """Kernel row that an output row applies to each input row of a group."""
        wanted = {row * self.sh + i * self.dh: i for i in range(self.kh)}
        return [wanted.get(r) for r in self.groups[group]]

    def kernel_column(self, output: int, column: int) -> int | None:
        """Kernel column that the output of a place in the tile applies to an input column."""
        j, rest = divmod(column - output * self.pixels * self.sw, self.dw)
        return j if rest == 0 and 0 <= j < self.kw else None


def best_tile(plan: Plan, step: Step, node: Node) -> Tile:
    """The tile with the fewest vector instructions for the whole layer, those of overlapping tiles included."""
    _, height, width = step.shape
    pixels = pixels_together(plan, step, node)

    def cost(tile: Tile) -> int:
        reach = Reach(node, tile, pixels)
        interleave = SHUFFLES * len(reach.columns) * len(reach.groups)
        one = interleave + tile.columns * (QUADS * reach.kw * len(reach.uses) + FINISH * tile.rows)
        return -(-height // tile.rows) * -(-width // (tile.columns * pixels)) * one

    fitting = [tile for tile in TILES if tile.rows <= height and tile.columns * pixels <= width]
    return min(fitting, key=cost)


class ByteKernel:
    """Emits one kernel.  ``order`` is the channel of each int32 lane, int64 [blocks * 4, 16]."""

    def __init__(self, plan: Plan, step: Step, node: Node, bias: np.ndarray, target: Target, tile: Tile | None):
        self.source, self.plan, self.step, self.node = Source(), plan, step, node
        self.view = plan.views[step.inputs[0]]
        self.channels, self.height, self.width = step.shape
        self.pixels = pixels_together(plan, step, node)
        self.tile = tile or best_tile(plan, step, node)
        self.bytes = self.channels * self.pixels  # one after the other
        self.blocks = -(-self.bytes // BYTES)
        self.order = self._order()
        self.reach = Reach(node, self.tile, self.pixels)
        self.pointer = self.source.tensor(step.inputs[0], self.view)
        self.bias = Constants(self.source, bias, self.order)
        self.weights = self.source.constant(self._packed_weights())
        self.finish: Finish = PackedFinish(self, target) if is_packed(step) else LaneFinish(self, target)

    def _order(self) -> np.ndarray:
        """Channel of lane (register q, 128-bit lane p, dword d) of each block: 16 p + 4 q + d from its start."""
        starts = np.minimum(np.arange(self.blocks) * BYTES, max(self.bytes - BYTES, 0))
        byte = np.arange(BYTES).reshape(QUADS, QUADS, 4).transpose(1, 0, 2)
        order = np.minimum(starts[:, None, None, None] + byte, self.bytes - 1) % self.channels
        return order.reshape(self.blocks * QUADS, LANES)

    def _packed_weights(self) -> np.ndarray:
        """int8 [blocks][uses][kernel columns][4 registers][16 lanes][4 rows]."""
        weight, reach = self.node.arrays["weight"][:, 0], self.reach
        kw, uses = reach.kw, reach.uses
        packed = np.zeros((self.blocks * QUADS, LANES, len(uses), kw, DEPTH), np.int8)
        for u, (row, group) in enumerate(uses):
            for position, tap in enumerate(reach.taps(row, group)):
                if tap is not None:
                    packed[:, :, u, :, position] = weight[self.order, tap]
        packed = packed.reshape(self.blocks, QUADS, LANES, len(uses), kw, DEPTH)
        return packed.transpose(0, 3, 4, 1, 2, 5).ravel()

    def emit(self) -> Source:
        """The whole kernel."""
        source, tile = self.source, self.tile
        turns = -(-self.height // tile.rows)
        (sh, sw), (top, _, left, _) = self.node.attrs["stride"], self.node.attrs["padding"]
        with image_rows(source, self.plan.batch, turns, self.plan.batch * int(np.prod(self.step.shape))) as (n, turn):
            h = source.let(f"T.min(({turn})*{tile.rows}, {self.height - tile.rows})", "h")
            with source.loop("b", self.blocks) as b:
                start = source.let(f"T.min(({b})*{BYTES}, {max(self.bytes - BYTES, 0)})", "start")
                bias, weights = self._load(b)
                self.finish.begin(b)
                step = tile.columns * self.pixels
                with source.loop("w", -(-self.width // step)) as turn_w:
                    w = source.let(f"T.min(({turn_w})*{step}, {self.width - step})", "w")
                    corner = self.view.at(n, f"({h})*{sh} - {top}", f"({w})*{sw} - {left}")
                    corner = source.let(f"{corner} + {start}", "at")
                    self._columns(corner, bias, weights, (n, h, w, start))
        return source

    def _load(self, block: str) -> tuple[list[str], dict[tuple[int, int, int], list[str]]]:
        """Bias of the 4 registers; weights of the 4 registers by (output row, group, kernel column)."""
        bias = [self.bias.vector(f"({block})*{QUADS} + {q}") for q in range(QUADS)]
        keys = [(row, group, j) for row, group in self.reach.uses for j in range(self.reach.kw)]
        size = len(keys) * QUADS
        held = {
            key: [
                self.source.let(
                    f"{self.weights}[{span(f'({block})*{size * BYTES} + {(i * QUADS + q) * BYTES}', BYTES)}]"
                )
                for q in range(QUADS)
            ]
            for i, key in enumerate(keys)
        }
        return bias, held

    def _columns(
        self, corner: str, bias: list[str], weights: Mapping[tuple[int, int, int], list[str]], place: tuple[str, ...]
    ) -> None:
        """All columns of a tile from left to right; an output is finished after its last column."""
        reach = self.reach
        totals = {(r, t): list(bias) for r in range(self.tile.rows) for t in range(self.tile.columns)}
        n, h, w, start = place
        for column in reach.columns:
            registers = [self._interleaved(corner, rows, column) for rows in reach.groups]
            for t in range(self.tile.columns):
                j = reach.kernel_column(t, column)
                if j is None:
                    continue
                for row, group in reach.uses:
                    for q, factor in enumerate(weights[row, group, j]):
                        total = totals[row, t][q]
                        totals[row, t][q] = self._dot(total, registers[group][q], factor)
                if j == reach.kw - 1:
                    for row in range(self.tile.rows):
                        at = _At(n, f"{h} + {row}", f"{w} + {t * self.pixels}")
                        self.finish.finish(totals.pop((row, t)), at, start)

    def _dot(self, total: str, x: str, w: str) -> str:
        return self.source.let(
            f'T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", {total}, {x}, {w})', "sum"
        )

    def _interleaved(self, corner: str, rows: list[int], column: int) -> list[str]:
        """Four uint8x64 registers with the bytes of up to four rows of a column, row by row in each dword."""
        buffer, let = self.view.buffer, self.source.let
        offsets = [row * buffer.row + column * buffer.pitch for row in rows]
        x = [let(f"{self.pointer}[{span(f'{corner} + {offset}', BYTES)}]", "x") for offset in offsets]
        a, b, c, d = (x[min(i, len(x) - 1)] for i in range(DEPTH))  # missing rows have zero weights
        pairs = [let(f"T.Shuffle([{p}, {q}], {_unpack(BYTES, high)})") for high in (0, 1) for p, q in ((a, b), (c, d))]
        pairs = [let(f'T.reinterpret("uint16x32", {pair})') for pair in pairs]
        quads = [
            f"T.Shuffle([{p}, {q}], {_unpack(BYTES // 2, high)})" for p, q in (pairs[:2], pairs[2:]) for high in (0, 1)
        ]
        return [let(f'T.reinterpret("uint8x64", {quad})') for quad in quads]


def _unpack(lanes: int, high: int) -> list[int]:
    """Indices that interleave the low (or high) halves of each 128-bit lane of two registers."""
    part = lanes // 4
    half = part // 2
    return [p * part + high * half + i + source * lanes for p in range(4) for i in range(half) for source in (0, 1)]


@dataclass(frozen=True)
class _At:
    """A pixel (expressions)."""

    n: str
    h: str
    w: str

    def __call__(self, view: View) -> str:
        return view.at(self.n, self.h, self.w)


class LaneFinish:
    """Registers back in natural order, then the body as everywhere; whole blocks of 16 channels only."""

    def __init__(self, kernel: ByteKernel, target: Target):
        self.kernel, self.block = kernel, ""
        self.epilogue = Epilogue(kernel.source, kernel.plan, kernel.step, target)

    def begin(self, block: str) -> None:
        self.block = f"T.min(({block})*{QUADS}, {self.kernel.channels // LANES - QUADS})"

    def finish(self, totals: Sequence[str], at: Callable[[View], str], start: str) -> None:
        for i in range(QUADS):
            self.epilogue.begin(f"{self.block} + {i}")
            lanes = [q * LANES + 4 * i + d for q in range(QUADS) for d in range(4)]
            value = self.kernel.source.let(f"T.Shuffle([{', '.join(totals)}], {lanes})")
            self.epilogue.finish({self.kernel.step.name: Value(value)}, at, f"{start} + {i * LANES}")


class PackedFinish:
    """One requantization to bytes, packed with saturation, perhaps behind a clip, perhaps a table on the bytes."""

    def __init__(self, kernel: ByteKernel, target: Target):
        self.kernel, self.node = kernel, _requantization(kernel.step)
        source, plan, name = kernel.source, kernel.plan, kernel.step.writes[0]
        total = plan.types[self.node.inputs[0]]
        clips = [node.arrays for node in kernel.step.body if node.op == "clip"]
        self.bounds = [Constants(source, clip[key], kernel.order) for clip in clips for key in ("lo", "hi")]
        arrays = self.node.arrays
        self.rescale = Rescale(
            source,
            arrays["multiplier"],
            arrays["shift"],
            (total.lo, total.hi),
            self.node.attrs["rounding"],
            lambda values: Constants(source, values, kernel.order),
        )
        self.result = plan.views[name]
        self.to = source.tensor(name, self.result)
        last = kernel.step.body[-1]
        self.table = ByteTable(source, self._table(last)) if last.op == "lookup" else None
        self.held: list[str] = []
        self.clip: list[list[str]] = []
        self.apply: list[Callable[[Value], Value]] = []

    def _table(self, node: Node) -> np.ndarray:
        """The lookup from stored byte to stored byte, uint8 [256]."""
        zero_in = 128 if self.node.type.signed else 0
        table = node.arrays["table"].astype(np.int64)
        index = np.clip(np.arange(256) - zero_in - node.attrs["offset"], 0, len(table) - 1)
        return (table[index] + self.result.storage.zero).astype(np.uint8)

    def begin(self, block: str) -> None:
        registers = [f"({block})*{QUADS} + {q}" for q in range(QUADS)]
        self.clip = [[bound.vector(register) for bound in self.bounds] for register in registers]
        self.apply = [self.rescale.load(register) for register in registers]
        self.held = self.table.load() if self.table else []

    def finish(self, totals: Sequence[str], at: Callable[[View], str], start: str) -> None:
        source, kernel = self.kernel.source, self.kernel
        if self.bounds:
            clipped = zip(totals, self.clip, strict=True)
            totals = [source.let(f"T.max(T.min({total}, {most}), {least})") for total, (least, most) in clipped]
        parts = [apply(Value(total)).name for apply, total in zip(self.apply, totals, strict=True)]
        pairs = [_pack(source, "int16x32", "packssdw", *parts[i : i + 2]) for i in (0, 2)]
        if self.node.type.signed:
            packed = _pack(source, "uint8x64", "packsswb", *pairs)
            packed = source.let(f"T.bitwise_xor({packed}, {_splat_byte(128)})")
        else:
            packed = _pack(source, "uint8x64", "packuswb", *pairs)
        packed = self._clamped(packed)
        if self.table:
            packed = self.table.look(self.held, packed)
        offset, valid = f"{at(self.result)} + {start}", min(kernel.bytes, BYTES)
        done = 0
        while done < valid:
            size = widest(valid - done, BYTES)
            piece = packed if size == BYTES else f"T.Shuffle([{packed}], {list(range(done, done + size))})"
            source.line(f"{self.to}[{span(f'{offset} + {done}', size)}] = {piece}")
            done += size

    def _clamped(self, packed: str) -> str:
        """The part of the clamp that is narrower than a byte."""
        node, zero = self.node, 128 if self.node.type.signed else 0
        lo, hi = node.attrs["lo"], node.attrs["hi"]
        if hi is not None and hi + zero < 255 and self.rescale.hi > hi:
            packed = self.kernel.source.let(f"T.min({packed}, {_splat_byte(hi + zero)})")
        if lo is not None and lo + zero > 0 and self.rescale.lo < lo:
            packed = self.kernel.source.let(f"T.max({packed}, {_splat_byte(lo + zero)})")
        return packed


Finish = PackedFinish | LaneFinish


def _splat_byte(value: int) -> str:
    return f"T.Broadcast(T.uint8({value}), {BYTES})"


def _pack(source: Source, dtype: str, name: str, a: str, b: str) -> str:
    return source.let(f'T.call_llvm_pure_intrin("{dtype}", "llvm.x86.avx512.{name}.512", {a}, {b})')


def _requantization(step: Step) -> Node:
    """The one requantization of a packed body."""
    return next(node for node in step.body if node.op == "requantize")


def is_packed(step: Step) -> bool:
    """Whether the body is one requantization to bytes, perhaps behind a clip, perhaps with a table on the bytes."""
    ops = [node.op for node in step.body]
    forms = [[*clip, "requantize", *table] for clip in ([], ["clip"]) for table in ([], ["lookup"])]
    if ops not in forms or step.writes != (step.body[-1].name,):
        return False
    before = [step.name, *(node.name for node in step.body)]
    if any(node.inputs != (name,) for node, name in zip(step.body, before, strict=False)):
        return False
    in_bytes = all(node.type.bits <= 8 for node in step.body if node.op != "clip")
    return in_bytes and step.body[-1].arrays.get("table", np.zeros(1)).ndim == 1


def fits_bytes(plan: Plan, step: Step) -> bool:
    """Whether :class:`ByteKernel` has a form for a step with an 8-bit input."""
    if not is_packed(step):
        return step.shape[0] >= BYTES and step.shape[0] % LANES == 0
    node = _requantization(step)
    total = plan.types[node.inputs[0]]
    return rescale_mode(node, (total.lo, total.hi)) != "wide"
