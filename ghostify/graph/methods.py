"""Methods that a forward goes through, such as timm's `forward_features`, as stretches of the one graph."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

from torch import fx, nn

from ghostify.errors import GhostifyError

MARKS = "ghostify_marks"
RESULT, CLASSIFIER, PRE_LOGITS = "->", "get_classifier", "pre_logits"
KEPT = "_user_preserved_attributes"  # in the meta of a traced module; torch.fx takes them over to copies


class Mark(NamedTuple):
    """What a node is to a method: the value of its `parameter`, or with RESULT in its place what it returns."""

    method: str
    parameter: str


class TracedModule(fx.GraphModule):
    """A traced module with those methods of the original that its forward calls on the way.

    Each runs its stretch of the module's own graph, so that whatever becomes of the graph becomes of the method.
    """

    def recompile(self) -> Any:
        code = super().recompile()
        for name, method in _methods(self.graph).items():
            setattr(type(self), name, method)
        return code


def set_attributes(made: fx.GraphModule, values: dict[str, Any]) -> None:
    """Give a traced module attributes, where torch.fx carries them over to copies."""
    made.meta[KEPT] = made.meta.get(KEPT, {}) | values
    for name, value in values.items():
        setattr(made, name, value)


def method_marks(node: fx.Node) -> frozenset[Mark]:
    """What the node is to the methods."""
    found: frozenset[Mark] = node.meta.get(MARKS, frozenset())
    return found


def mark_method(node: fx.Node, *marks: Mark) -> None:
    """Add marks to a node."""
    node.meta[MARKS] = method_marks(node) | frozenset(marks)


@contextlib.contextmanager
def record_methods(root: nn.Module) -> Iterator[Callable[[fx.Graph], None]]:
    """While `root` is traced: notes which of its public methods make which nodes of which. Call the result to mark."""
    calls: Counter[str] = Counter()
    seen: dict[str, tuple[dict[str, fx.Node], fx.Node]] = {}
    own = {n for cls in type(root).__mro__ if cls is not nn.Module and issubclass(cls, nn.Module) for n in vars(cls)}
    names = {n for n in own if not n.startswith("_") and n != "forward" and not hasattr(nn.Module, n)}
    names = {n for n in names if inspect.isfunction(inspect.getattr_static(type(root), n)) and n not in vars(root)}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            calls[name] += 1
            inputs = _tensors_only(method, args, kwargs)
            if isinstance(made, fx.Proxy) and made.node.op != "placeholder" and inputs:
                seen[name] = inputs, made.node
            return made

        return call

    classifier = _classifier(root)

    def put(graph: fx.Graph) -> None:
        for name, (inputs, result) in seen.items():
            if calls[name] == 1:
                mark_method(result, Mark(name, RESULT))
                for parameter, node in inputs.items():
                    mark_method(node, Mark(name, parameter))
        for node in graph.nodes:
            if node.op == "call_module" and classifier and node.target == classifier:
                mark_method(node, Mark(CLASSIFIER, RESULT))

    for name in names:
        root.__dict__[name] = watched(name, getattr(root, name))
    try:
        yield put
    finally:
        for name in names:
            root.__dict__.pop(name, None)


def _tensors_only(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, fx.Node]:
    """The nodes a method was called with by parameter, or nothing where something else is not at its default."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    inputs = {}
    for name, value in bound.arguments.items():
        if isinstance(value, fx.Proxy):
            inputs[name] = value.node
        elif value is not bound.signature.parameters[name].default:
            return {}
    return inputs


def _classifier(root: nn.Module) -> str | None:
    with contextlib.suppress(Exception):
        found = getattr(root, CLASSIFIER)()
        return next((path for path, m in root.named_modules() if m is found and path), None)
    return None


def _methods(graph: fx.Graph) -> dict[str, Callable[..., Any]]:
    """A method for each marked stretch that depends on nothing else."""
    marked: dict[str, dict[str, fx.Node]] = {}
    for node in graph.nodes:
        for name, part in method_marks(node):
            marked.setdefault(name, {})[part] = node
    methods: dict[str, Callable[..., Any]] = {}
    classifier = marked.pop(CLASSIFIER, {}).get(RESULT)
    for name, nodes in marked.items():
        result = nodes.pop(RESULT, None)
        made = None if result is None else _extract_method(graph, nodes, result)
        if made is None:
            continue
        before = classifier.all_input_nodes[0] if classifier is not None and name == "forward_head" else None
        short = None if before is None else _extract_method(graph, nodes, before)
        methods[name] = made if short is None else _with_pre_logits(made, short)
    if classifier is not None:
        methods |= _of_classifier(str(classifier.target))
    return methods


def _extract_method(graph: fx.Graph, inputs: dict[str, fx.Node], result: fx.Node) -> Callable[..., Any] | None:
    """The nodes from `inputs` to `result` as a function of a module and the inputs; None if that takes more inputs."""
    needed, waiting = set(inputs.values()), [result]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            if node.op == "placeholder":
                return None
            needed.add(node)
            waiting += node.all_input_nodes
    made = fx.Graph()
    copies = {node: made.placeholder(parameter) for parameter, node in inputs.items()}
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(copies[result])
    code = made.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, f"<{result.name}>", "exec"), space)
    function: Callable[..., Any] = space["forward"]
    return function


def _with_pre_logits(whole: Callable[..., Any], short: Callable[..., Any]) -> Callable[..., Any]:
    def forward_head(self: nn.Module, x: Any, pre_logits: bool = False) -> Any:
        return short(self, x) if pre_logits else whole(self, x)

    return forward_head


def _of_classifier(path: str) -> dict[str, Callable[..., Any]]:
    def get_classifier(self: nn.Module) -> nn.Module:
        """The module that makes the logits."""
        return self.get_submodule(path)

    def reset_classifier(self: fx.GraphModule, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier in the place of the old one; 0 classes: none."""
        if global_pool is not None:
            raise GhostifyError("the pooling is fixed in the graph: reset the classifier before converting")
        self.set_submodule(path, _new_classifier(self, self.get_submodule(path), num_classes))
        set_attributes(self, {"num_classes": num_classes})

    return {CLASSIFIER: get_classifier, "reset_classifier": reset_classifier}


def _new_classifier(model: nn.Module, old: Any, classes: int) -> nn.Module:
    if classes == 0:
        return nn.Identity()
    old = getattr(old, "primary_conv", old)
    like = next(model.parameters())
    if isinstance(old, nn.Conv2d):
        made: nn.Module = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
    elif isinstance(old, nn.Linear):
        made = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    elif isinstance(old, nn.Identity) and hasattr(model, "num_features"):
        made = nn.Linear(model.num_features, classes)  # type: ignore[arg-type]
    else:
        raise GhostifyError(f"a {type(old).__name__} as classifier cannot be made anew: reset it before converting")
    return made.to(like.device, like.dtype).train(model.training)
