"""Chooses the kernel and the tiling of a dense layer."""

from tvm_benchmark.dense import Kernel, Tiling
from tvm_benchmark.isa import Target
from tvm_benchmark.layers import layers_of
from tvm_benchmark.plan import Plan, Step
from tvm_benchmark.registers import RegisterKernel
from tvm_benchmark.source import Source
from tvm_benchmark.tiles import MAX_ROWS, UNPACKED_BYTES, TileKernel
from tvm_benchmark.walks import walks_of

FEW_PIXELS = 5  # below, a tile of weights costs more than the vector instructions it saves
NEAR_BYTES = 256 << 10  # weights that stay in the second-level cache beside the pixels
CHEAP_ROWS = 11  # a product of fewer rows waits for its weights
KERNELS: dict[str, type[Kernel]] = {"registers": RegisterKernel, "tiles": TileKernel}


def default_tiling(plan: Plan, step: Step, target: Target) -> Tiling:
    """A good tiling without a search."""
    layers = layers_of(plan, step)
    layer = layers[0]
    if any(x.view.storage.dtype != "uint8" for x in layers):
        return Tiling(4, 1)
    if target.amx and plan.batch * step.shape[1] * step.shape[2] >= FEW_PIXELS:
        walks = walks_of(plan, step, layers, MAX_ROWS)
        walk = min(walks, key=lambda name: walks[name].tiles * max(walks[name].pixels, CHEAP_ROWS))
        if walks[walk].tiles <= 4:  # all pixels at once: every weight is read once
            return Tiling(MAX_ROWS, 1, 4, "panels", "tiles", walk)
        near = UNPACKED_BYTES if any(x.bits <= 4 for x in layers) else NEAR_BYTES
        order = "pixels" if max(x.weight.size for x in layers) <= near else "panels"
        return Tiling(MAX_ROWS, 2, 2, order, "tiles", walk)
    pixels, panel = (7, 2) if target.dot == "avx512" else (4, 1)
    return Tiling(pixels, panel, walk="long" if layer.is_point else "rows")


def emit_with(plan: Plan, step: Step, target: Target, tiling: Tiling) -> Source:
    """The kernel of a dense layer under a tiling."""
    return KERNELS[tiling.kernel](plan, step, target, tiling).emit()


def emit(plan: Plan, step: Step, target: Target) -> Source:
    """The kernel of a dense layer under its default tiling."""
    return emit_with(plan, step, target, default_tiling(plan, step, target))
