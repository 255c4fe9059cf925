"""The compiled model in the place of the torch engine, and held to it: ``quant_train.py -e --engine tvm``."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tvm_benchmark.artifact import CompiledModel, check_cpu, read_info
from tvm_benchmark.compile import compile_graph, versions
from tvm_benchmark.equality import difference
from tvm_benchmark.isa import choose
from utils.errors import UserError
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import graph_hash

BATCH = 8  # images of one call, at most: their tensors stay in the caches


def compiled(graph: Graph, folder: Path, batch: int, threads: int, say: Callable[[str], None]) -> CompiledModel:
    """The model in ``folder``, compiled anew unless this graph is there for this batch, machine and version.

    batch: images of one call where they are few, else they are cut into batches of 8.

    Raises UserError as :func:`compile_graph` and :class:`CompiledModel` do.
    """
    batch = min(batch, BATCH)
    if not _is_current(graph, folder, batch):
        target = choose()
        say(f"compiling for {target.name} ({target.mcpu}), batches of {batch}, into {folder}")
        compile_graph(graph, folder, batch=batch, say=say)
    return CompiledModel(folder, threads)


def _is_current(graph: Graph, folder: Path, batch: int) -> bool:
    try:
        info = read_info(folder)
        check_cpu(info, folder)
    except UserError:
        return False
    wanted = {"graph_hash": graph_hash(graph), "batch": batch, "target": choose().name, "versions": versions()}
    return all(info[key] == value for key, value in wanted.items())


class Checked:
    """Predicts with the compiled model; the first images go through ``reference`` too, and every logit must be equal.

    checked: how many images.
    """

    def __init__(self, model: CompiledModel, reference: Callable[[Tensor], Tensor], checked: int) -> None:
        self.model, self.reference, self.unchecked = model, reference, checked

    def __call__(self, images: Tensor) -> Tensor:
        """Logits float32 [N, classes] of images uint8 [N, C, H, W].  Raises UserError where they differ."""
        logits = torch.from_numpy(self.model.predict(images.numpy()))
        count = min(self.unchecked, len(images))
        if count:
            found = difference(logits[:count].numpy(), self.reference(images[:count]).cpu().numpy())
            if found.different:
                raise UserError(f"{found.sentence}, and evaluate with --engine torch")
            self.unchecked -= count
        return logits
