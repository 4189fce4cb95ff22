"""Milliseconds of single layers and whole models in their inference form: original and ghosts by turns, and kept.

On a GPU where the model is there, in its own dtype; on a CPU layers are timed in float32.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.deployment.inference_form import deploy
from ghostify.graph.program import Convolution, Program
from ghostify.graph.tracing import trace
from ghostify.io.atomic import write_text_atomic
from ghostify.modules.ghost import GhostModule, build_ghost_module
from ghostify.modules.layout import GhostLayout
from ghostify.pruning.slicing import slice_conv
from ghostify.timing.timer import LatencyTimer

ROUNDS = 9
Form = tuple[nn.Conv2d, GhostLayout | None]
Counts = tuple[int | None, int | None]


def cache_folder() -> Path:
    """GHOSTIFY_CACHE, or ~/.cache/ghostify."""
    return Path(os.environ.get("GHOSTIFY_CACHE", Path.home() / ".cache/ghostify"))


def cache_file() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "milliseconds.json"


def layer_latency(
    conv: nn.Conv2d, conv_info: Convolution, layouts: Sequence[GhostLayout | None], clock: LatencyTimer
) -> list[float]:
    """Median milliseconds of all calls of a layer, norm and ReLU folded in, for each layout (None: as it is).

    Measured on random images of the shapes of its calls; kept on disk by shapes, runtime and its version, threads,
    and processor or GPU.
    """
    return _form_latencies([(conv, layout) for layout in (None, *layouts)], conv_info, clock)[1:]


def pruned_latency(conv: nn.Conv2d, conv_info: Convolution, ways: Sequence[Counts], clock: LatencyTimer) -> list[float]:
    """The same of a dense or depthwise convolution as it is, first, and where it makes and reads so many maps (None:
    all)."""
    some = ([None if count is None else range(count) for count in way] for way in ways)
    smaller = [slice_conv(conv, *maps) for maps in some]
    return _form_latencies([(own, None) for own in (conv, *smaller)], conv_info, clock)


def model_latency(program: Program, clock: LatencyTimer) -> float:
    """Median milliseconds of one forward of the example inputs, in the original's own inference form."""
    return interleaved_latency([program.module], program.example, clock)[0]


def interleaved_latency(models: Sequence[nn.Module], example: Any, clock: LatencyTimer | None = None) -> list[float]:
    """Median milliseconds of one forward of each model's inference form, by turns; in eager PyTorch by default."""
    small = [deploy(m, example) for m in models]
    return (clock or LatencyTimer()).latencies_ms(small, [example] * len(small))


def _form_latencies(forms: Sequence[Form], conv_info: Convolution, clock: LatencyTimer) -> list[float]:
    """Median milliseconds of all calls of a layer, for each form of it."""
    total = [0.0] * len(forms)
    for shape in [call.input_shape for call in conv_info.calls if call.input_shape is not None]:
        keys = [_key(form, shape, clock) for form in forms]
        taken = _time_missing(keys, [partial(_build_layer, form, shape) for form in forms], clock)
        total = [spent + more for spent, more in zip(total, taken, strict=True)]
    return total


def _time_missing(
    keys: Sequence[str], forms: Sequence[Callable[[], tuple[nn.Module, Tensor]]], clock: LatencyTimer
) -> list[float]:
    """Milliseconds of each form, by its key on disk; those not known yet are timed by turns with the first."""
    known = _read()
    if any(key not in known for key in keys):
        missing = [k for k, key in enumerate(keys) if key not in known and key != keys[0]]
        models, images = zip(*(forms[k]() for k in (0, *missing)), strict=True)
        first, *taken = clock.latencies_ms(models, images, ROUNDS)
        known.setdefault(keys[0], first)
        share = known[keys[0]] / first  # what was measured before was another mood of the machine
        known |= {keys[k]: spent * share for k, spent in zip(missing, taken, strict=True)}
        _write(known)
    return [known[key] for key in keys]


def _build_layer(form: Form, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A convolution of such attributes, norm and activation behind it, as `deploy` makes it; images for it."""
    conv, layout = form
    plain, images = copy.deepcopy(conv).to(*_timed_as(conv)), _images(conv, shape)
    norm = nn.BatchNorm2d(conv.out_channels).to(plain.weight)
    module = trace(nn.Sequential(plain, norm, nn.ReLU()).eval()).module
    if layout is not None:
        module.set_submodule("0", _filled(build_ghost_module(plain, layout)))
    return deploy(module, images), images


def _timed_as(conv: nn.Conv2d) -> tuple[torch.device, torch.dtype]:
    """Where a layer is timed, and in which type."""
    device, dtype = conv.weight.device, conv.weight.dtype
    return device, torch.float32 if device.type == "cpu" else dtype


def _filled(ghost: GhostModule) -> GhostModule:
    for parameter in ghost.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    return ghost


def _images(conv: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    drawn = torch.randn(shape[0], conv.in_channels, *shape[2:], generator=torch.Generator().manual_seed(0))
    return drawn.to(*_timed_as(conv))


def _key(form: Form, shape: tuple[int, ...], clock: LatencyTimer) -> str:
    conv, layout = form
    device, dtype = _timed_as(conv)
    layer = (
        type(conv).__name__, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.padding_mode, conv.dilation, conv.groups, shape[0], *shape[2:],
    )  # fmt: skip
    on_cpu = (torch.get_num_threads(), clock.version, processor())
    machine = on_cpu if device.type == "cpu" else (clock.version, dtype, gpu(device))
    facts = ", ".join([*map(repr, layer), layout_text(layout), *map(repr, machine)])
    return hashlib.sha256(f"({facts})".encode()).hexdigest()[:24]


def layout_text(layout: GhostLayout | None) -> str:
    """What stands for a layout in the keys on disk: it must stay as it is for measurements to be found again."""
    if layout is None:
        return "None"
    return f"Layout({', '.join(f'{name}={value}' for name, value in layout.to_dict().items())})"


def gpu(device: torch.device) -> str:
    """Its name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def processor() -> str:
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read() -> dict[str, float]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _write(known: dict[str, float]) -> None:
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(known))
    except OSError:
        return  # nowhere to keep it: measured again next time
