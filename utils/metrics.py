"""Counting what a classifier gets right, with a rule for ties, which integer logits often have."""

from collections.abc import Sequence

import torch


class AverageMeter:
    """Mean of values weighted by how many items each stands for."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, value: float, count: int = 1) -> None:
        """Add the mean `value` of `count` items."""
        self.total += value * count
        self.count += count

    @property
    def average(self) -> float:
        """Mean of all items so far; 0.0 before the first."""
        return self.total / self.count if self.count else 0.0


def label_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Place of the label's logit among all, 0 is the largest; of equal logits the lower class comes first (argmax).

    logits: float or integer [N, C], at least one class. labels: int64 [N] in 0..C-1. Returns int64 [N].
    A row with NaN has the rank C: never correct.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ranks = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return torch.where(logits.isnan().any(1), logits.shape[1], ranks)


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1, 5)) -> tuple[int, ...]:
    """Number of rows whose label is among the k largest logits, for each k; see `label_ranks` for shapes and ties.

    >>> topk_correct(torch.tensor([[1, 3, 2], [4, 4, 0]]), torch.tensor([2, 1]), (1, 2))
    (0, 2)
    """
    ranks = label_ranks(logits, labels)
    return tuple(int((ranks < min(k, logits.shape[1])).sum()) for k in ks)
