"""What a network makes of labelled images, and how much a change of it gains, with the noise of few images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils.metrics import label_ranks
from utils.quantization_utils.sensitivity_loss import mean_and_error

Batch = tuple[Tensor, Tensor]  # images and int64 labels [N]
CERTAIN = 2.0  # standard errors that a gain must exceed


class Images:
    """Labelled images that every pass yields in the same batches: float32 [N, C, H, W] on the device, int64 [N].

    batches: uint8 images and labels.  to_input: makes the network's input of a batch of images.
    """

    def __init__(self, batches: Sequence[Batch], to_input: Callable[[Tensor], Tensor]) -> None:
        self.batches, self.to_input = list(batches), to_input
        self.count = sum(len(labels) for _, labels in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.batches:
            yield self.to_input(images), labels

    def inputs(self, limit: int | None = None) -> Iterator[Tensor]:
        """The first ``limit`` images without labels, in their batches."""
        left = self.count if limit is None else limit
        for images, _ in self.batches:
            if left > 0:
                yield self.to_input(images[:left])
            left -= len(images)

    def half(self, odd: bool) -> "Images":
        """Every second image, from number 0 or 1 of each batch on; batches of a single image are left out."""
        halves = [(images[int(odd) :: 2], labels[int(odd) :: 2]) for images, labels in self.batches]
        return Images([pair for pair in halves if len(pair[1]) > 1], self.to_input)


@dataclass(frozen=True)
class Outcomes:
    """Of every image: cross-entropy (float64 [N]) and whether the class is right (bool [N])."""

    losses: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float(self.correct.double().mean())


@dataclass(frozen=True)
class Gain:
    """How much better one network is than another on the same images, each with its standard error.

    loss: by how much the mean cross-entropy falls.  top1: percentage points by which top-1 rises.  The errors come from
    the differences image by image; infinite for a single image.
    """

    loss: float
    loss_error: float
    top1: float
    top1_error: float

    @property
    def certain(self) -> bool:
        """Whether top-1 and loss both gain more than two standard errors: one alone is too often chance."""
        return self.top1 > CERTAIN * self.top1_error and self.loss > CERTAIN * self.loss_error


@torch.no_grad()
def outcomes(run: Callable[[Tensor], Tensor], batches: Iterable[Batch], label: str = "") -> Outcomes:
    """Run a network (float32 images -> logits [N, classes]) over labelled images; at least one."""
    losses, correct = [], []
    for images, labels in tqdm(batches, desc=label, unit="batch", leave=False, disable=None if label else True):
        logits = run(images).cpu()
        labels = labels.cpu()
        losses.append(F.cross_entropy(logits.double(), labels, reduction="none"))
        correct.append(label_ranks(logits, labels) == 0)
    return Outcomes(torch.cat(losses), torch.cat(correct))


def gain(before: Outcomes, after: Outcomes) -> Gain:
    """What ``after`` gains over ``before`` on the same images in the same order."""
    falls = before.losses - after.losses
    rises = 100 * (after.correct.double() - before.correct.double())
    (loss, top1), (loss_error, top1_error) = (v.tolist() for v in mean_and_error(torch.stack([falls, rises])))
    return Gain(loss, loss_error, top1, top1_error)
