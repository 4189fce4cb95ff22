"""The protocol of a runtime, and the runtimes by name, by export format and by file.

To add one, write a file beside this one and a row in `ROWS`; timing, export, the command and the benchmarks ask here.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ghostify.errors import GhostifyError
from ghostify.runtimes.aotinductor import AotInductor
from ghostify.runtimes.compiled import Compiled
from ghostify.runtimes.eager import Eager
from ghostify.runtimes.onnx_runtime import OnnxRuntime
from ghostify.runtimes.openvino import OpenVino
from ghostify.runtimes.tensors import Runner


class Runtime(Protocol):
    """One way to run an inference form (see `deploy`), and all that the rest of the program asks of it."""

    @property
    def name(self) -> str:
        """What users type; part of the keys of measured latencies."""

    @property
    def package(self) -> str:
        """The distribution that runs the model; its version decides whether a measured latency still holds."""

    @property
    def format(self) -> str:
        """The export format that it reads. Of several runtimes that share one, the first row verifies its files."""

    @property
    def suffix(self) -> str:
        """How the names of its files end."""

    @property
    def is_in_process(self) -> bool:
        """Whether it is timed in this process, on the device of the inputs; otherwise in a worker, on the CPU."""

    @property
    def is_channels_last(self) -> bool:
        """Whether it is timed on images laid out N x H x W x C."""

    @property
    def loads_folders(self) -> bool:
        """Whether it runs a folder that `save` wrote, too."""

    @property
    def compiles_slowly(self) -> bool:
        """Whether even a single layer takes seconds of compilation, and a plan's candidates thus hours."""

    def unsupported(self, example: Any, /) -> str | None:
        """What it cannot do with these inputs, and the remedy; with None, what it cannot do on this machine."""

    def write(self, deployed: nn.Module, args: tuple[Any, ...], folder: Path) -> Path:
        """Write an inference form, the size of a batch free, the other sizes those of `args`; returns the file."""

    def write_for_timing(self, deployed: nn.Module, args: tuple[Any, ...], folder: Path) -> Path:
        """Write it as fast as possible; the file may accept no other sizes than those of `args`."""

    def load(self, file: Path, threads: int | None, exclusive: bool, /) -> Runner:
        """A function that runs such a file on the CPU, tensors in, tensors out.

        Where it is not `exclusive`, but alternates with other models in one process, its threads do not wait for the
        next call at the others' cost.
        """


ROWS: tuple[Runtime, ...] = (
    Eager(),
    Compiled(),
    OnnxRuntime(),
    OpenVino(),
    AotInductor(),
)
RUNTIMES = {runtime.name: runtime for runtime in ROWS}
EXPORT_FORMATS = {name: next(r for r in ROWS if r.format == name) for name in dict.fromkeys(r.format for r in ROWS)}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name, installed or not."""
    if name not in RUNTIMES:
        raise GhostifyError(f"runtime {name!r}: is unknown. Use {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


def require_runtime(name: str) -> Runtime:
    """The runtime of that name, which is installed and works on this machine; raises `GhostifyError` otherwise."""
    runtime = get_runtime(name)
    installed_version(runtime)
    check_supported(runtime, None)
    return runtime


def check_supported(runtime: Runtime, example: Any) -> None:
    """Raise `GhostifyError` for what the runtime cannot do with these inputs."""
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
    """A function that runs an exported file, or a folder that `save` wrote, in a runtime: tensors in, tensors out.

    The runtime is by default the file's own, and eager PyTorch for a folder; see `Runtime.load` for `exclusive`.
    """
    path = Path(path)
    chosen = _runtime_of(path) if runtime is None else get_runtime(runtime)
    if path.is_dir() and not chosen.loads_folders:
        raise GhostifyError(f"{path}: is a folder. Pass the {chosen.suffix} file in it to runtime {chosen.name!r}.")
    if not path.exists():
        raise GhostifyError(f"{path}: does not exist. Pass a file that `export` wrote, or a folder that `save` wrote.")
    return chosen.load(path, threads, exclusive)


def _runtime_of(path: Path) -> Runtime:
    """The first runtime with the longest suffix that the name has."""
    matching = [r for r in ROWS if (r.loads_folders if path.is_dir() else path.name.endswith(r.suffix))]
    if not matching:
        suffixes = ", ".join(r.suffix for r in EXPORT_FORMATS.values())
        raise GhostifyError(f"{path}: is not an exported model. Pass a file that ends in {suffixes}.")
    return max(matching, key=lambda r: 0 if path.is_dir() else len(r.suffix))
