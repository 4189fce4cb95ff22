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
from ghostify.graph.attributes import copy_attributes, missing_attributes
from ghostify.graph.conv_types import to_standard_conv
from ghostify.graph.functional_conv import as_conv_module, call_settings_key, resolve_attribute, weight_path
from ghostify.graph.inputs import bind_example, tensor_leaves
from ghostify.graph.observation import ForwardRecord, record_forward
from ghostify.graph.op_queries import is_conv2d, is_standard_conv
from ghostify.graph.partition import models_match, record_first_calls, trace_submodules
from ghostify.graph.paths import join_path
from ghostify.graph.program import FUNCTIONAL_CONV, ConvCall, Convolution, Program
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
    _check_acyclic(model, "", ())
    root = _copied(model)
    _refuse_uninitialised(root)
    named = [(path, m) for path, m in root.named_modules() if isinstance(m, nn.Conv2d)]
    ran = example_inputs is not None
    module, parts, reason = _trace_with_fallback(model, root, example_inputs)
    if not parts:
        raise GhostifyError(
            f"{type(model).__name__}.forward cannot be traced ({reason}), and no module in it that holds convolutions: "
            f"rewrite that line of forward without control flow on tensors"
        )
    seen = record_forward(module, parts, bind_example(module, example_inputs)) if ran else ForwardRecord({}, None)
    found = _called_convs(module, parts, seen.calls, ran=ran)
    convolutions = (*found, *_uncalled_convs(found, named, module), *seen.untraced_convs)
    if seen.untraced_convs:
        warnings.warn(
            f"{len(seen.untraced_convs)} convolutions run as functions in forwards that do not trace, and stay as "
            f"they are: the first is {seen.untraced_convs[0].name}",
            stacklevel=2,
        )
    if isinstance(module, fx.GraphModule):
        copy_attributes(module, model)
    lost = missing_attributes(module, model)
    return Program(module, _in_call_order(parts, list(seen.calls)), convolutions, seen.macs, lost, example_inputs)


def _copied(model: nn.Module) -> nn.Module:
    held = [v for m in model.modules() for v in tensor_leaves(list(vars(m).values()))]
    kept = {id(v): v.detach().clone() for v in held if not v.is_leaf}  # of a forward with gradients: deepcopy refuses
    try:
        root = copy.deepcopy(model, kept)
    except Exception as error:
        raise GhostifyError(f"{type(model).__name__} cannot be copied: {error}") from error
    for path, module in list(root.named_modules()):
        if path and _is_compiled(module):
            root.set_submodule(path, module._orig_mod)
    return root


def _trace_with_fallback(model: nn.Module, root: nn.Module, example: Any) -> tuple[nn.Module, Parts, str]:
    """The model with its graphs; if that answers otherwise than the model, only single convolutions are entered."""
    if example is None:
        return trace_submodules(root, {})
    inputs = bind_example(root, example)
    module, parts, reason = trace_submodules(root, record_first_calls(root, inputs))
    if not any(path and isinstance(module.get_submodule(path), fx.GraphModule) for path in parts):
        return module, parts, reason
    with contextlib.suppress(Exception):
        if models_match(model, inputs, module, bind_example(module, example)):
            return module, parts, reason
    again = _copied(model)
    return trace_submodules(again, record_first_calls(again, inputs), whole=False)


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made it of another module."""
    return type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module)


def _check_acyclic(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> None:
    """PyTorch itself walks in circles there, in `eval()` and elsewhere."""
    for name, child in module.named_children():
        if any(child is m for m in (*above, module)):
            raise GhostifyError(
                f"{join_path(path, name)} is a module that it lies in itself: keep that reference where PyTorch does "
                f"not take it for a submodule, such as in a list"
            )
        _check_acyclic(child, join_path(path, name), (*above, module))


def _refuse_uninitialised(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise GhostifyError(f"{name} is lazy and has no shape yet: run one forward of the model first")


def _called_convs(
    module: nn.Module, parts: Parts, calls: Mapping[tuple[str, str], ConvCall], *, ran: bool
) -> tuple[Convolution, ...]:
    """Every convolution that a part calls, in order of first use: as they ran, or else outer parts first."""
    readers = _ParameterUses(module, parts)
    found = []
    places = {path: k for k, (path, _) in enumerate(module.named_modules())}
    for path, part in sorted(parts.items(), key=lambda item: places.get(item[0], len(places))):
        uses: dict[str, list[fx.Node]] = defaultdict(list)
        for node in part.graph.nodes:
            name = _conv_name(part, node)
            if name is not None:
                uses[name].append(node)
        for name, nodes in uses.items():
            whole = (
                path if path and not isinstance(module.get_submodule(path), fx.GraphModule) else join_path(path, name)
            )
            seen = tuple(calls.get((path, n.name), ConvCall(n.name)) for n in nodes)
            idle = (
                "it is not called when the example inputs run"
                if ran and not any(c.output_positions for c in seen)
                else None
            )
            found.append(_make_convolution(part, readers, path, whole, name, nodes, seen, idle))
    order = {key: k for k, key in enumerate(calls)}
    return tuple(
        sorted(found, key=lambda c: min(order.get((c.subgraph_path, call.node), len(order)) for call in c.calls))
    )


def _in_call_order(parts: Parts, calls: list[tuple[str, str]]) -> Parts:
    """The parts in the order of their first calls, inner ones still before those that they are inside of."""
    outermost = {p: min((q for q in parts if q == p or p.startswith(f"{q}.") or not q), key=len) for p in parts}
    first: dict[str, int] = {}
    for k, (path, _) in enumerate(calls):
        first.setdefault(outermost[path], k)
    return dict(sorted(parts.items(), key=lambda item: first.get(outermost[item[0]], len(calls))))


def _uncalled_convs(
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
    return str(node.target) if node.op == "call_module" else weight_path(part, node) or node.name


def _make_convolution(
    part: fx.GraphModule,
    readers: _ParameterUses,
    path: str,
    whole: str,
    name: str,
    nodes: list[fx.Node],
    calls: tuple[ConvCall, ...],
    idle: str | None,
) -> Convolution:
    inner = _submodule(part, name)
    if inner is not None:
        return _of_module(whole, inner, calls, idle or _unsupported_reason(readers, inner), path)
    if weight_path(part, nodes[0]) is None:
        shape = calls[0].output_shape or (0, 0)
        computed = "its weight is computed in the forward"
        return Convolution(whole, FUNCTIONAL_CONV, 0, shape[1], (0, 0), 1, False, calls, computed, path)
    conv = as_conv_module(part, nodes[0])
    if len({call_settings_key(n) for n in nodes}) > 1:
        obstacle: str | None = "one weight is used with different strides, paddings or biases"
    else:
        obstacle = _unsupported_reason(readers, conv, own_uses=len(nodes))
    return _of_module(whole, conv, calls, idle or obstacle, path, conv_class=FUNCTIONAL_CONV)


def _of_module(
    name: str,
    conv: nn.Conv2d,
    calls: tuple[ConvCall, ...],
    obstacle: str | None,
    part: str = "",
    conv_class: str | None = None,
) -> Convolution:
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    return Convolution(
        name,
        conv_class or type(conv).__name__,
        conv.in_channels,
        conv.out_channels,
        kernel,
        conv.groups,
        conv.bias is not None,
        calls,
        obstacle,
        part,
    )


class _ParameterUses:
    """How many modules hold each parameter, and how many nodes fetch it."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        self.holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        fetched = [(part, n) for part in parts.values() for n in part.graph.nodes if n.op == "get_attr"]
        self.fetches = Counter(id(resolve_attribute(part, str(n.target))) for part, n in fetched)


def _unsupported_reason(readers: _ParameterUses, conv: nn.Conv2d, own_uses: int = 0) -> str | None:
    if has_hooks(conv):
        return "it carries hooks: remove them, then convert"
    if not is_standard_conv(conv) and isinstance(why := to_standard_conv(conv), str):
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
