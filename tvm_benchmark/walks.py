"""The output pixels of a dense layer cut into tiles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm_benchmark.layers import Layer
from tvm_benchmark.layout import Shape3, View
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.source import Source

Site = tuple[str, str, str]  # expressions of image, row and column


@dataclass(frozen=True)
class Walk:
    """The output pixels of a step cut into tiles of R pixels; the last tile of a run overlaps its neighbour.

    A run is a row of the output, or, for stride 1, the whole image along the rows of the input ("long"): pixel v of
    a run is then row v / row_length, column v % row_length, and columns beyond the output are computed and dropped.
    linear: all pixels of all images follow each other in every view, so that no coordinates are needed.

    images, runs: runs of all images.  length: pixels of a run.  row_length: 0 for runs that are rows.
    """

    images: int
    runs: int
    length: int
    pixels: int
    row_length: int
    shape: Shape3
    linear: bool

    @property
    def per_run(self) -> int:
        return -(-self.length // self.pixels)

    @property
    def tiles(self) -> int:
        return self.images * self.runs * self.per_run

    def site(self, source: Source, tile: str) -> Site:
        """Image, run and first pixel of a tile, as expressions."""
        n, run, first = "0", "0", "0"
        if self.per_run > 1:
            place = f"T.truncmod({tile}, {self.per_run})" if self.images * self.runs > 1 else tile
            first = source.let(f"T.min(({place})*{self.pixels}, {self.length - self.pixels})", "w")
            tile = f"T.truncdiv({tile}, {self.per_run})"
        if self.runs > 1:
            run = source.let(f"T.truncmod({tile}, {self.runs})" if self.images > 1 else tile, "h")
            tile = f"T.truncdiv({tile}, {self.runs})"
        if self.images > 1:
            n = source.let(tile, "n")
        return n, run, first

    def at(self, view: View, site: Site) -> str:
        """Element offset of an output pixel in a view."""
        n, h, w = site
        return view.at(w, "0", "0") if self.linear and view.buffer.shape[1:] == (1, 1) else view.at(n, h, w)

    @contextmanager
    def pixel(self, source: Source, site: Site, i: str) -> Iterator[Site]:
        """Coordinates of the i-th pixel of a tile, inside a condition where it may be none of the output."""
        n, h, w = site
        v = f"{w} + {i}"
        if self.linear or not self.row_length:
            yield n, h, v
            return
        _, height, width = self.shape
        v = source.let(v, "v")
        row, column = source.let(f"T.truncdiv({v}, {self.row_length})", "h"), f"T.truncmod({v}, {self.row_length})"
        column = source.let(column, "w")
        if self.row_length == width and self.length > height * width:  # images follow each other
            yield f"T.truncdiv({row}, {height})", f"T.truncmod({row}, {height})", column
        elif self.row_length == width:
            yield n, row, column
        else:
            with source.block(f"if {column} < {width}:"):
                yield n, row, column


def walks_of(plan: Plan, step: Step, layers: Sequence[Layer], pixels: int) -> dict[str, Walk]:
    """The ways to cut the pixels of a step into tiles of at most ``pixels``, by name: "rows" and, for stride 1,
    "long"."""
    _, height, width = step.shape
    views = [plan.views[name] for name in (*step.inputs, *step.reads, *step.writes)]
    layer = layers[0]
    point = all(x.is_point for x in layers)
    packed = point and all(x.view.is_dense for x in layers)
    walks = {"rows": Walk(plan.batch, height, width, _even(width, pixels), 0, step.shape, False)}
    if layer.stride != (1, 1) or (len(layers) > 1 and not packed):
        return walks
    row = layer.view.buffer.row // layer.view.buffer.pitch
    if point and all(v.is_dense and v.buffer.shape[1:] == (height, width) for v in views):
        length = plan.batch * height * width
        walks["long"] = Walk(1, 1, length, _even(length, pixels), width, step.shape, True)
    elif packed:
        length = plan.batch * height * width
        walks["long"] = Walk(1, 1, length, _even(length, pixels), width, step.shape, False)
    else:
        length = (height - 1) * row + width
        walks["long"] = Walk(plan.batch, 1, length, _even(length, pixels), row, step.shape, False)
    return walks


def _even(length: int, pixels: int) -> int:
    """Pixels of a tile: as few tiles as ``pixels`` allows, all of one size."""
    return -(-length // -(-length // pixels))
