"""The runtimes that inference forms run in, and how a stored one is opened."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ghostify.errors import GhostifyError
from ghostify.storing.checkpoint import load
from ghostify.tracing.calls import tensors_of

FORMATS = {"onnx": "model.onnx", "openvino": "model.xml", "pt2": "model.pt2"}
FORMAT_OF = {"eager": "pt2", "compile": "pt2", "onnx": "onnx", "openvino": "openvino"}
PACKAGES = {"eager": "torch", "compile": "torch", "onnx": "onnxruntime", "openvino": "openvino"}
OWN = {".onnx": "onnx", ".xml": "openvino", ".pt2": "eager"}
RUNTIMES = tuple(FORMAT_OF)
PRECISE = "f32"

Runner = Callable[..., list[Tensor]]


def known_runtime(runtime: str) -> str:
    """The name of a runtime that is installed here, and its version; raises `GhostifyError` for any other."""
    if runtime not in RUNTIMES:
        raise GhostifyError(f"runtime {runtime!r} is unknown: use {', '.join(RUNTIMES)}")
    try:
        return f"{runtime} {importlib.metadata.version(PACKAGES[runtime])}"
    except importlib.metadata.PackageNotFoundError as error:
        needed = f"runtime {runtime!r} needs {PACKAGES[runtime]}"
        raise GhostifyError(f"{needed}: pip install 'ghostify[export]'") from error


def runner(file: str | Path, threads: int | None = None, *, runtime: str | None = None, alone: bool = True) -> Runner:
    """A function that runs an exported file in a runtime, its own by default, or a saved model's folder in PyTorch:
    tensors in, tensors out.

    Where it is not `alone`, but other models take turns with it in one process, its threads do not wait for the next
    call at the others' cost.
    """
    file = Path(file)
    if file.is_dir():
        return _pytorch(load(file).eval(), threads, runtime == "compile")
    if file.suffix not in OWN:
        raise GhostifyError(f"{file}: is no exported model: .onnx, .xml and .pt2 are")
    if not file.is_file():
        raise GhostifyError(f"{file}: there is no such file")
    runtime = runtime or OWN[file.suffix]
    if runtime == "onnx":
        return _onnx_runtime(file, threads, alone)
    return (
        _openvino(file, threads)
        if runtime == "openvino"
        else _pytorch(torch.export.load(file).module(), threads, runtime == "compile")
    )


def channels_last(values: Any) -> Any:
    """The same inputs, images among them laid out N x H x W x C."""
    last = torch.channels_last
    return tree_map_only(Tensor, lambda t: t.contiguous(memory_format=last) if t.dim() == 4 else t, values)


def _onnx_runtime(file: Path, threads: int | None, alone: bool) -> Runner:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
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


def _pytorch(module: Callable[..., Any], threads: int | None, compiled: bool) -> Runner:
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if compiled:
        setattr(importlib.import_module("torch._inductor.config"), "freezing", True)  # noqa: B010
        module = torch.compile(module)

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(module(*inputs))

    return run
