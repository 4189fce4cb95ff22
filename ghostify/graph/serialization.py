"""Traced modules as JSON data and tensors: graphs, classes and attributes of leaves, no code, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.methods import PRESERVED_KEY, method_marks
from ghostify.graph.paths import join_path
from ghostify.graph.tensor_facts import facts_of
from ghostify.graph.values import NOT_SAVED, encode, is_attribute, saved_name
from ghostify.modules.hooks import has_hooks

DERIVED = ("_flat_weights", "_flat_weight_refs")  # recurrent layers compute these from their parameters


def serialize_module(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The module as JSON data, and its tensors by path.

    Raises `GhostifyError` for a module with hooks and for attributes that JSON cannot express.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    first_paths: dict[int, str] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        if id(inner) in first_paths:
            modules[path] = {"same": first_paths[id(inner)]}
            continue
        first_paths[id(inner)] = path
        modules[path] = _serialize_one(path, inner, tensors)
    aliases = _aliases(module)
    return {"modules": modules, "aliases": aliases}, {k: v for k, v in tensors.items() if k not in aliases}


def _serialize_one(path: str, inner: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if has_hooks(inner):
        raise GhostifyError(f"{path or 'the model'}: has hooks, which cannot be saved. Remove them first.")
    item: dict[str, Any] = {"training": inner.training, "parameters": {}, "buffers": {}}
    for name, parameter in inner._parameters.items():
        item["parameters"][name] = None if parameter is None else facts_of(parameter)
        if parameter is not None:
            tensors[join_path(path, name)] = parameter
    for name, buffer in inner._buffers.items():
        persistent = name not in inner._non_persistent_buffers_set
        item["buffers"][name] = None if buffer is None else {**facts_of(buffer), "persistent": persistent}
        if buffer is not None:
            tensors[join_path(path, name)] = buffer
    if isinstance(inner, fx.GraphModule):
        item["class_name"] = type(inner).__name__
        item["nodes"] = [_serialize_node(n) for n in inner.graph.nodes]
        item["attributes"] = _serialize_attributes(path, inner, inner.meta.get(PRESERVED_KEY, {}), tensors)
        return item
    item["class"] = saved_name(type(inner), f"{path}: its class")
    item["attributes"] = _serialize_attributes(path, inner, inner.__dict__, tensors)
    return item


def _serialize_attributes(
    path: str, inner: nn.Module, values: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The attributes as JSON data, without those that `nn.Module` makes itself."""
    derived = DERIVED if isinstance(inner, nn.RNNBase) else ()
    attributes = {
        key: encode(value, join_path(path, key), tensors)
        for key, value in values.items()
        if key not in NOT_SAVED and key not in derived
    }
    cls = fx.GraphModule if isinstance(inner, fx.GraphModule) else type(inner)
    for key, value in attributes.items():
        if not is_attribute(cls, key, value):
            raise GhostifyError(
                f"{join_path(path, key)}: replaces a method of its class, which cannot be saved. "
                f"Define the method in a class of its own."
            )
    return attributes


def _serialize_node(node: fx.Node) -> dict[str, Any]:
    where = f"node {node.name}"
    target = saved_name(node.target, where) if node.op == "call_function" else node.target
    marks = sorted(method_marks(node))
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [encode(a, where) for a in node.args],
        "kwargs": {k: encode(v, where) for k, v in node.kwargs.items()},
        **({"marks": [list(m) for m in marks]} if marks else {}),
    }


def _aliases(module: nn.Module) -> dict[str, str]:
    """Paths of tensors that have an earlier path too, with that path."""
    first_paths: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for path, tensor in named:
        if first_paths.setdefault(id(tensor), path) != path:
            aliases[path] = first_paths[id(tensor)]
    return aliases
