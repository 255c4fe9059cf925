"""From a plan to one TIR module, one arena of constants and one plan of the workspace.

``TABLE`` is the lowering table: one row for each kind of step.  Kernels with equal text become one function; ``main``
calls them in order with pointers into the workspace and the arena.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_benchmark import convolution, depthwise, elementwise, inputs, movement, pools
from tvm_benchmark.halo import emit_halo
from tvm_benchmark.isa import Target
from tvm_benchmark.layout import ALIGNMENT, NO_HALO, Buffer
from tvm_benchmark.memory import Lifetime, assign_offsets
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.script import parse
from tvm_benchmark.source import Param, Source

Emit = Callable[[Plan, Step, Target], Source]
# What flat kernels need of TVM's pipeline, by module and name.  The whole of it gives the same instructions in up to
# twice the time; its storage rewriting moves local arrays out of their loops, where they are no registers.
PASSES = (
    *("s_tir.LowerOpaqueBlock", "tirx.FlattenBuffer", "tirx.NarrowDataType", "tirx.StmtSimplify", "tirx.StmtSimplify"),
    *("s_tir.RewriteUnsafeSelect", "tirx.VerifyMemory", "tirx.AnnotateEntryFunc", "tirx.SplitHostDevice"),
    *("tirx.MakePackedAPI", "tirx.LowerTVMBuiltin", "tirx.LowerIntrin"),
)
PASS_ARGUMENTS = {"tirx.NarrowDataType": (32,)}  # bits of an index
SLACK = 4096  # bytes after the last tensor that kernels may read

TABLE: Mapping[str, Emit] = {
    "image": inputs.emit_image,
    "quantize": inputs.emit_quantize,
    "conv": convolution.emit,
    "depthwise": depthwise.emit,
    "max_pool": pools.emit_max_pool,
    "avg_pool": pools.emit_avg_pool,
    "movement": movement.emit,
    "pointwise": elementwise.emit,
}


@dataclass(frozen=True)
class Lowered:
    """What is compiled and what belongs to it.

    module: TVMScript with ``main(space, weights, images)``, and with steps also ``step_0``, ``step_1`` ...
    weights: uint8, all constants in execution order.  space_bytes: workspace.  result: byte offset of the float32
    logits [batch, classes] in the workspace.  steps: one record for each step.  tensors: where each stored tensor
    lies (offset in bytes, dtype, zero, shape [C, H, W], halo, pitch, first).
    """

    module: str
    weights: np.ndarray
    space_bytes: int
    result: int
    steps: list[dict[str, Any]]
    tensors: dict[str, dict[str, Any]]


class Arena:
    """Constants in the order in which they are read, each aligned.  share: equal ones are stored once."""

    def __init__(self, share: bool = False) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0
        self.known: dict[bytes, int] | None = {} if share else None

    def add(self, array: np.ndarray) -> int:
        """Byte offset of a constant."""
        offset = self.size
        data = array.view(np.uint8).ravel()
        if self.known is not None:
            known = self.known.setdefault(data.tobytes(), offset)
            if known != offset:
                return known
        padding = -len(data) % ALIGNMENT
        self.parts += [data, np.zeros(padding, np.uint8)]
        self.size += len(data) + padding
        return offset

    def bytes(self) -> np.ndarray:
        return np.concatenate([*self.parts, np.zeros(SLACK, np.uint8)])


@dataclass(frozen=True)
class _Call:
    step: int
    function: str
    arguments: str


class _Lowering:
    def __init__(self, plan: Plan, target: Target, keep: bool):
        self.plan, self.target = plan, target
        self.functions: dict[str, str] = {}  # text without the name -> name
        self.arena = Arena()
        self.calls: list[_Call] = []
        self.records: list[dict[str, Any]] = []
        buffers = {view.buffer.name: view.buffer for view in plan.views.values()}
        lifetimes = [_lifetime(plan, buffer, keep) for buffer in buffers.values()]
        self.offsets, size = assign_offsets(lifetimes, ALIGNMENT)
        self.space_bytes = -(-(size + SLACK) // ALIGNMENT) * ALIGNMENT

    def lower(self, emit: Mapping[str, Emit], steps: bool) -> Lowered:
        filled: set[str] = set()
        for index, step in enumerate(self.plan.steps):
            for name in step.writes:
                buffer = self.plan.views[name].buffer
                if buffer.halo != NO_HALO and buffer.name not in filled:
                    filled.add(buffer.name)
                    self._call(index, emit_halo(self.plan, buffer))
            source = emit[step.kind](self.plan, step, self.target)
            name, constant_bytes = self._call(index, source)
            self.records.append(_record(self.plan, step, name, constant_bytes))
        return Lowered(
            module=self._module(steps),
            weights=self.arena.bytes(),
            space_bytes=self.space_bytes,
            result=self.offsets[self.plan.result],
            steps=self.records,
            tensors={name: self._location(name) for name in self.plan.views},
        )

    def _call(self, step: int, source: Source) -> tuple[str, int]:
        text = source.text("kernel")
        name = self.functions.setdefault(text, f"kernel_{len(self.functions)}")
        before = self.arena.size
        arguments = ", ".join(self._argument(param) for param in source.params)
        self.calls.append(_Call(step, name, arguments))
        return name, self.arena.size - before

    def _argument(self, param: Param) -> str:
        if param.array is not None:
            return f"T.address_of(weights[{self.arena.add(param.array)}])"
        assert param.tensor is not None
        if param.tensor == "images":
            return "T.address_of(images[0])"
        return f"T.address_of(space[{self.offsets[self.plan.views[param.tensor].buffer.name]}])"

    def _location(self, name: str) -> dict[str, Any]:
        view = self.plan.views[name]
        buffer = view.buffer
        return {
            "offset": self.offsets[buffer.name],
            "dtype": buffer.storage.dtype,
            "zero": buffer.storage.zero,
            "shape": [view.channels, *buffer.shape[1:]],
            "halo": list(buffer.halo),
            "pitch": buffer.pitch,
            "first": view.first,
        }

    def _module(self, steps: bool) -> str:
        first = self.plan.steps[0].anchor
        assert first is not None
        dtype = "uint8" if first.op == "image" else "float32"
        count = self.plan.batch * int(np.prod(first.type.shape))
        signature = (
            f'space: T.Buffer(({self.space_bytes},), "uint8"), weights: T.Buffer(({self.arena.size + SLACK},), '
            f'"uint8"), images: T.Buffer(({count},), "{dtype}")'
        )
        groups = {"main": self.calls}
        if steps:
            for index in range(len(self.plan.steps)):
                groups[f"step_{index}"] = [call for call in self.calls if call.step == index]
        texts = {name: [f"{call.function}({call.arguments})" for call in calls] for name, calls in groups.items()}
        return module_text(self.functions, texts, signature)


def module_text(functions: Mapping[str, str], calls: Mapping[str, Sequence[str]], signature: str) -> str:
    """TVMScript of a module.

    functions: text of a private function called ``kernel`` -> its name.  calls: entry point -> what it calls.
    """
    texts = [text.replace("def kernel(", f"def {name}(") for text, name in functions.items()]
    for name, lines in calls.items():
        head = ["@T.prim_func(s_tir=True)", f"def {name}({signature}):", '    T.func_attr({"tirx.noalias": True})']
        texts.append("\n".join([*head, *(f"    T.evaluate(Module.{line})" for line in lines)]))
    lines = ["    " + line for text in texts for line in text.splitlines()]
    return "\n".join(["@I.ir_module(s_tir=True)", "class Module:", *lines]) + "\n"


def _lifetime(plan: Plan, buffer: Buffer, keep: bool) -> Lifetime:
    """First and last step that touch a buffer; the result is read after the last step."""
    uses = [
        i
        for i, step in enumerate(plan.steps)
        for n in (*step.writes, *step.reads, *step.inputs)
        if plan.views[n].buffer.name == buffer.name
    ]
    last = len(plan.steps) if keep or buffer.name == plan.result else max(uses)
    return Lifetime(buffer.name, buffer.bytes(plan.batch), 0 if keep else min(uses), last)


def _record(plan: Plan, step: Step, kernel: str, constant_bytes: int) -> dict[str, Any]:
    _, h, w = step.shape
    layers = [node for node in step.anchors if "weight" in node.arrays]
    macs = sum(h * w * int(node.arrays["weight"].size) for node in layers)
    return {
        "name": step.name,
        "kind": step.kind,
        "kernel": kernel,
        "macs": macs,
        "layers": [node.name for node in layers],
        "weight_bits": max((node.attrs["weight_bits"] for node in layers), default=0),
        "weight_bytes": constant_bytes,
        "input_bytes": _bytes(plan, (*step.inputs, *step.reads)),
        "output_bytes": _bytes(plan, step.writes),
    }


def _bytes(plan: Plan, names: Sequence[str]) -> int:
    """Bytes of one image's tensors, halos left out."""
    return sum(int(np.prod(plan.types[name].shape)) * plan.views[name].storage.bytes for name in names)


def lower(
    plan: Plan, target: Target, *, emit_conv: Emit | None = None, steps: bool = False, keep: bool = False
) -> Lowered:
    """Lower a plan for a target.

    emit_conv: emitter of dense layers (a tuner's).  steps: one more entry point for each step.  keep: no memory is
    used twice, so that every stored tensor can be read after a run.
    """
    table = {**TABLE, "conv": emit_conv} if emit_conv else TABLE
    return _Lowering(plan, target, keep).lower(table, steps)


def build(lowered: Lowered, target: Target) -> Any:
    """Compile the module.  Returns TVM's executable."""
    return compile_text(lowered.module, target)


def compile_text(module: str, target: Target) -> Any:
    """Compile TVMScript for a target.  Returns TVM's executable."""
    import tvm
    from tvm.tirx.build import codegen_build

    modules = {"tirx": tvm.tirx.transform, "s_tir": tvm.s_tir.transform}
    host = tvm.target.Target(target.llvm())
    passes = [tvm.tirx.transform.BindTarget(host.with_host(host))]
    for name in PASSES:
        library, function = name.split(".")
        passes.append(getattr(modules[library], function)(*PASS_ARGUMENTS.get(name, ())))
    return tvm.runtime.Executable(codegen_build(tvm.transform.Sequential(passes)(parse(module)), host))
