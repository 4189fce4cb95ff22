"""OpenVINO on the CPU, in float32."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.runtimes.onnx_runtime import OnnxRuntime
from ghostify.runtimes.onnx_writer import write_onnx
from ghostify.runtimes.tensors import ExportInputs, Runner, by_name, to_array, unsupported_by_worker


@dataclass(frozen=True)
class OpenVino:
    """The `Runtime` for OpenVINO files, which reads ONNX files as well.

    `precision` is a hint; without it OpenVINO computes in bfloat16 where the processor supports that.
    """

    name: str = "openvino"
    package: str = "openvino"
    format: str = "openvino"
    suffix: str = ".xml"
    is_in_process: bool = False
    is_channels_last: bool = False
    loads_folders: bool = False
    compiles_slowly: bool = False
    precision: str = "f32"

    def unsupported(self, example: Any) -> str | None:
        return unsupported_by_worker(example)

    def write(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        file = folder / f"model{self.suffix}"
        onnx_file = OnnxRuntime().write(deployed, inputs, folder)
        openvino = importlib.import_module("openvino")
        openvino.save_model(openvino.convert_model(str(onnx_file)), str(file), compress_to_fp16=False)
        onnx_file.unlink()
        return file

    def write_for_timing(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        file = folder / "model.onnx"
        return file if write_onnx(deployed, inputs.args, file) else self.write(deployed, inputs, folder)

    def load(self, file: Path, threads: int | None, _exclusive: bool) -> Runner:
        core = importlib.import_module("openvino").Core()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.precision}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        compiled = core.compile_model(str(file), "CPU", options)

        names = [port.any_name for port in compiled.inputs]

        def run(*args: Any, **kwargs: Any) -> list[Tensor]:
            results = compiled({name: to_array(x) for name, x in by_name(names, args, kwargs).items()})
            return [torch.from_numpy(results[k].copy()) for k in range(len(compiled.outputs))]

        return run
