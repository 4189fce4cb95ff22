"""A calibration set as batches bound to a traced module's inputs: checked, cut, kept, and shared among processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghostify.errors import GhostifyError
from ghostify.fitting.activation_store import Shelf, loaded
from ghostify.fitting.distributed import mine
from ghostify.graph.inputs import CallArguments, Inputs, PlaceholderValues, inputs_of, run, tensors_of
from ghostify.graph.modes import evaluating
from ghostify.numerics import outputs_match

IN_MEMORY = 1 << 26
VALUES = 16 * 3 * 224**2
HELD_OUT = 8
FORM_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Batch:
    """`size` images of the calibration set, from number `first` on; `number` is the user's batch they come from.

    `otherwise` is what the converted model is fed in their place, where that differs.
    """

    number: int
    first: int
    size: int
    stored: Inputs
    form: torch.memory_format = torch.preserve_format
    otherwise: Inputs | None = None

    @property
    def inputs(self) -> Inputs:
        """What the module takes, laid out in `form`."""
        return in_form(tree_map(loaded, self.stored), self.form)

    @property
    def converted_inputs(self) -> Inputs:
        """What the converted module takes."""
        return self.inputs if self.otherwise is None else in_form(tree_map(loaded, self.otherwise), self.form)


@dataclass(frozen=True, eq=False)
class Batches:
    """This process's batches, and the number of images of all processes."""

    own: tuple[Batch, ...]
    images: int


def batches_of(module: nn.Module, calibration: Iterable[Any] | Batches) -> Batches:
    """The batches of `calibration`, as `module` takes them; further elements of a tuple, such as labels, are left out.

    Large ones are cut. Those that come from a loader are kept, beyond 64 MiB in temporary files; those of a list stay
    the caller's. Of several processes, each passes the whole set and keeps every so many-th batch. Raises
    `GhostifyError` for a set that is empty, or holds values that are not finite.
    """
    if isinstance(calibration, Batches):
        return calibration
    if isinstance(calibration, Tensor | Mapping):
        calibration = [calibration]
    shelf = None if isinstance(calibration, Sequence) else Shelf(IN_MEMORY)
    (rank, processes), parts, seen = mine(), 0, 0
    own: list[Batch] = []
    for number, batch in enumerate(calibration):
        inputs = inputs_of(module, batch)
        _refuse_strange(inputs, number)
        first = tensors_of(inputs)[0]
        for part in split(inputs, max(1, VALUES * len(first) // first.numel())):
            size = images_of(part)
            if parts % processes == rank:
                own.append(Batch(number, seen, size, part if shelf is None else tree_map(shelf.put, part)))
            parts, seen = parts + 1, seen + size
    if parts < processes:
        raise GhostifyError(
            "calibration yields no batches: pass a list or a DataLoader, not a spent iterator"
            if not parts
            else f"calibration yields {parts} batches for {processes} processes: use smaller batches"
        )
    form = _fast_form(module, split(own[0].inputs, 1)[0])
    return Batches(tuple(replace(batch, form=form) for batch in own), seen)


def split(inputs: Inputs, images: int) -> list[Inputs]:
    """Inputs for up to `images` images each; whole where their tensors do not agree on how many there are,
    and where they are those of a module without a graph."""
    if isinstance(inputs, CallArguments):
        return [inputs]
    sizes = {len(v) if v.dim() else 0 for v in inputs.values if isinstance(v, Tensor)}
    if len(sizes) != 1 or any(tensors_of(v) for v in inputs.values if not isinstance(v, Tensor)):
        return [inputs]
    parts = [v.split(images) if isinstance(v, Tensor) else repeat(v) for v in inputs.values]
    return [PlaceholderValues(part) for part in zip(*parts, strict=False)]


def in_form(inputs: Inputs, form: torch.memory_format) -> Inputs:
    """The inputs with their images laid out in `form`."""

    def laid_out(value: Any) -> Any:
        return value.to(memory_format=form) if isinstance(value, Tensor) and value.dim() == 4 else value

    return tree_map(laid_out, inputs)


def judges(numbers: Tensor, every: int = HELD_OUT) -> Tensor:
    """Which images are held out, by number: the last of every `every`, none of one."""
    return numbers % every == max(every - 1, 1)


def images_of(inputs: Inputs) -> int:
    """How many images the inputs hold: the length of the first tensor that has one, or of a list of single images."""
    tensors = [v for v in tensors_of(inputs) if v.dim() > 0]
    apart = isinstance(inputs, PlaceholderValues) and any(isinstance(v, Tensor) for v in inputs.values)
    listed = not apart and all(v.dim() == 3 for v in tensors)
    return len(tensors) if listed else len(tensors[0])


def _fast_form(module: nn.Module, inputs: Inputs) -> torch.memory_format:
    """Channels last on a CPU, where convolutions run faster so, if the model does the same with such images."""
    if any(v.device.type != "cpu" for v in tensors_of(inputs)):
        return torch.preserve_format
    with evaluating(module):
        try:
            as_given, last = (
                tensors_of(run(module, in_form(inputs, form))) for form in (torch.preserve_format, torch.channels_last)
            )
        except (RuntimeError, TypeError):
            return torch.preserve_format
    alike = bool(as_given) and outputs_match(last, as_given, FORM_TOLERANCE)
    return torch.channels_last if alike else torch.preserve_format


def _refuse_strange(inputs: Inputs, number: int) -> None:
    tensors = tensors_of(inputs)
    if not tensors or tensors[0].dim() == 0 or tensors[0].numel() == 0:
        raise GhostifyError(f"calibration batch {number}: holds no images")
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
        raise GhostifyError(f"calibration batch {number}: holds NaN or infinite values")
