"""The outputs of an inference form or an exported file compared with the model's, whatever their types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from ghostify.numerics import find_mismatch

MAX_FLIPPED_SHARE = 0.01  # of the values of an output of integers or booleans, which rounding may flip
Comparable = Tensor | bool | int | float | str | bytes | None | torch.dtype | torch.device

Tolerance = Callable[[Tensor], float]


@dataclass(frozen=True)
class OutputCheck:
    """The first difference between outputs, if any, and what could not be compared; both as text."""

    difference: str | None
    uncompared: tuple[str, ...] = ()


def output_leaves(outputs: Any) -> dict[str, Any]:
    """All values in nested outputs by name, such as "output[0].boxes"; also those in dataclasses and other objects."""
    return dict(_leaves(outputs, "output", ()))


def _leaves(value: Any, name: str, owners: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    for path, leaf in tree_flatten_with_path(value)[0]:
        leaf_name = name + keystr(path)
        if isinstance(leaf, Comparable | type) or not hasattr(leaf, "__dict__"):
            yield leaf_name, leaf
        elif id(leaf) not in owners:
            for key, inner in vars(leaf).items():
                yield from _leaves(inner, f"{leaf_name}.{key}", (*owners, id(leaf)))


def check_outputs(actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: Tolerance) -> OutputCheck:
    """Compare outputs by name (see `output_leaves`).

    Floating-point tensors are compared to `tolerance(reference)` of their maximum, NaN equal to NaN; of integers and
    booleans 1 % of the values may differ. A tensor with another number of rows, such as of boxes found, is not
    compared. Other shapes, types or names are differences.
    """
    if list(actual) != list(expected):
        return OutputCheck(f"it has the outputs {_listed(actual)} in place of {_listed(expected)}")
    uncompared: list[str] = []
    for name, reference in expected.items():
        value = actual[name]
        if _has_other_rows(value, reference):
            uncompared.append(f"{name} has {len(value)} rows in place of {len(reference)}")
        elif not isinstance(reference, Comparable):
            uncompared.append(f"{name} is of class {type(reference).__name__}, which cannot be compared")
        elif (difference := _difference(value, reference, tolerance)) is not None:
            return OutputCheck(f"{name} {difference}", tuple(uncompared))
    return OutputCheck(None, tuple(uncompared))


def check_tensors(actual: Sequence[Tensor], expected: Mapping[str, Any], tolerance: Tolerance) -> OutputCheck:
    """`check_outputs` for the tensors alone, in order: exported files have no other outputs and names of their own."""
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    if len(actual) != len(tensors):
        return OutputCheck(f"it has {len(actual)} outputs in place of {len(tensors)}")
    moved = {name: value.to(reference.device) for value, (name, reference) in zip(actual, tensors.items(), strict=True)}
    return check_outputs(moved, tensors, tolerance)


def _has_other_rows(value: Any, reference: Any) -> bool:
    if not (isinstance(value, Tensor) and isinstance(reference, Tensor) and value.dim() == reference.dim() > 0):
        return False
    return value.shape[0] != reference.shape[0] and value.shape[1:] == reference.shape[1:]


def _difference(value: Any, reference: Any, tolerance: Tolerance) -> str | None:
    if isinstance(reference, float) and isinstance(value, float):
        value, reference = torch.tensor(value), torch.tensor(reference)
    if not isinstance(reference, Tensor):
        return None if type(value) is type(reference) and value == reference else f"is {value!r}, not {reference!r}"
    if not isinstance(value, Tensor) or value.shape != reference.shape or value.dtype != reference.dtype:
        return f"is {_described(value)}, not {_described(reference)}"
    if reference.is_complex():
        value, reference = torch.view_as_real(value.resolve_conj()), torch.view_as_real(reference.resolve_conj())
    if not reference.is_floating_point():
        flipped, count = int((value != reference).sum()), reference.numel()
        return f"differs in {flipped} of {count} values" if flipped > MAX_FLIPPED_SHARE * count else None
    mismatch = find_mismatch(value, reference, of_largest=tolerance(reference))
    if mismatch is None:
        return None
    return f"differs by {mismatch.difference:.2g} from values with maximum {mismatch.largest:.2g}"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of class {type(value).__name__}"
    return f"of {str(value.dtype).removeprefix('torch.')} in shape {tuple(value.shape)}"


def _listed(outputs: Mapping[str, Any]) -> str:
    return ", ".join(outputs) or "(none)"
