"""Outer loops of kernels: which work is worth threads, and how rows of a batch are numbered."""

from collections.abc import Iterator
from contextlib import contextmanager

from tvm_benchmark.source import Source

WORTH_THREADS = 20_000  # output elements from which the start of the threads pays


def kind(elements: int) -> str:
    """Kind of the outermost loop of a kernel that writes so many elements."""
    return "parallel" if elements >= WORTH_THREADS else "serial"


@contextmanager
def image_rows(source: Source, batch: int, height: int, elements: int) -> Iterator[tuple[str, str]]:
    """A loop over all rows of a batch; gives image and row.  elements: the kernel's output elements."""
    with source.loop("row", batch * height, kind(elements)) as row:
        if batch == 1:
            yield "0", row
        elif height == 1:
            yield row, "0"
        else:
            yield source.let(f"T.floordiv({row}, {height})", "n"), source.let(f"T.floormod({row}, {height})", "h")
