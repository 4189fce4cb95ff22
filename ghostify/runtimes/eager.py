"""Eager PyTorch: in this process, operator by operator, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.io.checkpoint import load
from ghostify.runtimes.pytorch import export_program, module_runner
from ghostify.runtimes.tensors import ExportInputs, Runner


@dataclass(frozen=True)
class Eager:
    """The `Runtime` for eager PyTorch; its files are torch.export's, which PyTorch loads without ghostify."""

    name: str = "eager"
    package: str = "torch"
    format: str = "pt2"
    suffix: str = ".pt2"
    is_in_process: bool = True
    is_channels_last: bool = True
    loads_folders: bool = True
    compiles_slowly: bool = False

    def unsupported(self, _example: Any) -> str | None:
        return None

    def write(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        file = folder / f"model{self.suffix}"
        program = export_program(deployed, inputs)
        with file.open("wb") as stream:  # errors of the disk are OSError here
            torch.export.save(program, stream)
        return file

    def write_for_timing(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        return self.write(deployed, inputs, folder)

    def load(self, file: Path, threads: int | None, _exclusive: bool) -> Runner:
        return module_runner(load_module(file), threads)


def load_module(file: Path) -> nn.Module:
    """The module in a file of torch.export, or in a folder that `save` wrote."""
    return load(file).eval() if file.is_dir() else torch.export.load(file).module()
