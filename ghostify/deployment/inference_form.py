"""The inference form of a model: norms folded, ghost modules split, channel orders in the weights, channels last."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.arguments import a_model, anything, public
from ghostify.deployment.channel_order import ChannelOrders, record_shapes
from ghostify.deployment.folding import can_be_dense, fold_norms, freeze_eval
from ghostify.errors import GhostifyError
from ghostify.fitting.subgraph_inputs import record_calls
from ghostify.graph.inputs import (
    PlaceholderValues,
    as_arguments,
    bind_example,
    bind_inputs,
    call_model,
    run_example,
    tensor_leaves,
)
from ghostify.graph.modes import eval_mode
from ghostify.graph.tracing import trace
from ghostify.numerics import find_mismatch

TOLERANCE, TF32_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2, 0.1
ALWAYS_DENSE_MAPS = 64
DENSE_MAX_MAPS = 512


@public(model=a_model, example_inputs=anything)
def deploy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of a converted model, or of any model that traces, for inference only.

    Norms are folded into convolutions. Ghost modules become two convolutions and a concatenation, or a second dense
    convolution instead where that saves reordering its output. Consumers take the channels in the order in which they
    are computed. Weights are laid out N x H x W x C. `example_inputs` is what one forward takes; the result runs at
    other sizes as well. Its outputs equal the model's in evaluation mode up to rounding: checked on `example_inputs` to
    1e-4 of their maximum (1e-2 on a GPU, whose float32 may be TF32; 0.1 in half precision). Raises `GhostifyError`
    where the model does not run, or the outputs differ.
    """
    with eval_mode(model):
        expected = tensor_leaves(run_example(model, bind_example(model, example_inputs)))
    deployed = _traced_copy(model, example_inputs)
    metadata = copy.copy(model.__dict__.get("meta", {}))
    with eval_mode(deployed):
        subgraphs = {path: m for path, m in deployed.named_modules() if isinstance(m, fx.GraphModule)}
        for path, subgraph in reversed(subgraphs.items()):
            inputs = _subgraph_inputs(deployed, path, subgraph, example_inputs)
            if inputs is not None:
                _deploy_subgraph(subgraph, inputs)
    deployed = deployed.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    deployed.__dict__["meta"] = metadata
    _check_outputs(expected, deployed, example_inputs)
    return deployed


def _traced_copy(model: nn.Module, example: Any) -> nn.Module:
    if any(isinstance(m, fx.GraphModule) for m in model.modules()):
        return copy.deepcopy(model)
    return trace(model, example).module


def _deploy_subgraph(subgraph: fx.GraphModule, inputs: PlaceholderValues) -> None:
    dense = _to_be_dense(subgraph, inputs)
    _folded_orders(subgraph, dense, inputs).apply()


def _folded_orders(subgraph: fx.GraphModule, dense: set[str], inputs: PlaceholderValues) -> ChannelOrders:
    """Fold norms and split ghost modules, in place; returns the channel orders of the resulting graph."""
    freeze_eval(subgraph)
    concatenations = fold_norms(subgraph, dense)
    subgraph.recompile()
    return ChannelOrders(subgraph, concatenations, record_shapes(subgraph, *inputs.values))


def _to_be_dense(subgraph: fx.GraphModule, inputs: PlaceholderValues) -> set[str]:
    """Paths of the ghost modules that become two dense convolutions: those with few intrinsic maps, and those whose
    output would be reordered, since the second convolution then costs less than the copy."""
    intrinsic_counts = {
        path: module.primary_conv.out_channels for path, module in subgraph.named_modules() if can_be_dense(module)
    }
    if not intrinsic_counts:
        return set()
    always = {path for path, count in intrinsic_counts.items() if count <= ALWAYS_DENSE_MAPS}
    trial = _folded_orders(copy.deepcopy(subgraph), always, inputs)
    reordered = {str(node.args[0][0].target) for node in trial.reordered()}  # type: ignore[index, union-attr]
    return always | {
        path
        for path, count in intrinsic_counts.items()
        if count <= DENSE_MAX_MAPS and any(target.startswith(f"{path}.") for target in reordered)
    }


def _subgraph_inputs(
    deployed: nn.Module, path: str, subgraph: fx.GraphModule, example: Any
) -> PlaceholderValues | None:
    """The inputs of the subgraph at `path` when the example inputs run; None if it is not called."""
    if not path:
        return bind_inputs(subgraph, *as_arguments(example))
    calls = record_calls(subgraph, deployed, path, bind_example(deployed, example))
    return calls[0] if calls else None


def _check_outputs(expected: list[Tensor], deployed: nn.Module, example: Any) -> None:
    with eval_mode(deployed):
        actual = tensor_leaves(call_model(deployed, bind_example(deployed, example)))
    for reference, output in zip(expected, actual, strict=True):
        if reference.shape != output.shape or not reference.is_floating_point() or not reference.numel():
            continue
        mismatch = find_mismatch(output, reference, of_largest=_tolerance(reference))
        if mismatch is not None:
            raise GhostifyError(
                f"deploy: the inference form differs by {mismatch.difference:.2g} from outputs with maximum "
                f"{mismatch.largest:.2g}. Use the model as it is, and report this."
            )


def _tolerance(output: Tensor) -> float:
    if output.dtype not in (torch.float32, torch.float64):
        return HALF_TOLERANCE
    return TOLERANCE if output.device.type == "cpu" or output.dtype == torch.float64 else TF32_TOLERANCE
