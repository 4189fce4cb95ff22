"""The inference form as a file for another runtime, checked there: ONNX, OpenVINO, or torch.export's own."""

from __future__ import annotations

import contextlib
import importlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ghostify.calls import as_arguments, tensors_of
from ghostify.deploy import deploy
from ghostify.errors import GhostifyError

FORMATS = {"onnx": "model.onnx", "openvino": "model.xml", "pt2": "model.pt2"}
TOLERANCE = 1e-3
PRECISE = "f32"

Runner = Callable[..., list[Tensor]]


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    try:
        file = fresh / FORMATS[format]
        try:
            with _quiet():
                _write(small, args, file, format)
        except ImportError as error:
            raise GhostifyError(f"{format} needs {error.name}: pip install 'ghostify[export]'") from error
        except GhostifyError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise GhostifyError(f"the model cannot be exported as {format}: {reason}") from error
        _check(small, args, file, format)
        folder.mkdir(exist_ok=True)
        for written in fresh.iterdir():
            written.replace(folder / written.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder / FORMATS[format]


def runner(file: str | Path, threads: int | None = None) -> Runner:
    """A function that runs an exported file in its own runtime: tensors in, tensors out."""
    file = Path(file)
    opened = {".onnx": _onnx_runtime, ".xml": _openvino, ".pt2": _torch_export}
    if file.suffix not in opened:
        raise GhostifyError(f"{file}: is no exported model: .onnx, .xml and .pt2 are")
    if not file.is_file():
        raise GhostifyError(f"{file}: there is no such file")
    return opened[file.suffix](file, threads)


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
            difference, largest = (a - b).abs().max().item(), a.abs().max().item()
            if not difference <= TOLERANCE * largest:
                raise GhostifyError(
                    f"the {format} file is {difference:.2g} off PyTorch's answers, which reach {largest:.2g}: "
                    f"use another format, and report this"
                )


def _onnx_runtime(file: Path, threads: int | None) -> Runner:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = [x.contiguous().numpy() for x in inputs]
        return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, given, strict=True)))]

    return run


def _openvino(file: Path, threads: int | None) -> Runner:
    core = importlib.import_module("openvino").Core()
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISE}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(str(file), "CPU", options)

    def run(*inputs: Tensor) -> list[Tensor]:
        made = compiled([x.contiguous().numpy() for x in inputs])
        return [torch.from_numpy(made[k].copy()) for k in range(len(compiled.outputs))]

    return run


def _torch_export(file: Path, threads: int | None) -> Runner:  # noqa: ARG001
    module = torch.export.load(file).module()

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(module(*inputs))

    return run


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
