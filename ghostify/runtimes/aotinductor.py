"""AOTInductor: compiled ahead of time by Inductor and the C++ compiler, to a file for this kind of processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ghostify.runtimes.pytorch import export_program, missing_compiler, module_runner
from ghostify.runtimes.tensors import ExportInputs, Runner, to_channels_last, unsupported_by_worker

LAYOUT_KEY, CHANNELS_LAST, CONTIGUOUS = "ghostify_images", "channels_last", "contiguous"


@dataclass(frozen=True)
class AotInductor:
    """The `Runtime` for AOTInductor's packages.

    A file reads images in the memory format that it was compiled for, without a check; the format is stored in the
    file, and `load` converts inputs to it.
    """

    name: str = "aotinductor"
    package: str = "torch"
    format: str = "aotinductor"
    suffix: str = ".aoti.pt2"
    is_in_process: bool = False
    is_channels_last: bool = True
    loads_folders: bool = False
    compiles_slowly: bool = True

    def unsupported(self, example: Any) -> str | None:
        return unsupported_by_worker(example) or missing_compiler()

    def write(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        return _compile(deployed, _converted(inputs, _contiguous), folder / f"model{self.suffix}", CONTIGUOUS)

    def write_for_timing(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        return _compile(deployed, _converted(inputs, to_channels_last), folder / f"model{self.suffix}", CHANNELS_LAST)

    def load(self, file: Path, threads: int | None, _exclusive: bool) -> Runner:
        package = torch._inductor.aoti_load_package(str(file))
        convert = to_channels_last if package.get_metadata().get(LAYOUT_KEY) == CHANNELS_LAST else _contiguous
        run = module_runner(package, threads)
        return lambda *args, **kwargs: run(*convert(args), **convert(kwargs))


def _compile(deployed: nn.Module, inputs: ExportInputs, file: Path, layout: str) -> Path:
    """Compile for inputs in the memory format of `inputs`; the number of threads stays free."""
    settings = {"freezing": True, "cpp.dynamic_threads": True, "aot_inductor.metadata": {LAYOUT_KEY: layout}}
    with torch.no_grad():
        program = export_program(deployed, inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)
    return file


def _converted(inputs: ExportInputs, convert: Callable[[Any], Any]) -> ExportInputs:
    return replace(inputs, args=convert(inputs.args), kwargs=convert(inputs.kwargs))


def _contiguous(values: Any) -> Any:
    """The same values, tensors in contiguous memory format."""
    return tree_map_only(Tensor, Tensor.contiguous, values)
