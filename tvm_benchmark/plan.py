"""From an integer graph to steps: what is computed together, what is stored and where.

A step is one anchor (a convolution, a pool, the input ...) with a body: the pointwise nodes that follow it, computed
on its values while they are in registers.  Only tensors that a later step reads are stored.  Concats store nothing of
their own: each branch is requantized into its channels of one buffer by whoever makes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tvm_benchmark.layout import NO_HALO, Buffer, Shape3, View, shape3, storage_of
from utils.errors import UserError
from utils.integer_graph.ir import Graph, Node, TensorType
from utils.integer_graph.type_rules import clamped

POINTWISE = ("requantize", "add", "mul", "clip", "lookup", "logits")
MERGED = "merged"  # kind of a step that another one computes
MOVEMENT = ("gather", "pad2d", "upsample", "reshape")


@dataclass
class Step:
    """One kernel call.

    kind: row of the lowering table.  anchor: the node it is named after (None: a pointwise step).  inputs: tensors
    that the anchor reads.  body: pointwise nodes on the anchor's values, in order.  shape: (C, H, W) of all its
    results.  reads: further tensors that the body loads.  writes: tensors that are stored.  second: another
    convolution whose accumulators the body reads as well (a shortcut that is added), inputs[1] is its input.
    """

    kind: str
    anchor: Node | None
    inputs: tuple[str, ...]
    shape: Shape3
    body: list[Node] = field(default_factory=list)
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    second: Node | None = None

    @property
    def name(self) -> str:
        return self.anchor.name if self.anchor else self.body[0].name

    @property
    def anchors(self) -> tuple[Node, ...]:
        return tuple(node for node in (self.anchor, self.second) if node)


@dataclass
class Plan:
    """Steps in order, and the view and type of every tensor that is stored."""

    batch: int
    steps: list[Step]
    views: dict[str, View]
    types: dict[str, TensorType]
    result: str


def convolution_kind(node: Node) -> str:
    """``depthwise`` where every output channel reads one input channel and there is one output for each, else
    ``conv``."""
    outputs, per_group = node.arrays["weight"].shape[:2]
    return "depthwise" if per_group == 1 and node.attrs["groups"] == outputs > 1 else "conv"


class _Planner:
    def __init__(self, graph: Graph, batch: int):
        self.graph, self.batch = graph, batch
        self.types = {node.name: node.type for node in graph.nodes}
        self.readers = graph.consumers()
        self.steps: list[Step] = []
        self.made_in: dict[str, int] = {}
        self.alias: dict[str, str] = {}  # a reshape of one pixel is the tensor itself
        self.slices: dict[str, tuple[str, int]] = {}  # tensor -> (tensor that holds it, first channel)

    def plan(self) -> Plan:
        for node in self.graph.nodes:
            self._place(self._resolved(node))
        self.steps = [step for step in self.steps if step.kind != MERGED]
        self._find_transfers()
        views = self._views()
        return Plan(self.batch, self.steps, views, self.types, self.graph.nodes[-1].name)

    def _resolved(self, node: Node) -> Node:
        return replace(node, inputs=tuple(self.alias.get(name, name) for name in node.inputs))

    def _place(self, node: Node) -> None:
        if node.op == "float_op":
            raise UserError(
                f"{node.name} computes {node.attrs['function']} in float32: got a float island, expected integers "
                "throughout; compile a network without it, or evaluate it with --engine torch"
            )
        if node.op == "reshape" and shape3(node.type)[1:] == shape3(self.types[node.inputs[0]])[1:] == (1, 1):
            self.alias[node.name] = node.inputs[0]
        elif node.op == "gather" and _is_range(node.arrays["index"]):
            self._slice(node)
        elif node.op == "concat":
            self._concat(node)
        elif node.op in POINTWISE:
            self._pointwise(node)
        else:
            kind = convolution_kind(node) if node.op == "conv2d" else "conv" if node.op == "linear" else node.op
            self._new_step(Step("movement" if kind in MOVEMENT else kind, node, node.inputs, shape3(node.type)))

    def _new_step(self, step: Step) -> None:
        self.made_in[step.name] = len(self.steps)
        self.steps.append(step)

    def _slice(self, node: Node) -> None:
        parent, first = self.slices.get(node.inputs[0], (node.inputs[0], 0))
        self.slices[node.name] = (parent, first + int(node.arrays["index"][0]))
        self.made_in[node.name] = self.made_in[node.inputs[0]]

    def _pointwise(self, node: Node) -> None:
        shape = shape3(node.type)
        latest = max(self.made_in[name] for name in node.inputs)
        step = self.steps[latest]
        fusable = step.kind not in ("movement", "image", "quantize") and step.shape == shape
        values = {step.name, *(n.name for n in step.body)}
        fusable = fusable and all(name in values or self.made_in[name] < latest for name in node.inputs)
        if fusable and any(name in values and shape3(self.types[name]) == shape for name in node.inputs):
            self._merge_shortcut(step, node)
            step.body.append(node)
            self.made_in[node.name] = latest
        else:
            self._new_step(Step("pointwise", None, (), shape, [node]))

    def _merge_shortcut(self, step: Step, node: Node) -> None:
        """Compute an earlier convolution in this step too, where only ``node`` of this step's body reads it: its
        accumulators are then never stored."""
        if step.second or step.body or not _is_dense(step):
            return
        for name in node.inputs:
            other = self.steps[self.made_in[name]]
            if other is not step and other.name == name and _is_dense(other) and not other.body:
                alone = len(self.readers[name]) == 1 and name not in self.alias.values()
                if alone and other.kind == "conv" and other.shape == step.shape:
                    step.second, step.inputs = other.anchor, (*step.inputs, *other.inputs)
                    other.kind = MERGED
                    return

    def _concat(self, node: Node) -> None:
        first, last = 0, 0
        for i, name in enumerate(node.inputs):
            branch = _branch(node, i, self.types[name])
            self.types[branch.name] = branch.type
            self._pointwise(branch)
            self.slices[branch.name] = (node.name, first)
            first += shape3(branch.type)[0]
            last = max(last, self.made_in[branch.name])
        self.made_in[node.name] = last

    def _holder(self, name: str) -> str:
        """The tensor in whose buffer this one lies."""
        while name in self.slices:
            name = self.slices[name][0]
        return name

    def _find_transfers(self) -> None:
        """Fill in what every step loads and stores."""
        wanted: set[str] = {self.graph.nodes[-1].name}
        for step in self.steps:
            own = {node.name for node in (*step.anchors, *step.body)}
            outside = [name for node in step.body for name in node.inputs if name not in own]
            step.reads = tuple(dict.fromkeys(outside))
            wanted.update(step.reads, step.inputs)
        wanted |= {self._holder(name) for name in wanted}
        for step in self.steps:
            own_names = [*([step.name] if step.anchor else []), *(node.name for node in step.body)]
            step.writes = tuple(n for n in own_names if n in wanted or self._holder(n) != n)

    def _views(self) -> dict[str, View]:
        stored = {name for step in self.steps for name in (*step.writes, *step.reads, *step.inputs)}
        holders = {self._holder(name) for name in stored}
        halos = self._halos()
        buffers = {
            name: Buffer(name, storage_of(self.types[name]), shape3(self.types[name]), halos.get(name, NO_HALO))
            for name in holders
        }
        return {name: self._view(name, buffers) for name in sorted(stored | holders)}

    def _view(self, name: str, buffers: Mapping[str, Buffer]) -> View:
        first, channels, holder = 0, shape3(self.types[name])[0], name
        while holder in self.slices:
            holder, start = self.slices[holder]
            first += start
        return View(buffers[holder], first, channels)

    def _halos(self) -> dict[str, tuple[int, int, int, int]]:
        halos: dict[str, tuple[int, int, int, int]] = {}
        for step in self.steps:
            for node, name in zip(step.anchors, step.inputs, strict=False):
                if node.op != "conv2d":
                    continue
                holder = self._holder(name)
                old, pads = halos.get(holder, NO_HALO), node.attrs["padding"]
                top, bottom, left, right = (max(a, b) for a, b in zip(old, pads, strict=True))
                halos[holder] = (top, bottom, left, right)
        return halos


def _is_dense(step: Step) -> bool:
    """Whether a step is a convolution without groups."""
    return step.kind == "conv" and step.anchor is not None and step.anchor.attrs.get("groups", 1) == 1


def _is_range(index: np.ndarray) -> bool:
    return bool(index[0] >= 0 and (np.diff(index) == 1).all())


def _branch(node: Node, i: int, x: TensorType) -> Node:
    """The requantization of one branch of a concat, as a node of its own."""
    arrays = {key: node.arrays[f"{key}{i}"] for key in ("multiplier", "shift")}
    # Bounds are those of the whole concat, whose storage it shares.
    wide = clamped(x.shape, node.attrs, node.type.lo, node.type.hi)
    return Node(f"{node.name}:{i}", "requantize", (node.inputs[i],), wide, node.attrs, arrays, node.scale)


def make_plan(graph: Graph, batch: int) -> Plan:
    """Plan a verified graph for a batch size.  Raises UserError for a graph with float islands."""
    return _Planner(graph, batch).plan()
