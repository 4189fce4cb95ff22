"""Shared parts of PyTorch's runtimes: torch.export's program, a module's runner, the search for a C++ compiler."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ghostify.graph.inputs import tensor_leaves
from ghostify.modules.hooks import has_hooks
from ghostify.runtimes.tensors import ExportInputs, Runner


@torch.no_grad()
def export_program(deployed: nn.Module, inputs: ExportInputs) -> ExportedProgram:
    """The inference form as torch.export's program; a free batch size is that of every tensor's first dimension.

    Without gradients, since a part of a forward that turns them off cannot be loaded from a file otherwise.
    """
    deployed = _WithHooks(deployed) if has_hooks(deployed) else deployed
    if not inputs.free_batch:
        return torch.export.export(deployed, inputs.args, inputs.kwargs, strict=False)
    batch, shapes = torch.export.Dim("batch", min=1), torch.export.ShapesCollection()
    inputs = inputs.doubled(single_only=True)  # a size of one would be a constant
    for tensor in tensor_leaves((inputs.args, inputs.kwargs)):
        shapes[tensor] = {0: batch} if tensor.dim() else {}
    return torch.export.export(deployed, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)


class _WithHooks(nn.Module):
    """Calls a module with its hooks, which torch.export leaves out where they are those of the exported module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        self.forward = forward


def module_runner(module: Callable[..., Any], threads: int | None) -> Runner:
    """A function that runs a module without gradients; sets the number of threads of this process."""
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        with torch.no_grad():
            return tensor_leaves(module(*args, **kwargs))

    return run


def missing_compiler() -> str | None:
    """The error, with its remedy, if Inductor finds no C++ compiler on this machine; None if it finds one."""
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:
        return f"finds no C++ compiler ({type(error).__name__}). Install one, such as g++, or name it in CXX."
    return None
