"""Arguments of public functions: a check for each kind, and the decorator that applies them.

A check takes the name of an argument and its value. It returns the value, numbers of NumPy as Python's, or raises
`GhostifyError`.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ghostify.errors import GhostifyError
from ghostify.neutral_context import neutral_context
from ghostify.numerics import RUNNING_STATISTICS, first_not_finite
from ghostify.text import first_line, format_value

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], Any]

MODEL_REMEDY = "Pass a torch.nn.Module with its weights, such as timm.create_model(name)."
MAX_SEED = 2**64 - 1


def public(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of a public function: checks its arguments, each by `checks`, and runs it in `neutral_context`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        assert set(checks) == set(signature.parameters), function.__name__

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            with neutral_context():
                for name, value in bound.arguments.items():
                    bound.arguments[name] = checks[name](name, value)
                return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def anything(_name: str, value: Any) -> Any:
    """A value that is checked where it is used."""
    return value


def optional(check: Check) -> Check:
    """None, or what `check` accepts."""
    return lambda name, value: None if value is None else check(name, value)


def instance_of(kinds: type | tuple[type, ...], remedy: str) -> Check:
    """An instance of a class."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, kinds):
            return value
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise GhostifyError(f"{name}: is {format_value(value)}, not a {names}. {remedy}")

    return check


def a_flag(name: str, value: Any) -> bool:
    """True or False."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise GhostifyError(f"{name} {format_value(value)}: is not a boolean. Use true or false.")


def a_number(
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    problem: str = "is not a number",
    remedy: str = "Pass one.",
) -> Check:
    """A finite number from `minimum` to `maximum`; with `above` and `below`, strictly between them."""

    def check(name: str, value: Any) -> Any:
        number = _plain_number(value)
        excluded = ([minimum] if above else []) + ([maximum] if below else [])
        if number is not None and math.isfinite(number) and minimum <= number <= maximum and number not in excluded:
            return number
        raise GhostifyError(f"{name} {format_value(value)}: {problem}. {remedy}")

    return check


def an_integer(
    minimum: int, maximum: int = 2**63 - 1, *, problem: str = "", remedy: str = "Pass one."
) -> Callable[[str, Any], int]:
    """An integer from `minimum` to `maximum`."""
    problem = problem or f"is not an integer of at least {minimum}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool) and minimum <= int(value) <= maximum:
            return int(value)
        raise GhostifyError(f"{name} {format_value(value)}: {problem}. {remedy}")

    return check


a_seed = an_integer(0, MAX_SEED, problem="is not an integer from 0 to 2**64 - 1", remedy="Pass one, such as 0.")


def a_choice(choices: Iterable[str], remedy: str | None = None) -> Check:
    """One of several names."""
    names = tuple(choices)
    remedy = remedy or f"Use {', '.join(names)}."

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        raise GhostifyError(f"{name} {format_value(value)}: is unknown. {remedy}")

    return check


def a_text(name: str, value: Any) -> str:
    """Text."""
    if isinstance(value, str):
        return value
    raise GhostifyError(f"{name}: is {format_value(value)}, not text. Pass a string.")


def a_path(name: str, value: Any) -> Any:
    """The path of a file or folder, as text or `Path`."""
    text = os.fspath(value) if isinstance(value, str | Path) else None
    if text is None:
        raise GhostifyError(f"{name}: is {format_value(value)}, not a path. Pass text or a pathlib.Path.")
    if not text or "\0" in text:
        raise GhostifyError(f"{name} {format_value(text)}: is not a path. Pass that of a file or folder.")
    return value


def a_function(*parameters: str) -> Check:
    """A function that can be called with values for `parameters`."""
    call = f"function of ({', '.join(parameters)})"

    def check(name: str, value: Any) -> Any:
        if not callable(value) or isinstance(value, type | nn.Module):
            raise GhostifyError(f"{name}: is {format_value(value)}, not a function. Pass a {call}.")
        try:
            inspect.signature(value).bind(*parameters)
        except ValueError:  # a built-in function without a signature
            return value
        except TypeError as error:
            raise GhostifyError(f"{name}: does not take ({', '.join(parameters)}). Pass a {call}.") from error
        return value

    return check


def a_mapping(remedy: str) -> Check:
    """A mapping with text as keys."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return value
        raise GhostifyError(f"{name}: is {format_value(value)}, not a mapping of names. {remedy}")

    return check


def a_sequence(check_item: Check, remedy: str) -> Check:
    """A list, tuple or other sized collection, with a check for its items; text is none."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise GhostifyError(f"{name}: is {format_value(value)}, not a list. {remedy}")
        return type(value)(check_item(f"{name}[{k}]", item) for k, item in enumerate(value))

    return check


def some_names(name: str, value: Any) -> tuple[str, ...]:
    """Several texts."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise GhostifyError(f"{name}: is {format_value(value)}, not a list of names. Pass one, such as ['package'].")
    return tuple(a_text(f"{name}: an item", item) for item in value)


def a_module(name: str, value: Any) -> nn.Module:
    """A module, whatever its weights."""
    if isinstance(value, nn.Module):
        return value
    raise GhostifyError(f"{name}: is {format_value(value)}, not a model. {MODEL_REMEDY}")


def a_model(name: str, value: Any) -> nn.Module:
    """A module whose weights hold data and are finite, the statistics of its norms too."""
    model = a_module(name, value)
    for path, tensor in _weights(model):
        if tensor.is_meta:
            raise GhostifyError(
                f"{name}: its weights are not there: {path} is on the meta device. Load the weights first."
            )
    weights = dict(_weights(model))
    damaged = first_not_finite({k: v.detach() for k, v in weights.items() if v.layout == torch.strided}, set(weights))
    if damaged is not None:
        raise GhostifyError(f"{damaged}: holds NaN or infinity. Load other weights.")
    for path, tensor in weights.items():
        if path.endswith("running_var") and bool((tensor < 0).any()):
            raise GhostifyError(f"{path}: has negative values, which no variance has. Load other weights.")
    return model


def a_device(name: str, value: Any) -> Any:
    """A device of this machine, or its name."""
    try:
        if isinstance(value, str | torch.device) and not torch.empty(0, device=value).is_meta:
            return value
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GhostifyError(f"{name} {str(value)!r:.60}: cannot be used ({first_line(error)}). Use cpu.") from error
    raise GhostifyError(f"{name} {format_value(value)}: is not a device that holds data. Use cpu.")


def call_function(name: str, function: Callable[..., R], *args: Any) -> R:
    """The result of a function that the caller passed as `name`; its failure as `GhostifyError`."""
    try:
        return function(*args)
    except GhostifyError:
        raise
    except Exception as error:
        raise GhostifyError(
            f"{name}: the function failed ({type(error).__name__}: {first_line(error)}). Correct it."
        ) from error


def _plain_number(value: Any) -> int | float | None:
    """A real number as Python's; None for anything else, and for integers beyond the range of floats."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return int(value) if isinstance(value, numbers.Integral) else as_float


def _weights(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The parameters of a model by path, and the running statistics of its norms; lazy ones are left out."""
    statistics = [
        (f"{path}.{name}".lstrip("."), getattr(module, name))
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name in RUNNING_STATISTICS
    ]
    for path, tensor in (*model.named_parameters(), *statistics):
        if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
            yield path, tensor
