"""Weight scales chosen by what a layer answers, not by the weights alone.

The error of a layer's weights is a poor guide where its inputs are all positive (behind a ReLU): the errors of the
weights add up then.  A depthwise filter has nine of them, and clipping one for the sake of the others, as the least
squared error of the weights may want it, shifts its whole output.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from utils.quantization_utils.adaround import Grid, with_scale
from utils.quantization_utils.blocks import Unit
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.quant_modules import evaluated_bias
from utils.quantization_utils.quant_primitives import per_channel
from utils.quantization_utils.rows import draw_rows, has_rows
from utils.quantization_utils.side_by_side import SideBySide, Values, run_unit
from utils.quantization_utils.tensor_cache import TensorCache

IMAGES, ROWS = 64, 1 << 13
FACTORS = tuple(factor / 50 for factor in range(20, 61))  # 0.4 to 1.2


@torch.no_grad()
def best_scales(grid: Grid, error: Callable[[Tensor], Tensor]) -> Tensor:
    """For every output channel the scale whose nearest rounding leaves the least error, float32 [O].

    error: folded weights [O, ...] -> error by channel [O].  Candidates are the grid's own scale and 0.4, 0.42, ... 1.2
    of the least one that clips no weight.  Layers with one scale for all channels keep to one.
    """
    weights, reach = grid.ratio * per_channel(grid.scale, grid.ratio), grid.reach
    reach = reach if grid.layer.per_channel else reach.amax().expand_as(reach)

    def loss(scale: Tensor) -> Tensor:
        steps = per_channel(scale, weights)
        losses = error((weights / steps).round_().clamp_(grid.low, grid.high) * steps)
        return losses if grid.layer.per_channel else losses.sum().expand_as(losses)

    best, lowest = grid.scale, loss(grid.scale)
    for factor in FACTORS:
        scale = torch.where(reach > 0, reach * factor, grid.scale)
        losses = loss(scale)
        best = torch.where(losses < lowest, scale, best)
        lowest = torch.minimum(lowest, losses)
    return best


@torch.no_grad()
def rescaled(unit: Unit, walk: SideBySide, grids: Mapping[str, Grid], seed: int) -> dict[str, Grid]:
    """Grids of a unit's layers with the best scales, one layer after the other on what those before it answer.

    Images that are not learned from decide.  grids: by operator name.  The layers take their scales over.
    """
    index = slice(walk.checked.start, min(walk.checked.start + IMAGES, walk.checked.stop))
    layers = [op for op in unit.layers if op.name in grids and has_rows(op)]
    with walk.in_float():
        floats = run_unit(unit, walk.float_inputs(unit, index))
        # Once more, as activations have overwritten what layers answered.
        wanted = {op.name: op.run(*[floats[name] for name in op.inputs]) for op in layers}
    values, found = walk.inputs(unit, index), dict(grids)
    for op in unit.ops:
        if op in layers:
            found[op.name] = _rescaled(op, found[op.name], values, wanted[op.name], seed)
        values[op.name] = op.run(*[values[name] for name in op.inputs])
    return found


def _rescaled(op: Op, grid: Grid, values: Values, wanted: Tensor, seed: int) -> Grid:
    cache, (name, *_) = TensorCache(len(wanted)), op.inputs
    cache.put(name, slice(None), values[name])
    cache.put(op.name, slice(None), wanted)
    rows = draw_rows(grid.layer.module, (cache, name), (cache, op.name), seed)
    bias, columns = evaluated_bias(grid.layer)[:, None], slice(0, ROWS)

    def error(weights: Tensor) -> Tensor:
        return (rows.product(weights, columns) + bias - rows.targets[:, columns]).square().mean(1)

    return with_scale(grid, best_scales(grid, error))
