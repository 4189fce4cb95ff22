"""Copies of models: nothing in a copy refers to the original, not even functions that were set on its modules."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ghostify.errors import GhostifyError
from ghostify.graph.exported import as_traced_module, is_exported
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.paths import join_path
from ghostify.modules.hooks import HOOKS, STATE_DICT_HOOKS
from ghostify.text import first_line


def copy_model(model: nn.Module) -> nn.Module:
    """A copy of a model, without its wrappers (see `unwrapped_model`); of an exported program, a traced module.

    Raises `GhostifyError` for a model that cannot be copied or contains itself.
    """
    model = unwrapped_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise GhostifyError(
            f"{type(model).__name__}: the model is compiled by torch.jit, and its code cannot be changed. "
            f"Convert the model before it is compiled."
        )
    _check_acyclic(model, "", ())
    memo: dict[int, Any] = {}
    try:
        root = copy_module(model, memo)
    except Exception as error:
        raise GhostifyError(
            f"{type(model).__name__}: the model cannot be copied ({first_line(error)}). "
            "Make it work with copy.deepcopy."
        ) from error
    _rebind_functions(root, _Rebinding(memo))
    for path, module in list(root.named_modules()):
        plain = uncompiled(module)
        plain = as_traced_module(plain) if is_exported(plain) else plain
        if plain is module:
            continue
        if not path:
            return plain
        root.set_submodule(path, plain)
    return root


def copy_module(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; `memo` is that of `copy.deepcopy`.

    It copies tensors with a history of gradients, which deepcopy refuses, without it. Its parameters are leaves also
    where they are those of modules compiled by `torch.jit`.
    """
    memo = {} if memo is None else memo
    attributes = [v for m in module.modules() for v in tensor_leaves(list(vars(m).values()))]
    memo.update({id(v): v.detach().clone() for v in attributes if not v.is_leaf})
    with torch.no_grad():
        copied = copy.deepcopy(module, memo)
    for parameter, original in zip(copied.parameters(), module.parameters(), strict=True):
        if parameter.requires_grad != original.requires_grad:
            parameter.requires_grad_(original.requires_grad)
    return copied


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model in the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    inner = model.module if isinstance(model, DataParallel | DistributedDataParallel) else uncompiled(model)
    return model if inner is model else unwrapped_model(inner)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, where `module` is a result of it; else the module itself."""
    original = getattr(module, "_orig_mod", None) if type(module).__name__ == "OptimizedModule" else None
    return original if isinstance(original, nn.Module) else module


def _check_acyclic(module: nn.Module, path: str, ancestors: tuple[nn.Module, ...]) -> None:
    """Raise `GhostifyError` where a module contains itself, for which `eval()` and the like never return."""
    for name, child in module.named_children():
        if any(child is m for m in (*ancestors, module)):
            raise GhostifyError(
                f"{join_path(path, name)}: the module contains itself as a submodule. Keep that reference where "
                f"PyTorch does not register it as a submodule, such as in a list."
            )
        _check_acyclic(child, join_path(path, name), (*ancestors, module))


def _rebind_functions(root: nn.Module, rebinding: _Rebinding) -> None:
    """Let functions that are attributes or hooks of modules refer to the copies, in place: `deepcopy` keeps them."""
    for module in root.modules():
        hooks = [getattr(module, name, None) for name in (*HOOKS, *STATE_DICT_HOOKS)]
        for functions in (vars(module), *(h for h in hooks if isinstance(h, dict))):
            for name, value in list(functions.items()):
                if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
                    functions[name] = rebinding.rebound(value)


class _Rebinding:
    """Replaces the objects of a copied model in functions; `copies` are the copies by the originals' ids."""

    def __init__(self, copies: dict[int, Any]) -> None:
        self.copies = copies
        self.functions: dict[int, types.FunctionType] = {}

    def rebound(self, value: Any) -> Any:
        """The copy of an object, or a function that refers to copies; any other value itself."""
        if id(value) in self.copies and self.copies[id(value)] is not value:
            return self.copies[id(value)]
        if isinstance(value, types.MethodType):
            return types.MethodType(self.rebound(value.__func__), self.rebound(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {name: self.rebound(v) for name, v in value.keywords.items()}
            return functools.partial(self.rebound(value.func), *map(self.rebound, value.args), **keywords)
        return self._function(value) if isinstance(value, types.FunctionType) else value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self.functions:
            return self.functions[id(function)]
        self.functions[id(function)] = function  # for functions that refer to themselves
        cells = tuple(map(self._cell, function.__closure__ or ()))
        defaults = tuple(map(self.rebound, function.__defaults__ or ()))
        read = {n: function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__}
        changed_globals = {n: self.rebound(v) for n, v in read.items() if isinstance(v, nn.Module | types.MethodType)}
        changed_globals = {n: v for n, v in changed_globals.items() if v is not read[n]}
        is_same = all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)) and all(
            a is b for a, b in zip(defaults, function.__defaults__ or (), strict=True)
        )
        if is_same and not changed_globals:
            return function
        names = {**function.__globals__, **changed_globals} if changed_globals else function.__globals__
        rebound = types.FunctionType(function.__code__, names, function.__name__, defaults or None, cells)
        rebound.__kwdefaults__ = function.__kwdefaults__
        rebound.__dict__.update(function.__dict__)
        self.functions[id(function)] = rebound
        return rebound

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # empty
            return cell
        rebound = self.rebound(content)
        is_same = rebound is content or (
            isinstance(content, types.MethodType | functools.partial) and rebound == content
        )
        return cell if is_same else types.CellType(rebound)
