"""Ops that only move integers: gather, pad2d, upsample, reshape.  Copies in the storage type."""

from collections.abc import Callable, Mapping

import numpy as np

from tvm_benchmark.isa import Target
from tvm_benchmark.layout import shape3
from tvm_benchmark.loops import image_rows
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.source import Source
from tvm_benchmark.vectors import BYTES, copy, cover, fill, span, widest

RUNS = 32  # copies of one pixel, at most; beyond it channels are moved one by one


class _Move:
    """A movement step: its two tensors, their pointers, its node."""

    def __init__(self, plan: Plan, step: Step):
        assert step.anchor is not None
        self.source, self.node, self.shape, self.batch = Source(), step.anchor, step.shape, plan.batch
        self.view, self.result = plan.views[step.inputs[0]], plan.views[step.name]
        self.input_shape = shape3(plan.types[step.inputs[0]])
        self.origin = self.source.tensor(step.inputs[0], self.view)
        self.to = self.source.tensor(step.name, self.result)
        storage = self.view.storage
        self.bytes, self.zero = storage.bytes, f"T.{storage.dtype}({storage.zero})"
        self.elements = plan.batch * int(np.prod(step.shape))

    def copy(self, to: str, origin: str, count: int) -> None:
        copy(self.source, (self.to, to), (self.origin, origin), count, self.bytes)

    def fill(self, to: str, count: int) -> None:
        fill(self.source, (self.to, to), self.zero, count, self.bytes)


def emit(plan: Plan, step: Step, target: Target) -> Source:
    """The kernel of a movement step."""
    move = _Move(plan, step)
    EMITTERS[move.node.op](move)
    return move.source


def _gather(move: _Move) -> None:
    index = move.node.arrays["index"].astype(np.int64)
    alternate = alternating(index)
    runs = channel_runs(index)
    table = ""
    if not alternate and len(runs) > RUNS:
        table = move.source.constant(index.astype(np.int32))
    channels, height, width = move.shape
    with image_rows(move.source, move.batch, height, move.elements) as (n, h), move.source.loop("w", width) as w:
        to, origin = (move.source.let(view.at(n, h, w), "at") for view in (move.result, move.view))
        if alternate:
            _interleave(move, to, origin, alternate)
        elif table:
            _one_by_one(move, to, origin, table, channels, bool(index.min() < 0))
        else:
            for first, channel, count in runs:
                if channel < 0:
                    move.fill(f"{to} + {first}", count)
                else:
                    move.copy(f"{to} + {first}", f"{origin} + {channel}", count)


def channel_runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    """(first channel of the result, first channel of the input or -1, channels) of every run of neighbours."""
    follows = (np.diff(index) == 1) & (index[:-1] >= 0) | (index[1:] == -1) & (index[:-1] == -1)
    starts = [0, *(np.flatnonzero(~follows) + 1).tolist()]
    ends = [*starts[1:], len(index)]
    return [(start, int(index[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def alternating(index: np.ndarray) -> tuple[int, int, int] | None:
    """(a, b, n) where the index is a, b, a + 1, b + 1, ... a + n - 1, b + n - 1: the shuffle of two groups, or a part
    of it."""
    if len(index) < 4 or len(index) % 2 or index.min() < 0:
        return None
    pairs = index.reshape(-1, 2)
    follows = (np.diff(pairs, axis=0) == 1).all()
    return (int(pairs[0, 0]), int(pairs[0, 1]), len(pairs)) if follows else None


def _interleave(move: _Move, to: str, origin: str, alternate: tuple[int, int, int]) -> None:
    """Channels of two runs in turn."""
    *firsts, count = alternate
    lanes = widest(count, BYTES // move.bytes // 2)
    pairs = [i // 2 + lanes * (i % 2) for i in range(2 * lanes)]
    with cover(move.source, count, lanes) as start:
        parts = [f"{move.origin}[{span(f'{origin} + {first} + {start}', lanes)}]" for first in firsts]
        index = span(f"{to} + 2*({start})", 2 * lanes)
        move.source.line(f"{move.to}[{index}] = T.Shuffle([{', '.join(parts)}], {pairs})")


def _one_by_one(move: _Move, to: str, origin: str, table: str, channels: int, zeros: bool) -> None:
    with move.source.loop("c", channels) as c:
        channel = move.source.let(f"{table}[{c}]", "channel")
        value = f"{move.origin}[{origin} + T.max({channel}, 0)]"
        if zeros:
            value = f"T.Select({channel} < 0, {move.zero}, {value})"
        move.source.line(f"{move.to}[{to} + {c}] = {value}")


def _pad2d(move: _Move) -> None:
    top, _, left, _ = move.node.attrs["padding"]
    _, height, width = move.shape
    _, in_height, in_width = move.input_shape
    first, last = max(left, 0), min(left + in_width, width)
    whole = all(view.channels == view.buffer.pitch for view in (move.view, move.result))
    with image_rows(move.source, move.batch, height, move.elements) as (n, h):
        row = move.source.let(f"{h} - {top}", "row")
        inside = move.source.let(f"T.And({row} >= 0, {row} < {in_height})", "inside")
        with move.source.block(f"if {inside}:"):
            _pixels(move, whole, n, h, 0, first)
            _copied(move, whole, (n, h, row), first, last)
            _pixels(move, whole, n, h, last, width)
        with move.source.block("else:"):
            _pixels(move, whole, n, h, 0, width)


def _pixels(move: _Move, whole: bool, n: str, h: str, first: int, last: int) -> None:
    """Zeros in the pixels [first, last) of a row."""
    if first == last:
        return
    channels, count = move.shape[0], last - first
    if whole:
        move.fill(move.result.at(n, h, str(first)), count * channels)
        return
    with move.source.loop("w", count) as w:
        move.fill(move.result.at(n, h, f"{first} + {w}"), channels)


def _copied(move: _Move, whole: bool, place: tuple[str, str, str], first: int, last: int) -> None:
    """The pixels [first, last) of a row.  place: image, row of the result, row of the input."""
    (n, h, row), left, channels = place, move.node.attrs["padding"][2], move.shape[0]
    if whole:
        to, origin = move.result.at(n, h, str(first)), move.view.at(n, row, str(first - left))
        move.copy(to, origin, (last - first) * channels)
        return
    with move.source.loop("w", last - first) as w:
        to, origin = move.result.at(n, h, f"{first} + {w}"), move.view.at(n, row, f"{first - left} + {w}")
        move.copy(to, origin, channels)


def _upsample(move: _Move) -> None:
    channels, height, width = move.shape
    rows, columns = move.node.attrs["scale"]
    with image_rows(move.source, move.batch, height, move.elements) as (n, h):
        row = move.source.let(f"T.floordiv({h}, {rows})", "row")
        with move.source.loop("w", width // columns) as w, move.source.loop("i", columns) as i:
            to = move.source.let(move.result.at(n, h, f"{w}*{columns} + {i}"), "to")
            move.copy(to, move.source.let(move.view.at(n, row, w), "from"), channels)


def _reshape(move: _Move) -> None:
    """One by one: channels come first in the meaning of the op, last in memory."""
    channels, height, width = move.input_shape
    _, out_height, out_width = move.shape
    source = move.source
    with source.loop("n", move.batch) as n, source.loop("h", height) as h, source.loop("w", width) as w:
        origin = source.let(move.view.at(n, h, w), "at")
        with source.loop("c", channels) as c:
            flat = source.let(f"({c})*{height * width} + ({h})*{width} + {w}", "flat")
            pixel = source.let(f"T.floormod({flat}, {out_height * out_width})", "pixel")
            channel = f"T.floordiv({flat}, {out_height * out_width})"
            to = move.result.at(n, f"T.floordiv({pixel}, {out_width})", f"T.floormod({pixel}, {out_width})")
            source.line(f"{move.to}[{to} + {channel}] = {move.origin}[{origin} + {c}]")


EMITTERS: Mapping[str, Callable[[_Move], None]] = {
    "gather": _gather,
    "pad2d": _pad2d,
    "upsample": _upsample,
    "reshape": _reshape,
}
