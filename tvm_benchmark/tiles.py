"""Dense kernels on tile registers (AMX): 16 pixels x 64 bytes times 64 bytes x 16 outputs in one instruction.

Eight tile registers: 0..3 accumulate, 4.. hold pixels, the last ones weights.  A tile of pixels is loaded straight
from NHWC memory, its rows one pixel stride apart; a tile of weights is one packed step.  Accumulators start as the
bias (one row loaded with stride 0) and are finished from a scratch array in the first-level cache.  A product takes
as many cycles as its tile of pixels has rows, so rows are never padded.
Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (TILELOADD, TDPBUSD).
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from tvm_benchmark.dense import Kernel, Tiling, Units
from tvm_benchmark.isa import Target
from tvm_benchmark.layers import Layer, block_bias, pack_weights
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Apply
from tvm_benchmark.source import Source
from tvm_benchmark.walks import Site

TILE_BYTES = 64  # reduction bytes of one tile register
PREFETCH_FROM = 100_000  # bytes of weights from which the next panel is fetched ahead
UNPACKED_BYTES = 64 << 10  # 4-bit weights that a job unpacks at once
ACCUMULATORS, REGISTERS = 4, 8
STEP = LANES * TILE_BYTES  # bytes of one tile of weights
MAX_ROWS = 16
Constants = tuple[str, list[Apply]]


def tile_config(rows: int, weights: list[int]) -> np.ndarray:
    """The 64 bytes that LDTILECFG reads (palette 1): the registers of weights have 16 rows, the others ``rows``."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32:2] = TILE_BYTES
    config[48 : 48 + REGISTERS] = rows
    config[[48 + register for register in weights]] = MAX_ROWS
    return config


@dataclass(frozen=True)
class Reduction:
    """One layer of a kernel on tiles: pointers to its pixels, weights and bias, and how long its sums are.

    turns: steps of one segment.  steps: steps of the whole reduction.  block_bytes: weights of one block.
    """

    layer: Layer
    pixels: str
    weights: str
    bias: str
    turns: int
    steps: int

    @property
    def block_bytes(self) -> int:
        return self.steps * STEP

    @property
    def four_bit(self) -> bool:
        return self.layer.bits <= 4


@dataclass(frozen=True)
class Unit:
    """A unit of a job: first block of its panel, as is and as packed, and the sites of its tiles."""

    first: str
    number: str
    block: str
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Behind:
    """A unit whose accumulators wait in the scratch array: where, the constants of its panel, the unit after it."""

    unit: Unit
    half: str
    constants: list[Constants]
    following: Unit | None = None


class TileKernel(Kernel):
    """Accumulators in tile registers: ``tiles`` tiles of pixels x ``panel`` blocks of outputs, at most four.

    A job is a pipeline: while the tiles of one unit are multiplied, the unit before is finished in vector registers,
    from the other half of a scratch array, a few pixels after every step of the reduction.  Longer runs of tile
    instructions would fill the processor's queues and stop the vector instructions behind them.
    """

    def __init__(self, plan: Plan, step: Step, target: Target, tiling: Tiling):
        super().__init__(plan, step, target, tiling)
        assert self.tiles * self.panel <= ACCUMULATORS
        assert self.pixels <= MAX_ROWS
        if any(layer.bits <= 4 and not self._unpacks_all(layer) for layer in self.layers):
            self.order = "panels"  # a panel is unpacked once
        self.reductions = [self._reduction(index, layer) for index, layer in enumerate(self.layers)]
        self.config = self.source.constant(tile_config(self.pixels, self._weight_registers()))
        self.scratch = ""
        self.unpacked: list[str] = []

    def _unpacks_all(self, layer: Layer) -> bool:
        """Whether a job unpacks all weights of a layer at its start, so that its pixels may come first."""
        return self.groups == 1 and layer.weight.size <= UNPACKED_BYTES

    def _reduction(self, index: int, layer: Layer) -> Reduction:
        weights = self.source.constant(pack_weights(layer, 4, TILE_BYTES, layer.bits <= 4))
        bias = self.source.constant(block_bias(layer))
        turns = -(-layer.segment // TILE_BYTES)
        rows, columns = layer.segments
        return Reduction(layer, self.pointers[index], weights, bias, turns, rows * columns * turns)

    def _pixel_registers(self) -> list[int]:
        return [4, 5][: self.tiles] if self.tiles <= 2 else [4, 5, 6]

    def _weight_registers(self) -> list[int]:
        return [r for r in range(ACCUMULATORS, REGISTERS) if r not in self._pixel_registers()]

    def emit(self) -> Source:
        self.emit_jobs(self._configure, self._run)
        return self.source

    def _call(self, name: str, *arguments: str) -> None:
        self.source.evaluate(f'T.call_llvm_intrin("void", "llvm.x86.{name}", {", ".join(arguments)})')

    def _load(self, register: int, address: str, stride: str) -> None:
        self._call("tileloadd64", f"T.int8({register})", f"T.address_of({address})", f"T.int64({stride})")

    def _configure(self) -> None:
        self._call("ldtilecfg", f"T.address_of({self.config}[0])")

    def _run(self, units: Units) -> None:
        """All units of a job: the first is only multiplied, the last only finished at the end."""
        source, count = self.source, units.count
        start = self.number(units.group, units.panel or "0")
        self.unpacked = [self._unpack(r, start, bool(units.panel)) if r.four_bit else "" for r in self.reductions]
        self.scratch = source.local(2 * len(self.layers) * self.unit_vectors, f"int32x{LANES}", "scratch")
        self._multiply_unit(units, "0", None)
        if count != 1:
            turns = count - 1 if isinstance(count, int) else f"{count} - 1"
            with source.loop("u", turns) as u:
                self._multiply_unit(units, f"({u} + 1)", u)
        last = str(count - 1) if isinstance(count, int) else source.let(f"{count} - 1", "last")
        unit = self._unit(units, last)
        behind = Behind(unit, self._half(last), self._constants(units.group, unit))
        self._finish(units.group, behind, "0", self.tiles * self.pixels)

    def _unit(self, units: Units, unit: str) -> Unit:
        first, block = units.locate(unit)
        block = self.source.let(block, "blk")
        sites = tuple(self.walk.site(self.source, self.tile_of(block, m)) for m in range(self.tiles))
        return Unit(first, self.number(units.group, first), block, sites)

    def _half(self, unit: str) -> str:
        """First vector of the half of the scratch array that belongs to a unit."""
        return self.source.let(f"T.bitwise_and({unit}, 1)*{len(self.layers) * self.unit_vectors}", "half")

    def _constants(self, group: str, unit: Unit) -> list[Constants]:
        """First channel and loaded constants of every block of a unit's panel."""
        found = []
        for j in range(self.panel):
            number, channel = self.channel(group, f"{unit.first} + {j}")
            found.append((self.source.let(channel, "ch"), self.epilogue.begin(number)))
        return found

    def _behind(self, units: Units, before: str, following: Unit) -> "Behind":
        unit = self._unit(units, before)
        return Behind(unit, self._half(before), self._constants(units.group, unit), following)

    def _multiply_unit(self, units: Units, index: str, before: str | None) -> None:
        """Multiply one unit and finish the one before it, where there is one, in between."""
        unit, half = self._unit(units, index), self._half(index)
        behind = self._behind(units, before, unit) if before is not None else None
        pixels, steps = self.tiles * self.pixels, sum(r.steps for r in self.reductions)
        each = max(1, (pixels - pixels // 4) // steps)  # finished after each step; the rest hides the stores
        done = 0
        for number, reduction in enumerate(self.reductions):
            for m, n in product(range(self.tiles), range(self.panel)):
                self._load(m * self.panel + n, f"{reduction.bias}[({unit.number} + {n})*{LANES}]", "0")
            bases = [self.input_offset(reduction.layer, units.group, site) for site in unit.sites]
            shared = min(reduction.steps, (pixels - done) // each) if behind else 0
            if shared and behind:
                with self.source.loop("k", shared) as k:
                    self._step(reduction, unit, bases, k)
                    self._finish(units.group, behind, f"{done} + ({k})*{each}", each)
            if reduction.steps > shared:
                with self.source.loop("k", reduction.steps - shared) as k:
                    self._step(reduction, unit, bases, f"{k} + {shared}")
            done += shared * each
            self._store(f"{half} + {number * self.unit_vectors}")
        if behind and done < pixels:
            self._finish(units.group, behind, str(done), pixels - done)

    def _finish(self, group: str, behind: "Behind", start: str, count: int) -> None:
        """Take pixels of a unit through the epilogue, and ask for what the same ones of the next will touch."""
        source = self.source
        with source.loop("x", count) as turn:
            x = source.let(f"{start} + {turn}", "x")
            tile = source.let(f"T.truncdiv({x}, {self.pixels})", "m")
            i = source.let(f"T.truncmod({x}, {self.pixels})", "i") if self.tiles > 1 else x
            site = self.walk.site(source, self.tile_of(behind.unit.block, tile))
            for j, (channel, loaded) in enumerate(behind.constants):
                self.epilogue.loaded = loaded
                at = f"{behind.half} + ({x})*{self.panel} + {j}"
                vectors = [f"{self.scratch}[{at} + {r * self.unit_vectors}]" for r in range(len(self.layers))]
                self.finish_pixel(vectors, site, i, channel)
            if behind.following and self.epilogue.far():
                self._fetch(group, behind.following, tile, i)

    def _fetch(self, group: str, unit: Unit, tile: str, i: str) -> None:
        """Ask for the cache lines that the i-th pixel of a tile will touch when it is finished."""
        site = self.walk.site(self.source, self.tile_of(unit.block, tile))
        _, channel = self.channel(group, unit.first)
        with self.walk.pixel(self.source, site, i) as pixel:
            self.epilogue.fetch(partial(self.walk.at, site=pixel), channel, self.panel * LANES)

    def _unpack(self, reduction: Reduction, start: str, panel: bool) -> str:
        """Unpack 4-bit weights, one panel or all, into the cache: tiles are loaded from memory only."""
        source, four, size = self.source, "T.Broadcast(T.int8(4), 64)", reduction.block_bytes
        count = (self.panel if panel else self.blocks) * size
        unpacked = source.local(count // 64, "int8x64", "unpacked")
        with source.loop("u", count // 128) as u:
            raw = source.let(f"{reduction.weights}[T.Ramp(({start})*{size // 2} + ({u})*64, 1, 64)]", "raw")
            source.line(f"{unpacked}[({u})*2] = T.shift_right(T.shift_left({raw}, {four}), {four})")
            source.line(f"{unpacked}[({u})*2 + 1] = T.shift_right({raw}, {four})")
        return unpacked

    def _store(self, start: str) -> None:
        stride = f"T.int64({self.panel * LANES * 4})"
        for m, n in product(range(self.tiles), range(self.panel)):
            address = f"T.address_of({self.scratch}[{start} + {m * self.pixels * self.panel + n}])"
            self._call("tilestored64", f"T.int8({m * self.panel + n})", address, stride)

    def _step(self, reduction: Reduction, unit: Unit, bases: list[str], step: str) -> None:
        """One step of a reduction for all accumulators."""
        layer, (rows, columns) = reduction.layer, reduction.layer.segments
        step = self.source.let(step, "step")
        terms = [f"T.truncmod({step}, {reduction.turns})*{TILE_BYTES}"]
        segment = f"T.truncdiv({step}, {reduction.turns})"
        if columns > 1:
            terms.append(f"T.truncmod({segment}, {columns})*{layer.steps[1]}")
            segment = f"T.truncdiv({segment}, {columns})"
        if rows > 1:
            terms.append(f"{segment}*{layer.steps[0]}")
        offset = self.source.let(" + ".join(terms), "off")
        self._prefetch(reduction, unit, step)
        stride = str(layer.stride[1] * layer.view.buffer.pitch)
        pixel, weight = self._pixel_registers(), self._weight_registers()
        for n in range(self.panel):
            w = weight[n % len(weight)]
            self._load(w, self._weight_address(reduction, unit, n, step), str(TILE_BYTES))
            for m in range(self.tiles):
                a = pixel[m % len(pixel)]
                if n == 0:
                    self._load(a, f"{reduction.pixels}[{bases[m]} + {offset}]", stride)
                self._call("tdpbusd", f"T.int8({m * self.panel + n})", f"T.int8({a})", f"T.int8({w})")

    def _weight_address(self, reduction: Reduction, unit: Unit, n: int, step: str) -> str:
        if reduction.four_bit:
            unpacked = self.unpacked[next(i for i, r in enumerate(self.reductions) if r is reduction)]
            block = str(n) if self.order == "panels" else f"({unit.number} + {n})"
            return f"{unpacked}[{block}*{reduction.block_bytes // 64} + {step}*{STEP // 64}]"
        return f"{reduction.weights}[({unit.number} + {n})*{reduction.block_bytes} + {step}*{STEP}]"

    def _prefetch(self, reduction: Reduction, unit: Unit, step: str) -> None:
        """Ask for this step's share of the next panel's weights, spread over all units of this panel."""
        size = reduction.block_bytes
        whole = self.groups * self.blocks * size
        if reduction.four_bit or self.order != "panels" or whole < PREFETCH_FROM or self.pixel_blocks == 1:
            return
        per_unit = -(-self.panel * size // self.pixel_blocks)
        lines = -(-per_unit // (64 * reduction.steps))
        for line in range(lines):
            at = (
                f"({unit.number} + {self.panel})*{size} + ({unit.block})*{per_unit} + {step}*{lines * 64} + {line * 64}"
            )
            arguments = f"T.address_of({reduction.weights}[{at}]), T.int32(0), T.int32(2), T.int32(1)"
            self.source.evaluate(f'T.call_llvm_intrin("void", "llvm.prefetch.p0", {arguments})')
