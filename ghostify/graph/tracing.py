"""Tracing: a copy of any `nn.Module` as a `Program` that lists every convolution with all its calls."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from ghostify import skip_reasons
from ghostify.arguments import a_model, anything, public
from ghostify.errors import GhostifyError
from ghostify.graph.attributes import copy_attributes, missing_attributes, missing_hooks
from ghostify.graph.conv_types import to_standard_conv
from ghostify.graph.functional_conv import as_conv_module, call_settings_key, weight_path
from ghostify.graph.inputs import bind_example
from ghostify.graph.linear_layers import is_linear, linear_as_conv
from ghostify.graph.model_copy import copy_model, unwrapped_model
from ghostify.graph.observation import ForwardRecord, record_forward
from ghostify.graph.op_queries import is_conv2d, is_standard_conv
from ghostify.graph.partition import models_match, record_first_calls, trace_submodules
from ghostify.graph.paths import join_path, resolve_attribute
from ghostify.graph.program import FUNCTIONAL_CONV, ConvCall, Convolution, Program
from ghostify.modules.hooks import has_hooks
from ghostify.user_warnings import warn_user

Subgraphs = dict[str, fx.GraphModule]


@public(model=a_model, example_inputs=anything)
def trace(model: nn.Module, example_inputs: Any = None) -> Program:
    """Trace a copy of `model` into a `Program` that lists every convolution.

    `example_inputs` is what one forward takes: a tensor, a tuple of arguments or a dict of keywords. With it,
    shapes and MACs are recorded, and submodules with optional arguments are traced as they are called. Where a forward
    does not trace, the modules that it calls are traced instead. The model that `torch.compile` or `DataParallel` wraps
    is traced. Raises `GhostifyError` where the model cannot be copied or run, holds weights that are not there or not
    finite, or contains no traceable convolution.
    """
    root = copy_model(model)
    _check_initialized(root)
    convs = [(path, m) for path, m in root.named_modules() if isinstance(m, nn.Conv2d)]
    has_example = example_inputs is not None
    module, subgraphs, reason = _trace_with_fallback(model, root, example_inputs)
    if not subgraphs:
        raise GhostifyError(
            f"{type(model).__name__}.forward cannot be traced ({reason}), and it contains no module with convolutions "
            f"that can. Rewrite that line of forward without control flow on tensors."
        )
    record = ForwardRecord({}, None)
    if has_example:
        record = record_forward(module, subgraphs, bind_example(module, example_inputs))
    called = _called_convs(module, subgraphs, record.calls, has_example=has_example)
    convolutions = (*called, *_uncalled_convs(called, convs, module), *record.untraced_convs)
    if record.untraced_convs:
        warn_user(
            f"trace: {len(record.untraced_convs)} functional convolutions run in forwards that do not trace, and are "
            f"skipped. The first is {record.untraced_convs[0].name}."
        )
    model = unwrapped_model(model)
    if isinstance(module, fx.GraphModule):
        copy_attributes(module, model)
    missing = (*missing_attributes(module, model), *missing_hooks(module, model))
    subgraphs = _in_call_order(subgraphs, list(record.calls))
    linear_layers = tuple(_linear_layers(subgraphs, record.calls, has_example=has_example))
    return Program(module, subgraphs, convolutions, record.macs, missing, example_inputs, linear_layers)


def _trace_with_fallback(model: nn.Module, root: nn.Module, example: Any) -> tuple[nn.Module, Subgraphs, str]:
    """The result of `trace_submodules`; without traced submodules if the result computes something else than the model.

    `root` is a copy of `model`, and is changed in place.
    """
    if example is None:
        return trace_submodules(root, {})
    inputs = bind_example(root, example)
    module, subgraphs, reason = trace_submodules(root, record_first_calls(root, inputs))
    if not any(path and isinstance(module.get_submodule(path), fx.GraphModule) for path in subgraphs):
        return module, subgraphs, reason
    with contextlib.suppress(Exception):
        if models_match(copy_model(model), inputs, module, bind_example(module, example)):
            return module, subgraphs, reason
    fresh_copy = copy_model(model)
    return trace_submodules(fresh_copy, record_first_calls(fresh_copy, inputs), whole=False)


def _check_initialized(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise GhostifyError(f"{name}: the tensor is lazy and has no shape. Run one forward of the model first.")


def _called_convs(
    module: nn.Module, subgraphs: Subgraphs, calls: Mapping[tuple[str, str], ConvCall], *, has_example: bool
) -> tuple[Convolution, ...]:
    """Every convolution that a subgraph calls: in the order of the recorded calls, else outer subgraphs first."""
    parameter_uses = _ParameterUses(module, subgraphs)
    convs = []
    depth_first = {path: k for k, (path, _) in enumerate(module.named_modules())}
    for path, subgraph in sorted(subgraphs.items(), key=lambda item: depth_first.get(item[0], len(depth_first))):
        nodes_by_name: dict[str, list[fx.Node]] = defaultdict(list)
        for node in subgraph.graph.nodes:
            name = _conv_name(subgraph, node)
            if name is not None:
                nodes_by_name[name].append(node)
        for name, nodes in nodes_by_name.items():
            is_single_conv = path and not isinstance(module.get_submodule(path), fx.GraphModule)
            full_name = path if is_single_conv else join_path(path, name)
            conv_calls = tuple(calls.get((path, n.name), ConvCall(n.name)) for n in nodes)
            is_executed = not has_example or any(c.output_positions for c in conv_calls)
            not_executed = None if is_executed else skip_reasons.NOT_EXECUTED
            conv = _make_convolution(subgraph, parameter_uses, path, full_name, name, nodes, conv_calls, not_executed)
            convs.append(conv)
    order = {key: k for k, key in enumerate(calls)}
    return tuple(
        sorted(convs, key=lambda c: min(order.get((c.subgraph_path, call.node), len(order)) for call in c.calls))
    )


def _linear_layers(
    subgraphs: Subgraphs, calls: Mapping[tuple[str, str], ConvCall], *, has_example: bool
) -> Iterator[Convolution]:
    """Every linear layer that a subgraph calls, as a 1 x 1 convolution."""
    for path, subgraph in subgraphs.items():
        nodes_by_target: dict[str, list[fx.Node]] = defaultdict(list)
        for node in subgraph.graph.nodes:
            if is_linear(subgraph, node):
                nodes_by_target[str(node.target)].append(node)
        for target, nodes in nodes_by_target.items():
            layer = subgraph.get_submodule(target)
            assert isinstance(layer, nn.Linear)
            layer_calls = tuple(calls.get((path, n.name), ConvCall(n.name)) for n in nodes)
            is_executed = not has_example or any(c.output_positions for c in layer_calls)
            reason = None if is_executed else skip_reasons.NOT_EXECUTED
            conv_class = type(layer).__name__
            yield _of_module(join_path(path, target), linear_as_conv(layer), layer_calls, reason, path, conv_class)


def _in_call_order(subgraphs: Subgraphs, calls: list[tuple[str, str]]) -> Subgraphs:
    """The subgraphs in the order of their first calls, with inner subgraphs before those that contain them."""
    outermost = {p: min((q for q in subgraphs if q == p or p.startswith(f"{q}.") or not q), key=len) for p in subgraphs}
    first_call: dict[str, int] = {}
    for k, (path, _) in enumerate(calls):
        first_call.setdefault(outermost[path], k)
    return dict(sorted(subgraphs.items(), key=lambda item: first_call.get(outermost[item[0]], len(calls))))


def _uncalled_convs(
    called: tuple[Convolution, ...], named_convs: list[tuple[str, nn.Conv2d]], module: nn.Module
) -> Iterator[Convolution]:
    """Convolutions of the model that its traced forward does not call."""
    called_names = {c.name for c in called}
    listed = {id(m) for name in called_names if (m := _conv2d_at(module, name)) is not None}
    for path, conv in named_convs:
        if path not in called_names and id(conv) not in listed:
            listed.add(id(conv))
            yield _of_module(path, conv, (), skip_reasons.NOT_IN_GRAPH)


def _conv_name(subgraph: fx.GraphModule, node: fx.Node) -> str | None:
    if not is_conv2d(subgraph, node):
        return None
    return str(node.target) if node.op == "call_module" else weight_path(subgraph, node) or node.name


def _make_convolution(
    subgraph: fx.GraphModule,
    parameter_uses: _ParameterUses,
    path: str,
    full_name: str,
    name: str,
    nodes: list[fx.Node],
    calls: tuple[ConvCall, ...],
    not_executed: str | None,
) -> Convolution:
    inner = _conv2d_at(subgraph, name)
    if inner is not None:
        return _of_module(full_name, inner, calls, not_executed or _unsupported_reason(parameter_uses, inner), path)
    if weight_path(subgraph, nodes[0]) is None:
        outputs = (calls[0].output_shape or (0, 0))[1]
        reason = skip_reasons.COMPUTED_WEIGHT
        return Convolution(full_name, FUNCTIONAL_CONV, 0, outputs, (0, 0), 1, False, calls, reason, path)
    conv = as_conv_module(subgraph, nodes[0])
    if len({call_settings_key(n) for n in nodes}) > 1:
        unsupported: str | None = skip_reasons.DIFFERENT_SETTINGS
    else:
        unsupported = _unsupported_reason(parameter_uses, conv, own_fetches=len(nodes))
    return _of_module(full_name, conv, calls, not_executed or unsupported, path, conv_class=FUNCTIONAL_CONV)


def _of_module(
    name: str,
    conv: nn.Conv2d,
    calls: tuple[ConvCall, ...],
    unsupported_reason: str | None,
    subgraph_path: str = "",
    conv_class: str | None = None,
) -> Convolution:
    return Convolution(
        name,
        conv_class or type(conv).__name__,
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        conv.groups,
        conv.bias is not None,
        calls,
        unsupported_reason,
        subgraph_path,
    )


class _ParameterUses:
    """The number of modules that hold each parameter, and the number of nodes that fetch it."""

    def __init__(self, module: nn.Module, subgraphs: Subgraphs) -> None:
        self.holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        attribute_nodes = [(g, n) for g in subgraphs.values() for n in g.graph.nodes if n.op == "get_attr"]
        self.fetches = Counter(id(resolve_attribute(g, str(n.target))) for g, n in attribute_nodes)


def _unsupported_reason(parameter_uses: _ParameterUses, conv: nn.Conv2d, own_fetches: int = 0) -> str | None:
    """Why the convolution cannot be rewritten; `own_fetches` of the nodes that fetch its weight belong to it."""
    if has_hooks(conv):
        return skip_reasons.HAS_HOOKS
    if not is_standard_conv(conv) and isinstance(detail := to_standard_conv(conv), str):
        return skip_reasons.unsupported_class(conv, detail)
    if conv.weight.is_complex() or not conv.weight.is_floating_point():
        return skip_reasons.unsupported_dtype(conv.weight.dtype)
    is_held_elsewhere = any(parameter_uses.holders[id(p)] > 1 for p in conv.parameters())
    if is_held_elsewhere or parameter_uses.fetches[id(conv.weight)] > own_fetches:
        return skip_reasons.SHARED_WEIGHT
    return None


def _conv2d_at(module: nn.Module, name: str) -> nn.Conv2d | None:
    with contextlib.suppress(AttributeError):
        inner = module.get_submodule(name)
        return inner if isinstance(inner, nn.Conv2d) else None
    return None
