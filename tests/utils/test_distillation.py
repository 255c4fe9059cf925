"""The distillation loss against its formula written out in float64."""

import math

import pytest
import torch
from torch import nn

from utils.distillation import check_distillation, distillation_loss, teacher_logits
from utils.errors import UserError


def reference(
    student: list[list[float]], teacher: list[list[float]], labels: list[int], alpha: float, t: float
) -> float:
    """alpha T^2 mean_n sum_c p_c (log p_c - log q_c) - (1 - alpha) mean_n log softmax(student)[label]."""

    def log_softmax(row: list[float]) -> list[float]:
        return [value - math.log(sum(math.exp(v) for v in row)) for value in row]

    total = 0.0
    for s, p, label in zip(student, teacher, labels, strict=True):
        log_q, log_p = log_softmax([v / t for v in s]), log_softmax([v / t for v in p])
        divergence = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        total += alpha * t * t * divergence - (1 - alpha) * log_softmax(s)[label]
    return total / len(labels)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.95, 6.0), (0.3, 0.5)])
def test_loss_equals_its_formula(alpha: float, temperature: float) -> None:
    student, teacher, labels = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
    got = distillation_loss(student, teacher, labels, alpha, temperature).item()
    expected = reference(student.tolist(), teacher.tolist(), labels.tolist(), alpha, temperature)
    assert got == pytest.approx(expected, rel=1e-5)  # float32: about 100 roundings of 6e-8


def test_equal_logits_leave_no_divergence() -> None:
    logits = torch.randn(5, 7)
    assert distillation_loss(logits, logits, torch.zeros(5, dtype=torch.int64), 1.0, 6.0).item() == 0.0


def test_gradient_goes_to_the_student_only() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher, torch.tensor([0, 1, 2]), 0.9, 4.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_teacher_runs_without_gradients_and_in_evaluation_mode() -> None:
    teacher = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="training mode"):
        teacher_logits(teacher, torch.zeros(2, 3))
    assert not teacher_logits(teacher.eval(), torch.zeros(2, 3)).requires_grad


def test_refusals() -> None:
    with pytest.raises(UserError, match="teacher has 5 classes, the student 4"):
        distillation_loss(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), 0.5, 1.0)
    with pytest.raises(UserError, match=r"is 1\.5, expected 0 to 1"):
        check_distillation(1.5, 1.0)
    with pytest.raises(UserError, match="is 0, expected more than 0"):
        check_distillation(0.5, 0)
