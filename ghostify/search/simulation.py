"""Simulated conversions: the outputs of the original model with some of its convolutions changed, on unseen images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ghostify.evaluation.output_comparison import OutputComparison, OutputSums
from ghostify.fitting.chosen_images import ChosenImages, choose_images, odd_images
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.fitting.output_errors import chosen_outputs, outputs_of
from ghostify.fitting.sensitivity import PreparedCalibration
from ghostify.graph.executor import Values, execute, resume
from ghostify.graph.inputs import cloned, values_of
from ghostify.graph.linear_layers import FEATURES_RANK, as_maps
from ghostify.graph.modes import eval_mode
from ghostify.graph.observation import intercept_convs
from ghostify.graph.program import Program
from ghostify.modules.hooks import has_hooks
from ghostify.search.change_fits import ChangeFits, Replacement
from ghostify.search.model_changes import ModelChange

MAX_MEASURED_IMAGES = 64


class Simulator:
    """Measures the output errors of changed models: fitted to images of even numbers, tested on some of odd numbers.

    Where the whole forward is one graph, only the nodes from the first change on are computed for each model.
    """

    def __init__(self, program: Program, calibration: PreparedCalibration, seed: int) -> None:
        self.program, self.calibration, self.batches, self.seed = program, calibration, calibration.batches, seed
        self.scale = calibration.output_scale
        self._fits = ChangeFits(program, calibration, seed)
        layers = (*program.convolutions, *program.linear_layers)
        self._names = {(c.subgraph_path, call.node): c.name for c in layers for call in c.calls}

    @torch.no_grad()
    def compare(self, models: Sequence[ModelChange]) -> list[OutputComparison | None]:
        """The outputs of each changed model against the original's; None where they do not correspond."""
        if not models or not self.scale.deviations:
            return [None] * len(models)
        self._fits.collect([change for model in models for change in model])
        replacements = [{change.name: self._fits.replacement(change) for change in model} for model in models]
        sums = [OutputSums() for _ in models]
        run = self._run_from_first_change if self._is_one_graph else self._run_whole
        for images in choose_images(self.batches, odd_images(self.batches.images, MAX_MEASURED_IMAGES)):
            run(images, replacements, sums)
        (total,) = all_reduce_sum(torch.stack([s.values for s in sums]))
        return [OutputSums(values).comparison() for values in total]

    @property
    def _is_one_graph(self) -> bool:
        return list(self.program.subgraphs) == [""] and not has_hooks(self.program.module)

    def _run_whole(
        self, images: ChosenImages, models: Sequence[Mapping[str, Replacement]], sums: Sequence[OutputSums]
    ) -> None:
        """One forward for each model."""
        module = self.program.module
        expected = outputs_of(module, images, self.scale.importance)

        def on_conv(
            replacements: Mapping[str, Replacement], path: str, node: fx.Node, image: Tensor, output: Tensor
        ) -> Tensor:
            replacement = replacements.get(self._names.get((path, node.name), ""))
            return output if replacement is None else replacement(image, output)

        for replacements, model_sums in zip(models, sums, strict=True):
            with intercept_convs(module, self.program.subgraphs, partial(on_conv, replacements)):
                outputs = outputs_of(module, images, self.scale.importance)
            model_sums.add(outputs, expected, self.scale.deviations, images.size)

    def _run_from_first_change(
        self, images: ChosenImages, models: Sequence[Mapping[str, Replacement]], sums: Sequence[OutputSums]
    ) -> None:
        """One forward of the original, from which each model branches off at its first changed node."""
        module = self.program.module
        assert isinstance(module, fx.GraphModule)
        expected = outputs_of(module, images, self.scale.importance)
        starts = [self._first_node(module, replacements) for replacements in models]

        def replaced(replacements: Mapping[str, Replacement], node: fx.Node, value: Any, values: Values) -> Any:
            replacement = replacements.get(self._names.get(("", node.name), ""))
            if replacement is None:
                return value
            result = replacement(as_maps(values[node.all_input_nodes[0]]), as_maps(value))
            return result.flatten(1) if value.dim() == FEATURES_RANK else result

        def on_node(node: fx.Node, value: Any, values: Values) -> Any:
            for start, replacements, model_sums in zip(starts, models, sums, strict=True):
                if start is node:
                    changed = replaced(replacements, node, value, values)
                    output = resume(module, node, changed, values, partial(replaced, replacements))
                    model_sums.add(
                        chosen_outputs(output, images, self.scale.importance),
                        expected,
                        self.scale.deviations,
                        images.size,
                    )
            return value

        with eval_mode(module):
            execute(module, values_of(cloned(images.inputs)), on_node)

    def _first_node(self, module: fx.GraphModule, replacements: Mapping[str, Replacement]) -> fx.Node:
        """The first node that a model changes; the output where it changes none."""
        nodes = list(module.graph.nodes)
        return next((n for n in nodes if self._names.get(("", n.name)) in replacements), nodes[-1])
