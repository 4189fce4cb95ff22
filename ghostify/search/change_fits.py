"""Changes of convolutions fitted to one half of the calibration images: moments, and what is computed instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, fx, nn

from ghostify.fitting import patches
from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.chosen_images import ChosenImages, choose_images, even_images
from ghostify.fitting.moments import AssignedMoments, Moments
from ghostify.fitting.sensitivity import PreparedCalibration
from ghostify.graph.batches import run_batch
from ghostify.graph.modes import eval_mode
from ghostify.graph.neighbours import following_norm_of
from ghostify.graph.observation import intercept_convs
from ghostify.graph.program import Program
from ghostify.modules.layout import GhostLayout
from ghostify.pruning.pruning_groups import PruningGroup, find_pruning_groups
from ghostify.search.halves import POSITIONS, check_range, conv_error_metric
from ghostify.search.model_changes import ConvChange
from ghostify.search.replacements import (
    DepthwiseGhosts,
    KeptMaps,
    LinearMaps,
    covariance_of,
    depthwise_ghosts,
    on_best_directions,
    on_directions_within_groups,
    predictors_from,
    without_pruned_inputs,
)

MAX_FITTED_IMAGES = 512
IDENTITY = nn.Conv2d(1, 1, 1, device="meta")

Replacement = Callable[[Tensor, Tensor], Tensor]  # of the output of a call, given its input and its output


@dataclass(frozen=True, eq=False)
class _Moments:
    """Moments of inputs and of outputs by convolution, and those of assigned ghosts by convolution and layout."""

    inputs: dict[str, Moments] = field(default_factory=dict)
    outputs: dict[str, Moments] = field(default_factory=dict)
    ghosts: dict[str, dict[GhostLayout, tuple[GhostAssignment, AssignedMoments]]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not (self.inputs or self.outputs or self.ghosts)

    def add_reduced(self, other: _Moments) -> None:
        """Add the moments of `other`, summed over all processes, in place."""
        for sums, more in ((self.inputs, other.inputs), (self.outputs, other.outputs)):
            sums |= {name: moments.all_reduced() for name, moments in more.items()}
        for name, by_layout in other.ghosts.items():
            reduced = {layout: (assigned, moments.all_reduced()) for layout, (assigned, moments) in by_layout.items()}
            self.ghosts.setdefault(name, {}).update(reduced)


class ChangeFits:
    """Fits changes to the original's maps on calibration images of even numbers, at most `MAX_FITTED_IMAGES`."""

    def __init__(self, program: Program, calibration: PreparedCalibration, seed: int) -> None:
        self.program, self.calibration, self.seed = program, calibration, seed
        self._convs = {conv.name: conv for conv in (*program.convolutions, *program.linear_layers)}
        self._names = {(c.subgraph_path, call.node): c.name for c in self._convs.values() for call in c.calls}
        self._moments = _Moments()
        self._is_fitted = even_images(calibration.batches.images, MAX_FITTED_IMAGES)
        fitted_images = int(self._is_fitted(torch.arange(calibration.batches.images)).sum())
        self._positions_per_map = patches.positions_per_map(POSITIONS, fitted_images)

    def collect(self, changes: Iterable[ConvChange]) -> None:
        """Add the moments of these changes that are missing, from one forward over the fitted images."""
        missing = self._missing(changes)
        if missing.is_empty:
            return

        def on_call(images: ChosenImages, path: str, node: fx.Node, image: Tensor, output: Tensor) -> Tensor:
            name, seed = self._names.get((path, node.name), ""), self.seed + images.first
            if name in missing.inputs:
                self._add_positions(missing.inputs[name], self._channels(name, images.of(image)), images.first)
            if name in missing.outputs:
                self._add_positions(missing.outputs[name], images.of(output), images.first)
            for assignment, moments in missing.ghosts.get(name, {}).values():
                self._add_neighbours(moments, assignment, images.of(output), seed)
            return output

        module = self.program.module
        for images in choose_images(self.calibration.batches, self._is_fitted):
            with eval_mode(module), intercept_convs(module, self.program.subgraphs, partial(on_call, images)):
                run_batch(module, images.inputs, images.number)
        self._moments.add_reduced(missing)

    def _missing(self, changes: Iterable[ConvChange]) -> _Moments:
        """Empty moments for those that the changes need and that are not known."""
        known, missing = self._moments, _Moments()
        for change in changes:
            conv, layout = self._convs[change.name], change.layout
            if change.kept_in is not None and conv.name not in known.inputs:
                missing.inputs[conv.name] = Moments.zero(conv.inputs // self._width(conv.name), 0)
            if change.has_kernels and layout not in known.ghosts.get(conv.name, {}):
                assert layout is not None
                assert change.assignment is not None
                moments = AssignedMoments.zero(layout.intrinsic, layout.kernel_size**2, layout.ghosts)
                missing.ghosts.setdefault(conv.name, {})[layout] = change.assignment, moments
            elif layout is not None and not change.has_kernels and conv.name not in known.outputs:
                missing.outputs[conv.name] = Moments.zero(conv.outputs, 0)
        return missing

    def _width(self, name: str) -> int:
        """The number of inputs that are one channel: more than one where maps are flattened before a linear layer."""
        return self._widths.get(name, 1) if self._convs[name] in self.program.linear_layers else 1

    @cached_property
    def _widths(self) -> dict[str, int]:
        groups = [g for g in find_pruning_groups(self.program) if isinstance(g, PruningGroup)]
        return {conv.name: read.width for group in groups for conv, read in group.refitted}

    def _channels(self, name: str, image: Tensor) -> Tensor:
        """The inputs of a convolution or linear layer as maps, a channel each."""
        width = self._width(name)
        return image if width == 1 else image.reshape(len(image), -1, width, 1)

    def _add_positions(self, moments: Moments, maps: Tensor, first: int) -> None:
        """Add maps at sampled positions."""
        maps = maps.float().cpu()
        rows = patches.gather_positions(
            maps, patches.sample_positions(maps.shape, self._positions_per_map, self.seed + first)
        )
        check_range(rows, first)
        moments.add(rows, rows[:, :0])

    def _add_neighbours(self, moments: AssignedMoments, assignment: GhostAssignment, maps: Tensor, seed: int) -> None:
        """Add a crop of maps: the neighbours of intrinsic maps, and the ghosts."""
        maps, size = maps.float().cpu(), math.isqrt(moments.v.shape[1])
        side = math.ceil(self._positions_per_map**0.5)
        crop = patches.random_crop(IDENTITY, maps, maps, side, size, seed)
        intrinsic = crop.padded_input[:, assignment.intrinsic[:, 0]]
        targets = patches.flatten_positions(crop.target)[:, assignment.ghosts]
        moments.add(patches.unfold_neighbours(intrinsic, size), targets, assignment.sources[:, 0])

    def replacement(self, change: ConvChange) -> Replacement:
        """What a changed convolution computes; `collect` comes first."""
        conv, maps = self._pruned_conv(change), self._maps(change)

        def replaced(image: Tensor, output: Tensor) -> Tensor:
            if conv is not None:
                output = conv(image[:, list(change.kept_in or ())])
            return output if maps is None else maps(output)

        return replaced

    def _pruned_conv(self, change: ConvChange) -> nn.Conv2d | None:
        moments = self._moments.inputs.get(change.name)
        if change.kept_in is None or moments is None or not moments.count:
            return None
        conv = self.program.conv(change.name)
        width, free_mean = self._width(change.name), self._has_free_mean(change.name)
        return without_pruned_inputs(conv, change.kept_in, moments, free_mean=free_mean, width=width)

    def _maps(self, change: ConvChange) -> LinearMaps | KeptMaps | DepthwiseGhosts | None:
        """How the outputs in a layout follow from those of the original; None where no image reaches them."""
        name, layout, assignment = change.name, change.layout, change.assignment
        if layout is None:
            return None
        free_mean = self._has_free_mean(name)
        if change.has_kernels:
            assigned, ghost_moments = self._moments.ghosts[name][layout]
            if not ghost_moments.count:
                return None
            return depthwise_ghosts(ghost_moments, assigned, free_mean=free_mean)
        moments = self._moments.outputs[name]
        if not moments.count:
            return None
        metric, rank = conv_error_metric(self.calibration, name, moments.raw()[0]), layout.intrinsic
        if change.kept_out is not None:
            covariance = covariance_of(moments, free_mean=free_mean)
            predictors = predictors_from(change.kept_out, covariance, float(moments.count))
            of_kept = moments.projected(torch.eye(len(metric), dtype=metric.dtype)[list(change.kept_out)])
            metric = predictors @ metric @ predictors.T
            maps = on_best_directions(of_kept, metric, rank, free_mean=free_mean)
            return KeptMaps(change.kept_out, maps, predictors)
        if assignment is not None and not layout.is_low_rank:
            return on_directions_within_groups(moments, metric, assignment, free_mean=free_mean)
        return on_best_directions(moments, metric, rank, free_mean=free_mean)

    def _has_free_mean(self, name: str) -> bool:
        """Whether a bias, or the norm that follows, absorbs constants."""
        conv = self._convs[name]
        return conv.bias or following_norm_of(self.program, conv) is not None
