"""Runs a graph with torch, on batches, on a CPU or a GPU: the same integers as the interpreter, at the speed of floats.

Integers travel in float32 tensors.  That is exact because every product is cut into pieces whose partial sums are
proved within 2**24 (``exact_conv``), rescaling is done in float64 under a proof (``torch_rescale``), and only
algorithms that multiply and add are used: no Winograd, no FFT, no TF32, no bfloat16.  So the NNPACK and cuDNN libraries
are switched off while the engine runs (on a GPU, torch then convolves by im2col and a matrix product).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from utils.integer_graph.interpreter import check_images
from utils.integer_graph.ir import FLOAT_BITS, Graph
from utils.integer_graph.torch_rescale import Scratch, Value, dense
from utils.integer_graph.torch_steps import STEPS, Context, Step, as_nchw

DTYPE_NAMES = {torch.uint8: "uint8", torch.float32: "float32"}


_MKLDNN: Any = torch.backends.mkldnn  # a module whose attributes mypy does not see
PRECISIONS = (_MKLDNN.conv, _MKLDNN.matmul, torch.backends.cuda.matmul)
IEEE = "ieee"


@contextlib.contextmanager
def exact_algorithms() -> Iterator[None]:
    """Allow only float32 products that are sums of exact products, in any order; restores the settings."""
    before = [backend.fp32_precision for backend in PRECISIONS]
    try:
        for backend in PRECISIONS:
            backend.fp32_precision = IEEE
        with torch.backends.cudnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        for backend, precision in zip(PRECISIONS, before, strict=True):
            backend.fp32_precision = precision


class TorchEngine:
    """A graph planned for one device; call it with batches of any size.

    graph: verified (``ops.verify``).  One call at a time: the calls share buffers.  Uses torch's thread count.
    """

    def __init__(self, graph: Graph, device: str | torch.device = "cpu") -> None:
        self.graph = graph
        self.device = torch.device(device)
        types = {node.name: node.type for node in graph.nodes}
        context = Context(self.device, Scratch(self.device), types, {})
        self._steps: list[Step] = [STEPS[node.op](node, context) for node in graph.nodes]
        self._dead = graph.last_uses()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, classes] of images uint8 [N, C, H, W] (float32 where the graph starts with ``quantize``).

        Raises UserError for images that do not fit the graph.
        """
        return dense(self._run(images, keep=False)[self.graph.nodes[-1].name])

    def run(self, images: torch.Tensor, keep: bool = True) -> dict[str, torch.Tensor]:
        """The value of every node by name (without `keep`: of the last), int64 [N, *shape], the logits float32."""
        values = self._run(images, keep)
        types = {node.name: node.type for node in self.graph.nodes}
        with torch.inference_mode():
            tensors = {name: as_nchw(dense(value)).contiguous() for name, value in values.items()}
            return {n: t if types[n].bits == FLOAT_BITS else t.long() for n, t in tensors.items()}

    def _run(self, images: torch.Tensor, keep: bool) -> dict[str, Value]:
        check_images(self.graph.nodes[0], tuple(images.shape), DTYPE_NAMES.get(images.dtype, str(images.dtype)))
        values: dict[str, Value] = {}
        with torch.inference_mode(), exact_algorithms():
            first = images.to(self.device)
            for node, step, dead in zip(self.graph.nodes, self._steps, self._dead, strict=True):
                values[node.name] = step([values[name] for name in node.inputs] if node.inputs else [first])
                if not keep:
                    for name in dead:
                        del values[name]
        return values
