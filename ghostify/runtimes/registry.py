"""The protocol of a runtime, and the runtimes by name, by export format and by file.

A new runtime is a new file in this package and a row in `ROWS`; timing, export, the command line and the benchmarks
read this registry.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ghostify.arguments import a_choice
from ghostify.errors import GhostifyError
from ghostify.runtimes.aotinductor import AotInductor
from ghostify.runtimes.compiled import Compiled
from ghostify.runtimes.eager import Eager
from ghostify.runtimes.onnx_runtime import OnnxRuntime
from ghostify.runtimes.openvino import OpenVino
from ghostify.runtimes.tensors import ExportInputs, Runner


class Runtime(Protocol):
    """A way to write, load and run inference forms (see `deploy`)."""

    @property
    def name(self) -> str:
        """The name for users; part of the keys of measured latencies."""

    @property
    def package(self) -> str:
        """The distribution that runs the model; a stored latency is valid for one version of it."""

    @property
    def format(self) -> str:
        """The export format that it reads; if several runtimes share it, the first row verifies exported files."""

    @property
    def suffix(self) -> str:
        """The suffix of its files."""

    @property
    def is_in_process(self) -> bool:
        """Whether it is timed in this process on the device of the inputs, or in a worker process on the CPU."""

    @property
    def is_channels_last(self) -> bool:
        """Whether it is timed with images laid out N x H x W x C."""

    @property
    def loads_folders(self) -> bool:
        """Whether it also loads folders that `save` wrote."""

    @property
    def compiles_slowly(self) -> bool:
        """Whether compiling a single layer takes seconds, and a plan's candidates therefore hours."""

    def unsupported(self, example: Any, /) -> str | None:
        """The error, with its remedy, if it cannot run these inputs, or cannot run on this machine; None if it can."""

    def write(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        """Write an inference form for the sizes of `inputs`, but for a free batch size; returns the file."""

    def write_for_timing(self, deployed: nn.Module, inputs: ExportInputs, folder: Path) -> Path:
        """Write an inference form as fast as possible; the file may be limited to the sizes of `inputs`."""

    def load(self, file: Path, threads: int | None, exclusive: bool, /) -> Runner:
        """A function from the arguments of a forward to its output tensors that runs such a file on the CPU.

        With `exclusive=False`, for models that alternate in one process, its threads do not spin between calls.
        """


ROWS: tuple[Runtime, ...] = (
    Eager(),
    Compiled(),
    OnnxRuntime(),
    OpenVino(),
    AotInductor(),
)
RUNTIMES = {runtime.name: runtime for runtime in ROWS}
a_runtime = a_choice(RUNTIMES)
EXPORT_FORMATS = {name: next(r for r in ROWS if r.format == name) for name in dict.fromkeys(r.format for r in ROWS)}


def get_runtime(name: str) -> Runtime:
    """The runtime of this name, installed or not; raises `GhostifyError` for an unknown name."""
    return RUNTIMES[a_runtime("runtime", name)]


def require_runtime(name: str) -> Runtime:
    """The runtime of this name; raises `GhostifyError` unless it is installed and works on this machine."""
    runtime = get_runtime(name)
    installed_version(runtime)
    check_supported(runtime, None)
    return runtime


def check_supported(runtime: Runtime, example: Any) -> None:
    """Raise `GhostifyError` if the runtime cannot run these inputs, or with None if it cannot run on this machine."""
    if (reason := runtime.unsupported(example)) is not None:
        raise GhostifyError(f"runtime {runtime.name!r}: {reason}")


def installed_version(runtime: Runtime) -> str:
    """The version of the runtime's package; raises `GhostifyError` where it is missing."""
    try:
        return importlib.metadata.version(runtime.package)
    except importlib.metadata.PackageNotFoundError as error:
        missing = f"runtime {runtime.name!r}: needs {runtime.package}"
        raise GhostifyError(f"{missing}. Run pip install 'ghostify[export]'.") from error


def load_runner(
    path: str | Path, threads: int | None = None, *, runtime: str | None = None, exclusive: bool = True
) -> Runner:
    """A function from input tensors to output tensors that runs an exported file, or a folder that `save` wrote.

    The runtime is by default that of the file's suffix, and eager PyTorch for a folder; `exclusive` as in
    `Runtime.load`. Raises `GhostifyError` for a path that does not exist or that the runtime cannot load.
    """
    path = Path(path)
    selected = _runtime_of(path) if runtime is None else get_runtime(runtime)
    if path.is_dir() and not selected.loads_folders:
        raise GhostifyError(f"{path}: is a folder. Pass the {selected.suffix} file in it to runtime {selected.name!r}.")
    if not path.exists():
        raise GhostifyError(f"{path}: does not exist. Pass a file that `export` wrote, or a folder that `save` wrote.")
    return selected.load(path, threads, exclusive)


def _runtime_of(path: Path) -> Runtime:
    """The first runtime with the longest suffix that matches the file's name, or the first that loads folders."""
    matching = [r for r in ROWS if (r.loads_folders if path.is_dir() else path.name.endswith(r.suffix))]
    if not matching:
        suffixes = ", ".join(r.suffix for r in EXPORT_FORMATS.values())
        raise GhostifyError(f"{path}: is not an exported model. Pass a file that ends in {suffixes}.")
    return max(matching, key=lambda r: 0 if path.is_dir() else len(r.suffix))
