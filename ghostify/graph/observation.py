"""Observed forwards: shapes of the convolution calls, MACs, and callbacks on convolutions while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.flop_counter import FlopCounterMode

from ghostify.graph.call_hooks import on_calls
from ghostify.graph.executor import Values, execute
from ghostify.graph.functional_conv import Conv2dCall, Conv2dRecorder
from ghostify.graph.inputs import CallInputs, bind_inputs, run_example
from ghostify.graph.linear_layers import FEATURES_RANK, as_maps, is_linear
from ghostify.graph.modes import eval_mode
from ghostify.graph.op_queries import is_conv2d
from ghostify.graph.program import FUNCTIONAL_CONV, SINGLE_CONV_NAME, ConvCall, Convolution
from ghostify.skip_reasons import UNTRACED_FUNCTION

ConvCallback = Callable[[str, fx.Node, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ForwardRecord:
    """Calls of convolutions and linear layers by subgraph path and node name, and the MACs of the forward, as
    `MacCounter` counts them.

    `untraced_convs` are the functional convolutions that ran in forwards without a graph.
    """

    calls: Mapping[tuple[str, str], ConvCall]
    macs: int | None
    untraced_convs: tuple[Convolution, ...] = ()


class MacCounter(FlopCounterMode):
    """Counts multiply-accumulates while active, by torch's flop counter, in which each is two operations.

    Convolutions, linear layers, matrix products and attention count; element-wise operations do not.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def macs(self) -> int:
        return self.get_total_flops() // 2


def record_forward(module: nn.Module, subgraphs: Mapping[str, fx.GraphModule], inputs: CallInputs) -> ForwardRecord:
    """The record of one forward in evaluation mode. Raises `GhostifyError` where the model does not run."""
    calls: dict[tuple[str, str], ConvCall] = {}
    functional_convs = _FunctionalConvs(module)
    conv_modules = [m for m in module.modules() if isinstance(m, nn.Conv2d)]

    def record_call(path: str, node: fx.Node, image: Tensor, output: Tensor) -> Tensor:
        if output.dim() >= 3:
            positions = output[..., 0, :, :].numel()
            call = calls.get((path, node.name), ConvCall(node.name, tuple(image.shape), tuple(output.shape), 0))
            calls[path, node.name] = replace(call, output_positions=(call.output_positions or 0) + positions)
        functional_convs.discard(output)
        return output

    with (
        eval_mode(module),
        MacCounter() as counter,
        intercept_convs(module, subgraphs, record_call),
        on_calls(conv_modules, before=functional_convs.enter, after=functional_convs.leave),
        Conv2dRecorder(functional_convs.add),
    ):
        run_example(module, inputs)
    return ForwardRecord(calls, counter.macs, tuple(functional_convs.untraced.values()))


class _FunctionalConvs:
    """Collects the calls of conv2d outside the forward of a `Conv2d`, except those that a graph contains."""

    def __init__(self, module: nn.Module) -> None:
        self.module_weights = {id(p) for m in module.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()}
        self.module_depth = 0
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.untraced: dict[str, Convolution] = {}
        self.last_output: Tensor | None = None
        self.last_name = ""

    def add(self, call: Conv2dCall) -> None:
        """Add a call, under the path of its weight."""
        arguments, output = call
        weight = arguments["weight"]
        if self.module_depth or id(weight) in self.module_weights:
            return
        name = self.names.get(id(weight), f"conv2d[{len(self.untraced)}]")
        groups, kernel = arguments["groups"], (weight.shape[2], weight.shape[3])
        sizes = weight.shape[1] * groups, weight.shape[0], kernel, groups, arguments["bias"] is not None
        self.untraced.setdefault(name, Convolution(name, FUNCTIONAL_CONV, *sizes, (), UNTRACED_FUNCTION))
        self.last_output, self.last_name = output, name

    def enter(self, *_: object) -> None:
        """The forward of a `Conv2d` begins."""
        self.module_depth += 1

    def leave(self, *_: object) -> None:
        """The forward of a `Conv2d` ends."""
        self.module_depth -= 1

    def discard(self, output: Tensor) -> None:
        """Drop the last call if `output` is its output: a graph contains it."""
        if self.last_output is not None and output.data_ptr() == self.last_output.data_ptr():
            self.untraced.pop(self.last_name, None)
            self.last_output, self.last_name = None, ""


@contextlib.contextmanager
def intercept_convs(
    module: nn.Module, subgraphs: Mapping[str, fx.GraphModule], on_conv: ConvCallback
) -> Iterator[None]:
    """While active, call `on_conv` at every convolution call in the subgraphs of `module`, a copy of a program's.

    `on_conv(path, node, input, output)` gets the subgraph's path, the node, and the convolution's input and output; its
    result replaces the output. It runs with gradients if they are enabled now, whatever the forward sets. Linear layers
    of N x features count as convolutions of N x features x 1 x 1.
    """
    on_conv = _in_grad_mode(on_conv, enabled=torch.is_grad_enabled())
    undo: list[Callable[[], None]] = []
    try:
        for path, original in subgraphs.items():
            inner = module.get_submodule(path)
            if isinstance(inner, fx.GraphModule):
                inner.forward = _intercepted_forward(on_conv, path, inner)
                undo.append(partial(delattr, inner, "forward"))
            else:
                node = next(n for n in original.graph.nodes if n.target == SINGLE_CONV_NAME)
                hook = partial(_hook, on_conv, path, node)
                undo.append(inner.register_forward_hook(hook, with_kwargs=True).remove)
        yield
    finally:
        for step in undo:
            step()


def _hook(
    on_conv: ConvCallback,
    path: str,
    node: fx.Node,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    return _call_on_tensors(on_conv, path, node, next(iter((*args, *kwargs.values())), None), output)


def _call_on_tensors(on_conv: ConvCallback, path: str, node: fx.Node, image: Any, output: Any) -> Any:
    """The callback's result.

    The output itself where a subclass of `Conv2d` takes or returns something else, and under transforms of torch.func.
    """
    are_plain = all(isinstance(v, Tensor) and not is_functorch_wrapped_tensor(v) for v in (image, output))
    return on_conv(path, node, image, output) if are_plain else output


def _in_grad_mode(on_conv: ConvCallback, *, enabled: bool) -> ConvCallback:
    """The callback with gradients, or without them on tensors without a history of gradients."""

    def callback(path: str, node: fx.Node, image: Tensor, output: Tensor) -> Tensor:
        with torch.set_grad_enabled(enabled):
            if not enabled:
                image, output = (v.detach() if v.requires_grad else v for v in (image, output))
            return on_conv(path, node, image, output)

    return callback


def _intercepted_forward(on_conv: ConvCallback, path: str, subgraph: fx.GraphModule) -> Callable[..., Any]:
    """A forward of a subgraph that passes every convolution's output through `on_conv`."""

    def on_node(node: fx.Node, value: Any, values: Values) -> Any:
        if is_conv2d(subgraph, node):
            return _call_on_tensors(on_conv, path, node, values[node.all_input_nodes[0]], value)
        if is_linear(subgraph, node) and value.dim() == FEATURES_RANK:
            image = as_maps(values[node.all_input_nodes[0]])
            return _call_on_tensors(on_conv, path, node, image, as_maps(value)).flatten(1)
        return value

    def forward(*args: Any, **kwargs: Any) -> Any:
        return execute(subgraph, bind_inputs(subgraph, args, kwargs).values, on_node)

    return forward
