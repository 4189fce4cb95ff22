"""Distillation losses between the outputs of a student and a teacher; tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ghostify.numerics import relative_squared_error


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """A scalar: for logits (N x classes) T^2 KL(teacher || student) of the softened classes, averaged over images
    (Hinton et al., 2015, section 2), for other outputs `relative_map_error`."""
    if student.dim() != 2 or student.shape[1] < 2:
        return relative_map_error(student, teacher)
    student_log, teacher_log = (F.log_softmax(x.float() / temperature, 1) for x in (student, teacher))
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def relative_map_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||s - t||^2 / ||t||^2 of N x C x ... maps, both centred over images and positions in each channel; a scalar."""
    s, t = student.float(), teacher.float()
    dims = [d for d in range(t.dim()) if d != 1] if t.dim() > 1 else [0]
    return relative_squared_error(s, t, over=dims, ignore_mean=True)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean of `relative_map_error` over layers."""
    return torch.stack([relative_map_error(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
