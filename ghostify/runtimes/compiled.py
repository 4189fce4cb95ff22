"""torch.compile: the same files as eager PyTorch's, compiled when they are loaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.runtimes.eager import Eager, load_module
from ghostify.runtimes.pytorch import missing_compiler, module_runner
from ghostify.runtimes.tensors import ExportInputs, Runner, unsupported_by_worker


@dataclass(frozen=True)
class Compiled:
    """The `Runtime` for torch.compile; weights are frozen, so that Inductor packs them."""

    name: str = "compile"
    package: str = "torch"
    format: str = "pt2"
    suffix: str = ".pt2"
    is_in_process: bool = False
    is_channels_last: bool = True
    loads_folders: bool = True
    compiles_slowly: bool = True

    def unsupported(self, example: Any) -> str | None:
        return unsupported_by_worker(example) or missing_compiler()

    def write(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        return Eager().write(deployed, inputs, folder)

    def write_for_timing(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        return self.write(deployed, inputs, folder)

    def load(self, file: Path, threads: int | None, _exclusive: bool) -> Runner:
        setattr(importlib.import_module("torch._inductor.config"), "freezing", True)  # noqa: B010
        return module_runner(torch.compile(load_module(file)), threads)
