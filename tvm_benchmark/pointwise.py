"""Arithmetic on vectors of 16 values: rescaling, sums, clamps, tables, as TIR expressions.

Every kernel ends in these.  A value is an int32x16 vector, or an int64x16 one ("wide") where int32 cannot be proved;
the proofs use the bounds of the tensor types.  The rescaling rule itself is stated in
``utils.quantization_utils.dyadic``; here are its forms for vector registers:

short   operands of 16 bits, multipliers of 15: one instruction multiplies and rounds (AVX512-VNNI)
narrow  the product fits int32
high    shifts of at least 32: the high halves of 64-bit products of the even and the odd lanes, shifted further
        where the shift is more than 32 (a floor of a floor is the floor of the whole)
pairs   any shifts: 64-bit products of the even and the odd lanes
wide    int64 lanes throughout: results beyond int32, and halves to even where a tie can occur

All but the halves to even are a floor of the product plus a half; rounding "down" adds zero instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_benchmark.isa import Target
from tvm_benchmark.layout import Storage
from tvm_benchmark.source import Source
from tvm_benchmark.vectors import ByteTable, span
from utils.integer_graph.ir import Node, TensorType, int_range
from utils.quantization_utils.dyadic import CHEAP_SHIFT, ROUNDING, tie_is_impossible

LANES = 16
INT16, INT32 = 1 << 15, 1 << 31
LOW, HIGH = "T.Broadcast(T.int64(4294967295), 8)", "T.Broadcast(T.int64(-4294967296), 8)"
B32 = "T.Broadcast(T.int64(32), 8)"


@dataclass(frozen=True)
class Value:
    """A vector in a variable: int32x16, or int64x16 where wide."""

    name: str
    wide: bool = False

    def as_wide(self) -> str:
        return self.name if self.wide else f'T.cast({self.name}, "int64x16")'


def splat(value: int, wide: bool = False) -> str:
    return f"T.Broadcast(T.int64({value}), {LANES})" if wide else f"T.Broadcast(T.int32({value}), {LANES})"


def blocks(channels: int) -> int:
    """Number of blocks of 16 channels; the last may overlap the one before it."""
    return -(-channels // LANES)


def block_start(block: str, channels: int) -> str:
    """First channel of a block: the last block ends with the last channel."""
    if channels <= LANES:
        return "0"
    if channels % LANES == 0:
        return f"({block})*{LANES}"
    return f"T.min(({block})*{LANES}, {channels - LANES})"


def block_channels(channels: int) -> np.ndarray:
    """Channel of each lane of each block, int64 [blocks, 16]; lanes beyond the last channel repeat it."""
    start = np.minimum(np.arange(blocks(channels)) * LANES, max(channels - LANES, 0))
    return np.minimum(start[:, None] + np.arange(LANES), channels - 1)


class Constants:
    """Loads per-channel or per-tensor constants of a node as vectors, hoisted to where the block is known.

    values: [C] or [1].  order: channel of each lane of each block (:func:`block_channels`).
    """

    def __init__(self, source: Source, values: np.ndarray, order: np.ndarray):
        values = values.astype(np.int32)
        self.single = len(values) == 1
        self.name = source.constant(values if self.single else values[order].ravel())
        self.source = source

    def vector(self, block: str) -> str:
        """int32x16 of a block of channels."""
        if self.single:
            return self.source.let(f"T.Broadcast({self.name}[0], {LANES})", "c")
        return self.source.let(f"{self.name}[T.Ramp(({block})*{LANES}, 1, {LANES})]", "c")


class Splats:
    """Constants that are one number for all channels and change from position to position."""

    def __init__(self, source: Source, values: np.ndarray):
        self.name = source.constant(values.astype(np.int32))
        self.source = source

    def vector(self, position: str) -> str:
        """int32x16 of a position (an expression)."""
        return self.source.let(f"T.Broadcast({self.name}[{position}], {LANES})", "c")


Pack = Callable[[np.ndarray], "Constants | Splats"]


def _mode(m: np.ndarray, e: np.ndarray, x: tuple[int, int], rounding: str, vnni: bool) -> str:
    """Form of a rescaling (int64 m and e) of operands in [x[0], x[1]]."""
    reach, even = max(abs(x[0]), abs(x[1])), rounding == "even"
    ends = [ROUNDING[rounding](np.int64(bound), m, e) for bound in x]
    fits = max(abs(int(end.min())) for end in ends) < INT32 and max(abs(int(end.max())) for end in ends) < INT32
    ties = even and not all(tie_is_impossible(int(a), int(b), reach) for a, b in zip(m.ravel(), e.ravel(), strict=True))
    if ties or not fits or reach >= INT32:
        return "wide"
    if reach * int(m.max()) + (1 << (int(e.max()) - 1)) < INT32:
        short = x[0] >= -INT16 and x[1] < INT16 and m.max() < INT16
        return "short" if vnni and short else "narrow"
    return "high" if (e >= CHEAP_SHIFT).all() else "pairs"


def rescale_mode(node: Node, x: tuple[int, int]) -> str:
    """Form of the rescaling of a requantize node whose operand is in [x[0], x[1]]."""
    m, e = (node.arrays[key].astype(np.int64) for key in ("multiplier", "shift"))
    return _mode(m, e, x, node.attrs["rounding"], False)


class Rescale:
    """One dyadic rescaling of a node's operand: multipliers m, shifts e, operand bounds x in [lo, hi].

    pack: how m and e become vectors (:class:`Constants` of so many channels, :class:`Splats`).  vnni: whether
    AVX512-VNNI instructions may be used.
    """

    def __init__(
        self,
        source: Source,
        m: np.ndarray,
        e: np.ndarray,
        x: tuple[int, int],
        rounding: str,
        pack: Pack,
        vnni: bool = False,
    ):
        m64, e64 = m.astype(np.int64), e.astype(np.int64)
        self.source, self.rounding = source, rounding
        self.mode = _mode(m64, e64, x, rounding, vnni)
        ends = [ROUNDING[rounding](np.int64(bound), m64, e64) for bound in x]
        self.lo, self.hi = int(min(end.min() for end in ends)), int(max(end.max() for end in ends))
        self.m = pack(m.ravel())
        cheap = self.mode == "high" and (e64 == CHEAP_SHIFT).all()
        self.e = None if cheap else pack(e.ravel())

    def load(self, block: str) -> "Callable[[Value], Value]":
        """Load the constants of a block; gives the function that rescales a value with them."""
        let = self.source.let
        m = self.m.vector(block)
        e = self.e.vector(block) if self.e else ""
        if self.mode in ("short", "narrow"):
            half = self._half(e, splat(1))
            return lambda x: Value(let(f"T.shift_right({self._product(x.name, m, half)}, {e})"))
        if self.mode == "wide":
            return self._wide(m, e)
        me, mo = self._pair(m)
        if not e:
            half64 = f"T.Broadcast(T.int64({0 if self.rounding == 'down' else 1 << (CHEAP_SHIFT - 1)}), 8)"
            return lambda x: Value(self._high(x, (me, mo), (half64, half64)))
        ee, eo = self._pair(e)
        halves = tuple(self._half(s, "T.Broadcast(T.int64(1), 8)") for s in (ee, eo))
        if self.mode == "pairs":
            return lambda x: self._joined(x, (me, mo), (halves[0], halves[1]), (ee, eo))
        rest = let(f"{e} - {splat(CHEAP_SHIFT)}")
        return lambda x: Value(let(f"T.shift_right({self._high(x, (me, mo), (halves[0], halves[1]))}, {rest})"))

    def _half(self, e: str, one: str) -> str:
        """What is added before shifts e, a vector like ``one``."""
        return self.source.let(f"{one} - {one}" if self.rounding == "down" else f"T.shift_left({one}, {e} - {one})")

    def _product(self, x: str, m: str, half: str) -> str:
        """x * m + half in int32 lanes."""
        if self.mode == "narrow":
            return f"{x} * {m} + {half}"
        a, b = (f'T.reinterpret("int16x32", {factor})' for factor in (x, m))
        return f'T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpwssd.512", {half}, {a}, {b})'

    def _pair(self, x: str) -> tuple[str, str]:
        """Even and odd lanes of an int32x16 as sign-extended int64x8."""
        both = self.source.let(f'T.reinterpret("int64x8", {x})')
        even = self.source.let(f"T.shift_right(T.shift_left({both}, {B32}), {B32})")
        return even, self.source.let(f"T.shift_right({both}, {B32})")

    def _products(self, x: Value, m: tuple[str, str], half: tuple[str, str]) -> list[str]:
        """x * m + half of the even and the odd lanes, int64x8."""
        pairs = zip(self._pair(x.name), m, half, strict=True)
        return [self.source.let(f"{lane} * {a} + {b}") for lane, a, b in pairs]

    def _high(self, x: Value, m: tuple[str, str], half: tuple[str, str]) -> str:
        """High halves of x * m + half, int32x16."""
        even, odd = self._products(x, m, half)
        unsigned = f'T.shift_right(T.reinterpret("uint64x8", {even}), T.Broadcast(T.uint64(32), 8))'
        both = f'T.bitwise_or(T.reinterpret("int64x8", {unsigned}), T.bitwise_and({odd}, {HIGH}))'
        return self.source.let(f'T.reinterpret("int32x16", {both})')

    def _joined(self, x: Value, m: tuple[str, str], half: tuple[str, str], shift: tuple[str, str]) -> Value:
        even, odd = self._products(x, m, half)
        low = f"T.bitwise_and(T.shift_right({even}, {shift[0]}), {LOW})"
        high = f"T.shift_left(T.shift_right({odd}, {shift[1]}), {B32})"
        return Value(self.source.let(f'T.reinterpret("int32x16", T.bitwise_or({low}, {high}))'))

    def _wide(self, m: str, e: str) -> "Callable[[Value], Value]":
        let = self.source.let
        one = splat(1, wide=True)
        m64, e64 = (let(f'T.cast({x}, "int64x16")') for x in (m, e))
        half = self._half(e64, one)

        def floored(x: Value) -> Value:
            return Value(let(f"T.shift_right({x.as_wide()} * {m64} + {half}, {e64})"), True)

        def even(x: Value) -> Value:
            product = let(f"{x.as_wide()} * {m64}")
            odd = f"T.bitwise_and(T.shift_right({product}, {e64}), {one})"
            return Value(let(f"T.shift_right({product} + {half} - {one} + {odd}, {e64})"), True)

        return even if self.rounding == "even" else floored


def clamp(source: Source, x: Value, reach: tuple[int, int], lo: int | None, hi: int | None) -> Value:
    """min(max(x, lo), hi) where ``reach``, the bounds of x, needs it; narrow: what a node gives is proved to fit int32,
    by bounds that may be tighter than ``reach``."""
    text, wide = x.name, x.wide
    if hi is not None and reach[1] > hi:
        text = f"T.min({text}, {splat(hi, wide)})"
    if lo is not None and reach[0] < lo:
        text = f"T.max({text}, {splat(lo, wide)})"
    if wide:
        return Value(source.let(f'T.cast({text}, "int32x16")'))
    return x if text == x.name else Value(source.let(text))


Apply = Callable[[Sequence[Value]], Value]


class PointwiseNode:
    """A pointwise node ready to be emitted: ``load(block)`` gives the function from operand values to its value."""

    def __init__(self, source: Source, node: Node, operands: Sequence[TensorType], channels: int, target: Target):
        self.source, self.node, self.operands, self.channels = source, node, operands, channels
        self.target, self.order = target, block_channels(channels)
        emitters: Mapping[str, Callable[[], Callable[[str], Apply]]] = {
            "requantize": self._requantize,
            "add": self._add,
            "mul": self._mul,
            "clip": self._clip,
            "lookup": self._lookup,
            "logits": self._logits,
        }
        self.load = emitters[node.op]()

    def _rescale(self, suffix: str, x: tuple[int, int]) -> Rescale:
        arrays, rounding = self.node.arrays, self.node.attrs["rounding"]
        m, e = arrays[f"multiplier{suffix}"], arrays[f"shift{suffix}"]
        vnni = self.target.dot == "avx512"
        return Rescale(self.source, m, e, x, rounding, lambda values: Constants(self.source, values, self.order), vnni)

    def _clamped(self, x: Value, reach: tuple[int, int]) -> Value:
        return clamp(self.source, x, reach, self.node.attrs["lo"], self.node.attrs["hi"])

    def _requantize(self) -> Callable[[str], Apply]:
        rescale = self._rescale("", (self.operands[0].lo, self.operands[0].hi))

        def load(block: str) -> Apply:
            apply = rescale.load(block)
            return lambda x: self._clamped(apply(x[0]), (rescale.lo, rescale.hi))

        return load

    def _add(self) -> Callable[[str], Apply]:
        branches = [self._rescale(str(i), (x.lo, x.hi)) for i, x in enumerate(self.operands)]
        reach = (sum(b.lo for b in branches), sum(b.hi for b in branches))
        fits = max(-reach[0], reach[1]) < INT32

        def load(block: str) -> Apply:
            functions = [branch.load(block) for branch in branches]

            def apply(x: Sequence[Value]) -> Value:
                parts = [function(value) for function, value in zip(functions, x, strict=True)]
                wide = not fits or any(part.wide for part in parts)
                text = " + ".join(part.as_wide() if wide else part.name for part in parts)
                return self._clamped(Value(self.source.let(text), wide), reach)

            return apply

        return load

    def _mul(self) -> Callable[[str], Apply]:
        a, b = self.operands
        corners = [p * q for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
        bounds = (min(corners), max(corners))
        rescale = self._rescale("", bounds)
        wide = max(-bounds[0], bounds[1]) >= INT32

        def load(block: str) -> Apply:
            function = rescale.load(block)

            def apply(x: Sequence[Value]) -> Value:
                factors = [v.as_wide() if wide else v.name for v in x]
                product = Value(self.source.let(" * ".join(factors)), wide)
                return self._clamped(function(product), (rescale.lo, rescale.hi))

            return apply

        return load

    def _clip(self) -> Callable[[str], Apply]:
        lo, hi = (Constants(self.source, self.node.arrays[key], self.order) for key in ("lo", "hi"))

        def load(block: str) -> Apply:
            least, most = lo.vector(block), hi.vector(block)
            return lambda x: Value(self.source.let(f"T.max(T.min({x[0].name}, {most}), {least})"))

        return load

    def _lookup(self) -> Callable[[str], Apply]:
        table, offset = self.node.arrays["table"], self.node.attrs["offset"]
        least, most = int(table.min()), int(table.max())
        in_bytes = any(lo <= least and most <= hi for lo, hi in (int_range(8, False), int_range(8, True)))
        if self.target.vbmi and table.ndim == 1 and len(table) <= 256 and in_bytes:
            return self._lookup_in_registers(table, offset)
        name = self.source.constant(table.astype(np.int32).ravel())
        last = splat(table.shape[-1] - 1)
        rows = None
        if table.ndim == 2:
            rows = Constants(self.source, np.arange(len(table)) * table.shape[1], self.order)

        def load(block: str) -> Apply:
            first = rows.vector(block) if rows else splat(0)

            def apply(x: Sequence[Value]) -> Value:
                index = f"{x[0].name} - {splat(offset)}"
                if self.channels < LANES:  # lanes beyond the last channel hold anything
                    index = f"T.max(T.min({index}, {last}), {splat(0)})"
                return Value(self.source.let(f"{name}[{self.source.let(index)} + {first}]"))

            return apply

        return load

    def _lookup_in_registers(self, table: np.ndarray, offset: int) -> Callable[[str], Apply]:
        """The index is the low byte of a lane; the other bytes of what is found are dropped."""
        let = self.source.let
        entries = ByteTable(self.source, table.astype(np.uint8))

        def load(block: str) -> Apply:
            registers = entries.load()

            def apply(x: Sequence[Value]) -> Value:
                index = let(f'T.reinterpret("uint8x64", {x[0].name} - {splat(offset)})')
                found = f'T.reinterpret("int32x16", {entries.look(registers, index)})'
                if table.min() < 0:
                    return Value(let(f"T.shift_right(T.shift_left({found}, {splat(24)}), {splat(24)})"))
                return Value(let(f"T.bitwise_and({found}, {splat(255)})"))

            return apply

        return load

    def _logits(self) -> Callable[[str], Apply]:
        scale = self.node.arrays["scale"]
        packed = scale if len(scale) == 1 else scale[self.order].ravel()
        name = self.source.constant(packed)

        def load(block: str) -> Apply:
            one = len(packed) == 1
            factor = f"T.Broadcast({name}[0], {LANES})" if one else f"{name}[T.Ramp(({block})*{LANES}, 1, {LANES})]"
            factor = self.source.let(factor)
            # Not bound to a name: TVM's analysis of bounds fails on floats made of bounded integers.
            return lambda x: Value(f'T.cast({x[0].name}, "float32x16") * {factor}')

        return load


def loaded(source: Source, pointer: str, storage: Storage, offset: str, stride: int = 1) -> Value:
    """The 16 stored values from an element offset on, as integers; with stride 0 the same one 16 times."""
    raw = f"{pointer}[T.Ramp({offset}, 1, {LANES})]" if stride else f"T.Broadcast({pointer}[{offset}], {LANES})"
    text = raw if storage.dtype == "int32" else f'T.cast({raw}, "int32x16")'
    if storage.zero:
        text = f"{text} - {splat(storage.zero)}"
    return Value(source.let(text))


def store(source: Source, pointer: str, storage: Storage, offset: str, x: Value, lanes: int = LANES) -> None:
    """Store the first ``lanes`` of 16 values at an element offset."""
    assert not x.wide, "a stored value has proven int32 bounds"
    text = f"{x.name} + {splat(storage.zero)}" if storage.zero else x.name
    if storage.dtype not in ("int32", "float32"):
        text = f'T.cast({text}, "{storage.dtype}x16")'
    if lanes == LANES:
        source.line(f"{pointer}[T.Ramp({offset}, 1, {LANES})] = {text}")
        return
    whole, done = text if storage.dtype == "float32" else source.let(text), 0  # no names for floats: see logits
    for size in (8, 4, 2, 1):
        if lanes & size:
            part = f"T.Shuffle([{whole}], {list(range(done, done + size))})"
            source.line(f"{pointer}[{span(f'{offset} + {done}', size)}] = {part}")
            done += size
