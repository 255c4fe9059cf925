"""A layer as a matrix product over single output positions, drawn from all calibration images.

Positions of one image are much alike.  A thousand of them out of every image say more about a rounding than whole maps
of a few images at the same cost, and the product of matrices is the fastest there is on a CPU.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from utils.quantization_utils.float_ops import Op, pair
from utils.quantization_utils.tensor_cache import TensorCache

MOST_ROWS = 1 << 17
MOST_VALUES = 1 << 27  # 512 MiB of float32


@dataclass(frozen=True)
class Rows:
    """Some output positions of a layer.

    inputs: float32 [groups, K, R], what a group of output channels sees there (K: input channels of a group times
    kernel size, in the order of the weights).  targets: float32 [O, R].  answers: what the layer itself should answer
    for them, before any activation, where that is known.
    """

    inputs: Tensor
    targets: Tensor
    answers: Tensor | None = None

    def product(self, weight: Tensor, columns: slice) -> Tensor:
        """The layer without bias, [O, r], for weights [O, ...]."""
        groups, size, _ = self.inputs.shape
        chosen = self.inputs[:, :, columns]
        if groups == 1:
            return weight.reshape(-1, size) @ chosen[0]
        return torch.bmm(weight.reshape(groups, -1, size), chosen).flatten(0, 1)


def together(first: Rows, second: Rows) -> Rows:
    """The output positions of both."""
    assert first.answers is not None
    assert second.answers is not None
    pairs = (
        (first.inputs, second.inputs),
        (first.targets, second.targets),
        (first.answers, second.answers),
    )
    return Rows(*(torch.cat(pair, -1) for pair in pairs))


def has_rows(op: Op) -> bool:
    """Whether a layer can be taken apart: a convolution of maps, or a linear layer of vectors or sequences."""
    return len(op.shape) == 3 if op.kind == "conv" else len(op.shape) in (1, 2)


def draw_rows(
    module: nn.Conv2d | nn.Linear,
    source: tuple[TensorCache, str],
    target: tuple[TensorCache, str],
    seed: int,
    images: range | None = None,
) -> Rows:
    """Positions in random order: all of them, or at most 131072 and 512 MiB.

    source, target: cache and name of what the layer reads and of the values its output should have.  images: which
    ones, one after the other; all unless given.
    """
    cache, name = target
    shape = cache.shape(name)[:-1]
    index = draw_positions(module, shape, range(cache.count) if images is None else images, seed)
    return Rows(inputs_at(module, source, index, shape), cache.rows(name, index).T.contiguous())


def draw_positions(module: nn.Conv2d | nn.Linear, shape: tuple[int, ...], images: range, seed: int) -> Tensor:
    """Numbers of output positions [R], counted through all images; shape: of the output without its channels."""
    total = len(images) * prod(shape)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    size = prod(module.weight.shape[1:])
    most = max(1, min(total, MOST_ROWS, MOST_VALUES // (groups * size)))
    generator = torch.Generator().manual_seed(seed)
    if most == total:
        index = torch.randperm(total, generator=generator)
    else:
        index = torch.randint(total, (most,), generator=generator)
    return (index + images.start * prod(shape)).to(module.weight.device)


def inputs_at(
    module: nn.Conv2d | nn.Linear, source: tuple[TensorCache, str], index: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """What a layer reads, float32 [groups, K, R], for output positions [R] of :func:`draw_positions`."""
    if isinstance(module, nn.Linear):
        return source[0].rows(source[1], index).T.contiguous()[None]
    return _patches(module, source, index, shape)


def _patches(conv: nn.Conv2d, source: tuple[TensorCache, str], index: Tensor, positions: tuple[int, ...]) -> Tensor:
    """[groups, K, R]: the patch under each output position, zero outside the map."""
    cache, name = source
    height, width, channels = cache.shape(name)
    image, place = index // prod(positions), index % prod(positions)
    kernel, stride, dilation = pair(conv.kernel_size), pair(conv.stride), pair(conv.dilation)
    padding = _padding(conv)
    top = place // positions[1] * stride[0] - padding[0]
    left = place % positions[1] * stride[1] - padding[1]
    result = torch.empty(channels, prod(kernel), len(index), device=index.device)
    for tap in range(prod(kernel)):
        y = top + tap // kernel[1] * dilation[0]
        x = left + tap % kernel[1] * dilation[1]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        flat = (image * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
        result[:, tap] = (cache.rows(name, flat) * inside[:, None]).T
    return result.reshape(conv.groups, -1, len(index))


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Rows above and columns left of the map."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        kernel, dilation = pair(conv.kernel_size), pair(conv.dilation)
        return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
    return pair(conv.padding)
