"""What all kernels of convolutions and matrix products have in common: tilings, jobs, the way to the epilogue.

A kernel computes tiles of R pixels x NB blocks of 16 output channels, from packed weights (``layers``), tile after
tile (``walks``), in vector registers (``registers``) or in tile registers (``tiles``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tvm_benchmark.epilogue import Epilogue
from tvm_benchmark.isa import Target
from tvm_benchmark.layers import Layer, layers_of
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Value, blocks
from tvm_benchmark.source import Source
from tvm_benchmark.walks import Site, walks_of

JOBS = 8  # at least so many independent pieces of work, where the layer has them


@dataclass(frozen=True)
class Tiling:
    """How a layer is cut.

    pixels: pixels of one tile, at most.  tiles: tiles computed together (tile registers only).  panel: blocks of 16
    output channels computed together.  order: "panels" keeps one panel of weights and walks over the pixels,
    "pixels" keeps one block of pixels and walks over the panels.  kernel: "registers" or "tiles" (AMX).  walk:
    "rows" or "long" (see ``Walk``; rows where the layer has stride).
    """

    pixels: int
    panel: int
    tiles: int = 1
    order: str = "panels"
    kernel: str = "registers"
    walk: str = "rows"


@dataclass(frozen=True)
class Units:
    """The units of a job: how many, their group, their panel where it is one for all, and ``locate(unit)``: first
    block of the panel and block of pixels."""

    count: int | str
    group: str
    panel: str | None
    locate: Callable[[str], tuple[str, str]]


class Kernel(ABC):
    """One dense kernel under construction: what the register and the tile kernels have in common."""

    def __init__(self, plan: Plan, step: Step, target: Target, tiling: Tiling):
        self.plan, self.step, self.target = plan, step, target
        self.source = Source()
        self.layers = layers_of(plan, step)
        self.outputs, self.groups = self.layers[0].outputs, self.layers[0].groups
        walks = walks_of(plan, step, self.layers, tiling.pixels)
        self.walk = walks.get(tiling.walk, walks["rows"])
        self.tiles = min(tiling.tiles, self.walk.tiles)
        self.order = tiling.order
        self.blocks = blocks(self.outputs)
        self.panel = min(tiling.panel, self.blocks)
        self.panels = -(-self.blocks // self.panel)
        self.pixel_blocks = -(-self.walk.tiles // self.tiles)
        self.pointers = [self.source.tensor(n, v.view) for n, v in zip(step.inputs, self.layers, strict=True)]
        self.epilogue = Epilogue(self.source, plan, step, target)

    @abstractmethod
    def emit(self) -> Source:
        """Write the kernel."""

    @property
    def pixels(self) -> int:
        """Pixels of one tile."""
        return self.walk.pixels

    @property
    def unit_vectors(self) -> int:
        """Vectors of 16 accumulators of one unit."""
        return self.tiles * self.pixels * self.panel

    def emit_jobs(self, prepare: Callable[[], None], run: Callable[["Units"], None]) -> None:
        """The loop over jobs, which may run at the same time, each a row of units: a panel and a block of pixels.

        prepare(): emitted at the start of a job.  run(units): emits all units of a job.
        """
        groups, source = self.groups, self.source
        by_panel = self.order == "panels"
        outer = groups * self.panels if by_panel else groups
        chunks = min(self.pixel_blocks, -(-JOBS // outer))
        size = -(-self.pixel_blocks // chunks)
        chunks = -(-self.pixel_blocks // size)
        with source.loop("job", outer * chunks, "parallel") as job:
            prepare()
            place = job if chunks == 1 else source.let(f"T.truncdiv({job}, {chunks})", "place")
            first = "0" if chunks == 1 else source.let(f"T.truncmod({job}, {chunks})*{size}", "first")
            even = self.pixel_blocks % size == 0
            extent: int | str = size if even else source.let(f"T.min({size}, {self.pixel_blocks} - {first})", "extent")
            if not by_panel:
                group = place if groups > 1 else "0"
                count = extent * self.panels if isinstance(extent, int) else f"{extent}*{self.panels}"
                run(Units(count, group, None, lambda unit: self._locate(unit, first)))
                return
            group = source.let(f"T.truncdiv({place}, {self.panels})", "g") if groups > 1 else "0"
            start = self._panel_start(f"T.truncmod({place}, {self.panels})" if groups > 1 else place)
            run(Units(extent, group, start, lambda unit: (start, f"{first} + {unit}")))

    def _locate(self, unit: str, first: str) -> tuple[str, str]:
        """First block of the panel and block of pixels of a unit, where panels change fastest."""
        if self.panels == 1:
            return "0", f"{first} + {unit}"
        start = self._panel_start(f"T.truncmod({unit}, {self.panels})")
        return start, f"{first} + T.truncdiv({unit}, {self.panels})"

    def _panel_start(self, panel: str) -> str:
        if self.panels == 1:
            return "0"
        exact = self.blocks % self.panel == 0
        text = f"({panel})*{self.panel}"
        return self.source.let(text if exact else f"T.min({text}, {self.blocks - self.panel})", "o")

    def channel(self, group: str, block: str) -> tuple[str, str]:
        """Block number and first channel among all outputs."""
        if self.groups > 1:
            whole = self.source.let(f"({group})*{self.blocks} + {block}", "blk")
            return whole, f"({whole})*{LANES}"
        channels = self.outputs
        if channels <= LANES:
            return "0", "0"
        start = f"({block})*{LANES}"
        return block, start if channels % LANES == 0 else f"T.min({start}, {channels - LANES})"

    def tile_of(self, block: str, tile: int | str) -> str:
        """Number of a tile of a pixel block."""
        if self.tiles == 1:
            return block
        first = f"({block})*{self.tiles}"
        if self.walk.tiles % self.tiles:
            first = f"T.min({first}, {self.walk.tiles - self.tiles})"
        return f"{first} + {tile}"

    def input_offset(self, layer: Layer, group: str, site: Site) -> str:
        """Element of the first tap of a tile's first pixel."""
        n, h, w = site
        sh, sw = layer.stride
        at = self.walk.at(layer.view, (n, f"({h})*{sh}" if h != "0" else h, f"({w})*{sw}" if w != "0" else w))
        parts = [at] + ([f"({group})*{layer.inputs}"] if layer.groups > 1 else [])
        return self.source.let(f"{' + '.join(parts)} + {layer.start}", "a")

    def number(self, group: str, block: str) -> str:
        """Number of a block among the blocks of all groups, as the weights are packed."""
        return self.channel(group, block)[0] if self.groups > 1 else block

    def finish_pixel(self, scratches: Sequence[str], site: Site, i: str, channel: str) -> None:
        """Take 16 channels of the i-th pixel from a site on through the epilogue.

        scratches: for each layer the expression of its accumulators, a vector.
        """
        with self.walk.pixel(self.source, site, i) as pixel:
            values = {
                node.name: Value(self.source.let(scratch, "acc"))
                for node, scratch in zip(self.step.anchors, scratches, strict=True)
            }
            self.epilogue.finish(values, partial(self.walk.at, site=pixel), channel)
