"""The inference form as a file for another runtime, checked there: ONNX, OpenVINO, or torch.export's own."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ghostify.deploying.deploy import deploy
from ghostify.deploying.runtimes import FORMATS, runner
from ghostify.errors import GhostifyError
from ghostify.numerics import find_mismatch
from ghostify.storing.atomic import staged_folder
from ghostify.tracing.calls import as_arguments, tensors_of

TOLERANCE = 1e-3


def export(model: nn.Module, path: str | Path, *, format: str, example_inputs: Any) -> Path:
    """Write the inference form of a model (see `deploy`) to a folder: "onnx", "openvino" or "pt2"; returns the file.

    The size of a batch stays free; heights and widths are those of `example_inputs`. Every file is run by its own
    runtime and compared with PyTorch, to 1e-3 of the largest answer. Raises `GhostifyError` for a format whose packages
    are not installed (pip install 'ghostify[export]'), a model that cannot be exported, or a file that answers
    otherwise; nothing is written then.
    """
    if format not in FORMATS:
        raise GhostifyError(f"format {format!r} is unknown: use {', '.join(FORMATS)}")
    args, kwargs = as_arguments(example_inputs)
    if kwargs:
        raise GhostifyError("models with keyword inputs cannot be exported: pass example_inputs as a tuple")
    small = deploy(model, example_inputs)
    folder = Path(path)
    if folder.is_file():
        raise GhostifyError(f"{folder}: is a file: name a folder to export into")
    with staged_folder(folder, merge=True) as fresh:
        _check(small, args, write(small, args, fresh, format), format)
    return folder / FORMATS[format]


def write(small: nn.Module, args: tuple[Any, ...], folder: Path, format: str) -> Path:
    """Write an inference form into a folder, unchecked; returns the file."""
    file = folder / FORMATS[format]
    try:
        with _quiet():
            _write(small, args, file, format)
    except ImportError as error:
        raise GhostifyError(f"{format} needs {error.name}: pip install 'ghostify[export]'") from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GhostifyError(f"the model cannot be exported as {format}: {reason}") from error
    return file


def _write(small: nn.Module, args: tuple[Any, ...], file: Path, format: str) -> None:
    program = torch.export.export(small, _doubled(args), dynamic_shapes=_free_batch(args), strict=False)
    if format == "pt2":
        torch.export.save(program, file)
        return
    importlib.import_module("onnxscript")
    onnx = file.with_suffix(".onnx")
    torch.onnx.export(program, f=str(onnx), dynamo=True, verbose=False, external_data=False)
    if format == "openvino":
        openvino = importlib.import_module("openvino")
        openvino.save_model(openvino.convert_model(str(onnx)), str(file), compress_to_fp16=False)
        onnx.unlink()


def _free_batch(args: tuple[Any, ...]) -> Any:
    """The first dimension of every tensor is the batch."""
    batch = torch.export.Dim("batch", min=1)
    return tree_map_only(Tensor, lambda t: {0: batch} if t.dim() else {}, args)


def _doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch of one would be taken for a constant."""
    return tuple(tree_map_only(Tensor, lambda t: torch.cat((t, t)) if t.dim() and len(t) == 1 else t, args))


def _check(small: nn.Module, args: tuple[Any, ...], file: Path, format: str) -> None:
    run = runner(file)
    for given in (args, _doubled(args)):
        with torch.no_grad():
            wanted = tensors_of(small(*given))
        for a, b in zip(wanted, run(*given), strict=True):
            mismatch = find_mismatch(b, a, of_largest=TOLERANCE)
            if mismatch is not None:
                raise GhostifyError(
                    f"the {format} file is {mismatch.difference:.2g} off PyTorch's answers, which reach "
                    f"{mismatch.largest:.2g}: use another format, and report this"
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
