"""The last feature maps of two models before pooling, recorded as they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.graph.call_hooks import on_calls
from ghostify.numerics import relative_squared_error

MAX_INITIAL_ERROR = 0.5


@dataclass(eq=False)
class LastMaps:
    """The maps that the module at `path` returned last, in each of the models."""

    path: str | None
    maps: dict[str, Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def record(self, model: nn.Module, name: str) -> Iterator[None]:
        """Record the maps of `model` under `name` while it runs."""
        self.maps.pop(name, None)
        if self.path is None:
            yield
            return
        with on_calls([model.get_submodule(self.path)], after=partial(self._keep, name)):
            yield

    def _keep(self, name: str, _: nn.Module, output: Any) -> None:
        self.maps[name] = output

    def error(self, name: str, expected: str) -> Tensor | None:
        """The squared error of the maps recorded under `name`, relative to the variance of those under `expected`."""
        if name not in self.maps or expected not in self.maps:
            return None
        return relative_squared_error(self.maps[name].float(), self.maps[expected].float(), over=(0, 2, 3))


def last_maps(original: nn.Module, converted: nn.Module, run: Callable[[nn.Module], Any]) -> LastMaps:
    """The last module with maps (N x C x H x W, more than one pixel) that both models have and that nearly agree.

    `run` runs a model on some images. Maps of pruned or reordered channels do not agree, so they are not compared.
    """
    shapes: dict[str, torch.Size] = {}
    names = {module: path for path, module in original.named_modules() if not list(module.children())}

    def on_call(module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            shapes.pop(names[module], None)  # so that the last call counts
            shapes[names[module]] = output.shape

    with on_calls(names, after=on_call):
        run(original)
    for path in reversed(shapes):
        try:
            converted.get_submodule(path)
        except AttributeError:
            continue
        maps = LastMaps(path)
        for model, name in ((original, "original"), (converted, "converted")):
            with maps.record(model, name):
                run(model)
        if maps.maps["converted"].shape == maps.maps["original"].shape:
            error = maps.error("converted", "original")
            return maps if error is not None and error < MAX_INITIAL_ERROR else LastMaps(None)
    return LastMaps(None)
