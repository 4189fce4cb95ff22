"""The inference form of a model: plain convolutions, norms folded, channel orders taken up, channels last."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

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


def deploy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of a converted model, or of any that traces, for inference only.

    Norms are folded into convolutions, ghost modules become two convolutions and a concatenation, or one more dense
    convolution where that saves a gather; the orders in which ghosts come are taken up by whoever reads them; weights
    are laid out N x H x W x C. `example_inputs` is what one forward takes; the result runs at other sizes as well.
    Answers are those of the model in evaluation mode, but for rounding: checked on `example_inputs` to 1e-4 of their
    largest value (1e-2 on a GPU, whose float32 may be TF32; 0.1 in half precision). Raises `GhostifyError` where it
    does not run, or is not equal.
    """
    with eval_mode(model):
        wanted = tensor_leaves(run_example(model, bind_example(model, example_inputs)))
    made = _graphs(model, example_inputs)
    notes = copy.copy(model.__dict__.get("meta", {}))
    with eval_mode(made):
        parts = [p for p, m in made.named_modules() if isinstance(m, fx.GraphModule)]
        for path in reversed(parts):
            inputs = _subgraph_inputs(made, path, example_inputs)
            if inputs is not None:
                _deploy_subgraph(made.get_submodule(path), inputs)  # type: ignore[arg-type]
    made = made.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    made.__dict__["meta"] = notes
    _check(wanted, made, example_inputs)
    return made


def _graphs(model: nn.Module, example: Any) -> nn.Module:
    if any(isinstance(m, fx.GraphModule) for m in model.modules()):
        return copy.deepcopy(model)
    return trace(model, example).module


def _deploy_subgraph(part: fx.GraphModule, inputs: PlaceholderValues) -> None:
    dense = _to_be_dense(part, inputs)
    _folded_orders(part, dense, inputs).apply()


def _folded_orders(part: fx.GraphModule, dense: set[str], inputs: PlaceholderValues) -> ChannelOrders:
    freeze_eval(part)
    fold_norms(part, dense)
    part.recompile()
    record_shapes(part, *inputs.values)
    return ChannelOrders(part)


def _to_be_dense(part: fx.GraphModule, inputs: PlaceholderValues) -> set[str]:
    """Ghost modules of few intrinsic maps, and those whose order would have to be gathered: one more dense convolution
    costs less than the copying does."""
    able: dict[str, Any] = {path: m.primary_conv.out_channels for path, m in part.named_modules() if can_be_dense(m)}
    if not able:
        return set()
    small = {path for path, count in able.items() if count <= ALWAYS_DENSE_MAPS}
    trial = _folded_orders(copy.deepcopy(part), small, inputs)
    gathered = {str(w.args[0][0].target) for w in trial.gathers()}  # type: ignore[index, union-attr]
    return small | {
        p for p, count in able.items() if count <= DENSE_MAX_MAPS and any(g.startswith(f"{p}.") for g in gathered)
    }


def _subgraph_inputs(made: nn.Module, path: str, example: Any) -> PlaceholderValues | None:
    """What the part at `path` gets when the example inputs run: None if nothing."""
    if not path and isinstance(made, fx.GraphModule):
        return bind_inputs(made, *as_arguments(example))
    seen = record_calls(made.get_submodule(path), made, path, bind_example(made, example))  # type: ignore[arg-type]
    return seen[0] if seen else None


def _check(answers: list[Tensor], made: nn.Module, example: Any) -> None:
    with eval_mode(made):
        again = tensor_leaves(call_model(made, bind_example(made, example)))
    for wanted, found in zip(answers, again, strict=True):
        if wanted.shape != found.shape or not wanted.is_floating_point() or not wanted.numel():
            continue
        mismatch = find_mismatch(found, wanted, of_largest=_tolerance(wanted))
        if mismatch is not None:
            raise GhostifyError(
                f"the inference form is {mismatch.difference:.2g} off answers that reach {mismatch.largest:.2g}: keep "
                f"the model as it is, and report this"
            )


def _tolerance(wanted: Tensor) -> float:
    if wanted.dtype not in (torch.float32, torch.float64):
        return HALF_TOLERANCE
    return TOLERANCE if wanted.device.type == "cpu" or wanted.dtype == torch.float64 else TF32_TOLERANCE
