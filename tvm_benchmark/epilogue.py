"""The body of a step: from a vector of the anchor's values to everything that the step stores."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tvm_benchmark.isa import Target
from tvm_benchmark.layout import View
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.pointwise import LANES, Apply, PointwiseNode, Value, loaded, store
from tvm_benchmark.source import Source

At = Callable[[View], str]
CACHE_LINE = 64
FAR_BYTES = 256 << 10


class Epilogue:
    """Emits a step's body.  ``begin`` loads the constants of one block of 16 channels, ``finish`` takes the anchor's
    values of one pixel through the body and stores what later steps read.

    row: the length of the run of elements that is cut into blocks, where it is not the channels of a pixel.
    """

    def __init__(self, source: Source, plan: Plan, step: Step, target: Target, row: int | None = None):
        self.source, self.plan, self.step = source, plan, step
        channels = row or step.shape[0]
        self.lanes = min(channels, LANES)
        self.pointers = {name: source.tensor(name, plan.views[name]) for name in (*step.reads, *step.writes)}
        types = plan.types
        self.nodes = [
            PointwiseNode(source, node, [types[name] for name in node.inputs], channels, target) for node in step.body
        ]
        self.loaded: list[Apply] = []

    def begin(self, block: str) -> list[Apply]:
        """Load the constants of a block of channels (an expression), for the next ``finish`` and as its result."""
        self.loaded = [node.load(block) for node in self.nodes]
        return self.loaded

    def finish(self, anchors: Mapping[str, Value], at: At, channel: str) -> None:
        """Emit the body for 16 channels of a pixel and store its results.

        anchors: what the step's anchors computed, by name.  at: element offset of the pixel's channel 0 in a view.
        channel: expression of the first of the 16 channels.
        """
        values = dict(anchors)
        for node, function in zip(self.step.body, self.loaded, strict=True):
            for name in node.inputs:
                if name not in values:
                    values[name] = self._load(name, at, channel)
            values[node.name] = function([values[name] for name in node.inputs])
        for name in self.step.writes:
            view = self.plan.views[name]
            store(self.source, self.pointers[name], view.storage, f"{at(view)} + {channel}", values[name], self.lanes)

    def far(self) -> list[str]:
        """Tensors of the body that are too large to be expected in the second-level cache."""
        names = (*self.step.reads, *self.step.writes)
        return [name for name in names if self.plan.views[name].buffer.bytes(self.plan.batch) >= FAR_BYTES]

    def fetch(self, at: At, channel: str, channels: int) -> None:
        """Ask for the cache lines of far tensors that ``finish`` will touch for so many channels of a pixel."""
        for name in self.far():
            view, write = self.plan.views[name], int(name in self.step.writes)
            for start in range(0, channels * view.storage.bytes, CACHE_LINE):
                element = f"{at(view)} + {channel} + {start // view.storage.bytes}"
                arguments = f"T.address_of({self.pointers[name]}[{element}]), T.int32({write}), T.int32(3), T.int32(1)"
                self.source.evaluate(f'T.call_llvm_intrin("void", "llvm.prefetch.p0", {arguments})')

    def _load(self, name: str, at: At, channel: str) -> Value:
        """16 channels of a stored tensor, broadcast along its axes of one."""
        view, shape = self.plan.views[name], self.step.shape
        pointer, (height, width) = self.pointers[name], view.buffer.shape[1:]
        offset = at(replace(view, still=(height == 1 < shape[1], width == 1 < shape[2])))
        if view.channels == 1 < shape[0]:
            return loaded(self.source, pointer, view.storage, offset, stride=0)
        return loaded(self.source, pointer, view.storage, f"{offset} + {channel}")
