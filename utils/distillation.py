"""Knowledge distillation: a float teacher's softened probabilities as additional targets."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


@torch.no_grad()
def teacher_logits(teacher: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [N, C] of `teacher` for normalised float images [N, C, H, W], without gradients.

    The teacher must be in evaluation mode, else its BN statistics would drift (ValueError).
    """
    if teacher.training:
        raise ValueError("the teacher is in training mode, expected teacher.eval()")
    return teacher(images)


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float, temperature: float
) -> torch.Tensor:
    """alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy, both means over the batch, in float32.

    student, teacher: logits [N, C], softened by the temperature T > 0 in the KL term only; no gradient flows to the
    teacher. labels: int64 [N]. alpha in [0, 1]. T^2 keeps the size of the gradient independent of T.
    The KL is summed over classes (HAWQ-V3's code also averages over them, which makes it C times smaller).

    Raises UserError if teacher and student have different numbers of classes, or alpha or T is out of range.
    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.
    """
    if student.shape != teacher.shape:
        got, expected = teacher.shape[-1], student.shape[-1]
        raise UserError(
            f"the teacher has {got} classes, the student {expected}; use a teacher trained on the same classes"
        )
    check_distillation(alpha, temperature)
    soft_student = F.log_softmax(student.float() / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    divergence = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(student.float(), labels)


def check_distillation(alpha: float, temperature: float) -> None:
    """Raise UserError if alpha is outside [0, 1] or the temperature not positive."""
    if not 0 <= alpha <= 1:
        raise UserError(f"the weight of the distillation loss is {alpha}, expected 0 to 1")
    if not temperature > 0:
        raise UserError(f"the temperature of the distillation is {temperature}, expected more than 0")
