"""Small helpers for vector code: index texts, covers of a run of elements, tables of bytes in registers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tvm_benchmark.source import Source

BYTES = 64  # of the widest register
HALF_TABLE = 128  # entries that one permutation reaches


def span(offset: str, lanes: int, stride: int = 1) -> str:
    """Index text of ``lanes`` elements from an offset on.

    >>> span("p", 4), span("p", 1)
    ('T.Ramp(p, 1, 4)', 'p')
    """
    return f"T.Ramp({offset}, {stride}, {lanes})" if lanes > 1 else offset


def widest(extent: int, limit: int) -> int:
    """Greatest power of two that is at most both.

    >>> widest(24, 64)
    16
    """
    return 1 << (min(extent, limit).bit_length() - 1)


@contextmanager
def cover(source: Source, extent: int, lanes: int) -> Iterator[str]:
    """A loop over vectors of ``lanes <= extent`` elements that covers a run; the last one overlaps the one before it.
    Gives the first element of a vector."""
    with source.loop("v", -(-extent // lanes)) as v:
        start = f"({v})*{lanes}"
        yield start if extent % lanes == 0 else source.let(f"T.min({start}, {extent - lanes})", "start")


def copy(source: Source, to: tuple[str, str], origin: tuple[str, str], count: int, item_bytes: int) -> None:
    """Copy ``count`` elements.  to, origin: pointer and offset."""
    lanes = widest(count, BYTES // item_bytes)
    with cover(source, count, lanes) as start:
        value = f"{origin[0]}[{span(f'{origin[1]} + {start}', lanes)}]"
        source.line(f"{to[0]}[{span(f'{to[1]} + {start}', lanes)}] = {value}")


def fill(source: Source, to: tuple[str, str], value: str, count: int, item_bytes: int) -> None:
    """Set ``count`` elements to a scalar."""
    lanes = widest(count, BYTES // item_bytes)
    with cover(source, count, lanes) as start:
        vector = f"T.Broadcast({value}, {lanes})" if lanes > 1 else value
        source.line(f"{to[0]}[{span(f'{to[1]} + {start}', lanes)}] = {vector}")


class ByteTable:
    """A table of at most 256 bytes in registers (AVX512-VBMI).

    values: uint8 [T].  ``load`` puts it into registers, ``look`` gives the entries of 64 indices.
    """

    def __init__(self, source: Source, values: np.ndarray):
        size = HALF_TABLE if len(values) <= HALF_TABLE else 2 * HALF_TABLE
        self.source, self.registers = source, size // BYTES
        self.name = source.constant(np.pad(values.astype(np.uint8), (0, size - len(values))))

    def load(self) -> list[str]:
        return [self.source.let(f"{self.name}[{span(str(BYTES * i), BYTES)}]", "table") for i in range(self.registers)]

    def look(self, table: Sequence[str], index: str) -> str:
        """uint8x64 from uint8x64 below the table's size."""
        halves = [
            f'T.call_llvm_pure_intrin("uint8x64", "llvm.x86.avx512.vpermi2var.qi.512", {a}, {index}, {b})'
            for a, b in zip(table[::2], table[1::2], strict=True)
        ]
        if len(halves) == 1:
            return self.source.let(halves[0])
        low, high = (self.source.let(half) for half in halves)
        return self.source.let(f"T.Select({index} >= T.Broadcast(T.uint8({HALF_TABLE}), {BYTES}), {high}, {low})")
