"""Collection of the feature maps that distillation compares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.graph.call_hooks import AfterCall, on_calls
from ghostify.modules.ghost import GhostModule
from ghostify.summary import report


def collect_features(student: nn.Module, teacher: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists that fill with the maps of the rewritten layers as the models run, in the student's channel order.

    Hooks that stay append the maps, N x C x H x W each; clear the lists after each run. Layers with pruned outputs
    and linear layers are left out.
    Raises `GhostifyError` for a layer that the teacher does not have.
    """
    student_maps: list[Tensor] = []
    teacher_maps: list[Tensor] = []
    for layer in report(student).layers:
        if layer.skip_reason is not None or layer.outputs < layer.weight_shape[0]:
            continue
        ghost: Any = _submodule(student, layer.name)
        if isinstance(ghost, nn.Linear):
            continue
        is_reordered = isinstance(ghost, GhostModule) and ghost.order is None and bool(layer.channels)
        channels = list(layer.channels) if is_reordered else slice(None)
        on_calls([ghost], after=lambda _, output: student_maps.append(output))
        on_calls([_submodule(teacher, layer.name)], after=_append_to(teacher_maps, channels))
    return student_maps, teacher_maps


def _append_to(maps: list[Tensor], channels: list[int] | slice) -> AfterCall:
    """A hook that appends these channels of a module's output to a list."""
    return lambda _, output: maps.append(output[:, channels])


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise GhostifyError(
            f"{name}: the original has no such module to compare features with. Set features to 0."
        ) from None
