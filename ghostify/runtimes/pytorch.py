"""Shared parts of PyTorch's runtimes: torch.export's program, a module's runner, the search for a C++ compiler."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from ghostify.graph.inputs import tensor_leaves
from ghostify.runtimes.tensors import Runner, with_batch_of_two


def export_program(deployed: nn.Module, args: tuple[Any, ...]) -> ExportedProgram:
    """The inference form as torch.export's program; the batch size, every tensor's first dimension, stays free."""
    batch = torch.export.Dim("batch", min=1)
    free_batch = tree_map_only(Tensor, lambda t: {0: batch} if t.dim() else {}, args)
    return torch.export.export(deployed, with_batch_of_two(args), dynamic_shapes=free_batch, strict=False)


def module_runner(module: Callable[..., Any], threads: int | None) -> Runner:
    """A function that runs a module without gradients; sets the number of threads of this process."""
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tensor_leaves(module(*inputs))

    return run


def missing_compiler() -> str | None:
    """The error, with its remedy, if Inductor finds no C++ compiler on this machine; None if it finds one."""
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:
        return f"finds no C++ compiler ({type(error).__name__}). Install one, such as g++, or name it in CXX."
    return None
