"""Attributes of a model other than its forward: the serializable ones are copied, the missing ones listed."""

from __future__ import annotations

import copy

from torch import fx, nn

from ghostify.graph.methods import set_attributes
from ghostify.graph.values import is_serializable
from ghostify.modules.hooks import has_hooks, has_state_dict_hooks

STANDARD = frozenset(dir(nn.Module)) | {"forward", "meta"}


def copy_attributes(traced: fx.GraphModule, model: nn.Module) -> None:
    """Give a traced module the model's serializable public attributes, such as `num_classes`, in place."""
    public = {k: v for k, v in vars(model).items() if not k.startswith("_") and k not in vars(traced)}
    values = {k: v for k, v in public.items() if k != "training" and not callable(v) and is_serializable(v)}
    set_attributes(traced, copy.deepcopy(values))


def missing_attributes(converted: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Names of the model's public methods and attributes that the converted module lacks, in alphabetical order."""
    names = {n for n in (*dir(type(model)), *vars(model)) if not n.startswith("_")} - STANDARD
    return tuple(sorted(n for n in names if not hasattr(converted, n)))


def missing_hooks(converted: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Names of the hooks of the model's modules and parameters that the converted module does not run."""
    present = dict(converted.named_modules())
    missing = []
    for path, module in model.named_modules():
        counterpart = present.get(path, nn.Module())
        for kind, has_kind in (("", has_hooks), ("state_dict ", has_state_dict_hooks)):
            if has_kind(module) and not has_kind(counterpart):
                missing.append(f"{kind}hooks of {path or 'the model'}")
    hooked = [n for n, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    return (*missing, *(f"hooks of {name}" for name in hooked))
