"""Methods that a model's forward calls, such as timm's `forward_features`, kept as parts of the traced graph."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

from torch import fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.node_records import NodeRecord, build_graph, record_nodes

MARKS = "ghostify_marks"
METHOD_NAMES = "ghostify_methods"  # attribute of a traced module's class: the names of its methods from the graph
RESULT, CLASSIFIER = "->", "get_classifier"
PRESERVED_KEY = "_user_preserved_attributes"  # key in a traced module's meta that torch.fx copies with the module


class Mark(NamedTuple):
    """The role of a node in a method: the value of `parameter`, or the method's result where `parameter` is RESULT."""

    method: str
    parameter: str


class TracedModule(fx.GraphModule):
    """A traced module with the methods of the original that its forward calls.

    Each method runs a part of the module's own graph, so that changes of the graph change the method too.
    """

    def recompile(self) -> fx.graph.PythonCode:
        code = super().recompile()
        own_class = type(self)  # torch.fx makes a class for each instance
        for name in vars(own_class).get(METHOD_NAMES, ()):
            delattr(own_class, name)
        methods = _methods(self.graph)
        for name, method in methods.items():
            setattr(own_class, name, method)
        setattr(own_class, METHOD_NAMES, tuple(methods))
        return code

    def __reduce__(self) -> tuple[Any, ...]:
        """In a pickle, the nodes stand for the graph: torch.fx would trace anew, which loses marks and the report."""
        state = {key: value for key, value in vars(self).items() if key not in ("_graph", "_tracer_cls")}
        return _unpickled, (type(self).__name__, record_nodes(self.graph)), state

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        """A copy with all attributes, also those that were set after the conversion, which torch.fx would drop."""
        copied = _without_modules(type(self).__name__)
        memo[id(self)] = copied
        state = copy.deepcopy(vars(self), memo)
        graph = state.pop("_graph")
        vars(copied).update(state)
        copied.graph = graph
        return copied


def _without_modules(class_name: str) -> TracedModule:
    """A traced module with an empty graph and no submodules."""
    return TracedModule({}, fx.Graph(), class_name=class_name)


def _unpickled(class_name: str, records: list[NodeRecord]) -> TracedModule:
    """A traced module with these nodes, which pickle then gives its modules and attributes."""
    traced = _without_modules(class_name)
    traced.graph = build_graph(records)
    return traced


def set_attributes(traced: fx.GraphModule, values: dict[str, Any]) -> None:
    """Give a traced module attributes that copies of it keep, in place."""
    traced.meta[PRESERVED_KEY] = traced.meta.get(PRESERVED_KEY, {}) | values
    for name, value in values.items():
        setattr(traced, name, value)


def method_marks(node: fx.Node) -> frozenset[Mark]:
    """The marks of a node."""
    marks: frozenset[Mark] = node.meta.get(MARKS, frozenset())
    return marks


def mark_method(node: fx.Node, *marks: Mark) -> None:
    """Add marks to a node, in place."""
    node.meta[MARKS] = method_marks(node) | frozenset(marks)


@contextlib.contextmanager
def record_methods(root: nn.Module) -> Iterator[Callable[[fx.Graph], None]]:
    """Record the inputs and results of the public methods that run while `root` is traced.

    Yields a function that marks them in the traced graph.
    """
    call_counts: Counter[str] = Counter()
    calls: dict[str, tuple[dict[str, fx.Node], fx.Node]] = {}
    names = _public_methods(root)

    def recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            call_counts[name] += 1
            inputs = _tensor_inputs(method, args, kwargs)
            if isinstance(result, fx.Proxy) and result.node.op != "placeholder" and inputs:
                calls[name] = inputs, result.node
            return result

        return call

    classifier = _classifier_path(root)

    def mark_methods(graph: fx.Graph) -> None:
        for name, (inputs, result) in calls.items():
            if call_counts[name] == 1:
                mark_method(result, Mark(name, RESULT))
                for parameter, node in inputs.items():
                    mark_method(node, Mark(name, parameter))
        for node in graph.nodes:
            if node.op == "call_module" and classifier and node.target == classifier:
                mark_method(node, Mark(CLASSIFIER, RESULT))

    for name in names:
        root.__dict__[name] = recording(name, getattr(root, name))
    try:
        yield mark_methods
    finally:
        for name in names:
            root.__dict__.pop(name, None)


def _public_methods(root: nn.Module) -> set[str]:
    """Names of the public methods that the classes of `root` define, without `forward` and those of `nn.Module`."""
    classes = (c for c in type(root).__mro__ if c is not nn.Module and issubclass(c, nn.Module))
    names = {n for c in classes for n in vars(c) if not n.startswith("_") and n != "forward"}
    names = {n for n in names if not hasattr(nn.Module, n) and n not in vars(root)}
    return {n for n in names if inspect.isfunction(inspect.getattr_static(type(root), n))}


def _tensor_inputs(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, fx.Node]:
    """The nodes that a method was called with, by parameter; empty where any other argument is not at its default."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    inputs = {}
    for name, value in bound.arguments.items():
        if isinstance(value, fx.Proxy):
            inputs[name] = value.node
        elif value is not bound.signature.parameters[name].default:
            return {}
    return inputs


def _classifier_path(root: nn.Module) -> str | None:
    with contextlib.suppress(Exception):
        classifier = getattr(root, CLASSIFIER)()
        return next((path for path, m in root.named_modules() if m is classifier and path), None)
    return None


def _methods(graph: fx.Graph) -> dict[str, Callable[..., Any]]:
    """A function for each marked method whose result depends on the method's own inputs only."""
    marked: dict[str, dict[str, fx.Node]] = {}
    for node in graph.nodes:
        for name, parameter in method_marks(node):
            marked.setdefault(name, {})[parameter] = node
    methods: dict[str, Callable[..., Any]] = {}
    classifier = marked.pop(CLASSIFIER, {}).get(RESULT)
    for name, inputs in marked.items():
        result = inputs.pop(RESULT, None)
        method = None if result is None else _extract_method(graph, inputs, result)
        if method is None:
            continue
        pre_logits = classifier.all_input_nodes[0] if classifier is not None and name == "forward_head" else None
        headless = None if pre_logits is None else _extract_method(graph, inputs, pre_logits)
        methods[name] = method if headless is None else _with_pre_logits(method, headless)
    if classifier is not None:
        methods |= _classifier_methods(str(classifier.target))
    return methods


def _extract_method(graph: fx.Graph, inputs: dict[str, fx.Node], result: fx.Node) -> Callable[..., Any] | None:
    """The nodes from `inputs` to `result` as a function of a module and the inputs; None if it needs more inputs."""
    needed, pending = set(inputs.values()), [result]
    while pending:
        node = pending.pop()
        if node not in needed:
            if node.op == "placeholder":
                return None
            needed.add(node)
            pending += node.all_input_nodes
    extracted = fx.Graph()
    copies = {node: extracted.placeholder(parameter) for parameter, node in inputs.items()}
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = extracted.node_copy(node, copies.__getitem__)
    extracted.output(copies[result])
    code = extracted.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{result.name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


def _with_pre_logits(complete: Callable[..., Any], headless: Callable[..., Any]) -> Callable[..., Any]:
    def forward_head(self: nn.Module, x: Any, pre_logits: bool = False) -> Any:
        return headless(self, x) if pre_logits else complete(self, x)

    return forward_head


def _classifier_methods(path: str) -> dict[str, Callable[..., Any]]:
    def get_classifier(self: nn.Module) -> nn.Module:
        """The module that computes the logits."""
        return self.get_submodule(path)

    def reset_classifier(self: fx.GraphModule, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new, untrained one; with 0 classes, by the identity."""
        if global_pool is not None:
            raise GhostifyError(
                "reset_classifier: the pooling is fixed in the traced graph. "
                "Reset the original's classifier, then convert."
            )
        self.set_submodule(path, _new_classifier(self, self.get_submodule(path), num_classes))
        set_attributes(self, {"num_classes": num_classes})

    return {CLASSIFIER: get_classifier, "reset_classifier": reset_classifier}


def _new_classifier(model: nn.Module, old: Any, classes: int) -> nn.Module:
    if classes == 0:
        return nn.Identity()
    old = getattr(old, "primary_conv", old)
    reference = next(model.parameters())
    if isinstance(old, nn.Conv2d):
        classifier: nn.Module = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
    elif isinstance(old, nn.Linear):
        classifier = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    elif isinstance(old, nn.Identity) and hasattr(model, "num_features"):
        classifier = nn.Linear(model.num_features, classes)  # type: ignore[arg-type]
    else:
        raise GhostifyError(
            f"reset_classifier: a classifier of class {type(old).__name__} cannot be recreated. "
            f"Reset the original's classifier, then convert."
        )
    return classifier.to(reference.device, reference.dtype).train(model.training)
