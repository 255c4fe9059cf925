"""Counts and means against plain Python."""

import numpy as np
import torch

from utils.metrics import AverageMeter, label_ranks, topk_correct


def test_average_is_weighted() -> None:
    meter = AverageMeter()
    assert meter.average == 0.0
    meter.update(2.0, 3)
    meter.update(4.0)
    assert meter.average == (2.0 * 3 + 4.0) / 4


def test_ranks_equal_a_stable_sort_of_integers_with_ties() -> None:
    logits = torch.randint(-3, 4, (200, 10))
    labels = torch.randint(0, 10, (200,))
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    expected = [row.tolist().index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    assert label_ranks(logits, labels).tolist() == expected


def test_top1_is_argmax_and_top5_is_topk() -> None:
    logits, labels = torch.randn(300, 20), torch.randint(0, 20, (300,))
    top1, top5 = topk_correct(logits, labels)
    assert top1 == int((logits.argmax(1) == labels).sum())
    assert top5 == int((logits.topk(5).indices == labels[:, None]).any(1).sum())


def test_more_places_than_classes() -> None:
    assert topk_correct(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])) == (1, 4)


def test_nan_is_never_correct() -> None:
    logits = torch.tensor([[float("nan")] * 3, [0.0, float("nan"), 9.0], [0.0, 1.0, 9.0]])
    assert topk_correct(logits, torch.tensor([0, 2, 2])) == (1, 1)
