"""Versions, threads, devices, runtimes, extras and data on this machine, for `ghostify doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from ghostify.data.datasets import fashion_mnist_folder
from ghostify.errors import GhostifyError
from ghostify.io.checkpoint import versions
from ghostify.runtimes.registry import RUNTIMES, installed_version, require_runtime
from ghostify.timing.latency import cache_file, processor

EXTRAS = {
    "export": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "finetune": ("accelerate", "tensorboard"),
    "report": ("altair", "vl-convert-python"),
    "demo": ("scikit-learn",),
}


LABELS = {"pytorch_threads": "PyTorch threads", "fashion_mnist": "Fashion-MNIST"}


def collect_facts() -> dict[str, str | int]:
    """Facts by key, in words that name what is missing and how to install it."""
    facts: dict[str, str | int] = {"python": platform.python_version(), **versions()}
    facts["processor"] = f"{processor() or platform.machine()}, {os.cpu_count()} cores"
    facts["pytorch_threads"] = torch.get_num_threads()
    facts["accelerator"] = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "none"
    for runtime in RUNTIMES:
        facts[f"runtime_{runtime}"] = _runtime(runtime)
    for extra, packages in EXTRAS.items():
        facts[f"extra_{extra}"] = _extra(extra, packages)
    folder = fashion_mnist_folder()
    facts["fashion_mnist"] = "not on this machine" if folder is None else str(folder)
    facts["latency_cache"] = f"{cache_file()}, {'exists' if cache_file().exists() else 'not written yet'}"
    return facts


def _runtime(name: str) -> str:
    try:
        runtime = require_runtime(name)
        return f"{runtime.package} {installed_version(runtime)}"
    except GhostifyError as error:
        return str(error)


def _extra(extra: str, packages: tuple[str, ...]) -> str:
    installed = {package: _version(package) for package in packages}
    missing = [package for package, version in installed.items() if version is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install 'ghostify[{extra}]'"
    return ", ".join(f"{package} {version}" for package, version in installed.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
