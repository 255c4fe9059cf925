"""Dense kernels on vector registers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm_benchmark.dense import Kernel, Tiling, Units
from tvm_benchmark.isa import Target
from tvm_benchmark.layers import block_bias, pack_weights
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES
from tvm_benchmark.source import Source


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
