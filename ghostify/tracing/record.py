"""One forward of the example inputs: the shapes at every convolution call, and the multiply-accumulates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ghostify.graph.op_queries import is_conv2d
from ghostify.tracing.calls import Inputs, bind_inputs, run_example, spread
from ghostify.tracing.functional import Called, Watch
from ghostify.tracing.modes import evaluating
from ghostify.tracing.program import LONE, Call, Convolution

BESIDE = "it runs as a function in a forward that does not trace"

Look = Callable[[str, fx.Node, Any, Any], Any]


@dataclass(frozen=True)
class Record:
    """Convolution calls by part and node, and the MACs of the whole forward, attention and linear layers included.

    `beside` are the convolutions that ran as functions in forwards of which there is no graph.
    """

    calls: Mapping[tuple[str, str], Call]
    macs: int | None
    beside: tuple[Convolution, ...] = ()


def record(module: nn.Module, parts: Mapping[str, fx.GraphModule], inputs: Inputs) -> Record:
    """Run `inputs` once in evaluation mode. Raises `GhostifyError` where the model does not run."""
    calls: dict[tuple[str, str], Call] = {}
    beside = _Beside(module)

    def look(path: str, node: fx.Node, seen: Any, made: Any) -> Any:
        if isinstance(seen, Tensor) and isinstance(made, Tensor) and made.dim() >= 3:
            places = made[..., 0, :, :].numel()
            first = calls.get((path, node.name), Call(node.name, tuple(seen.shape), tuple(made.shape), 0))
            calls[path, node.name] = replace(first, places=(first.places or 0) + places)
        beside.forget(made)
        return made

    with (
        evaluating(module),
        FlopCounterMode(display=False) as counter,
        looking(module, parts, look),
        Watch(beside.note),
    ):
        run_example(module, inputs)
    return Record(calls, counter.get_total_flops() // 2, tuple(beside.found.values()))


class _Beside:
    """Keeps every call of conv2d whose weight is not a `Conv2d`'s, but for those that somebody looks at."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {id(p) for m in module.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()}
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.found: dict[str, Convolution] = {}
        self.last: tuple[Any, str] = (None, "")

    def note(self, call: Called) -> None:
        given, made = call
        weight = given["weight"]
        if id(weight) in self.own:
            return
        name = self.names.get(id(weight), f"conv2d[{len(self.found)}]")
        groups, kernel = given["groups"], (weight.shape[2], weight.shape[3])
        sizes = weight.shape[1] * groups, weight.shape[0], kernel, groups, given["bias"] is not None
        self.found.setdefault(name, Convolution(name, "conv2d", *sizes, (), BESIDE))
        self.last = made, name

    def forget(self, made: Any) -> None:
        """The last call is known from a graph."""
        if made is self.last[0]:
            self.found.pop(self.last[1], None)
            self.last = (None, "")


@contextlib.contextmanager
def looking(module: nn.Module, parts: Mapping[str, fx.GraphModule], look: Look) -> Iterator[None]:
    """While it lasts, every convolution call in the parts of `module`, a copy of a program's, goes through `look`.

    `look` gets the part's path, the node, the convolution's input and output, and returns what goes on as the output.
    """
    undo: list[Callable[[], None]] = []
    try:
        for path, known in parts.items():
            part = module.get_submodule(path)
            if isinstance(part, fx.GraphModule):
                interpreter = _Looking(part, partial(look, path))
                part.forward = partial(_interpreted, interpreter)
                undo.append(partial(delattr, part, "forward"))
            else:
                node = next(n for n in known.graph.nodes if n.target == LONE)
                hook = partial(_hook, look, path, node)
                undo.append(part.register_forward_hook(hook).remove)
        yield
    finally:
        for step in undo:
            step()


def _hook(look: Look, path: str, node: fx.Node, _module: nn.Module, inputs: Any, made: Any) -> Any:
    return look(path, node, inputs[0] if inputs else None, made)


def _interpreted(interpreter: fx.Interpreter, *args: Any, **kwargs: Any) -> Any:
    module = interpreter.module
    assert isinstance(module, fx.GraphModule)
    return interpreter.run(*spread(module, bind_inputs(module, args, kwargs))[0], enable_io_processing=False)


class _Looking(fx.Interpreter):
    """Runs a graph; what its convolutions make goes through `look`."""

    def __init__(self, module: fx.GraphModule, look: Callable[[fx.Node, Any, Any], Any]) -> None:
        super().__init__(module)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if is_conv2d(self.module, n):
            return self.look(n, self.env.get(n.all_input_nodes[0]), made)
        return made
