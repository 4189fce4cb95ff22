"""Checks of calibration batches: that they can be read, hold finite images, and run through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ghostify.errors import GhostifyError
from ghostify.graph.batches import batch_error
from ghostify.graph.inputs import CallInputs, call_model, tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.text import first_line, format_value

REMEDY = "Pass batches such as tensors of N x C x H x W, or a DataLoader."


def an_iterable(name: str, value: Any) -> Any:
    """Something that yields batches; a check of arguments."""
    is_iterable = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if not is_iterable or isinstance(value, str | bytes | type | nn.Module | np.generic):
        raise GhostifyError(f"{name}: is {format_value(value)}, which yields no batches. {REMEDY}")
    return value


def read_batches(calibration: Any) -> Iterator[Any]:
    """The batches of `calibration`; raises `GhostifyError` where one cannot be read."""
    is_one_batch = isinstance(calibration, Tensor | Mapping)
    try:
        batches = iter([calibration] if is_one_batch else an_iterable("calibration", calibration))
    except TypeError as error:
        raise GhostifyError(f"calibration: yields no batches ({first_line(error)}). {REMEDY}") from error
    number = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except GhostifyError:
            raise
        except Exception as error:
            raise GhostifyError(
                f"calibration batch {number}: cannot be read ({type(error).__name__}: {first_line(error)}). "
                "Correct the loader."
            ) from error
        yield batch
        number += 1


def check_values(inputs: CallInputs, number: int) -> None:
    """Raises `GhostifyError` for inputs without images, or with values that are not finite."""
    tensors = tensor_leaves(inputs)
    if not tensors:
        raise GhostifyError(
            f"calibration batch {number}: has no images, because it holds no tensors. Pass tensors, for NumPy's arrays "
            "those of torch.from_numpy; dataclasses after torch.export.register_dataclass."
        )
    if tensors[0].dim() == 0 or tensors[0].numel() == 0:
        raise GhostifyError(f"calibration batch {number}: has no images. Leave it out.")
    if any(t.layout != torch.strided for t in tensors):
        raise GhostifyError(f"calibration batch {number}: is not a dense tensor. Pass it with to_dense().")
    if any(t.is_meta for t in tensors):
        raise GhostifyError(f"calibration batch {number}: is on the meta device and has no values. Pass real images.")
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point() or t.is_complex()):
        raise GhostifyError(f"calibration batch {number}: has NaN or infinite values. Correct it or leave it out.")


class BatchRunner:
    """Runs each batch that differs in shape or type from those before: one image of it, or else all."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.casts: dict[Any, torch.dtype | None] = {}
        self.dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def runnable(self, inputs: CallInputs, one_image: CallInputs, number: int) -> CallInputs:
        """The inputs as ordinary tensors without gradients, which the model runs on.

        Where it does not run on another floating-point type than its own, they are converted to its own. Raises
        `GhostifyError` where it does not run on either.
        """
        leaves, structure = tree_flatten(inputs)
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        signature = (str(structure), *((v.shape[1:], v.dtype, v.device) for v in tensors))
        if signature not in self.casts:
            samples = [_ordinary(one_image, None), _ordinary(inputs, None)]
            self.casts[signature] = self._cast(samples, number)
        return _ordinary(inputs, self.casts[signature])

    def _cast(self, samples: list[CallInputs], number: int) -> torch.dtype | None:
        """None where the model runs on one of the samples as it is, else the type to convert them to."""
        error = self._failure(samples)
        if error is None:
            return None
        has_other_dtype = any(v.is_floating_point() and v.dtype != self.dtype for v in tensor_leaves(samples))
        if has_other_dtype and self._failure([_ordinary(sample, self.dtype) for sample in samples]) is None:
            return self.dtype
        raise batch_error(number, error) from error

    def _failure(self, samples: list[CallInputs]) -> Exception | None:
        """The error on the last sample, or None where the model runs on one of them."""
        error = None
        for sample in samples:
            error = self._error(sample)
            if error is None:
                break
        return error

    def _error(self, inputs: CallInputs) -> Exception | None:
        """The error of one forward, or None."""
        try:
            with eval_mode(self.module):
                call_model(self.module, inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return error
        return None


def _ordinary(inputs: CallInputs, dtype: torch.dtype | None) -> CallInputs:
    """The inputs without gradients or inference tensors, which autograd refuses; floating-point ones in `dtype`."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.clone() if value.is_inference() else value.detach()
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)

    return tree_map(convert, inputs)
