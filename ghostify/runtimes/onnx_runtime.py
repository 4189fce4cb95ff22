"""ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.runtimes.onnx_writer import write_onnx
from ghostify.runtimes.pytorch import export_program
from ghostify.runtimes.tensors import Runner, unsupported_by_worker

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

    def write(self, deployed: nn.Module, args: tuple[Any, ...], folder: Path) -> Path:
        importlib.import_module("onnxscript")
        file = folder / f"model{self.suffix}"
        program = export_program(deployed, args)
        torch.onnx.export(program, f=str(file), dynamo=True, verbose=False, external_data=False)
        return file

    def write_for_timing(self, deployed: nn.Module, args: tuple[Any, ...], folder: Path) -> Path:
        file = folder / f"model{self.suffix}"
        return file if write_onnx(deployed, args, file) else self.write(deployed, args, folder)

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

        def run(*inputs: Tensor) -> list[Tensor]:
            arrays = [x.contiguous().numpy() for x in inputs]
            return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, arrays, strict=True)))]

        return run
