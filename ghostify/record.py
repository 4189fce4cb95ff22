"""One forward of the example inputs: the shapes at every convolution call, and the multiply-accumulates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ghostify.calls import Inputs, bind_inputs, run, spread
from ghostify.errors import GhostifyError
from ghostify.functional import is_functional
from ghostify.modes import evaluating
from ghostify.program import LONE, Call, called

Look = Callable[[str, fx.Node, Any, Any], Any]


@dataclass(frozen=True)
class Record:
    """Convolution calls by part and node, and the MACs of the whole forward, attention and linear layers included."""

    calls: Mapping[tuple[str, str], Call]
    macs: int | None


def record(module: nn.Module, parts: Mapping[str, fx.GraphModule], inputs: Inputs) -> Record:
    """Run `inputs` once in evaluation mode. Raises `GhostifyError` where the model does not run."""
    calls: dict[tuple[str, str], Call] = {}

    def look(path: str, node: fx.Node, seen: Any, made: Any) -> Any:
        if isinstance(seen, Tensor) and isinstance(made, Tensor) and made.dim() >= 3:
            places = made[..., 0, :, :].numel()
            first = calls.get((path, node.name), Call(node.name, tuple(seen.shape), tuple(made.shape), 0))
            calls[path, node.name] = replace(first, places=(first.places or 0) + places)
        return made

    try:
        with evaluating(module), FlopCounterMode(display=False) as counter, looking(module, parts, look):
            run(module, inputs)
    except GhostifyError:
        raise
    except Exception as error:
        raise GhostifyError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error
    return Record(calls, counter.get_total_flops() // 2)


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
        if is_functional(n) or (n.op == "call_module" and isinstance(called(self.module, n), nn.Conv2d)):
            return self.look(n, self.env.get(n.all_input_nodes[0]), made)
        return made
