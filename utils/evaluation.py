"""Accuracy of float models and integer graphs over a loader, and how far simulation and integers agree."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data_utils import normalize
from utils.errors import UserError
from utils.integer_graph.torch_engine import TorchEngine
from utils.metrics import topk_correct
from utils.preprocess import Preprocess
from utils.quantization_utils.prepare import QuantizedModel

Batches = Iterable[tuple[Tensor, Tensor]]  # uint8 images [N, C, H, W] and int64 labels [N]
Engine = Callable[[Tensor], Tensor]  # uint8 images [N, C, H, W] to logits float32 [N, classes]
BATCH_PIXELS = 64 * 224 * 224  # keeps the integer graph's temporaries to a few GB


@dataclass(frozen=True)
class Accuracy:
    """top1, top5: percent of ``images``; seconds: wall time of the whole pass, loading included.

    predictions: int64 [images], the predicted class of each.
    """

    top1: float
    top5: float
    images: int
    seconds: float
    predictions: Tensor


def evaluation_batch(wanted: int, input_size: int) -> int:
    """Images per batch of evaluation and calibration: ``wanted``, but at most 64 at 224 x 224 pixels.

    >>> evaluation_batch(128, 224), evaluation_batch(128, 32), evaluation_batch(1, 4000)
    (64, 128, 1)
    """
    return min(wanted, max(1, BATCH_PIXELS // input_size**2))


def evaluate(predict: Engine, loader: Batches, label: str) -> Accuracy:
    """Accuracy of ``predict`` (uint8 images -> logits [N, classes]); raises UserError for a loader without images."""
    start = time.perf_counter()
    correct1 = correct5 = images = 0
    predictions = []
    bar = tqdm(loader, desc=label, unit="batch", leave=False, disable=None)
    for batch, labels in bar:
        logits = predict(batch).cpu()
        predictions.append(logits.argmax(1))
        one, five = topk_correct(logits, labels, (1, 5))
        correct1, correct5, images = correct1 + one, correct5 + five, images + len(labels)
        bar.set_postfix(top1=f"{100 * correct1 / images:.2f}")
    if images == 0:
        raise UserError("there are 0 images to evaluate; check the val/ folder")
    seconds = time.perf_counter() - start
    return Accuracy(100 * correct1 / images, 100 * correct5 / images, images, seconds, torch.cat(predictions))


def float_predictor(model: nn.Module, preprocess: Preprocess, device: torch.device) -> Engine:
    """Logits of a float (or fake-quantized) model in eval mode."""
    model.eval()

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(normalize(images.to(device), preprocess))
        return logits

    return predict


@dataclass(frozen=True)
class Agreement:
    """Percent of predictions and of activation integers that are equal in simulation and integer graph.

    ``narrow`` counts activations of at most 8 bits alone: 16-bit residual streams show every rounding of a scale.
    """

    top1: float
    activations: float
    narrow: float
    images: int


AGREEMENT_BATCH = 8  # every tensor of both sides is held at once


@torch.no_grad()
def agreement(
    model: QuantizedModel, engine: TorchEngine, loader: Batches, preprocess: Preprocess, limit: int
) -> Agreement:
    """Compare fake quantization with the integer graph, tensor by tensor, on the first ``limit`` images."""
    model.eval()
    device = next(model.model.parameters()).device
    narrow = {name for name, quantizer in model.activation_quantizers().items() if quantizer.bits <= 8}
    same_top1 = images = 0
    counts = {True: [0, 0], False: [0, 0]}  # of at most 8 bits or not: equal integers, all integers
    bar = tqdm(desc="agreement", total=limit, unit="image", leave=False, disable=None)
    for batch in _first(loader, limit):
        simulated = model.activation_integers(normalize(batch.to(device), preprocess))
        integers = engine.run(batch.to(device), keep=True)
        same_top1 += int((simulated.pop("logits").argmax(1) == integers["logits"].argmax(1)).sum())
        for name, values in simulated.items():
            counts[name in narrow][0] += int((integers[name].reshape(values.shape) == values).sum())
            counts[name in narrow][1] += values.numel()
        images += len(batch)
        bar.update(len(batch))
    bar.close()
    same, total = (sum(pair) for pair in zip(*counts.values(), strict=True))
    return Agreement(_percent(same_top1, images), _percent(same, total), _percent(*counts[True]), images)


def _percent(part: int, whole: int) -> float:
    return 100 * part / max(whole, 1)


def _first(loader: Batches, limit: int) -> Iterator[Tensor]:
    """The first ``limit`` images in batches small enough to keep all their activations."""
    left = limit
    for batch, _ in loader:
        yield from batch[:left].split(AGREEMENT_BATCH)
        left -= len(batch)
        if left <= 0:
            return
