"""ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.graph.inputs import tensor_leaves
from ghostify.runtimes.onnx_writer import write_onnx
from ghostify.runtimes.pytorch import export_program
from ghostify.runtimes.tensors import ExportInputs, Runner, by_name, to_array, unsupported_by_worker

ERROR_SEVERITY = 3


@dataclass(frozen=True)
class OnnxRuntime:
    """The `Runtime` for ONNX files in ONNX Runtime."""

    name: str = "onnx"
    package: str = "onnxruntime"
    format: str = "onnx"
    suffix: str = ".onnx"
    is_in_process: bool = False
    is_channels_last: bool = False
    loads_folders: bool = False
    compiles_slowly: bool = False

    def unsupported(self, example: Any) -> str | None:
        return unsupported_by_worker(example)

    def write(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        importlib.import_module("onnxscript")
        file = folder / f"model{self.suffix}"
        positional = replace(inputs, args=(*inputs.args, *inputs.kwargs.values()), kwargs={})
        program = export_program(_TensorOutputs(deployed, tuple(inputs.kwargs)), positional)
        names = inputs.names(deployed)
        torch.onnx.export(program, f=str(file), input_names=names, dynamo=True, verbose=False, external_data=False)
        return file

    def write_for_timing(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        file = folder / f"model{self.suffix}"
        return file if write_onnx(deployed, inputs.args, file) else self.write(deployed, inputs, folder)

    def load(self, file: Path, threads: int | None, exclusive: bool) -> Runner:
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        if threads:
            options.intra_op_num_threads = threads
        if not exclusive:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(*args: Any, **kwargs: Any) -> list[Tensor]:
            arrays = {name: to_array(x) for name, x in by_name(names, args, kwargs).items()}
            return [torch.as_tensor(y) for y in session.run(None, arrays)]

        return run


class _TensorOutputs(nn.Module):
    """A module with positional arguments only, of which the last are its `keywords`, and with tensors as outputs only.

    An ONNX file has no other outputs.
    """

    def __init__(self, module: nn.Module, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.keywords = module, keywords

    def forward(self, *args: Any) -> list[Tensor]:
        count = len(args) - len(self.keywords)
        return tensor_leaves(self.module(*args[:count], **dict(zip(self.keywords, args[count:], strict=True))))
