"""Fills the frame of zeros around a buffer's images."""

from tvm_benchmark.layout import Buffer, View
from tvm_benchmark.plan import Plan
from tvm_benchmark.source import Source

VECTOR = 64


def emit_halo(plan: Plan, buffer: Buffer) -> Source:
    """A kernel that writes the stored zero to the halo of every image of a buffer."""
    source = Source()
    top, bottom, left, right = buffer.halo
    pointer = source.tensor(buffer.name, View(buffer, 0, buffer.pitch))
    height = buffer.shape[1]
    with source.loop("n", plan.batch) as n:
        base = f"({n})*{buffer.image}"
        # The right end of a row and the left end of the next one are neighbours.
        _fill(source, pointer, buffer, base, top * buffer.row + left * buffer.pitch)
        if (left + right) and height > 1:
            with source.loop("h", height - 1) as h:
                start = (top + 1) * buffer.row - right * buffer.pitch
                _fill(source, pointer, buffer, f"{base} + ({h})*{buffer.row} + {start}", (left + right) * buffer.pitch)
        size = bottom * buffer.row + right * buffer.pitch
        _fill(source, pointer, buffer, f"{base} + {buffer.image - size}", size)
    return source


def _fill(source: Source, pointer: str, buffer: Buffer, start: str, size: int) -> None:
    """``size`` elements from an offset on; the last vector overlaps the one before it."""
    zero = f"T.{buffer.storage.dtype}({buffer.storage.zero})"
    if size >= VECTOR:
        with source.loop("v", -(-size // VECTOR)) as v:
            at = f"{start} + T.min(({v})*{VECTOR}, {size - VECTOR})"
            source.line(f"{pointer}[T.Ramp({at}, 1, {VECTOR})] = T.Broadcast({zero}, {VECTOR})")
    elif size:
        with source.loop("v", size) as v:
            source.line(f"{pointer}[{start} + {v}] = {zero}")
