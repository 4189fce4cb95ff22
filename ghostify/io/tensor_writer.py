"""Tensors written as safetensors files."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; raises `OSError` where the disk refuses."""
    try:
        save_file({name: _with_own_storage(tensor) for name, tensor in tensors.items()}, file)
    except safetensors.SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in row-major order, the only one in its storage."""
    on_cpu = tensor.detach().cpu().contiguous()
    return on_cpu if on_cpu.untyped_storage().nbytes() == on_cpu.nbytes else on_cpu.clone()
