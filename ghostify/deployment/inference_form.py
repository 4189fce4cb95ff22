"""The inference form of a model: norms folded, ghost modules split, channel orders in the weights, channels last."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghostify.arguments import a_model, anything, public
from ghostify.deployment.channel_order import ChannelOrders, record_shapes
from ghostify.deployment.dense_ghosts import dense_candidates, mac_allowance, within_allowance
from ghostify.deployment.folding import fold_norms, freeze_eval
from ghostify.deployment.output_check import Tolerance, check_outputs, output_leaves
from ghostify.errors import GhostifyError
from ghostify.fitting.subgraph_inputs import record_calls
from ghostify.graph.exported import is_exported
from ghostify.graph.inputs import (
    CallInputs,
    PlaceholderValues,
    as_arguments,
    bind_example,
    bind_inputs,
    call_model,
    run_example,
    tensor_leaves,
)
from ghostify.graph.model_copy import copy_module
from ghostify.graph.modes import eval_mode
from ghostify.graph.parametrizations import fix_computed_weights
from ghostify.graph.tracing import trace
from ghostify.modules.hooks import has_hooks
from ghostify.user_warnings import warn_user

TOLERANCE, TF32_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2, 0.1
HALF_TYPES = (torch.float16, torch.bfloat16)
IMAGE_DIM = 4
ALWAYS_DENSE_MAPS = 64
DENSE_MAX_MAPS = 512


@public(model=a_model, example_inputs=anything)
def deploy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of a converted model, or of any model that traces, for inference only.

    Norms are folded into convolutions. Ghost modules become two convolutions and a concatenation, or a second dense
    convolution instead where that saves reordering its output; after a conversion under a budget of MACs only as far as
    the whole keeps within that budget. Consumers take the channels in the order in which they are computed. Weights are
    laid out N x H x W x C. `example_inputs` is what one forward takes; the result runs at other sizes as well. Its
    outputs equal the model's in evaluation mode up to rounding: checked on `example_inputs` to 1e-4 of their maximum
    (1e-2 on a GPU, whose float32 may be TF32; 0.1 in half precision), and for integers and booleans in 99 % of the
    values. Warns of outputs that cannot be compared, such as boxes where their number changes. Raises `GhostifyError`
    where the model does not run, or the outputs differ.
    """
    expected = _outputs(model, example_inputs)
    deployed = _traced_copy(model, example_inputs)
    fix_computed_weights(deployed)
    metadata = copy.copy(model.__dict__.get("meta", {}))
    allowance = mac_allowance(model, example_inputs)
    deployed.eval()
    subgraphs = {path: m for path, m in deployed.named_modules() if isinstance(m, fx.GraphModule)}
    for path, subgraph in reversed(subgraphs.items()):
        inputs = _subgraph_inputs(deployed, path, subgraph, example_inputs)
        if inputs is not None:
            allowance -= _deploy_subgraph(subgraph, inputs, allowance)
    _to_channels_last(deployed.eval().requires_grad_(False))
    deployed.__dict__["meta"] = metadata
    _check(deployed, expected, example_inputs, tolerance_of(model, bind_example(model, example_inputs)))
    return deployed


def tolerance_of(model: nn.Module, inputs: CallInputs, least: float = TOLERANCE) -> Tolerance:
    """The permitted difference of an output of the model, relative to its maximum."""
    with eval_mode(model), _HalfDetector() as detector:
        call_model(model, inputs)
    is_half = detector.is_half or any(t.dtype in HALF_TYPES for t in (*model.parameters(), *model.buffers()))

    def tolerance(output: Tensor) -> float:
        if is_half or output.dtype in HALF_TYPES:
            return HALF_TOLERANCE
        is_exact = output.device.type == "cpu" or output.dtype == torch.float64
        return least if is_exact else max(least, TF32_TOLERANCE)

    return tolerance


class _HalfDetector(TorchDispatchMode):
    """While active, finds out whether anything is computed in half precision, as under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.is_half = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.is_half |= any(t.dtype in HALF_TYPES for t in tensor_leaves(result))
        return result


def _outputs(model: nn.Module, example: Any) -> dict[str, Any]:
    """All outputs in evaluation mode."""
    with eval_mode(model):
        return output_leaves(run_example(model, bind_example(model, example)))


def _check(deployed: nn.Module, expected: dict[str, Any], example: Any, tolerance: Tolerance) -> None:
    checked = check_outputs(_outputs(deployed, example), expected, tolerance)
    if checked.difference is not None:
        raise GhostifyError(
            f"deploy: the inference form differs from the model: {checked.difference}. "
            "Use the model as it is, and report this."
        )
    if checked.uncompared:
        warn_user(
            f"deploy: outputs that were not compared with the model's: {'; '.join(checked.uncompared)}. "
            "Compare them on images of your own."
        )


@torch.no_grad()
def _to_channels_last(module: nn.Module) -> None:
    """Lay out all tensors of four dimensions N x H x W x C, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == IMAGE_DIM:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _traced_copy(model: nn.Module, example: Any) -> nn.Module:
    if any(isinstance(m, fx.GraphModule) and not is_exported(m) for m in model.modules()):
        return copy_module(model)
    return trace(model, example).module


@torch.no_grad()
def _deploy_subgraph(subgraph: fx.GraphModule, inputs: PlaceholderValues, allowance: float) -> float:
    """Deploy a subgraph, in place; returns the MACs by which ghosts that become dense raise its cost."""
    dense = _to_be_dense(subgraph, inputs, allowance)
    _folded_orders(subgraph, set(dense), inputs).apply()
    return sum(dense.values())


def _folded_orders(subgraph: fx.GraphModule, dense: set[str], inputs: PlaceholderValues) -> ChannelOrders:
    """Fold norms and split ghost modules, in place; returns the channel orders of the resulting graph."""
    freeze_eval(subgraph)
    concatenations = fold_norms(subgraph, dense)
    subgraph.recompile()
    with eval_mode(subgraph):
        shapes = record_shapes(subgraph, inputs)
    return ChannelOrders(subgraph, concatenations, shapes)


def _to_be_dense(subgraph: fx.GraphModule, inputs: PlaceholderValues, allowance: float) -> dict[str, int]:
    """Paths of the ghost modules that become two dense convolutions, with the MACs that this adds, `allowance` at most.

    These are the modules with few intrinsic maps, and those whose output would be reordered, since the second
    convolution then takes less time than the copy.
    """
    with eval_mode(subgraph):
        candidates = dense_candidates(subgraph, inputs)
    if not candidates:
        return {}
    few = [c for c in candidates if c.intrinsic <= ALWAYS_DENSE_MAPS]
    always = within_allowance(few, allowance)
    trial = _folded_orders(copy.deepcopy(subgraph), set(always), inputs)
    reordered = {str(node.args[0][0].target) for node in trial.reordered()}  # type: ignore[index, union-attr]
    copied = [
        c
        for c in candidates
        if c.path not in always
        and c.intrinsic <= DENSE_MAX_MAPS
        and any(target.startswith(f"{c.path}.") for target in reordered)
    ]
    return always | within_allowance(copied, allowance - sum(always.values()))


def _subgraph_inputs(
    deployed: nn.Module, path: str, subgraph: fx.GraphModule, example: Any
) -> PlaceholderValues | None:
    """The inputs of the subgraph at `path` when the example inputs run; None if it is not called."""
    if not path and not has_hooks(subgraph):
        return bind_inputs(subgraph, *as_arguments(example))
    calls = record_calls(subgraph, deployed, path, bind_example(deployed, example))
    return calls[0] if calls else None
