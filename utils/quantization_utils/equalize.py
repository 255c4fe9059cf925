"""Cross-layer equalisation: channels of neighbouring layers get ranges alike, the function stays as it is.

For a layer whose output only one other layer reads, through a ReLU at most, dividing output channel i by s_i and
multiplying the next layer's weights of input channel i by s_i changes nothing, as relu(x / s) = relu(x) / s.
s_i = sqrt(r1_i / r2_i) makes both ranges sqrt(r1_i * r2_i).  Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.
Behind a BatchNorm the division goes into its gamma and beta.
An upper clip stands in the way: min(x, 6) / s is not min(x / s, 6), and a ceiling per channel has no integer form
here, so pairs with a ReLU6 between them are left alone (:mod:`balance` scales those of their channels that can be).
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from utils.quantization_utils.float_ops import ComputedConv, Op
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantBatchNorm, Quantizer, QuantLayer

SWEEPS = 100
CONVERGED = 1e-3  # largest |log s| of a sweep
DEAD = 1e-4  # channels whose range is this part of the layer's largest are left alone
LINEAR_KINDS = ("identity", "max_pool", "avg_pool", "scale")  # f(x / s) = f(x) / s for s > 0


@dataclass(frozen=True)
class Pair:
    """Two layers of which only the second reads the first, by their names."""

    first: str
    second: str


@dataclass(frozen=True)
class Equalized:
    """skipped: layer -> why its output could not be scaled, for those that one other layer reads; sweeps: until
    nothing changed, or 100."""

    pairs: tuple[Pair, ...]
    skipped: dict[str, str]
    sweeps: int


@torch.no_grad()
def equalize(model: QuantizedModel) -> Equalized:
    """Equalise all pairs of layers again and again until the ranges settle; changes the float model's parameters.

    Calibrate afterwards.  With a weight scale per output channel only the columns of the second layer and the
    channels of the activations between gain; with one scale per layer both layers do.
    """
    pairs, skipped = find_pairs(model)
    layers = model.weight_layers()
    sweeps, change = 0, torch.inf if pairs else 0.0
    while change >= CONVERGED and sweeps < SWEEPS:
        change = max(_equalize_pair(layers[pair.first], layers[pair.second]) for pair in pairs)
        sweeps += 1
    return Equalized(tuple(pairs), skipped, sweeps)


def find_pairs(model: QuantizedModel) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of a network in order, and the layers that were left out with the reason."""
    readers: dict[str, list[Op]] = {op.name: [] for op in model.ops}
    for op in model.ops:
        for name in op.inputs if op.kind != "host" else ():
            readers[name].append(op)
    uses = parameter_uses(model)
    pairs, skipped = [], {}
    for op in model.ops:
        if op.kind not in ("conv", "linear"):
            continue
        second, why = _only_reader(op, readers)
        why = why or why_fixed(op, uses) or (why_fixed(second, uses, reads=True) if second else None)
        if second is not None and why is None:
            pairs.append(Pair(op.attrs["layer"], second.attrs["layer"]))
        elif why is not None:
            skipped[op.attrs["layer"]] = why
    return pairs, skipped


def parameter_uses(model: QuantizedModel) -> Counter[int]:
    """How many layers use a parameter, by the address of its values."""
    return Counter(p.data_ptr() for m in model.weight_layers().values() for p in _parameters(m))


def _parameters(layer: nn.Module) -> list[Tensor]:
    """What must not be changed if another layer has it too: of a layer used twice these occur twice."""
    assert isinstance(layer, QuantLayer | QuantBatchNorm)
    norm: list[Tensor] = [] if layer.bn is None else list(layer.bn.parameters())
    if isinstance(layer, QuantBatchNorm):
        return norm
    module: nn.Module = layer.module
    return [*(module.stored() if isinstance(module, ComputedConv) else module.parameters()), *norm]


def _only_reader(op: Op, readers: dict[str, list[Op]]) -> tuple[Op | None, str | None]:
    """The layer that alone reads an output, through steps that commute with positive factors; or why there is none.

    Neither where the output goes to several places or through other arithmetic: that is no pair to begin with.
    """
    ceiling = None
    while len(readers[op.name]) == 1:
        (reader,) = readers[op.name]
        if reader.kind in ("conv", "linear"):
            return reader, ceiling
        if not commutes(op, reader):
            break
        clip = ceiling_of(reader)
        ceiling = ceiling or (None if clip is None else f"an upper clip at {clip:g} (ReLU6) lies behind it")
        op = reader
    return None, None


def commutes(source: Op, op: Op) -> bool:
    """Whether an operator that reads ``source`` commutes with positive factors of channels, but for a ceiling."""
    if op.kind == "clip":
        return op.attrs["lo"] in (0, None)
    if op.kind == "move":
        return _only_flattens(source, op)
    return op.kind in (*LINEAR_KINDS, "quantize")


def _only_flattens(source: Op, op: Op) -> bool:
    """Whether a movement makes [C] of [C, 1, 1], every channel in its place."""
    if len(op.shape) != 1 or source.shape != (*op.shape, *([1] * (len(source.shape) - 1))):
        return False
    numbers = torch.arange(float(op.shape[0])).reshape(1, *source.shape)
    try:
        found = op.run(*[numbers if name == source.name else 1 for name in op.inputs])  # other operands: batch sizes
    except (TypeError, IndexError, RuntimeError, ValueError):
        return False
    return isinstance(found, Tensor) and torch.equal(found.flatten(), numbers.flatten())


def ceiling_of(op: Op) -> float | None:
    """The upper bound that a quantizer or a clip puts on its output."""
    if isinstance(op.module, Quantizer):
        return op.module.ceiling
    return op.attrs["hi"] if op.kind == "clip" else None


def why_fixed(op: Op, uses: Counter[int], reads: bool = False) -> str | None:
    """Why the parameters of a layer must not be scaled.  reads: as the second of a pair."""
    layer = op.module
    if not isinstance(layer, QuantLayer) or not isinstance(layer.module, nn.Conv2d | nn.Linear):
        return "its weights are computed, not stored"
    if is_parametrized(layer.module):
        return "its weights are computed by a parametrization"
    if any(uses[p.data_ptr()] > 1 for p in _parameters(layer)):
        return "its weights are used twice"
    if not reads and layer.bn is not None and (layer.bn.weight is None or layer.bn.bias is None):
        return "its BatchNorm has no factors"
    return None


def _equalize_pair(first: nn.Module, second: nn.Module) -> float:
    """One step for one pair; returns the largest |log s|."""
    assert isinstance(first, QuantLayer)
    assert isinstance(second, QuantLayer)
    weight, _ = fold(first.module.weight, None, first.bn)
    rows = weight.flatten(1).abs().amax(1)
    columns = input_ranges(second)
    alive = (rows > DEAD * rows.max()) & (columns > DEAD * columns.max())
    factors = torch.where(alive, rows / columns, 1.0).sqrt()
    scale_outputs(first, 1 / factors)
    by_input(second.module).mul_(factors.reshape(by_input(second.module).shape[0], 1, -1, 1))
    return float(factors.log().abs().max())


def input_ranges(layer: QuantLayer) -> Tensor:
    """The largest magnitude of the folded weights that read each input channel, [I]."""
    weight, _ = fold(layer.module.weight, None, layer.bn)
    return by_input(layer.module, weight).abs().amax((1, 3)).reshape(-1)


def by_input(module: nn.Conv2d | nn.Linear, weight: Tensor | None = None) -> Tensor:
    """Weights [O, I/groups, ...] as a view [groups, O/groups, I/groups, positions]."""
    weight = module.weight.data if weight is None else weight
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def scale_outputs(layer: QuantLayer, factors: Tensor) -> None:
    """Multiply the output channels of a layer, by its BatchNorm where it has one."""
    if layer.bn is not None:
        layer.bn.weight.mul_(factors)
        layer.bn.bias.mul_(factors)
        return
    layer.module.weight.mul_(factors.reshape(-1, *([1] * (layer.module.weight.dim() - 1))))
    if layer.module.bias is not None:
        layer.module.bias.mul_(factors)
