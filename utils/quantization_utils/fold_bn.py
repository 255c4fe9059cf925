"""Batch normalisation as the per-channel affine map it is in evaluation."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def affine_of(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """``(k, shift)`` with ``bn(x) = k * x + shift`` per channel under running statistics; float32 [C] each.

    ``k = gamma / sqrt(var + eps)``, ``shift = beta - mean * k``.  Differentiable in gamma and beta.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    sigma = torch.sqrt(bn.running_var + bn.eps)
    k = sigma.reciprocal() if bn.weight is None else bn.weight / sigma
    shift = -bn.running_mean * k
    return k, shift if bn.bias is None else bn.bias + shift


def fold(weight: Tensor, bias: Tensor | None, bn: _BatchNorm | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer that does the work of ``bn(layer(x))``.

    weight: float32 [O, ...]; bias: [O] or None (a bias in front of the BN is folded too).  Without BN the arguments
    come back as they are.
    """
    if bn is None:
        return weight, bias
    k, shift = affine_of(bn)
    folded_bias = shift if bias is None else shift + bias * k
    return weight * k.reshape(-1, *([1] * (weight.dim() - 1))), folded_bias
