"""A small search for the tiling of each dense layer, in this process, remembered on disk.

Candidates of one layer are compiled together and timed in turn on random integers; the weights change between runs,
as they do in a network, so that what hides the weights' way from memory wins.  The result is kept under a key of the
layer, the processor, the versions and the text of the kernel generators, so that nothing stale is ever used.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from tvm_benchmark.convolution import FEW_PIXELS, default_tiling, emit_with
from tvm_benchmark.dense import Tiling
from tvm_benchmark.isa import Target, cpu_name
from tvm_benchmark.layers import layers_of
from tvm_benchmark.lowering import SLACK, Arena, compile_text, module_text
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.source import Source
from tvm_benchmark.walks import walks_of
from utils.atomic_file import write_text
from utils.errors import UserError

CACHE_VARIABLE = "HAWQ_CACHE"
MAX_CANDIDATES = 50
SECONDS = 0.02  # spent on each candidate
COPIES_BYTES = 8 << 20  # the weights rotate over so much memory
GENERATORS = (
    *("dense", "registers", "tiles", "layers", "walks", "epilogue", "pointwise", "vectors", "layout", "plan", "source"),
    "isa",
)


def candidates(plan: Plan, step: Step, target: Target) -> list[Tiling]:
    """Tilings worth trying for a layer, the default first; at most 50, none twice."""
    layers = layers_of(plan, step)
    first = default_tiling(plan, step, target)
    if any(layer.view.storage.dtype != "uint8" for layer in layers):
        return [first]
    walks = list(walks_of(plan, step, layers, 16))
    found = [first]
    if target.amx:
        shapes = ((2, 2), (1, 4), (4, 1), (1, 2), (2, 1), (3, 1), (1, 3), (1, 1))
        found += [
            Tiling(16, panel, tiles, order, "tiles", walk)
            for tiles, panel in shapes
            for walk in walks
            for order in ("panels", "pixels")
        ]
    few = plan.batch * step.shape[1] * step.shape[2] < FEW_PIXELS
    if few or not target.amx:
        sizes = ((7, 2), (14, 2), (6, 4), (5, 4), (12, 2), (9, 3), (14, 1), (7, 3), (4, 4), (8, 3))
        small = ((4, 1), (6, 1), (4, 2), (2, 2), (3, 2), (2, 4))
        pairs = sizes if target.dot == "avx512" else small
        found += [
            Tiling(pixels, panel, 1, order, "registers", walk)
            for pixels, panel in pairs
            for walk in walks
            for order in ("panels", "pixels")
        ]
    return list(dict.fromkeys(found))[:MAX_CANDIDATES]


class Tuner:
    """Finds and remembers tilings.  ``emit`` goes into ``lowering.lower`` as the emitter of dense layers.

    search: measure layers that are not remembered (else they get their default).
    """

    def __init__(self, folder: Path | None = None, search: bool = True):
        self.folder = folder or cache_folder()
        self.search = search
        self.searched = 0

    def emit(self, plan: Plan, step: Step, target: Target) -> Source:
        return emit_with(plan, step, target, self.tiling(plan, step, target))

    def tiling(self, plan: Plan, step: Step, target: Target) -> Tiling:
        """The best tiling of a layer: remembered, searched for, or the default."""
        path = self.folder / f"{layer_key(plan, step, target)}.json"
        found = _read(path)
        if found is not None:
            return found
        if not self.search:
            return default_tiling(plan, step, target)
        options = candidates(plan, step, target)
        times = measure([emit_with(plan, step, target, option) for option in options], plan, target)
        best = min(range(len(options)), key=times.__getitem__)
        record = {"tiling": asdict(options[best]), "microseconds": round(times[best] * 1e6, 2)}
        record["tried"] = len(options)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record) + "\n")
        self.searched += 1
        return options[best]


def cache_folder() -> Path:
    """Where tilings are kept: $HAWQ_CACHE/tilings, else ~/.cache/hawq/tilings."""
    base = os.environ.get(CACHE_VARIABLE)
    return (Path(base) if base else Path.home() / ".cache" / "hawq") / "tilings"


def _read(path: Path) -> Tiling | None:
    try:
        return Tiling(**json.loads(path.read_text())["tiling"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the tiling {path} ({error}), expected JSON; remove the file") from error


def layer_key(plan: Plan, step: Step, target: Target) -> str:
    """Hash of everything that the best tiling may depend on."""
    assert step.anchor is not None
    layers = layers_of(plan, step)
    views = [plan.views[name] for name in (*step.inputs, *step.reads, *step.writes)]
    what = {
        "layers": [[x.weight.shape, x.groups, x.stride, x.dilation, x.padding, x.bits <= 4] for x in layers],
        "batch": plan.batch,
        "views": [[v.buffer.shape, v.buffer.halo, v.buffer.storage.dtype, v.first, v.channels] for v in views],
        "body": [node.op for node in step.body],
        "target": target.name,
        "cpu": cpu_name(),
        "generators": _generators(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _generators() -> str:
    """Hash of TVM's version and of the modules that write kernels."""
    import tvm

    digest = hashlib.sha256(tvm.__version__.encode())
    for name in GENERATORS:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _module(sources: Sequence[Source], plan: Plan) -> tuple[str, int, np.ndarray]:
    """Text with one entry point for each kernel, the size of the workspace, the arena."""
    arena, offsets, size = Arena(share=True), dict[str, int](), 0
    functions, calls = dict[str, str](), dict[str, list[str]]()
    for i, source in enumerate(sources):
        arguments = []
        for param in source.params:
            if param.array is not None:
                arguments.append(f"T.address_of(weights[{arena.add(param.array)}])")
                continue
            assert param.tensor is not None
            if param.tensor not in offsets:
                offsets[param.tensor] = size
                size += -(-(plan.views[param.tensor].buffer.bytes(plan.batch) + SLACK) // SLACK) * SLACK
            arguments.append(f"T.address_of(space[{offsets[param.tensor]}])")
        name = functions.setdefault(source.text("kernel"), f"kernel_{i}")
        calls[f"candidate_{i}"] = [f"{name}({', '.join(arguments)})"]
    weights = arena.bytes()
    signature = f'space: T.Buffer(({size},), "uint8"), weights: T.Buffer(({len(weights)},), "uint8")'
    return module_text(functions, calls, signature), size, weights


def measure(sources: Sequence[Source], plan: Plan, target: Target) -> list[float]:
    """Seconds of one call of each kernel, minima over interleaved rounds, one thread for all."""
    import tvm

    module, size, weights = _module(sources, plan)
    executable = compile_text(module, target)
    space = tvm.runtime.tensor(np.random.default_rng(0).integers(0, 256, size).astype(np.uint8))
    copies = max(2, min(16, COPIES_BYTES // len(weights)))
    tensors = [(space, tvm.runtime.tensor(weights)) for _ in range(copies)]
    functions = [executable[f"candidate_{i}"] for i in range(len(sources))]
    best = [float("inf")] * len(sources)
    for function in functions:
        function(*tensors[0])
    end, turn = time.perf_counter() + SECONDS * len(sources), 0
    while turn < 3 or time.perf_counter() < end:
        for i, function in enumerate(functions):
            copy = tensors[(turn + i) % len(tensors)]
            begin = time.perf_counter()
            function(*copy)
            best[i] = min(best[i], time.perf_counter() - begin)
        turn += 1
    return best
