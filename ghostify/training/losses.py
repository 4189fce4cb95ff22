"""How far a student's answers are from its teacher's; tensor maths only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ghostify.numerics import relative_squared_error


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits (N x classes): T^2 KL(teacher || student) of the softened classes, averaged over images (Hinton et al.,
    2015, section 2). Other outputs: their squared error relative to the teacher's variance over images."""
    if student.dim() != 2 or student.shape[1] < 2:
        return relative_map_error(student, teacher)
    own, wanted = (F.log_softmax(x.float() / temperature, 1) for x in (student, teacher))
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def relative_map_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||s - t||^2 / ||t||^2, both less their mean over images and positions, channel by channel."""
    s, t = student.float(), teacher.float()
    over = [d for d in range(t.dim()) if d != 1] if t.dim() > 1 else [0]
    return relative_squared_error(s, t, over=over, ignore_mean=True)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean of `relative_map_error` over layers."""
    each = [relative_map_error(s, t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(each).mean()
