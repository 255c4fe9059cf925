"""Dense kernels on tile registers (AMX): 16 pixels x 64 bytes times 64 bytes x 16 outputs in one instruction.

Eight tile registers: 0..3 accumulate, 4.. hold pixels, the last ones weights.  A tile of pixels is loaded straight
from NHWC memory, its rows one pixel stride apart; a tile of weights is one packed step.  Accumulators start as the
bias (one row loaded with stride 0) and are finished from a scratch array in the first-level cache.  A product takes
as many cycles as its tile of pixels has rows, so rows are never padded.
Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (TILELOADD, TDPBUSD).
"""

import numpy as np

from tvm_benchmark.dense import PREFETCH_FROM, TILE_BYTES, Kernel, Tiling, block_bias, pack_weights
from tvm_benchmark.isa import Target
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES
from tvm_benchmark.source import Source

ACCUMULATORS, REGISTERS = 4, 8
STEP = LANES * TILE_BYTES  # bytes of one tile of weights
MAX_ROWS = 16


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
        packed = pack_weights(self.layer, 4, TILE_BYTES, self.four_bit)
        self.turns = -(-self.layer.segment // TILE_BYTES)
        rows, columns = self.layer.segments
        self.block_bytes = rows * columns * self.turns * STEP
        self.weights = self.source.constant(packed)
        self.bias = self.source.constant(block_bias(self.layer))
        self.config = self.source.constant(tile_config(self.pixels, self._weight_registers()))
        self.unpacked = ""

    def _pixel_registers(self) -> list[int]:
        return [4, 5][: self.tiles] if self.tiles <= 2 else [4, 5, 6]

    def _weight_registers(self) -> list[int]:
        return [r for r in range(ACCUMULATORS, REGISTERS) if r not in self._pixel_registers()]

    def emit(self) -> Source:
        self.emit_jobs(self._configure, self._start_panel, self._block)
        return self.source

    def _call(self, name: str, *arguments: str) -> None:
        self.source.evaluate(f'T.call_llvm_intrin("void", "llvm.x86.{name}", {", ".join(arguments)})')

    def _load(self, register: int, address: str, stride: str) -> None:
        self._call("tileloadd64", f"T.int8({register})", f"T.address_of({address})", f"T.int64({stride})")

    def _configure(self) -> None:
        self._call("ldtilecfg", f"T.address_of({self.config}[0])")
        if self.four_bit:
            self.unpacked = self.source.local(self.panel * self.block_bytes, "int8", "unpacked")

    def _start_panel(self, group: str, start: str) -> None:
        """Unpack a panel of 4-bit weights into the cache: tiles are loaded from memory only."""
        if not self.four_bit:
            return
        number, _ = self._number(group, start)
        four = "T.Broadcast(T.int8(4), 64)"
        with self.source.loop("u", self.panel * self.block_bytes // 128) as u:
            raw = self.source.let(
                f"{self.weights}[T.Ramp(({number})*{self.block_bytes // 2} + ({u})*64, 1, 64)]", "raw"
            )
            low = f"T.shift_right(T.shift_left({raw}, {four}), {four})"
            self.source.line(f"{self.unpacked}[T.Ramp(({u})*128, 1, 64)] = {low}")
            self.source.line(f"{self.unpacked}[T.Ramp(({u})*128 + 64, 1, 64)] = T.shift_right({raw}, {four})")

    def _number(self, group: str, block: str) -> tuple[str, str]:
        return self.channel(group, block) if self.layer.groups > 1 else (block, "")

    def _block(self, group: str, first: str, block: str) -> None:
        source, layer = self.source, self.layer
        sites = [self.walk.site(source, self.tile_of(block, m)) for m in range(self.tiles)]
        bases = [self.input_offset(group, site) for site in sites]
        number, _ = self._number(group, first)
        for m in range(self.tiles):
            for n in range(self.panel):
                self._load(m * self.panel + n, f"{self.bias}[({number} + {n})*{LANES}]", "0")
        rows, columns = layer.segments
        row_step, column_step = layer.steps
        ahead = self._lines_ahead(rows * columns * self.turns)
        with source.loop("r", rows) as r, source.loop("s", columns) as s, source.loop("k", self.turns) as k:
            step = source.let(f"(({r})*{columns} + {s})*{self.turns} + {k}", "step")
            offset = source.let(f"({r})*{row_step} + ({s})*{column_step} + ({k})*{TILE_BYTES}", "off")
            for line in range(ahead):
                self._prefetch(number, block, step, line, ahead)
            self._multiply(bases, number, step, offset)
        scratch = source.local(self.tiles * self.pixels * self.panel * LANES, "int32", "scratch")
        row = self.panel * LANES
        for m in range(self.tiles):
            for n in range(self.panel):
                address = f"T.address_of({scratch}[{m * self.pixels * row + n * LANES}])"
                self._call("tilestored64", f"T.int8({m * self.panel + n})", address, f"T.int64({row * 4})")
        self.emit_epilogue(group, first, block, scratch)

    def _multiply(self, bases: list[str], number: str, step: str, offset: str) -> None:
        """One step of the reduction for all accumulators."""
        stride = str(self.layer.stride[1] * self.layer.view.buffer.pitch)
        pixel, weight = self._pixel_registers(), self._weight_registers()
        for n in range(self.panel):
            w = weight[n % len(weight)]
            if self.four_bit:
                self._load(w, f"{self.unpacked}[{n * self.block_bytes} + {step}*{STEP}]", str(TILE_BYTES))
            else:
                at = f"({number} + {n})*{self.block_bytes} + {step}*{STEP}"
                self._load(w, f"{self.weights}[{at}]", str(TILE_BYTES))
            for m in range(self.tiles):
                a = pixel[m % len(pixel)]
                if n == 0:
                    self._load(a, f"{self.input}[{bases[m]} + {offset}]", stride)
                self._call("tdpbusd", f"T.int8({m * self.panel + n})", f"T.int8({a})", f"T.int8({w})")

    def _lines_ahead(self, steps: int) -> int:
        """Cache lines of the next panel to fetch in each step, spread over all steps of this panel."""
        panel_bytes = self.panel * self.block_bytes
        whole = self.layer.groups * self.blocks * self.block_bytes
        if self.four_bit or self.tiling.order != "panels" or whole < PREFETCH_FROM or self.pixel_blocks == 1:
            return 0
        return -(-panel_bytes // (64 * steps * self.pixel_blocks))

    def _prefetch(self, number: str, block: str, step: str, line: int, ahead: int) -> None:
        per_block = -(-self.panel * self.block_bytes // self.pixel_blocks)
        at = f"({number} + {self.panel})*{self.block_bytes} + ({block})*{per_block} + {step}*{ahead * 64} + {line * 64}"
        arguments = f"T.address_of({self.weights}[{at}]), T.int32(0), T.int32(2), T.int32(1)"
        self.source.evaluate(f'T.call_llvm_intrin("void", "llvm.prefetch.p0", {arguments})')
