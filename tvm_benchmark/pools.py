"""Pools over NHWC tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import numpy as np

from tvm_benchmark.epilogue import Epilogue
from tvm_benchmark.isa import Target
from tvm_benchmark.layout import View
from tvm_benchmark.loops import image_rows
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Rescale, Splats, Value, block_start, blocks, clamp, loaded, splat
from tvm_benchmark.source import Source
from tvm_benchmark.vectors import BYTES, cover, span, widest
from utils.integer_graph.ir import Node


def emit_max_pool(plan: Plan, step: Step, target: Target) -> Source:
    """Greatest value of each window.  Stored values are compared: storing keeps the order."""
    source = Source()
    if step.writes == (step.name,):
        _max_bytes(source, plan, step)
    else:
        _max_lanes(source, plan, step, target)
    return source


def emit_avg_pool(plan: Plan, step: Step, target: Target) -> Source:
    """Rescaled, clamped sum of each window, then the body."""
    source = Source()
    node, (channels, height, width) = _anchor(step), step.shape
    view, types = plan.views[step.inputs[0]], plan.types
    pointer = source.tensor(step.inputs[0], view)
    epilogue = Epilogue(source, plan, step, target)
    windows = _Windows(source, node)
    sums = _sum_bounds(node, types[step.inputs[0]].lo, types[step.inputs[0]].hi)
    m, e = node.arrays["multiplier"], node.arrays["shift"]
    rescale = Rescale(source, m, e, sums, node.attrs["rounding"], lambda values: Splats(source, values))
    together = next(g for g in (4, 2, 1) if blocks(channels) % g == 0)
    reads = plan.batch * channels * int(np.prod(plan.views[step.inputs[0]].buffer.shape[1:]))
    with image_rows(source, plan.batch, height, reads) as (n, h), source.loop("w", width) as w:
        apply = rescale.load("0" if m.size == 1 else source.let(f"({h})*{width} + {w}", "position"))
        with source.loop("b", blocks(channels) // together) as group:
            starts = [block_start(f"({group})*{together} + {i}", channels) for i in range(together)]
            totals = source.local(together * LANES, "int32", "sum")
            slots = [f"{totals}[T.Ramp({i * LANES}, 1, {LANES})]" for i in range(together)]
            for slot in slots:
                source.line(f"{slot} = {splat(0)}")
            with windows.taps(h, w) as (row, column):
                for slot, start in zip(slots, starts, strict=True):
                    value = loaded(source, pointer, view.storage, f"{view.at(n, row, column)} + {start}")
                    source.line(f"{slot} = {slot} + {value.name}")
            for i, (slot, start) in enumerate(zip(slots, starts, strict=True)):
                epilogue.begin(f"({group})*{together} + {i}")
                value = apply(Value(source.let(slot)))
                value = clamp(source, value, (rescale.lo, rescale.hi), node.attrs["lo"], node.attrs["hi"])
                epilogue.finish({step.name: value}, lambda view: view.at(n, h, w), start)
    return source


def _anchor(step: Step) -> Node:
    assert step.anchor is not None
    return step.anchor


def _sum_bounds(node: Node, lo: int, hi: int) -> tuple[int, int]:
    """Bounds of the sums of all windows of values in [lo, hi]."""
    sizes = [np.subtract(node.attrs[f"{axis}_stop"], node.attrs[f"{axis}_start"]).max() for axis in ("row", "col")]
    top = int(sizes[0] * sizes[1])
    return min(lo, lo * top), max(hi, hi * top)


class _Windows:
    """Bounds of the windows: numbers where an axis has one window, arrays otherwise."""

    def __init__(self, source: Source, node: Node):
        self.source = source
        self.bounds = {
            f"{axis}_{end}": self._pack(node.attrs[f"{axis}_{end}"])
            for axis in ("row", "col")
            for end in ("start", "stop")
        }

    def _pack(self, values: list[int]) -> str:
        return str(values[0]) if len(values) == 1 else self.source.constant(np.array(values, np.int32))

    def _bound(self, name: str, position: str) -> str:
        packed = self.bounds[name]
        return packed if packed.isdigit() else self.source.let(f"{packed}[{position}]", name)

    @contextmanager
    def taps(self, h: str, w: str) -> Iterator[tuple[str, str]]:
        """Loops over the pixels of window (h, w); gives row and column."""
        top, bottom = self._bound("row_start", h), self._bound("row_stop", h)
        left, right = self._bound("col_start", w), self._bound("col_stop", w)
        with self.source.loop("i", f"{bottom} - {top}") as i, self.source.loop("j", f"{right} - {left}") as j:
            yield f"{top} + {i}", f"{left} + {j}"


def _tap(source: Source, node: Node, axis: int, position: str, tap: int, extent: int) -> str:
    """Coordinate of a tap of a window; taps outside of the image take the nearest tap inside, which changes no
    maximum."""
    d, stride, padding = (node.attrs[key][axis] for key in ("dilation", "stride", "padding"))
    start = f"({position})*{stride} - {padding}"
    first = f"T.floordiv({d - 1} - ({start}), {d})"
    last = f"T.floordiv({extent - 1} - ({start}), {d})"
    reach = (node.attrs["kernel"][axis] - 1) * d
    if extent > reach and padding == 0 and not node.attrs["ceil_mode"]:
        return f"{start} + {tap * d}"
    return source.let(f"{start} + T.max(T.min({tap}, {last}), {first})*{d}", "tap")


def _window(source: Source, node: Node, view: View, n: str, h: str, w: str, rows: list[str]) -> list[str]:
    """Offsets of channel 0 of every tap of a window."""
    columns = [_tap(source, node, 1, w, j, view.buffer.shape[2]) for j in range(node.attrs["kernel"][1])]
    return [source.let(view.at(n, row, column), "at") for row in rows for column in columns]


def _rows(source: Source, node: Node, view: View, h: str) -> list[str]:
    return [_tap(source, node, 0, h, i, view.buffer.shape[1]) for i in range(node.attrs["kernel"][0])]


def _greatest(source: Source, pointer: str, taps: list[str], start: str, lanes: int) -> str:
    """The maximum of the stored values of all taps."""
    values = [f"{pointer}[{span(f'{tap} + {start}', lanes)}]" for tap in taps]
    return reduce(lambda a, b: source.let(f"T.max({a}, {b})", "most"), values)


def _max_bytes(source: Source, plan: Plan, step: Step) -> None:
    """Nothing but the maximum is stored: whole registers, no conversion."""
    node, (channels, height, width) = _anchor(step), step.shape
    view, result = plan.views[step.inputs[0]], plan.views[step.name]
    pointer, to = source.tensor(step.inputs[0], view), source.tensor(step.name, result)
    lanes = widest(channels, BYTES // view.storage.bytes)
    with image_rows(source, plan.batch, height, plan.batch * channels * height * width) as (n, h):
        rows = _rows(source, node, view, h)
        with source.loop("w", width) as w:
            taps = _window(source, node, view, n, h, w, rows)
            with cover(source, channels, lanes) as start:
                most = _greatest(source, pointer, taps, start, lanes)
                source.line(f"{to}[{span(f'{result.at(n, h, w)} + {start}', lanes)}] = {most}")


def _max_lanes(source: Source, plan: Plan, step: Step, target: Target) -> None:
    """The body follows on 16 channels at a time."""
    node, (channels, height, width) = _anchor(step), step.shape
    view = plan.views[step.inputs[0]]
    pointer = source.tensor(step.inputs[0], view)
    epilogue = Epilogue(source, plan, step, target)
    with image_rows(source, plan.batch, height, plan.batch * channels * height * width) as (n, h):
        rows = _rows(source, node, view, h)
        with source.loop("b", blocks(channels)) as b:
            epilogue.begin(b)
            start = block_start(b, channels)
            with source.loop("w", width) as w:
                taps = _window(source, node, view, n, h, w, rows)
                most = _greatest(source, pointer, taps, start, LANES)
                text = f'T.cast({most}, "int32x16") - {splat(view.storage.zero)}'
                epilogue.finish({step.name: Value(source.let(text))}, lambda view: view.at(n, h, w), start)
