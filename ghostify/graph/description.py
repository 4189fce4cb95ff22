"""The description of a saved module as typed data: what a folder claims is checked before anything is built from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ghostify.errors import GhostifyError
from ghostify.graph.allowed_ops import check_method_name
from ghostify.graph.methods import RESULT, Mark
from ghostify.graph.paths import join_path
from ghostify.graph.tensor_facts import TensorFacts, parse_facts
from ghostify.graph.values import NOT_SAVED, is_identifier, names_in, tensor_keys

OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
UNQUOTABLE = frozenset('"\\')
PARAMETER_KINDS = {
    "": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "*": inspect.Parameter.VAR_POSITIONAL,
    "**": inspect.Parameter.VAR_KEYWORD,
}


@dataclass(frozen=True)
class NodeDescription:
    """A node whose names are checked, and whose arguments are still JSON data."""

    name: str
    op: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class ModuleDescription:
    """A module: of the class `import_name`, or traced, with `nodes` and a class name."""

    training: bool
    parameters: Mapping[str, TensorFacts | None]
    buffers: Mapping[str, TensorFacts | None]
    attributes: Mapping[str, Any]
    import_name: str | None
    class_name: str | None
    nodes: tuple[NodeDescription, ...] | None


@dataclass(frozen=True)
class ModelDescription:
    """All modules by path, a module before those in it; an earlier path stands for the module that has it too.

    `aliases` are paths of tensors that have an earlier path.
    """

    modules: Mapping[str, ModuleDescription | str]
    aliases: Mapping[str, str]

    def first(self, path: str) -> str:
        """The first path of the module at a path."""
        item = self.modules[path]
        return item if isinstance(item, str) else path

    def module(self, path: str) -> ModuleDescription:
        """The module at a path."""
        item = self.modules[self.first(path)]
        assert isinstance(item, ModuleDescription)
        return item

    def distinct(self) -> Iterator[tuple[str, ModuleDescription]]:
        """Each module under its first path."""
        for path, item in self.modules.items():
            if not isinstance(item, str):
                yield path, item

    def tensors(self) -> dict[str, TensorFacts]:
        """The stored tensors by key: parameters and buffers under their first paths, and those of plain attributes."""
        tensors: dict[str, TensorFacts] = {}
        for path, item in self.distinct():
            for name, facts in (*item.parameters.items(), *item.buffers.items()):
                key = join_path(path, name)
                if facts is not None and key not in self.aliases:
                    tensors[key] = facts
            tensors |= dict.fromkeys(tensor_keys(list(item.attributes.values())), TensorFacts())
        return tensors

    def names(self) -> Iterator[str]:
        """The names of all classes and functions."""
        for _, item in self.distinct():
            if item.import_name is not None:
                yield item.import_name
            yield from names_in(dict(item.attributes))
            for node in item.nodes or ():
                if node.op == "call_function":
                    yield node.target
                yield from names_in([node.args, node.kwargs])


def parse_description(data: object) -> ModelDescription:
    """The description in JSON data; raises `GhostifyError` for data that does not describe a module."""
    model = _mapping(data, "the model")
    items = _mapping(model.get("modules"), "the model's modules")
    if "" not in items or next(iter(items)) != "":
        raise GhostifyError("the model: has no outermost module")
    modules: dict[str, ModuleDescription | str] = {}
    open_paths: list[str] = []
    for path, item in items.items():
        while open_paths and not _is_within(path, open_paths[-1]):
            open_paths.pop()
        owner, _, name = path.rpartition(".")
        if path and (not open_paths or open_paths[-1] != owner or not _is_path_part(name)):
            raise GhostifyError(f"module {path[:80]!r}: is not within a module before it")
        open_paths.append(path)
        modules[path] = _parse_module(path, _mapping(item, f"module {path!r}"), modules)
    _check_shared(modules)
    aliases = _mapping(model.get("aliases"), "the model's aliases")
    if not all(isinstance(path, str) for path in aliases.values()):
        raise GhostifyError("the model's aliases: are not paths")
    return ModelDescription(modules, aliases)


def _parse_module(
    path: str, item: dict[str, Any], earlier: Mapping[str, ModuleDescription | str]
) -> ModuleDescription | str:
    where = f"module {path!r}"
    if "same" in item:
        first = item["same"]
        if not isinstance(first, str) or isinstance(earlier.get(first), str | None) or _is_within(path, first):
            raise GhostifyError(f"{where}: is the same as {first!r}, which is not a module before it")
        return first
    nodes = None
    if "nodes" in item:
        nodes = _parse_nodes(item["nodes"], where)
        if not is_identifier(item.get("class_name")):
            raise GhostifyError(f"{where}: has no valid class name")
    elif not isinstance(item.get("class"), str):
        raise GhostifyError(f"{where}: has neither a class nor nodes")
    if not isinstance(item.get("training"), bool):
        raise GhostifyError(f"{where}: has no mode")
    attributes = _mapping(item.get("attributes", {}), f"{where}: its attributes")
    parameters = _parse_tensors(item.get("parameters"), f"{where}: its parameters")
    buffers = _parse_tensors(item.get("buffers"), f"{where}: its buffers")
    if len({*attributes, *parameters, *buffers}) < len(attributes) + len(parameters) + len(buffers):
        raise GhostifyError(f"{where}: has two values of one name")
    return ModuleDescription(
        item["training"], parameters, buffers, attributes, item.get("class"), item.get("class_name"), nodes
    )


def _parse_tensors(items: object, where: str) -> dict[str, TensorFacts | None]:
    tensors: dict[str, TensorFacts | None] = {}
    for name, facts in _mapping(items, where).items():
        if not _is_path_part(name):
            raise GhostifyError(f"{where}: {name[:80]!r} is not a name")
        if facts is None:
            tensors[name] = None
            continue
        tensors[name] = parse_facts(_mapping(facts, f"{where}: {name}"), f"{where}: {name}")
    return tensors


def _check_shared(modules: Mapping[str, ModuleDescription | str]) -> None:
    """Raise `GhostifyError` where a module's second path does not hold again what lies within its first."""
    inner: dict[str, list[str]] = {path: [] for path in modules}
    for path in modules:
        if path:
            inner[path.rpartition(".")[0]].append(path)
    for path, first in modules.items():
        if isinstance(first, str):
            names = [p.rpartition(".")[2] for p in inner[path]]
            first_names = [p.rpartition(".")[2] for p in inner[first]]
            same = [modules[p] for p in inner[path]]
            expected = [p if not isinstance(target := modules[p], str) else target for p in inner[first]]
            if names != first_names or same != expected:
                raise GhostifyError(f"module {path!r}: differs from {first!r}, which it is the same as")


def _parse_nodes(items: object, where: str) -> tuple[NodeDescription, ...]:
    if not isinstance(items, list) or not items:
        raise GhostifyError(f"{where}: has no nodes")
    nodes = tuple(_parse_node(_mapping(item, f"{where}: a node")) for item in items)
    if len({node.name for node in nodes}) < len(nodes):
        raise GhostifyError(f"{where}: has two nodes of one name")
    outputs = [node for node in nodes if node.op == "output"]
    if outputs != [nodes[-1]] or len(outputs[0].args) != 1 or outputs[0].kwargs:
        raise GhostifyError(f"{where}: does not end in one output")
    _check_signature([node for node in nodes if node.op == "placeholder"], where)
    return nodes


def _parse_node(item: dict[str, Any]) -> NodeDescription:
    name, op, target, args = (item.get(key) for key in ("name", "op", "target", "args"))
    if not isinstance(name, str) or not is_identifier(name):
        raise GhostifyError(f"node {str(name)[:80]!r}: its name is not a name")
    where = f"node {name}"
    if op not in OPS or not isinstance(target, str):
        raise GhostifyError(f"{where}: is not an operation")
    if not isinstance(args, list):
        raise GhostifyError(f"{where}: has no arguments")
    kwargs = _mapping(item.get("kwargs"), f"{where}: its keyword arguments")
    if not all(map(is_identifier, kwargs)):
        raise GhostifyError(f"{where}: has a keyword that is not a name")
    if op in ("call_module", "get_attr") and not all(map(_is_target_part, target.split("."))):
        raise GhostifyError(f"{where}: {target[:80]!r} is not a path in the model")
    if op == "call_method":
        check_method_name(target)
        if not (args and isinstance(args[0], dict) and "node" in args[0]):
            raise GhostifyError(f"{where}: calls a method of what is not a node")
    if (op == "get_attr" and args) or (op in ("placeholder", "get_attr") and kwargs):
        raise GhostifyError(f"{where}: has arguments, which a node of its kind does not take")
    marks = item.get("marks", [])
    if not isinstance(marks, list):
        raise GhostifyError(f"{where}: has marks that are not a list")
    return NodeDescription(name, op, target, args, kwargs, tuple(map(_parse_mark, marks)))


def _check_signature(placeholders: list[NodeDescription], where: str) -> None:
    """Raise `GhostifyError` where the inputs are not the parameters of a function."""
    parameters: list[inspect.Parameter] = []
    try:
        for node in placeholders:
            name = node.target.lstrip("*")
            kind = PARAMETER_KINDS[node.target.removesuffix(name)]
            if not is_identifier(name) or name == "self" or len(node.args) > (not node.target.startswith("*")):
                raise ValueError(f"{name[:80]!r} is not a parameter")
            is_after_star = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
            is_keyword = is_after_star and kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            default = node.args[0] if node.args else inspect.Parameter.empty
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY if is_keyword else kind, default=default)
            )
        inspect.Signature(parameters)
    except (KeyError, ValueError) as error:
        raise GhostifyError(f"{where}: its inputs are not those of a function ({error})") from error


def _parse_mark(pair: object) -> Mark:
    """A stored mark, whose names are valid names of a method and of its parameter."""
    if isinstance(pair, list) and len(pair) == 2:
        method, parameter = pair
        is_method = is_identifier(method) and not method.startswith("_") and not hasattr(fx.GraphModule, method)
        is_parameter = parameter == RESULT or (is_identifier(parameter) and parameter != "self")
        if is_method and is_parameter:
            return Mark(method, parameter)
    raise GhostifyError(f"method {str(pair)[:80]!r}: is not allowed in a saved model")


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GhostifyError(f"{where}: is missing or not an object")
    return value


def _is_within(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")


def _is_path_part(name: str) -> bool:
    return (
        name.isprintable() and name != "" and "." not in name and name not in NOT_SAVED and not set(name) & UNQUOTABLE
    )


def _is_target_part(name: str) -> bool:
    """Whether generated code can name a part of a path: as an attribute, else as text in double quotes."""
    is_quotable = bool(name) and name.isprintable() and not set(name) & UNQUOTABLE
    return is_identifier(name) or (is_quotable and not name.isidentifier())
