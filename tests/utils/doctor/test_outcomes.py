"""Outcomes and gains against plain arithmetic on single images."""

import math

import pytest
import torch
import torch.nn.functional as F

from utils.doctor.outcomes import Images, Outcomes, gain, outcomes

LABELS = torch.tensor([0, 1, 2, 0, 1])
LOGITS = torch.tensor([[2.0, 0, 0], [0, 0, 1], [0, 1, 3], [1, 1, 0], [1, 1, 0]])


def test_losses_and_hits_image_by_image() -> None:
    """Of equal logits the lower class wins, so image 3 is right and image 4 is wrong."""
    found = outcomes(lambda x: LOGITS[x.long()], [(torch.arange(3), LABELS[:3]), (torch.arange(3, 5), LABELS[3:])])
    expected = F.cross_entropy(LOGITS.double(), LABELS, reduction="none")
    assert torch.allclose(found.losses, expected, rtol=1e-12)
    assert found.correct.tolist() == [True, False, True, True, False]
    assert found.top1 == pytest.approx(60)
    assert found.loss == pytest.approx(float(expected.mean()))


def test_gain_has_the_error_of_paired_differences() -> None:
    before = Outcomes(torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([True, False, False, False]))
    after = Outcomes(torch.tensor([0.5, 1, 3, 4.5]).double(), torch.tensor([True, True, True, False]))
    found = gain(before, after)
    falls = [0.5, 1, 0, -0.5]
    assert found.loss == pytest.approx(0.25)
    assert found.loss_error == pytest.approx(math.sqrt(sum((f - 0.25) ** 2 for f in falls) / 3 / 4))
    assert found.top1 == pytest.approx(50)
    assert found.top1_error == pytest.approx(math.sqrt((2 * 50**2 + 2 * 50**2) / 3 / 4))


def test_single_image_has_no_error_to_speak_of() -> None:
    one = Outcomes(torch.tensor([1.0]).double(), torch.tensor([False]))
    assert gain(one, Outcomes(torch.tensor([0.0]).double(), torch.tensor([True]))).top1_error == math.inf


def test_images_limit_and_halves() -> None:
    batches = [(torch.arange(5).reshape(5, 1), torch.arange(5)), (torch.arange(5, 8).reshape(3, 1), torch.arange(5, 8))]
    images = Images(batches, lambda x: x * 10)
    assert (images.count, len(images)) == (8, 2)
    assert [x.flatten().tolist() for x in images.inputs(6)] == [[0, 10, 20, 30, 40], [50]]
    assert [labels.tolist() for _, labels in images.half(False)] == [[0, 2, 4], [5, 7]]
    assert [labels.tolist() for _, labels in images.half(True)] == [[1, 3]], "a batch of one image has no variance"
