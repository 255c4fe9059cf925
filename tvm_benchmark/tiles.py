"""Dense kernels on tile registers (AMX): 16 pixels x 64 bytes times 64 bytes x 16 outputs in one instruction.

Eight tile registers: 0..3 accumulate, 4.. hold pixels, the last ones weights.  A tile of pixels is loaded straight
from NHWC memory, its rows one pixel stride apart; a tile of weights is one packed step.  Accumulators start as the
bias (one row loaded with stride 0) and are finished from a scratch array in the first-level cache.  A product takes
as many cycles as its tile of pixels has rows, so rows are never padded.
Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (TILELOADD, TDPBUSD).
"""

from functools import partial

import numpy as np

from tvm_benchmark.dense import PREFETCH_FROM, TILE_BYTES, Kernel, Site, Tiling, Units, block_bias, pack_weights
from tvm_benchmark.isa import Target
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES
from tvm_benchmark.source import Source

ACCUMULATORS, REGISTERS = 4, 8
STEP = LANES * TILE_BYTES  # bytes of one tile of weights
MAX_ROWS = 16
MIN_PART = 7  # pixels that are finished together, at least


def tile_config(rows: int, weights: list[int]) -> np.ndarray:
    """The 64 bytes that LDTILECFG reads (palette 1): the registers of weights have 16 rows, the others ``rows``."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32:2] = TILE_BYTES
    config[48 : 48 + REGISTERS] = rows
    config[[48 + register for register in weights]] = MAX_ROWS
    return config


class TileKernel(Kernel):
    """Accumulators in tile registers: ``tiles`` tiles of pixels x ``panel`` blocks of outputs, at most four."""

    def __init__(self, plan: Plan, step: Step, target: Target, tiling: Tiling):
        super().__init__(plan, step, target, tiling)
        assert self.tiles * self.panel <= ACCUMULATORS
        assert self.pixels <= MAX_ROWS
        self.four_bit = self.layer.bits <= 4
        if self.four_bit:
            self.order = "panels"  # a panel is unpacked once
        packed = pack_weights(self.layer, 4, TILE_BYTES, self.four_bit)
        self.turns = -(-self.layer.segment // TILE_BYTES)
        rows, columns = self.layer.segments
        self.steps = rows * columns * self.turns
        self.block_bytes = self.steps * STEP
        self.weights = self.source.constant(packed)
        self.bias = self.source.constant(block_bias(self.layer))
        self.config = self.source.constant(tile_config(self.pixels, self._weight_registers()))

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
        """All units of a job, as a pipeline: while tiles are multiplied, the unit before is finished in vector
        registers, part by part, from the other half of the scratch array."""
        source = self.source
        unpacked = self._unpack(units.panel) if self.four_bit and units.panel else ""
        scratch = source.local(2 * self.unit_vectors, f"int32x{LANES}", "scratch")
        count = units.count
        with source.loop("u", count + 1 if isinstance(count, int) else f"{count} + 1") as u:
            first, block = units.locate(f"T.min({u}, {count} - 1)")
            bases = [self.input_offset(units.group, self._site(block, m)) for m in range(self.tiles)]
            number = self._number(units.group, first)
            before, last_block = units.locate(f"T.max({u} - 1, 0)")
            with source.block(f"if {u} < {count}:"):
                for m in range(self.tiles):
                    for n in range(self.panel):
                        self._load(m * self.panel + n, f"{self.bias}[({number} + {n})*{LANES}]", "0")
            with source.loop("part", self.tiles * self.parts) as part:
                with source.block(f"if {u} < {count}:"):
                    self._reduce(bases, number, block, part, unpacked)
                    if self.epilogue.far():
                        self._fetch(units.group, first, block, part)
                with source.block(f"if {u} > 0:"):
                    self._finish(units.group, before, last_block, part, f"{scratch}[T.bitwise_and({u} + 1, 1)")
            with source.block(f"if {u} < {count}:"):
                self._store(f"{scratch}[T.bitwise_and({u}, 1)*{self.unit_vectors}")

    @property
    def parts(self) -> int:
        """Pieces into which the finishing of one tile is cut: as many as there are steps to hide it behind."""
        steps = -(-self.steps // self.tiles)
        return max(
            p
            for p in range(1, self.pixels + 1)
            if self.pixels % p == 0 and (p == 1 or p <= steps) and (p == 1 or self.pixels // p >= MIN_PART)
        )

    def _site(self, block: str, tile: int | str) -> Site:
        return self.walk.site(self.source, self.tile_of(block, tile))

    def _number(self, group: str, block: str) -> str:
        """Number of a block among the blocks of all groups."""
        return self.channel(group, block)[0] if self.layer.groups > 1 else block

    def _unpack(self, panel: str) -> str:
        """Unpack a panel of 4-bit weights into the cache: tiles are loaded from memory only."""
        source, four = self.source, "T.Broadcast(T.int8(4), 64)"
        unpacked = source.local(self.panel * self.block_bytes // 64, "int8x64", "unpacked")
        with source.loop("u", self.panel * self.block_bytes // 128) as u:
            raw = source.let(f"{self.weights}[T.Ramp(({panel})*{self.block_bytes // 2} + ({u})*64, 1, 64)]", "raw")
            source.line(f"{unpacked}[({u})*2] = T.shift_right(T.shift_left({raw}, {four}), {four})")
            source.line(f"{unpacked}[({u})*2 + 1] = T.shift_right({raw}, {four})")
        return unpacked

    def _part_site(self, block: str, part: str) -> Site:
        """Site of the first pixel of a part of a unit."""
        tile = part if self.parts == 1 else self.source.let(f"T.truncdiv({part}, {self.parts})", "m")
        n, h, w = self._site(block, tile)
        if self.parts > 1:
            w = self.source.let(f"{w} + T.truncmod({part}, {self.parts})*{self.pixels // self.parts}", "w")
        return n, h, w

    def _finish(self, group: str, first: str, block: str, part: str, scratch: str) -> None:
        """Take one part of a unit through the epilogue."""
        pixels = self.pixels // self.parts
        at = f"{scratch}*{self.unit_vectors} + ({part})*{pixels * self.panel}"
        self.emit_epilogue(group, first, self._part_site(block, part), at, pixels)

    def _fetch(self, group: str, first: str, block: str, part: str) -> None:
        """Ask for what the part will read and write when it is finished, one unit later."""
        site = self._part_site(block, part)
        _, channel = self.channel(group, first)
        source = self.source
        with source.loop("i", self.pixels // self.parts) as i, self.walk.pixel(source, site, i) as pixel:
            self.epilogue.fetch(partial(self.walk.at, site=pixel), channel, self.panel * LANES)

    def _store(self, scratch: str) -> None:
        for m in range(self.tiles):
            for n in range(self.panel):
                address = f"T.address_of({scratch} + {m * self.pixels * self.panel + n}])"
                stride = f"T.int64({self.panel * LANES * 4})"
                self._call("tilestored64", f"T.int8({m * self.panel + n})", address, stride)

    def _reduce(self, bases: list[str], number: str, block: str, part: str, unpacked: str) -> None:
        """One part of the reduction: its share of the steps."""
        source, parts = self.source, self.tiles * self.parts
        rows, columns = self.layer.segments
        row_step, column_step = self.layer.steps
        ahead = self._lines_ahead()
        begin = source.let(f"T.truncdiv(({part})*{self.steps}, {parts})", "begin")
        extent = f"T.truncdiv(({part} + 1)*{self.steps}, {parts}) - {begin}"
        with source.loop("k", extent if parts > 1 else self.steps) as k:
            step = source.let(f"{begin} + {k}", "step")
            terms = [f"T.truncmod({step}, {self.turns})*{TILE_BYTES}"]
            segment = f"T.truncdiv({step}, {self.turns})"
            if columns > 1:
                terms.append(f"T.truncmod({segment}, {columns})*{column_step}")
                segment = f"T.truncdiv({segment}, {columns})"
            if rows > 1:
                terms.append(f"{segment}*{row_step}")
            offset = source.let(" + ".join(terms), "off")
            for line in range(ahead):
                self._prefetch(number, block, step, line, ahead)
            self._multiply(bases, number, step, offset, unpacked)

    def _multiply(self, bases: list[str], number: str, step: str, offset: str, unpacked: str) -> None:
        """One step of the reduction for all accumulators."""
        stride = str(self.layer.stride[1] * self.layer.view.buffer.pitch)
        pixel, weight = self._pixel_registers(), self._weight_registers()
        for n in range(self.panel):
            w = weight[n % len(weight)]
            if self.four_bit:
                self._load(w, f"{unpacked}[{n * self.block_bytes // 64} + {step}*{STEP // 64}]", str(TILE_BYTES))
            else:
                at = f"({number} + {n})*{self.block_bytes} + {step}*{STEP}"
                self._load(w, f"{self.weights}[{at}]", str(TILE_BYTES))
            for m in range(self.tiles):
                a = pixel[m % len(pixel)]
                if n == 0:
                    self._load(a, f"{self.input}[{bases[m]} + {offset}]", stride)
                self._call("tdpbusd", f"T.int8({m * self.panel + n})", f"T.int8({a})", f"T.int8({w})")

    def _lines_ahead(self) -> int:
        """Cache lines of the next panel to fetch in each step, spread over all steps of this panel."""
        panel_bytes = self.panel * self.block_bytes
        whole = self.layer.groups * self.blocks * self.block_bytes
        if self.four_bit or self.order != "panels" or whole < PREFETCH_FROM or self.pixel_blocks == 1:
            return 0
        return -(-panel_bytes // (64 * self.steps * self.pixel_blocks))

    def _prefetch(self, number: str, block: str, step: str, line: int, ahead: int) -> None:
        per_block = -(-self.panel * self.block_bytes // self.pixel_blocks)
        at = f"({number} + {self.panel})*{self.block_bytes} + ({block})*{per_block} + {step}*{ahead * 64} + {line * 64}"
        arguments = f"T.address_of({self.weights}[{at}]), T.int32(0), T.int32(2), T.int32(1)"
        self.source.evaluate(f'T.call_llvm_intrin("void", "llvm.prefetch.p0", {arguments})')
