"""Modules from the description and tensors that `serialize_module` returned: no code, no pickle, listed names only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.allowed_ops import (
    ANY_TEXT,
    CALLERS,
    CLASS_ATTRIBUTES,
    DEVICE_TYPES,
    READABLE_ATTRIBUTES,
    AllowedNames,
    is_mode_text,
)
from ghostify.graph.description import (
    ModelDescription,
    ModuleDescription,
    NodeDescription,
    parse_description,
)
from ghostify.graph.layer_checks import check_layer
from ghostify.graph.methods import TracedModule, mark_method, set_attributes
from ghostify.graph.paths import join_path
from ghostify.graph.tensor_facts import TensorFacts
from ghostify.graph.values import (
    ARGUMENT_KINDS,
    ATTRIBUTE_KINDS,
    CUSTOM_ARGUMENT_KINDS,
    ValueReader,
    inner_texts,
    is_attribute,
    tensor_keys,
)
from ghostify.imports import import_name


def deserialize_module(data: object, tensors: Mapping[str, Tensor], allow: Iterable[str] = ()) -> nn.Module:
    """The module that `serialize_module` serialized.

    Classes and functions are those of the list in `allowed_ops`, and those that `allow` names. Raises `GhostifyError`
    for any other name, before anything is imported, and for data that does not describe a module.
    """
    names = AllowedNames(allow)
    description = parse_description(data)
    names.check(description.names())
    return _Builder(description, tensors, names).build()


def names_to_allow(data: object, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names that `deserialize_module` needs in `allow` for what `serialize_module` returned.

    Raises `GhostifyError` for data that it refuses although these names are allowed. Builds the module without memory
    for its tensors.
    """
    custom = [name for name in dict.fromkeys(parse_description(data).names()) if not AllowedNames().is_listed(name)]
    shapes = {key: tensor.detach().to("meta") for key, tensor in tensors.items()}
    deserialize_module(data, shapes, custom)
    return custom


class _Builder:
    """Builds the modules of a description from the outermost one inwards, then their graphs from the inside out."""

    def __init__(self, description: ModelDescription, tensors: Mapping[str, Tensor], names: AllowedNames) -> None:
        self.description, self.names = description, names
        self.tensors = {**tensors, **_aliased(description.aliases, tensors)}
        keys = {key for _, item in description.distinct() for key in tensor_keys(list(item.attributes.values()))}
        self.attribute_tensors = {key: self.tensors[key].clone() for key in sorted(keys & self.tensors.keys())}
        self.buffers: dict[tuple[int, bool], Tensor] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self._paths = list(description.modules)
        self._paths_of: dict[str, list[str]] = {path: [] for path in self._paths}
        for path in self._paths:
            self._paths_of[description.first(path)].append(path)
        self.built: dict[str, nn.Module] = {}

    def build(self) -> nn.Module:
        for path, item in self.description.modules.items():
            self.built[path] = self.built[item] if isinstance(item, str) else self._leaf(path, item)
            self._insert(path)
        for path in reversed(self._paths):  # of modules with several paths too, before all that they lie in
            first = self.description.first(path)
            item = self.description.module(first)
            if item.nodes is not None and not isinstance(self.built[first], fx.GraphModule):
                self._trace(first, item, item.nodes)
        for path, module in self.built[""].named_modules():
            module.training = self.description.module(path).training
            check_layer(path, module)
        return self.built[""]

    def _insert(self, path: str) -> None:
        if path:
            owner_path, _, name = path.rpartition(".")
            owner = self.built[owner_path]
            if name in owner.__dict__ or name in owner._parameters or name in owner._buffers:
                raise GhostifyError(f"module {path!r}: has the name of another value")
            owner._modules[name] = self.built[path]

    def _leaf(self, path: str, item: ModuleDescription) -> nn.Module:
        """A module of the stored class with its attributes and tensors; its constructor is not called."""
        leaf = nn.Module()
        if item.import_name is not None:
            cls = self.names.module_class(item.import_name)
            leaf = cls.__new__(cls)
            nn.Module.__init__(leaf)
            leaf.__dict__.update(self._attributes(path, item, cls))
        for name, facts in item.parameters.items():
            leaf._parameters[name] = None if facts is None else self._parameter(join_path(path, name), facts)
        for name, facts in item.buffers.items():
            leaf._buffers[name] = None if facts is None else self._buffer(join_path(path, name), facts)
            if facts is not None and not facts.persistent:
                leaf._non_persistent_buffers_set.add(name)
        if isinstance(leaf, nn.RNNBase):
            try:
                leaf._init_flat_weights()
            except (AttributeError, TypeError, RuntimeError) as error:
                raise GhostifyError(f"module {path!r}: is not a recurrent layer ({error})") from error
        return leaf

    def _attributes(self, path: str, item: ModuleDescription, cls: type[nn.Module]) -> dict[str, Any]:
        """The values of a module's attributes, none of which replaces a method or has a name of `nn.Module`'s own."""
        is_custom = self.names.is_custom(item.import_name or "")
        for name, value in item.attributes.items():
            if not is_attribute(cls, name, value):
                raise GhostifyError(f"module {path!r}: attribute {name[:80]!r} is not allowed in a saved model")
            if not is_custom and any(hasattr(cls, text) for text in {*inner_texts(value)} - DEVICE_TYPES):
                raise GhostifyError(f"module {path!r}: attribute {name!r} names a method, which is not allowed")
        return {
            name: ValueReader(
                f"module {path!r}", self.names, ATTRIBUTE_KINDS, self.attribute_tensors,
                accepts_class=is_custom or name in CLASS_ATTRIBUTES,
            ).read(value)
            for name, value in item.attributes.items()
        }  # fmt: skip

    def _parameter(self, key: str, facts: TensorFacts) -> nn.Parameter:
        """A copy of the stored tensor, one for all paths of it."""
        stored = self._stored(key, facts)
        if id(stored) not in self.parameters:
            self.parameters[id(stored)] = nn.Parameter(_copy(stored, facts), requires_grad=facts.requires_grad)
        return self.parameters[id(stored)]

    def _buffer(self, key: str, facts: TensorFacts) -> Tensor:
        """A copy of the stored tensor, one for all paths of it: they take no more memory than what is stored."""
        stored = self._stored(key, facts)
        copied = (id(stored), facts.channels_last)
        if copied not in self.buffers:
            self.buffers[copied] = _copy(stored, facts)
        return self.buffers[copied]

    def _stored(self, key: str, facts: TensorFacts) -> Tensor:
        """The stored tensor, which is as it is described."""
        if key not in self.tensors:
            raise GhostifyError(f"tensor {key}: is missing")
        problem = facts.problem(tuple(self.tensors[key].shape), self.tensors[key].dtype)
        if problem is not None:
            raise GhostifyError(f"tensor {key}: {problem}")
        return self.tensors[key]

    def _trace(self, path: str, item: ModuleDescription, nodes: tuple[NodeDescription, ...]) -> None:
        """Replace the module at a path by a traced one."""
        module = self.built[path]
        traced = TracedModule(module, self._graph(module, nodes), class_name=str(item.class_name))
        members = {*traced._modules, *traced._parameters, *traced._buffers}
        if members & item.attributes.keys():
            raise GhostifyError(f"module {path!r}: has two values of one name")
        set_attributes(traced, self._attributes(path, item, fx.GraphModule))
        for other in self._paths_of[path]:
            self.built[other] = traced
            if other:
                owner, _, name = other.rpartition(".")
                self.built[owner]._modules[name] = traced

    def _graph(self, module: nn.Module, descriptions: tuple[NodeDescription, ...]) -> fx.Graph:
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for item in descriptions:
            where = f"node {item.name}"
            target, accepts_text, is_custom = self._target(module, item)
            kinds = CUSTOM_ARGUMENT_KINDS if is_custom else ARGUMENT_KINDS
            reader = ValueReader(where, self.names, kinds, nodes, accepts_text, accepts_class=is_custom)
            args = tuple(reader.read(item.args))
            kwargs = reader.keywords(item.kwargs)
            self._check_call(module, item, target, args, kwargs)
            node = nodes[item.name] = graph.create_node(item.op, target, args, kwargs, name=item.name)
            if item.marks:
                mark_method(node, *item.marks)
        return graph

    def _target(self, module: nn.Module, item: NodeDescription) -> tuple[Any, Callable[[str], bool], bool]:
        """What a node calls or reads, which texts its arguments may hold, and whether the user allows any argument."""
        if item.op == "call_function":
            is_custom = self.names.is_custom(item.target)
            accepts_any = is_custom or item.target in ANY_TEXT
            accepts_text = _is_readable if item.target == "builtins:getattr" else is_mode_text
            return self.names.function(item.target), _is_text if accepts_any else accepts_text, is_custom
        if item.op == "call_module":
            called = _submodule(module, item.target)
            if called is None or type(called).forward is nn.Module.forward:
                raise GhostifyError(f"node {item.name}: {item.target!r} is not a module that can be called")
            is_custom = not isinstance(called, fx.GraphModule) and self.names.is_custom(import_name(type(called)))
            return item.target, _is_text if is_custom else is_mode_text, is_custom
        if item.op == "get_attr" and not _has_tensor(module, item.target):
            raise GhostifyError(f"node {item.name}: {item.target!r} is not a parameter or buffer")
        return item.target, _is_text if item.op == "output" else is_mode_text, False

    def _check_call(
        self, module: nn.Module, item: NodeDescription, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Raise `GhostifyError` where a call does not fit the parameters of what it calls, if these are known."""
        if target is getattr and (len(args) != 2 or not isinstance(args[0], fx.Node) or not isinstance(args[1], str)):
            raise GhostifyError(f"node {item.name}: reads an attribute that is not allowed in a saved model")
        called_argument = CALLERS.get(item.target) if item.op == "call_function" else None
        if called_argument in kwargs or (item.op == "call_method" and "key" in kwargs):
            raise GhostifyError(f"node {item.name}: passes what is called, which is not allowed in a saved model")
        called = target if item.op == "call_function" else None
        if item.op == "call_module":
            called = module.get_submodule(item.target).forward
        if called is not None:
            try:
                signature = inspect.signature(called)
            except ValueError:  # functions in C++
                return
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise GhostifyError(f"node {item.name}: does not fit what it calls ({error})") from error


def _copy(tensor: Tensor, facts: TensorFacts) -> Tensor:
    """A copy in the stored memory format: views of a file may be aligned so that kernels round differently."""
    return tensor.clone(memory_format=torch.channels_last if facts.channels_last else torch.contiguous_format)


def _aliased(aliases: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for alias, path in aliases.items():
        if alias in tensors or path not in tensors:
            raise GhostifyError(f"tensor {alias[:80]!r}: is not another name of a stored tensor")
    return {alias: tensors[path] for alias, path in aliases.items()}


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    current: nn.Module | None = module
    for name in path.split("."):
        current = None if current is None else current._modules.get(name)
    return current


def _has_tensor(module: nn.Module, path: str) -> bool:
    owner_path, _, name = path.rpartition(".")
    owner = _submodule(module, owner_path) if owner_path else module
    return owner is not None and (owner._parameters.get(name) is not None or owner._buffers.get(name) is not None)


def _is_text(_: str) -> bool:
    return True


def _is_readable(text: str) -> bool:
    return text in READABLE_ATTRIBUTES
