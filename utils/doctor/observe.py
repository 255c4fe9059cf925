"""One pass over a quantized network on some images: clipping, dead channels, and BatchNorm drift.

All of it is of the quantized network as it is deployed, errors of the layers in front included.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from utils.quantization_utils.calibrators import make_observer
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.observers import Range
from utils.quantization_utils.prepare import LAYER_KINDS, PASSING, QuantizedModel
from utils.quantization_utils.quant_modules import QuantBatchNorm, Quantizer, QuantLayer

CODE_BITS = 8  # of wider tensors nobody counts the codes
MIN_FACTOR = 1e-6  # |gamma| below it: the BatchNorm's input cannot be read off its output


@dataclass(frozen=True)
class Clipping:
    """One activation quantizer on the images seen.

    behind: layer or operator whose output it quantizes.  low, high: real values of its first and last code.  seen: the
    extremes that met it.  clipped: share of values that end more than half a step away.  unused: share of its codes
    that no value took, None above 8 bits.  best: the range with the least squared error on these images.
    """

    quantizer: str
    behind: str
    bits: int
    low: float
    high: float
    seen: tuple[float, float]
    clipped: float
    unused: float | None
    best: Range


@dataclass(frozen=True)
class DeadChannels:
    """A layer's output channels that carry nothing.

    zero: numbers of those whose integer weights are all 0.  constant: of those that gave one and the same value at
    every position of every image (behind the ReLU where there is one), those in ``zero`` included.  bound: the channels
    go into a sum, concat, product or the logits, so they cannot be taken out by themselves.
    """

    layer: str
    channels: int
    zero: tuple[int, ...]
    constant: tuple[int, ...]
    bound: bool

    @property
    def dead(self) -> tuple[int, ...]:
        """Both kinds together."""
        return tuple(sorted({*self.zero, *self.constant}))


@dataclass(frozen=True)
class Drift:
    """How far a BatchNorm's input on these images is from its running statistics; dead channels are left out.

    rms, worst: root mean square and largest magnitude over channels of (mean - running mean) / running sigma.
    channel: number of the worst.  spread: median of sigma / running sigma.
    """

    layer: str
    rms: float
    worst: float
    channel: int
    spread: float


@dataclass(frozen=True)
class Observed:
    """Everything one pass tells, in the order of execution."""

    clipping: list[Clipping]
    dead: list[DeadChannels]
    drift: list[Drift]


class _Watch:
    """An observer that counts what its quantizer, already calibrated, does to values."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.scale, (self.lo, self.hi) = quantizer.scale, quantizer.bounds()
        self.search = make_observer("mse", quantizer.bits, quantizer.signed)
        self.codes = torch.zeros(self.hi - self.lo + 1 if quantizer.bits <= CODE_BITS else 0, dtype=torch.int64)
        self.total = self.clipped = 0
        self.low, self.high = torch.inf, -torch.inf

    def update(self, x: Tensor) -> None:
        x = x.detach()
        self.search.update(x)
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        scaled = x * self.scale.reciprocal()
        self.total += x.numel()
        self.clipped += int(((scaled > self.hi + 0.5) | (scaled < self.lo - 0.5)).sum())
        if len(self.codes):
            codes = scaled.round_().clamp_(self.lo, self.hi).to(torch.int64).flatten() - self.lo
            self.codes += torch.bincount(codes, minlength=len(self.codes)).cpu()

    def result(self) -> Range:
        return self.search.result()

    def report(self, name: str, behind: str, bits: int) -> Clipping:
        """What was counted."""
        return Clipping(
            quantizer=name,
            behind=behind,
            bits=bits,
            low=self.lo * float(self.scale),
            high=self.hi * float(self.scale),
            seen=(self.low, self.high),
            clipped=self.clipped / max(self.total, 1),
            unused=float((self.codes == 0).double().mean()) if len(self.codes) else None,
            best=self.result(),
        )


class _Channels:
    """Extremes, sum and squares of every channel of a tensor over batches.  axis: of the channels."""

    def __init__(self, axis: int) -> None:
        self.axis, self.count = axis, 0
        self.low = self.high = torch.zeros(0)
        self.sum = self.squares = torch.zeros(0, dtype=torch.float64)

    def add(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        """A forward hook."""
        rows = output.detach().movedim(self.axis, 0).flatten(1)
        low, high, wide = rows.amin(1).cpu(), rows.amax(1).cpu(), rows.double()
        total, squares = wide.sum(1).cpu(), wide.square().sum(1).cpu()
        if self.count:
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            total, squares = self.sum + total, self.squares + squares
        self.low, self.high, self.sum, self.squares = low, high, total, squares
        self.count += rows.shape[1]

    def constant(self) -> tuple[int, ...]:
        """Channels with a single value."""
        return tuple(int(i) for i in torch.nonzero(self.low == self.high).flatten())

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 [C] each."""
        mean = self.sum / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0).sqrt()


@torch.no_grad()
def observe(model: QuantizedModel, batches: Iterable[Tensor]) -> Observed:
    """Run the calibrated model over float32 [N, C, H, W]; it is left in eval mode with quantization on."""
    model.eval()
    model.enable()
    ops = [op for op in model.ops if op.kind in LAYER_KINDS]
    behind = {op.inputs[0]: op.module for op in model.ops if op.kind == "quantize"}
    before = {op.name: _Channels(_axis(op)) for op in ops}
    after = {op.name: _Channels(_axis(op)) for op in ops}
    quantizers = model.activation_quantizers()
    watches = {name: _Watch(quantizer) for name, quantizer in quantizers.items()}
    handles = []
    try:
        for op in ops:
            handles.append(_module(op).register_forward_hook(before[op.name].add))
            handles.append((behind.get(op.name) or _module(op)).register_forward_hook(after[op.name].add))
        for name, quantizer in quantizers.items():
            quantizer.observer = watches[name]
        for batch in tqdm(batches, desc="ranges and channels", unit="batch", leave=False, disable=None):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for quantizer in quantizers.values():
            quantizer.observer = None
    places = quantized_places(model)
    clipping = [watches[name].report(name, places[name], quantizers[name].bits) for name in quantizers]
    dead = [_dead(op, after[op.name], _is_bound(model, op)) for op in ops]
    drifts = [_drift(op, before[op.name], found) for op, found in zip(ops, dead, strict=True)]
    return Observed(clipping, dead, [drift for drift in drifts if drift is not None])


def quantized_places(model: QuantizedModel) -> dict[str, str]:
    """Quantizer -> the layer, module or operator whose output it quantizes, as people know it."""
    by_name = {op.name: op for op in model.ops}
    found = {}
    for name in model.activation_quantizers():
        op = by_name[name]
        while op.kind == "quantize":
            op = by_name[op.inputs[0]]
        found[name] = op.attrs.get("layer") or ("the image" if op.kind == "input" else op.path or op.name)
    return found


def _axis(op: Op) -> int:
    return -1 if op.kind == "linear" else 1


def _module(op: Op) -> QuantLayer | QuantBatchNorm:
    assert isinstance(op.module, QuantLayer | QuantBatchNorm)
    return op.module


def _is_bound(model: QuantizedModel, layer: Op) -> bool:
    """Whether a layer's channels reach anything but layers, on a way that keeps channels apart."""
    frontier = {layer.name}
    for op in model.ops:  # in order of execution, so a reader comes after what it reads
        if op.kind == "host" or not frontier.intersection(op.inputs):
            continue
        if op.kind in LAYER_KINDS:
            continue
        if op.kind not in (*PASSING, "quantize", "avg_pool", "function"):
            return True
        frontier.add(op.name)
    return False


def _dead(op: Op, channels: _Channels, bound: bool) -> DeadChannels:
    weight = _module(op).integer_weights().weight
    zero = torch.nonzero((weight.flatten(1) == 0).all(1)).flatten()
    return DeadChannels(op.attrs["layer"], weight.shape[0], tuple(int(i) for i in zero), channels.constant(), bound)


def _drift(op: Op, channels: _Channels, dead: DeadChannels) -> Drift | None:
    """Running statistics are folded: the output is gamma * (x - mean) / sigma + beta, from which x's moments follow."""
    bn = _module(op).bn
    if bn is None:
        return None
    mean, deviation = channels.moments()
    gamma, beta = _affine(bn, mean)
    alive = gamma.abs() > MIN_FACTOR
    alive[list(dead.dead)] = False
    if not bool(alive.any()):
        return None
    shift = torch.where(alive, (mean - beta) / torch.where(alive, gamma, 1.0), 0.0)
    worst = int(shift.abs().argmax())
    return Drift(
        layer=op.attrs["layer"],
        rms=float(shift[alive].square().mean().sqrt()),
        worst=float(shift[worst]),
        channel=worst,
        spread=float((deviation[alive] / gamma[alive].abs()).median()),
    )


def _affine(bn: _BatchNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma and beta, float64 [C] on the CPU."""
    gamma = torch.ones_like(like) if bn.weight is None else bn.weight.detach().cpu().double()
    beta = torch.zeros_like(like) if bn.bias is None else bn.bias.detach().cpu().double()
    return gamma, beta
