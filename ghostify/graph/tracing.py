"""Any `nn.Module` -> a traced program in which every use of every `Conv2d` is known."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.attributes import keep_attributes, lost_attributes
from ghostify.graph.conv_types import plain
from ghostify.graph.functional_conv import attribute, functional_conv, functional_weight, settings
from ghostify.graph.inputs import example_of, tensors_of
from ghostify.graph.observation import Record, record
from ghostify.graph.op_queries import is_conv2d, is_standard_conv
from ghostify.graph.partition import answers_alike, enter, how_called
from ghostify.graph.paths import within
from ghostify.graph.program import Call, Convolution, Program
from ghostify.modules.hooks import has_hooks

Parts = dict[str, fx.GraphModule]


def trace(model: nn.Module, example_inputs: Any = None) -> Program:
    """Trace a copy of `model` into a `Program` of every convolution call.

    `example_inputs` is what one forward takes (a tensor, a tuple of arguments or a dict of keywords); with it, shapes
    and MACs are recorded, and modules inside that take optional arguments are entered as they are called. Where a
    forward does not trace, the modules it calls are traced in its place. Raises `GhostifyError` where the model cannot
    be copied or run, or no convolution be reached.
    """
    if _is_compiled(model):
        model = model._orig_mod  # type: ignore[assignment]
    _refuse_circles(model, "", ())
    root = _copied(model)
    _refuse_uninitialised(root)
    named = [(path, m) for path, m in root.named_modules() if isinstance(m, nn.Conv2d)]
    ran = example_inputs is not None
    module, parts, reason = _entered(model, root, example_inputs)
    if not parts:
        raise GhostifyError(
            f"{type(model).__name__}.forward cannot be traced ({reason}), and no module in it that holds convolutions: "
            f"rewrite that line of forward without control flow on tensors"
        )
    seen = record(module, parts, example_of(module, example_inputs)) if ran else Record({}, None)
    found = _reached(module, parts, seen.calls, ran=ran)
    convolutions = (*found, *_unreached(found, named, module), *seen.beside)
    if seen.beside:
        warnings.warn(
            f"{len(seen.beside)} convolutions run as functions in forwards that do not trace, and stay as they are: "
            f"the first is {seen.beside[0].name}",
            stacklevel=2,
        )
    if isinstance(module, fx.GraphModule):
        keep_attributes(module, model)
    lost = lost_attributes(module, model)
    return Program(module, _as_they_run(parts, list(seen.calls)), convolutions, seen.macs, lost, example_inputs)


def _copied(model: nn.Module) -> nn.Module:
    held = [v for m in model.modules() for v in tensors_of(list(vars(m).values()))]
    kept = {id(v): v.detach().clone() for v in held if not v.is_leaf}  # of a forward with gradients: deepcopy refuses
    try:
        root = copy.deepcopy(model, kept)
    except Exception as error:
        raise GhostifyError(f"{type(model).__name__} cannot be copied: {error}") from error
    for path, module in list(root.named_modules()):
        if path and _is_compiled(module):
            root.set_submodule(path, module._orig_mod)
    return root


def _entered(model: nn.Module, root: nn.Module, example: Any) -> tuple[nn.Module, Parts, str]:
    """The model with its graphs; if that answers otherwise than the model, only single convolutions are entered."""
    if example is None:
        return enter(root, {})
    inputs = example_of(root, example)
    module, parts, reason = enter(root, how_called(root, inputs))
    if not any(path and isinstance(module.get_submodule(path), fx.GraphModule) for path in parts):
        return module, parts, reason
    with contextlib.suppress(Exception):
        if answers_alike(model, inputs, module, example_of(module, example)):
            return module, parts, reason
    again = _copied(model)
    return enter(again, how_called(again, inputs), whole=False)


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made it of another module."""
    return type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module)


def _refuse_circles(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> None:
    """PyTorch itself walks in circles there, in `eval()` and elsewhere."""
    for name, child in module.named_children():
        if any(child is m for m in (*above, module)):
            raise GhostifyError(
                f"{within(path, name)} is a module that it lies in itself: keep that reference where PyTorch does not "
                f"take it for a submodule, such as in a list"
            )
        _refuse_circles(child, within(path, name), (*above, module))


def _refuse_uninitialised(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise GhostifyError(f"{name} is lazy and has no shape yet: run one forward of the model first")


def _reached(
    module: nn.Module, parts: Parts, calls: Mapping[tuple[str, str], Call], *, ran: bool
) -> tuple[Convolution, ...]:
    """Every convolution that a part calls, in order of first use: as they ran, or else outer parts first."""
    readers = _Readers(module, parts)
    found = []
    places = {path: k for k, (path, _) in enumerate(module.named_modules())}
    for path, part in sorted(parts.items(), key=lambda item: places.get(item[0], len(places))):
        uses: dict[str, list[fx.Node]] = defaultdict(list)
        for node in part.graph.nodes:
            name = _conv_name(part, node)
            if name is not None:
                uses[name].append(node)
        for name, nodes in uses.items():
            whole = path if path and not isinstance(module.get_submodule(path), fx.GraphModule) else within(path, name)
            seen = tuple(calls.get((path, n.name), Call(n.name)) for n in nodes)
            idle = "it is not called when the example inputs run" if ran and not any(c.places for c in seen) else None
            found.append(_describe(part, readers, path, whole, name, nodes, seen, idle))
    order = {key: k for k, key in enumerate(calls)}
    return tuple(sorted(found, key=lambda c: min(order.get((c.part, call.node), len(order)) for call in c.calls)))


def _as_they_run(parts: Parts, calls: list[tuple[str, str]]) -> Parts:
    """The parts in the order of their first calls, inner ones still before those that they are inside of."""
    outermost = {p: min((q for q in parts if q == p or p.startswith(f"{q}.") or not q), key=len) for p in parts}
    first: dict[str, int] = {}
    for k, (path, _) in enumerate(calls):
        first.setdefault(outermost[path], k)
    return dict(sorted(parts.items(), key=lambda item: first.get(outermost[item[0]], len(calls))))


def _unreached(
    found: tuple[Convolution, ...], named: list[tuple[str, nn.Conv2d]], module: nn.Module
) -> Iterator[Convolution]:
    """Convolutions of the model that its forward, as traced, does not call."""
    known = {c.name for c in found}
    seen = {id(m) for name in known if (m := _submodule(module, name)) is not None}
    for path, conv in named:
        if path not in known and id(conv) not in seen:
            seen.add(id(conv))
            yield _of_module(path, conv, (), "its forward does not call it as traced")


def _conv_name(part: fx.GraphModule, node: fx.Node) -> str | None:
    if not is_conv2d(part, node):
        return None
    return str(node.target) if node.op == "call_module" else functional_weight(part, node) or node.name


def _describe(
    part: fx.GraphModule,
    readers: _Readers,
    path: str,
    whole: str,
    name: str,
    nodes: list[fx.Node],
    calls: tuple[Call, ...],
    idle: str | None,
) -> Convolution:
    inner = _submodule(part, name)
    if inner is not None:
        return _of_module(whole, inner, calls, idle or _obstacle(readers, inner), path)
    if functional_weight(part, nodes[0]) is None:
        shape = calls[0].output_shape or (0, 0)
        computed = "its weight is computed in the forward"
        return Convolution(whole, "conv2d", 0, shape[1], (0, 0), 1, False, calls, computed, path)
    conv = functional_conv(part, nodes[0])
    if len({settings(n) for n in nodes}) > 1:
        obstacle: str | None = "one weight is used with different strides, paddings or biases"
    else:
        obstacle = _obstacle(readers, conv, own_uses=len(nodes))
    return _of_module(whole, conv, calls, idle or obstacle, path, kind="conv2d")


def _of_module(
    name: str, conv: nn.Conv2d, calls: tuple[Call, ...], obstacle: str | None, part: str = "", kind: str | None = None
) -> Convolution:
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    return Convolution(
        name,
        kind or type(conv).__name__,
        conv.in_channels,
        conv.out_channels,
        kernel,
        conv.groups,
        conv.bias is not None,
        calls,
        obstacle,
        part,
    )


class _Readers:
    """How many modules hold each parameter, and how many nodes fetch it."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        self.holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        fetched = [(part, n) for part in parts.values() for n in part.graph.nodes if n.op == "get_attr"]
        self.fetches = Counter(id(attribute(part, str(n.target))) for part, n in fetched)


def _obstacle(readers: _Readers, conv: nn.Conv2d, own_uses: int = 0) -> str | None:
    if has_hooks(conv):
        return "it carries hooks: remove them, then convert"
    if not is_standard_conv(conv) and isinstance(why := plain(conv), str):
        return f"{type(conv).__module__}.{type(conv).__name__} is a Conv2d of its own kind: {why}"
    if conv.weight.is_complex() or not conv.weight.is_floating_point():
        return f"its weight is {conv.weight.dtype}"
    if any(readers.holders[id(p)] > 1 for p in conv.parameters()) or readers.fetches[id(conv.weight)] > own_uses:
        return "its weight is shared with another part of the model"
    return None


def _submodule(module: nn.Module, name: str) -> nn.Conv2d | None:
    with contextlib.suppress(AttributeError):
        found = module.get_submodule(name)
        return found if isinstance(found, nn.Conv2d) else None
    return None
