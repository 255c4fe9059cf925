"""Accuracy of float models and integer graphs over a loader, and how far simulation and integers agree."""

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data_utils import normalize
from utils.errors import UserError
from utils.integer_graph.torch_engine import TorchEngine
from utils.metrics import topk_correct
from utils.preprocess import Preprocess
from utils.quantization_utils.prepare import QuantizedModel


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Batches of uint8 images [N, C, H, W] and int64 labels [N]."""


@dataclass(frozen=True)
class Accuracy:
    """top1, top5: percent of ``images``; seconds: wall time of the whole pass, loading included."""

    top1: float
    top5: float
    images: int
    seconds: float


def evaluate(predict: Callable[[Tensor], Tensor], loader: Batches, label: str) -> Accuracy:
    """Accuracy of ``predict`` (uint8 images -> logits [N, classes]); raises UserError for a loader without images."""
    start = time.perf_counter()
    correct1 = correct5 = images = 0
    bar = tqdm(loader, desc=label, unit="batch", leave=False, disable=None)
    for batch, labels in bar:
        logits = predict(batch)
        one, five = topk_correct(logits.cpu(), labels, (1, 5))
        correct1, correct5, images = correct1 + one, correct5 + five, images + len(labels)
        bar.set_postfix(top1=f"{100 * correct1 / images:.2f}")
    if images == 0:
        raise UserError("there are 0 images to evaluate; check the val/ folder")
    return Accuracy(100 * correct1 / images, 100 * correct5 / images, images, time.perf_counter() - start)


def float_predictor(model: nn.Module, preprocess: Preprocess, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Logits of a float (or fake-quantized) model in eval mode."""
    model.eval()

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(normalize(images.to(device), preprocess))
        return logits

    return predict


@dataclass(frozen=True)
class Agreement:
    """Percent of predictions and of activation integers that are equal in simulation and integer graph."""

    top1: float
    activations: float
    images: int


@torch.no_grad()
def agreement(
    model: QuantizedModel, engine: TorchEngine, loader: Batches, preprocess: Preprocess, limit: int
) -> Agreement:
    """Compare fake quantization with the integer graph, tensor by tensor, on the first ``limit`` images."""
    model.eval()
    device = next(model.model.parameters()).device
    same_top1 = images = 0
    same = total = 0
    for batch, _ in islice(loader, -(-limit // max(1, _batch_size(loader)))):
        batch = batch[: limit - images]
        simulated = model.activation_integers(normalize(batch.to(device), preprocess))
        integers = engine.run(batch.to(device), keep=True)
        same_top1 += int((simulated.pop("logits").argmax(1) == integers["logits"].argmax(1)).sum())
        for name, values in simulated.items():
            if name in integers:
                same += int((integers[name].reshape(values.shape) == values).sum())
                total += values.numel()
        images += len(batch)
    return Agreement(100 * same_top1 / max(images, 1), 100 * same / max(total, 1), images)


def _batch_size(loader: Batches) -> int:
    return next(iter(loader))[0].shape[0]
