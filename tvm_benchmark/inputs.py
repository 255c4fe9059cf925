"""The first step: images as the user has them (NCHW) into NHWC integers."""

import numpy as np

from tvm_benchmark.isa import Target
from tvm_benchmark.loops import image_rows
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.source import Source
from tvm_benchmark.vectors import BYTES, ByteTable, cover, span, widest

NARROWEST = 16  # pixels of a row from which registers hold tables


def emit_image(plan: Plan, step: Step, target: Target) -> Source:
    """uint8 images through a table for each channel."""
    source = Source()
    assert step.anchor is not None
    view, (channels, height, width) = plan.views[step.name], step.shape
    images, to = source.images("uint8"), source.tensor(step.name, view)
    table = (step.anchor.arrays["table"].astype(np.int32) + view.storage.zero).astype(view.storage.dtype)
    fast = target.vbmi and view.storage.dtype == "uint8" and channels in (1, 3) and width >= NARROWEST
    entries = [ByteTable(source, row) for row in table] if fast else []
    flat = "" if fast else source.constant(table.ravel())
    with image_rows(source, plan.batch, height, plan.batch * channels * height * width) as (n, h):
        planes = [source.let(_plane(step, n, h, c), "plane") for c in range(channels)]
        if fast:
            _emit_in_registers(source, entries, (images, planes), (to, view.at(n, h, "0")), width)
            return source
        with source.loop("w", width) as w:
            for c, plane in enumerate(planes):
                pixel = f'T.cast({images}[{plane} + {w}], "int32")'
                source.line(f"{to}[{view.at(n, h, w)} + {c}] = {flat}[{c * 256} + {pixel}]")
    return source


def _plane(step: Step, n: str, h: str, c: int) -> str:
    """Element of the images where a row of a channel starts."""
    channels, height, width = step.shape
    return f"(({n})*{channels} + {c})*{height * width} + ({h})*{width}"


def _emit_in_registers(
    source: Source, entries: list[ByteTable], origin: tuple[str, list[str]], to: tuple[str, str], width: int
) -> None:
    """One row of 1 or 3 channels, up to 64 pixels at a time.  origin: images and the offsets of the row's channels.
    to: tensor and offset of the row."""
    images, planes = origin
    registers = [table.load() for table in entries]
    lanes, channels = widest(width, BYTES), len(entries)
    with cover(source, width, lanes) as start:
        found = []
        for table, held, plane in zip(entries, registers, planes, strict=True):
            pixels = source.let(f"{images}[{span(f'{plane} + {start}', lanes)}]", "pixels")
            if lanes < BYTES:
                pixels = source.let(f"T.Shuffle([{', '.join([pixels] * (BYTES // lanes))}], {list(range(BYTES))})")
            found.append(table.look(held, pixels))
        done = 0
        while done < channels * lanes:
            size = widest(channels * lanes - done, BYTES)
            piece = _interleaved(source, found, done, size)
            source.line(f"{to[0]}[{span(f'{to[1]} + ({start})*{channels} + {done}', size)}] = {piece}")
            done += size


def _interleaved(source: Source, found: list[str], first: int, size: int) -> str:
    """Bytes [first, first + size) of the pixels whose channels are 1 or 3 vectors."""
    if len(found) == 1:
        return f"T.Shuffle([{found[0]}], {list(range(first, first + size))})"
    places = [divmod(first + i, 3) for i in range(size)]
    two = [pixel + BYTES * min(c, 1) for pixel, c in places]
    both = source.let(f"T.Shuffle([{found[0]}, {found[1]}], {two})")
    three = [size + pixel if c == 2 else i for i, (pixel, c) in enumerate(places)]
    return f"T.Shuffle([{both}, {found[2]}], {three})"


def emit_quantize(plan: Plan, step: Step, target: Target) -> Source:
    """float32 images scaled, rounded to the nearest even integer and clamped."""
    source = Source()
    assert step.anchor is not None
    view, (channels, height, width), attrs = plan.views[step.name], step.shape, step.anchor.attrs
    images, to = source.images("float32"), source.tensor(step.name, view)
    lanes = widest(width, NARROWEST)
    scale = source.constant(np.array([attrs["inverse_scale"]], np.float32))
    factor, low, high = (
        _splat(text, lanes) for text in (f"{scale}[0]", *(f"T.float32({attrs[k]})" for k in ("lo", "hi")))
    )
    with image_rows(source, plan.batch, height, plan.batch * channels * height * width) as (n, h):
        for c in range(channels):
            with cover(source, width, lanes) as start:
                pixels = f"{images}[{span(f'{_plane(step, n, h, c)} + {start}', lanes)}]"
                rounded = source.let(f"T.nearbyint({pixels} * {factor})")
                value = f"T.max(T.min({rounded}, {high}), {low})"
                integer = source.let(
                    f'T.cast({value}, "{_lanes("int32", lanes)}") + {_splat(f"T.int32({view.storage.zero})", lanes)}'
                )
                index = span(f"{view.at(n, h, start)} + {c}", lanes, view.buffer.pitch)
                source.line(f'{to}[{index}] = T.cast({integer}, "{_lanes(view.storage.dtype, lanes)}")')
    return source


def _splat(text: str, lanes: int) -> str:
    return f"T.Broadcast({text}, {lanes})" if lanes > 1 else text


def _lanes(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype
