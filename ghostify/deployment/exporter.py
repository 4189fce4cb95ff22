"""Export: the inference form as a file for another runtime, verified there."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.arguments import a_choice, a_flag, a_model, a_path, anything, optional, public
from ghostify.deployment.inference_form import deploy, tolerance_of
from ghostify.deployment.output_check import Tolerance, check_outputs, check_tensors, output_leaves
from ghostify.errors import GhostifyError
from ghostify.graph.inputs import CallArguments, as_arguments
from ghostify.graph.modes import eval_mode
from ghostify.graph.module_state import ModuleState
from ghostify.io.atomic import check_output_folder, staged_folder
from ghostify.io.output import check_unicode, is_disk_error
from ghostify.runtimes.registry import EXPORT_FORMATS, Runtime, check_supported
from ghostify.runtimes.tensors import ExportInputs
from ghostify.text import one_line
from ghostify.user_warnings import warn_user

TOLERANCE = 1e-3
MAX_REASON = 200


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written, and why its batch size is fixed: "" where it is free, or was fixed by the user."""

    path: Path
    free_batch: bool
    fixed_reason: str = ""


@public(
    model=a_model,
    path=a_path,
    format=a_choice(EXPORT_FORMATS),
    example_inputs=anything,
    dynamic=optional(a_flag),
    overwrite=a_flag,
)
def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    example_inputs: Any,
    dynamic: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the inference form of a model (see `deploy`) to a folder as "onnx", "openvino", "pt2" or "aotinductor".

    Returns the file. It takes what `example_inputs` is: a tensor, a tuple, or a dict of keywords, whose names are those
    of the inputs in ONNX. The batch size is free where the model permits it, else that of `example_inputs`, with a
    warning; with `dynamic=True` it must be free, with `dynamic=False` it is fixed. Heights and widths are those of
    `example_inputs`. Every file is run in its runtime and compared with PyTorch, to 1e-3 of the maximum output (0.1 in
    half precision). Raises `GhostifyError` for a format whose packages are not installed (pip install
    'ghostify[export]'), a model that cannot be exported or has random outputs, or a file with different outputs;
    nothing is written then. So it is for a folder that holds files which ghostify did not write; with `overwrite` those
    stay, and only ghostify's own are replaced.
    """
    written = export_file(
        model, path, format=format, example_inputs=example_inputs, dynamic=dynamic, overwrite=overwrite
    )
    if written.fixed_reason:
        warn_user(f"export: the batch size is fixed ({written.fixed_reason}). Pass dynamic=False to choose this.")
    return written.path


def export_file(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    example_inputs: Any,
    dynamic: bool | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """`export` of arguments that are checked, without its warning; the result says whether the batch size is free."""
    runtime = EXPORT_FORMATS[format]
    check_supported(runtime, None)
    check_unicode(path)
    check_output_folder(path, overwrite=overwrite)
    deployed = deploy(model, example_inputs)
    inputs = ExportInputs(*as_arguments(example_inputs)).in_order_of(deployed)
    _check_reproducible(deployed, inputs)
    with staged_folder(path, overwrite=overwrite) as staging:
        written = _write_checked(deployed, inputs, staging, runtime, dynamic)
    return replace(written, path=Path(path) / written.path.name)


def _write_checked(
    deployed: nn.Module, inputs: ExportInputs, folder: Path, runtime: Runtime, dynamic: bool | None
) -> ExportedFile:
    """Write with a free batch size unless `dynamic` is False, or else with a fixed one unless it is True."""
    fixed_reason, present = "", set(folder.iterdir())
    if dynamic is not False:
        try:
            file = write_unchecked(deployed, inputs, folder, runtime)
            _check_file(deployed, (inputs, inputs.doubled()), file, runtime)
            return ExportedFile(file, free_batch=True)
        except GhostifyError as error:
            fixed_reason = _reason(error)
            if dynamic:
                raise GhostifyError(
                    f"format {runtime.format!r}: the model cannot be exported with a free batch size ({fixed_reason}). "
                    "Pass dynamic=False (--fixed-batch), or use another format."
                ) from error
        _remove(set(folder.iterdir()) - present)
    fixed = replace(inputs, free_batch=False)
    file = write_unchecked(deployed, fixed, folder, runtime)
    _check_file(deployed, (fixed,), file, runtime)
    return ExportedFile(file, free_batch=False, fixed_reason=fixed_reason)


def write_unchecked(
    deployed: nn.Module, inputs: ExportInputs, folder: Path, runtime: Runtime, *, for_timing: bool = False
) -> Path:
    """Write an inference form for a runtime to a folder without verification; returns the file.

    What the exporters' forwards leave in the model, such as buffers without values, is undone.
    """
    state = ModuleState(deployed)
    try:
        with _silence_exporters():
            return (runtime.write_for_timing if for_timing else runtime.write)(deployed, inputs, folder)
    except ImportError as error:
        missing = f"format {runtime.format!r}: needs {error.name}"
        raise GhostifyError(f"{missing}. Run pip install 'ghostify[export]'.") from error
    except Exception as error:
        if is_disk_error(error):
            raise
        failure = f"format {runtime.format!r}: the model cannot be exported ({_reason(error)})"
        raise GhostifyError(f"{failure}. Use another format.") from error
    finally:
        state.restore()


def _check_reproducible(deployed: nn.Module, inputs: ExportInputs) -> None:
    """Raise `GhostifyError` where two runs on the same inputs differ: such outputs cannot be verified."""
    runs = []
    for seed in (0, 1):
        with eval_mode(deployed):
            torch.manual_seed(seed)
            runs.append(_outputs(deployed, inputs))
    difference = check_outputs(runs[1], runs[0], _tolerance(deployed, inputs)).difference
    if difference is not None:
        raise GhostifyError(
            f"export: two runs on the same inputs differ ({difference}), so a file cannot be verified. "
            "Remove what is random, such as dropout that ignores eval()."
        )


def _check_file(deployed: nn.Module, examples: Sequence[ExportInputs], file: Path, runtime: Runtime) -> None:
    failure = f"format {runtime.format!r}: the file"
    for inputs in examples:
        try:
            with eval_mode(deployed):
                expected = _outputs(deployed, inputs)
        except Exception as error:
            refusal = "does not run on example_inputs" if inputs is examples[0] else "takes no batch of another size"
            raise GhostifyError(f"export: the model {refusal} ({_reason(error)}).") from error
        try:
            with _silence_exporters():
                given = inputs.cloned()
                actual = runtime.load(file, None, True)(*given.args, **given.kwargs)
        except Exception as error:
            raise GhostifyError(
                f"{failure} does not run in {runtime.package} ({_reason(error)}). "
                "Use another format, or convert the model by model.float()."
            ) from error
        difference = check_tensors(actual, expected, _tolerance(deployed, inputs, TOLERANCE)).difference
        if difference is not None:
            raise GhostifyError(
                f"{failure} differs from PyTorch's outputs: {difference}. Use another format, and report this."
            )


def _outputs(deployed: nn.Module, inputs: ExportInputs) -> dict[str, Any]:
    given = inputs.cloned()
    return output_leaves(deployed(*given.args, **given.kwargs))


def _tolerance(deployed: nn.Module, inputs: ExportInputs, *least: float) -> Tolerance:
    return tolerance_of(deployed, CallArguments(inputs.args, inputs.kwargs), *least)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _reason(error: BaseException) -> str:
    """What an exporter or a runtime says first about the cause of its error, as short plain text."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [text for line in str(error).splitlines() if (text := one_line(line).strip(" -"))]
    if len(lines) > 1 and lines[0].startswith("Constraints violated"):
        del lines[0]
    sentence = lines[0].partition(". ")[0] if lines else type(error).__name__
    return sentence[:MAX_REASON].rstrip(".: ")


@contextlib.contextmanager
def _silence_exporters() -> Iterator[None]:
    """Suppress the warnings and messages of the exporters."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
