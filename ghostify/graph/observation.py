"""One forward of the example inputs: the shapes at every convolution call, and the multiply-accumulates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ghostify.graph.executor import Values, execute
from ghostify.graph.functional_conv import Conv2dCall, Conv2dRecorder
from ghostify.graph.inputs import CallInputs, bind_inputs, run_example
from ghostify.graph.modes import eval_mode
from ghostify.graph.op_queries import is_conv2d
from ghostify.graph.program import FUNCTIONAL_CONV, SINGLE_CONV_NAME, ConvCall, Convolution

UNTRACED_REASON = "it runs as a function in a forward that does not trace"

ConvCallback = Callable[[str, fx.Node, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ForwardRecord:
    """Convolution calls by part and node, and the MACs of the whole forward, attention and linear layers included.

    `untraced_convs` are the convolutions that ran as functions in forwards of which there is no graph.
    """

    calls: Mapping[tuple[str, str], ConvCall]
    macs: int | None
    untraced_convs: tuple[Convolution, ...] = ()


class MacCounter(FlopCounterMode):
    """Counts multiply-accumulates while it lasts, by torch's own flop counter, in which each is two operations.

    Convolutions, linear layers, matrix products and attention count; element-wise work does not.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def macs(self) -> int:
        return self.get_total_flops() // 2


def record_forward(module: nn.Module, parts: Mapping[str, fx.GraphModule], inputs: CallInputs) -> ForwardRecord:
    """Run `inputs` once in evaluation mode. Raises `GhostifyError` where the model does not run."""
    calls: dict[tuple[str, str], ConvCall] = {}
    untraced_convs = _Beside(module)

    def look(path: str, node: fx.Node, seen: Tensor, made: Tensor) -> Tensor:
        if made.dim() >= 3:
            places = made[..., 0, :, :].numel()
            first = calls.get((path, node.name), ConvCall(node.name, tuple(seen.shape), tuple(made.shape), 0))
            calls[path, node.name] = replace(first, output_positions=(first.output_positions or 0) + places)
        untraced_convs.forget(made)
        return made

    with (
        eval_mode(module),
        MacCounter() as counter,
        intercept_convs(module, parts, look),
        Conv2dRecorder(untraced_convs.note),
    ):
        run_example(module, inputs)
    return ForwardRecord(calls, counter.macs, tuple(untraced_convs.found.values()))


class _Beside:
    """Keeps every call of conv2d whose weight is not a `Conv2d`'s, but for those that somebody looks at."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {id(p) for m in module.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()}
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.found: dict[str, Convolution] = {}
        self.last: tuple[Any, str] = (None, "")

    def note(self, call: Conv2dCall) -> None:
        given, made = call
        weight = given["weight"]
        if id(weight) in self.own:
            return
        name = self.names.get(id(weight), f"conv2d[{len(self.found)}]")
        groups, kernel = given["groups"], (weight.shape[2], weight.shape[3])
        sizes = weight.shape[1] * groups, weight.shape[0], kernel, groups, given["bias"] is not None
        self.found.setdefault(name, Convolution(name, FUNCTIONAL_CONV, *sizes, (), UNTRACED_REASON))
        self.last = made, name

    def forget(self, made: Any) -> None:
        """The last call is known from a graph."""
        if made is self.last[0]:
            self.found.pop(self.last[1], None)
            self.last = (None, "")


@contextlib.contextmanager
def intercept_convs(module: nn.Module, parts: Mapping[str, fx.GraphModule], look: ConvCallback) -> Iterator[None]:
    """While it lasts, every convolution call in the parts of `module`, a copy of a program's, goes through `look`.

    `look` gets the part's path, the node, the convolution's input and output, and returns what goes on as the output.
    """
    undo: list[Callable[[], None]] = []
    try:
        for path, known in parts.items():
            part = module.get_submodule(path)
            if isinstance(part, fx.GraphModule):
                part.forward = _intercepted(look, path, part)
                undo.append(partial(delattr, part, "forward"))
            else:
                node = next(n for n in known.graph.nodes if n.target == SINGLE_CONV_NAME)
                hook = partial(_hook, look, path, node)
                undo.append(part.register_forward_hook(hook, with_kwargs=True).remove)
        yield
    finally:
        for step in undo:
            step()


def _hook(
    look: ConvCallback,
    path: str,
    node: fx.Node,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    made: Any,
) -> Any:
    return _through(look, path, node, next(iter((*args, *kwargs.values())), None), made)


def _through(look: ConvCallback, path: str, node: fx.Node, image: Any, made: Any) -> Any:
    """A subclass of `Conv2d` may take and return anything; only tensors are looked at."""
    return look(path, node, image, made) if isinstance(image, Tensor) and isinstance(made, Tensor) else made


def _intercepted(look: ConvCallback, path: str, part: fx.GraphModule) -> Callable[..., Any]:
    """A forward of a part in which what its convolutions make goes through `look`."""

    def on_node(node: fx.Node, made: Any, values: Values) -> Any:
        if is_conv2d(part, node):
            return _through(look, path, node, values[node.all_input_nodes[0]], made)
        return made

    def forward(*args: Any, **kwargs: Any) -> Any:
        return execute(part, bind_inputs(part, args, kwargs).values, on_node)

    return forward
