"""Export: the inference form as a file for another runtime, verified there."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.arguments import a_choice, a_flag, a_model, a_path, anything, public
from ghostify.deployment.inference_form import deploy
from ghostify.errors import GhostifyError
from ghostify.graph.inputs import as_arguments, tensor_leaves
from ghostify.io.atomic import check_output_folder, staged_folder
from ghostify.io.output import is_disk_error
from ghostify.numerics import find_mismatch
from ghostify.runtimes.registry import EXPORT_FORMATS, Runtime, check_supported
from ghostify.runtimes.tensors import with_batch_of_two

TOLERANCE = 1e-3


@public(
    model=a_model,
    path=a_path,
    format=a_choice(EXPORT_FORMATS),
    example_inputs=anything,
    overwrite=a_flag,
)
def export(model: nn.Module, path: str | Path, *, format: str, example_inputs: Any, overwrite: bool = False) -> Path:
    """Write the inference form of a model (see `deploy`) to a folder as "onnx", "openvino", "pt2" or "aotinductor".

    Returns the file. The batch size stays free; heights and widths are those of `example_inputs`. Every file is run in
    its runtime and compared with PyTorch, to 1e-3 of the maximum output. Raises `GhostifyError` for a format whose
    packages are not installed (pip install 'ghostify[export]'), a model that cannot be exported, or a file with
    different outputs; nothing is written then. So it is for a folder that holds files which ghostify did not write;
    with `overwrite` those stay, and only ghostify's own are replaced.
    """
    runtime = EXPORT_FORMATS[format]
    args, kwargs = as_arguments(example_inputs)
    if kwargs:
        raise GhostifyError("export: models with keyword inputs are not supported. Pass example_inputs as a tuple.")
    check_supported(runtime, None)
    check_output_folder(path, overwrite=overwrite)
    deployed = deploy(model, example_inputs)
    with staged_folder(path, overwrite=overwrite) as staging:
        file = write_unchecked(deployed, args, staging, runtime)
        _check_file(deployed, args, file, runtime)
    return Path(path) / file.name


def write_unchecked(
    deployed: nn.Module, args: tuple[Any, ...], folder: Path, runtime: Runtime, *, for_timing: bool = False
) -> Path:
    """Write an inference form for a runtime to a folder without verification; returns the file."""
    try:
        with _silence_exporters():
            return (runtime.write_for_timing if for_timing else runtime.write)(deployed, args, folder)
    except ImportError as error:
        missing = f"format {runtime.format!r}: needs {error.name}"
        raise GhostifyError(f"{missing}. Run pip install 'ghostify[export]'.") from error
    except Exception as error:
        if is_disk_error(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        failure = f"format {runtime.format!r}: the model cannot be exported ({reason.rstrip('.')})"
        raise GhostifyError(f"{failure}. Use another format.") from error


def _check_file(deployed: nn.Module, args: tuple[Any, ...], file: Path, runtime: Runtime) -> None:
    run = runtime.load(file, None, True)
    for inputs in (args, with_batch_of_two(args)):
        with torch.no_grad():
            expected = tensor_leaves(deployed(*inputs))
        for reference, output in zip(expected, run(*inputs), strict=True):
            mismatch = find_mismatch(output, reference, of_largest=TOLERANCE)
            if mismatch is not None:
                raise GhostifyError(
                    f"format {runtime.format!r}: the file differs by {mismatch.difference:.2g} from PyTorch's outputs "
                    f"with maximum {mismatch.largest:.2g}. Use another format, and report this."
                )


@contextlib.contextmanager
def _silence_exporters() -> Iterator[None]:
    """Suppress the warnings and messages of the exporters."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
