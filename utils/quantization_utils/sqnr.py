"""Signal to quantization noise of every layer: how much of what the float network computes survives.

``10 log10(sum(float**2) / sum((quantized - float)**2))`` in dB over a layer's whole output, in front of its ReLU, on
the same images; the quantized network's errors of all layers before are in it.  6 dB are about one bit.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from utils.quantization_utils.execution import run_ops
from utils.quantization_utils.prepare import LAYER_KINDS, QuantizedModel

LIMIT = 150.0  # dB, beyond float32's own rounding; stands for equal outputs, and its negative for noise without signal
BATCH = 8  # every layer's float output is held at once
WORST = 10


@torch.no_grad()
def layer_sqnr(
    model: QuantizedModel, batches: Iterable[Tensor], reference: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """dB by layer name in order, at most 150.

    batches: float32 [N, C, H, W].  reference: state_dict of the float network to compare with, where the model's own
    weights were rounded or its biases corrected since; the model keeps its own.  It is left in eval mode, quantization
    on.
    """
    model.eval()
    names = {op.name: op.attrs["layer"] for op in model.ops if op.kind in LAYER_KINDS}
    signal, noise = (dict.fromkeys(names, 0.0) for _ in range(2))
    own = {key: value.clone() for key, value in model.model.state_dict().items()}
    pieces = [piece for batch in batches for piece in batch.split(BATCH)]
    for piece in tqdm(pieces, desc="SQNR", unit="batch", leave=False, disable=None):
        expected = _float_outputs(model, piece, own, reference)
        for op, (output,) in run_ops(model, [piece], quantized=True):
            if op.name in names:
                exact = expected.pop(op.name)
                signal[op.name] += _energy(exact)
                noise[op.name] += _energy(exact.sub_(output))
    return {layer: _decibels(signal[name], noise[name]) for name, layer in names.items()}


def _float_outputs(
    model: QuantizedModel, images: Tensor, own: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Output of every layer of the reference network; the model has its own weights back afterwards."""
    if reference is not None:
        model.model.load_state_dict(reference)
    try:
        ops = run_ops(model, [images], quantized=False)
        return {op.name: outputs[0].clone() for op, outputs in ops if op.kind in LAYER_KINDS}
    finally:
        if reference is not None:
            model.model.load_state_dict(own)


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0 or signal == 0:
        return LIMIT if noise == 0 else -LIMIT
    return min(LIMIT, max(-LIMIT, 10 * math.log10(signal / noise)))


def worst_layers(values: Mapping[str, float], count: int = WORST) -> list[tuple[str, float]]:
    """Names and dB of the layers with the least, the worst first."""
    return sorted(values.items(), key=lambda pair: pair[1])[:count]


def format_worst(values: Mapping[str, float]) -> str:
    """The worst layers as lines for people."""
    lines = [f"signal to quantization noise of {len(values)} layers, the worst:"]
    return "\n".join([*lines, *(f"  {db:6.1f} dB  {name}" for name, db in worst_layers(values))])
