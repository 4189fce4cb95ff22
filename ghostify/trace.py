"""Any `nn.Module` -> a traced program in which every use of every `Conv2d` is known."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ghostify.errors import GhostifyError
from ghostify.kinds import is_plain, plain
from ghostify.modes import evaluating

Shape = tuple[int, ...]
CONV2D_FUNCTIONS = (F.conv2d, torch.conv2d)


@dataclass(frozen=True)
class Call:
    """One use of a convolution: its graph node, and N x C x H x W shapes where example inputs were given."""

    node: str
    input_shape: Shape | None = None
    output_shape: Shape | None = None


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution of the model, with every call of it.

    `name` is the module's path, or the path of the weight for `torch.nn.functional.conv2d`. `kind` is the class name,
    or "conv2d" for the function. `obstacle` says why it cannot be taken apart, if it cannot.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    groups: int
    bias: bool
    calls: tuple[Call, ...]
    obstacle: str | None = None

    @property
    def taps(self) -> int:
        """Multiply-accumulates for one output value."""
        return self.inputs // self.groups * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced copy of the caller's model; read-only from here on. `macs` counts one forward of the example inputs."""

    module: fx.GraphModule
    convolutions: tuple[Convolution, ...]
    macs: int | None = None

    def conv(self, name: str) -> nn.Conv2d:
        """The convolution `name` as a plain module; it shares the program's parameters where it is one there."""
        return as_module(self.module, name)


class Mode(nn.Module):
    """Stands in a graph for `self.training` of the module that read it, so that `train()` and `eval()` still count."""

    def forward(self) -> bool:
        return self.training


def fixed(value: Any, default: Any, name: str) -> None:
    """Stand guard in a graph over an optional argument that was left at its default when the model was traced."""
    if value is not default and not (type(value) is type(default) and value == default):
        raise GhostifyError(
            f"argument {name!r} was fixed at its default {default!r} when the model was traced: "
            f"name it in example_inputs to keep it an input"
        )


def same_mode(mode: bool, traced: bool, name: str) -> None:
    """Stand guard in a graph over a module whose forward branches on `training`: tracing followed one way only."""
    if mode is not traced:
        was, now = ("train", "eval") if traced else ("eval", "train")
        raise GhostifyError(
            f"{name or 'the model'} branches on its mode and was traced in {was} mode: "
            f"call .{now}() on the original before converting it, to have it the other way"
        )


def trace(model: nn.Module, example_inputs: Any = None) -> Program:
    """Trace a copy of `model` into a `Program` of every convolution call.

    `example_inputs` is what one forward takes (a tensor, a tuple of arguments or a dict of keywords); with it, shapes
    and MACs are recorded. Raises `GhostifyError` where the model cannot be copied, traced or run.
    """
    args, kwargs = as_arguments(example_inputs)
    try:
        root = copy.deepcopy(model, _detached(model))
    except Exception as error:
        raise GhostifyError(f"{type(model).__name__} cannot be copied: {error}") from error
    _refuse_uninitialised(root)
    graph, leaves = _trace_with_leaves(root, len(args), set(kwargs))
    module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    module.train(model.training)
    calls, macs = ({}, None) if example_inputs is None else _run(module, args, kwargs)
    return Program(module, tuple(_convolutions(module, calls, leaves)), macs)


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward, from a tensor, a tuple or list, or a dict of keywords."""
    if batch is None:
        return (), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def bind_inputs(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of a traced module's placeholders, in order, for one forward of `args` and `kwargs`."""
    positional, values = list(args), []
    for node in (n for n in module.graph.nodes if n.op == "placeholder"):
        if node.target in kwargs:
            values.append(kwargs[node.target])
        elif positional:
            values.append(positional.pop(0))
        elif node.args:
            values.append(node.args[0])
        else:
            raise GhostifyError(f"the model's input {node.target!r} is missing from the example or calibration inputs")
    return values


def called(module: nn.Module, node: fx.Node) -> nn.Module:
    """The submodule that a `call_module` node calls."""
    return module.get_submodule(str(node.target))


def as_module(module: fx.GraphModule, name: str) -> nn.Conv2d:
    """The convolution called `name` in a traced module as a plain one: itself, what its class amounts to, or a `Conv2d`
    around a functional call's parameters."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return _functional_conv(module, next(n for n in module.graph.nodes if _functional_weight(module, n) == name))
    assert isinstance(found, nn.Conv2d)
    made = plain(found)
    assert isinstance(made, nn.Conv2d)
    return made


def _detached(model: nn.Module) -> dict[int, Any]:
    """Copies of the tensors that modules keep from a forward with gradients, which deepcopy refuses."""
    held = [v for m in model.modules() for v in tree_leaves(list(vars(m).values())) if isinstance(v, Tensor)]
    return {id(v): v.detach().clone() for v in held if not v.is_leaf}


class _Tracer(fx.Tracer):
    """Symbolic tracing that keeps `self.training` live and takes as leaves what is known, or found, not to trace."""

    def __init__(self, leaves: Mapping[str, str], settled: set[str], positional: int, keywords: set[str]) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.leaves, self.settled = leaves, settled
        self.last_mode: str | None = None
        self.notrace = tuple(get_notrace_modules())
        self.positional, self.keywords = positional, keywords
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves
            or isinstance(m, (*self.notrace, nn.Conv2d))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not in a `finally`: after an error the top names the module that does not trace
        return result

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        parameter = sig.parameters.get(name)
        if parameter is None or parameter.default is parameter.empty or name in self.keywords:
            return proxy
        positional = [p for p in sig.parameters if p != "self"].index(name) < self.positional
        if positional or not isinstance(parameter.default, bool | int | float | str | None):
            return proxy
        self.create_proxy("call_function", fixed, (proxy, parameter.default, name), {})
        return parameter.default

    def mode_of(self, path: str, module: nn.Module) -> fx.Proxy | bool:
        self.last_mode = path
        if "ghostify_mode" not in module._modules:
            module.ghostify_mode = Mode().train(module.__dict__["training"])
        mode = self.create_proxy("call_module", f"{path}.ghostify_mode".lstrip("."), (), {})
        if path not in self.settled:
            return mode
        now = module.__dict__["training"]
        self.create_proxy("call_function", same_mode, (mode, now, path), {})
        return now


@contextlib.contextmanager
def _live_training(root: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """While tracing, reading `training` of a module of `root` yields a node of its graph."""
    paths = {id(m): path for path, m in root.named_modules()}

    def get(module: nn.Module) -> Any:
        path = None if isinstance(module, Mode) else paths.get(id(module))
        return module.__dict__["training"] if path is None else tracer.mode_of(path, module)

    def put(module: nn.Module, mode: bool) -> None:
        module.__dict__["training"] = mode

    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


def _trace_with_leaves(root: nn.Module, positional: int, keywords: set[str]) -> tuple[fx.Graph, dict[str, str]]:
    """Trace; whatever module turns out not to trace becomes a leaf, with the reason, and tracing starts again.

    One that branches on its own mode and holds convolutions, or is the whole model, is traced in its present mode.
    """
    leaves: dict[str, str] = {}
    settled: set[str] = set()
    while True:
        tracer = _Tracer(leaves, settled, positional, keywords)
        try:
            with _live_training(root, tracer):
                return tracer.trace(root), leaves
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            inside = tracer.inside[-1] if tracer.inside else ""
            for module in root.modules():
                module._modules.pop("ghostify_mode", None)
            convolves = any(isinstance(m, nn.Conv2d) for m in root.get_submodule(inside).modules())
            if tracer.last_mode == inside and inside not in settled and (convolves or not inside):
                settled.add(inside)
            elif not inside:
                raise GhostifyError(
                    f"{type(root).__name__}.forward cannot be traced ({reason}): ghostify its submodules one by one, "
                    f"or rewrite that line of forward without control flow on tensors"
                ) from error
            else:
                leaves[inside] = reason


def _refuse_uninitialised(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise GhostifyError(f"{name} is lazy and has no shape yet: run one forward of the model first")


class _Recorder(fx.Interpreter):
    """Runs a graph and notes the shapes at each node that may be a convolution."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[Shape, Shape]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_module", "call_function") and isinstance(result, Tensor) and n.all_input_nodes:
            source = self.env.get(n.all_input_nodes[0])
            if isinstance(source, Tensor):
                self.shapes[n.name] = (tuple(source.shape), tuple(result.shape))
        return result


def _run(module: fx.GraphModule, args: Any, kwargs: Any) -> tuple[dict[str, tuple[Shape, Shape]], int]:
    recorder = _Recorder(module)
    try:
        with evaluating(module), FlopCounterMode(display=False) as counter:
            recorder.run(*bind_inputs(module, args, kwargs), enable_io_processing=False)
    except GhostifyError:
        raise
    except Exception as error:
        raise GhostifyError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error
    return recorder.shapes, counter.get_total_flops() // 2


def _convolutions(
    module: fx.GraphModule, shapes: dict[str, tuple[Shape, Shape]], leaves: Mapping[str, str]
) -> Iterator[Convolution]:
    """Every convolution in order of first use: modules, functions, then those inside what does not trace."""
    uses: dict[str, list[fx.Node]] = defaultdict(list)
    readers = _Readers(module)
    for node in module.graph.nodes:
        name = _conv_name(module, node)
        if name is not None:
            uses[name].append(node)
    for name, nodes in uses.items():
        calls = tuple(Call(n.name, *shapes.get(n.name, (None, None))) for n in nodes)
        yield _describe(module, readers, name, nodes, calls)
    seen = {id(m) for m in (_submodule(module, name) for name in uses) if m is not None}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        target, holder = str(node.target), called(module, node)
        for path, inner in holder.named_modules(prefix=target):
            if isinstance(inner, nn.Conv2d) and id(inner) not in seen:
                seen.add(id(inner))
                why = leaves.get(target, "taken as one piece by the tracer")
                yield _of_module(path, inner, (Call(node.name),), f"inside {type(holder).__name__} {target!r}: {why}")


def _conv_name(module: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        return str(node.target) if isinstance(called(module, node), nn.Conv2d) else None
    if node.op == "call_function" and node.target in CONV2D_FUNCTIONS:
        return _functional_weight(module, node) or node.name
    return None


def _describe(
    module: fx.GraphModule, readers: _Readers, name: str, nodes: list[fx.Node], calls: tuple[Call, ...]
) -> Convolution:
    inner = _submodule(module, name)
    if inner is not None:
        return _of_module(name, inner, calls, _obstacle(readers, inner))
    if _functional_weight(module, nodes[0]) is None:
        shape = calls[0].output_shape or (0, 0)
        return Convolution(
            name, "conv2d", 0, shape[1], (0, 0), 1, False, calls, "its weight is computed in the forward"
        )
    obstacle: str | None
    if len({_settings(n) for n in nodes}) > 1:
        obstacle = "one weight is used with different strides, paddings or biases"
    else:
        obstacle = _obstacle(readers, _functional_conv(module, nodes[0]), own_uses=len(nodes))
    return _of_module(name, _functional_conv(module, nodes[0]), calls, obstacle, kind="conv2d")


def _of_module(
    name: str, conv: nn.Conv2d, calls: tuple[Call, ...], obstacle: str | None, kind: str | None = None
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
    )


class _Readers:
    """How many modules hold each parameter, and how many nodes fetch it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        fetched = [n for n in module.graph.nodes if n.op == "get_attr"]
        self.fetches = Counter(id(_attribute(module, str(n.target))) for n in fetched)


def _obstacle(readers: _Readers, conv: nn.Conv2d, own_uses: int = 0) -> str | None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(conv, h) for h in hooks):
        return "it carries hooks: remove them, then convert"
    if not is_plain(conv) and isinstance(why := plain(conv), str):
        return f"{type(conv).__module__}.{type(conv).__name__} is a Conv2d of its own kind: {why}"
    if conv.weight.is_complex() or not conv.weight.is_floating_point():
        return f"its weight is {conv.weight.dtype}"
    if any(readers.holders[id(p)] > 1 for p in conv.parameters()) or readers.fetches[id(conv.weight)] > own_uses:
        return "its weight is shared with another part of the model"
    return None


def _functional_weight(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Path of the parameter a functional convolution takes as weight, or None where it is computed."""
    if node.op != "call_function" or node.target not in CONV2D_FUNCTIONS:
        return None
    bound = _bind(node)
    for key in ("weight", "bias"):
        value = bound[key]
        if value is None and key == "bias":
            continue
        fetched = isinstance(value, fx.Node) and value.op == "get_attr"
        if not fetched or not isinstance(_attribute(module, value.target), nn.Parameter):
            return None
    if any(isinstance(bound[k], fx.Node) for k in ("stride", "padding", "dilation", "groups")):
        return None
    return bound["weight"].target


def _functional_conv(module: fx.GraphModule, node: fx.Node) -> nn.Conv2d:
    bound = _bind(node)
    weight = _attribute(module, bound["weight"].target)
    bias = None if bound["bias"] is None else _attribute(module, bound["bias"].target)
    conv = nn.Conv2d(
        weight.shape[1] * bound["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        bound["stride"],
        bound["padding"],
        bound["dilation"],
        bound["groups"],
        bias is not None,
        device="meta",
    )
    conv.weight, conv.bias = weight, bias
    return conv.train(module.training)


def _bind(node: fx.Node) -> dict[str, Any]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _settings(node: fx.Node) -> str:
    """Everything a functional convolution is called with but its input."""
    bound = {k: v.target if isinstance(v, fx.Node) else v for k, v in _bind(node).items() if k != "input"}
    return str(sorted(bound.items()))


def _submodule(module: nn.Module, name: str) -> nn.Conv2d | None:
    with contextlib.suppress(AttributeError):
        found = module.get_submodule(name)
        return found if isinstance(found, nn.Conv2d) else None
    return None


def _attribute(module: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(module)
