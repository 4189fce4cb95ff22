"""Calls, parameter reads and mode reads of a model's modules passed to a tracer, without a change of any class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Interceptor(Protocol):
    """What decides on the calls, attribute reads and mode reads of intercepted modules."""

    def intercept_call(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a call; `call` runs the module's own."""

    def intercept_attribute(self, value: Any) -> Any:
        """What the read of a parameter, buffer or submodule returns."""

    def intercept_mode(self, module: nn.Module) -> Any:
        """What the read of `module.training` returns."""


@contextlib.contextmanager
def intercepted(root: nn.Module, interceptor: Interceptor) -> Iterator[None]:
    """While active, every module of `root` is of a subclass of its class that asks `interceptor`.

    Other models, also of the same classes, in this thread and in others, are not affected. Modules compiled by
    `torch.jit` cannot change their class: stand-ins take their places until the caller restores the submodules.
    """
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    _replace_scripted(root)
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in root.modules():
            own_class = type(module)
            if own_class not in classes:
                classes[own_class] = _subclass(own_class, interceptor)
            _set_class(module, classes[own_class])
            changed.append((module, own_class))
        yield
    finally:
        for module, own_class in changed:
            _set_class(module, own_class)


class ScriptedStandIn(nn.Module):
    """Takes the place of a module compiled by `torch.jit` while its parents are traced."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.training = scripted.training
        self.__dict__["scripted"] = scripted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scripted"], name)


class _Intercepted:
    """Overrides that ask the interceptor of the class; without slots, as `nn.Module`, so that classes can change."""

    _interceptor: Interceptor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not run what the intercepted class does for its subclasses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        has_own_call = getattr(super().__call__, "__func__", None) is not nn.Module.__call__  # type: ignore[misc]
        call = super().__call__ if has_own_call else self.forward  # type: ignore[misc]
        return self._interceptor.intercept_call(self, call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._interceptor.intercept_attribute(super().__getattr__(name))  # type: ignore[misc]

    @property
    def training(self) -> Any:
        assert isinstance(self, nn.Module)
        return self._interceptor.intercept_mode(self)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode


def _subclass(own_class: type[nn.Module], interceptor: Interceptor) -> type[nn.Module]:
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(own_class, name) for name in names} | {"__slots__": (), "_interceptor": interceptor}
    subclass: type[nn.Module] = type.__new__(type(own_class), own_class.__name__, (_Intercepted, own_class), namespace)
    return subclass


def _set_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", new_class)  # not by the class's own `__setattr__`


def _replace_scripted(root: nn.Module) -> None:
    for parent in list(root.modules()):
        if isinstance(parent, torch.jit.ScriptModule):
            continue
        for name, child in list(parent._modules.items()):
            if isinstance(child, torch.jit.ScriptModule):
                parent._modules[name] = ScriptedStandIn(child)
