"""Latencies (ms) of single layers and complete models in inference form; those of layers are cached on disk.

On the GPU of the model, in its own dtype, or on the CPU, where layers are timed in float32.
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
from ghostify.errors import GhostifyError
from ghostify.files import read_json
from ghostify.graph.program import Convolution, Program
from ghostify.graph.tracing import trace
from ghostify.io.atomic import write_text_atomic
from ghostify.modules.ghost import GhostModule, build_ghost_module
from ghostify.modules.layout import GhostLayout
from ghostify.pruning.slicing import slice_conv
from ghostify.timing.timer import LatencyTimer

ROUNDS = 9
ConvVariant = tuple[nn.Conv2d, GhostLayout | None]  # a convolution, or a ghost module in its place
Counts = tuple[int | None, int | None]  # numbers of outputs and inputs; None: all


def cache_folder() -> Path:
    """GHOSTIFY_CACHE, or ~/.cache/ghostify."""
    return Path(os.environ.get("GHOSTIFY_CACHE", os.path.expanduser("~/.cache/ghostify")))


def cache_file() -> Path:
    """The file of cached latencies."""
    return cache_folder() / "milliseconds.json"


def layer_latency(
    conv: nn.Conv2d, conv_info: Convolution, layouts: Sequence[GhostLayout | None], timer: LatencyTimer
) -> list[float]:
    """Median latency (ms) of all calls of a layer, with a norm and ReLU folded in, for each layout (None: unchanged).

    Measured on random images of the shapes of the calls; cached on disk by shapes, runtime and its version, threads,
    and processor or GPU.
    """
    return _form_latencies([(conv, layout) for layout in (None, *layouts)], conv_info, timer)[1:]


def pruned_latency(
    conv: nn.Conv2d, conv_info: Convolution, kept_counts: Sequence[Counts], timer: LatencyTimer
) -> list[float]:
    """The same for a dense or depthwise convolution: unchanged, first, then for each number of outputs and inputs."""
    channels = ([None if count is None else range(count) for count in counts] for counts in kept_counts)
    pruned = [slice_conv(conv, *kept) for kept in channels]
    return _form_latencies([(form, None) for form in (conv, *pruned)], conv_info, timer)


def model_latency(program: Program, timer: LatencyTimer) -> float:
    """Median latency (ms) of one forward of the example inputs, in the original's inference form."""
    return interleaved_latency([program.module], program.example, timer)[0]


def interleaved_latency(models: Sequence[nn.Module], example: Any, timer: LatencyTimer | None = None) -> list[float]:
    """Median latency (ms) of one forward of each model's inference form, interleaved; by default in eager PyTorch."""
    deployed = [deploy(model, example) for model in models]
    return (timer or LatencyTimer()).latencies_ms(deployed, [example] * len(deployed))


def _form_latencies(forms: Sequence[ConvVariant], conv_info: Convolution, timer: LatencyTimer) -> list[float]:
    """Median latency (ms) of all calls of a layer, for each of its forms."""
    totals = [0.0] * len(forms)
    for shape in [call.input_shape for call in conv_info.calls if call.input_shape is not None]:
        keys = [_key(form, shape, timer) for form in forms]
        latencies_ms = _time_missing(keys, [partial(_build_layer, form, shape) for form in forms], timer)
        totals = [total + latency_ms for total, latency_ms in zip(totals, latencies_ms, strict=True)]
    return totals


def _time_missing(
    keys: Sequence[str], builders: Sequence[Callable[[], tuple[nn.Module, Tensor]]], timer: LatencyTimer
) -> list[float]:
    """Latencies (ms) by their keys in the cache; missing ones are timed, interleaved with the first form."""
    cached = _read_cache()
    if any(key not in cached for key in keys):
        missing = [k for k, key in enumerate(keys) if key not in cached and key != keys[0]]
        models, images = zip(*(builders[k]() for k in (0, *missing)), strict=True)
        first, *latencies_ms = timer.latencies_ms(models, images, ROUNDS)
        cached.setdefault(keys[0], first)
        scale = cached[keys[0]] / first  # the machine may be faster or slower than when the first form was cached
        cached |= {keys[k]: latency_ms * scale for k, latency_ms in zip(missing, latencies_ms, strict=True)}
        _write_cache(cached)
    return [cached[key] for key in keys]


def _build_layer(form: ConvVariant, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """The inference form of a layer, with norm and activation, in random weights; and images for it."""
    conv, layout = form
    copied, images = copy.deepcopy(conv).to(*_device_and_dtype(conv)), _random_images(conv, shape)
    norm = nn.BatchNorm2d(conv.out_channels).to(copied.weight)
    module = trace(nn.Sequential(copied, norm, nn.ReLU()).eval()).module
    if layout is not None:
        module.set_submodule("0", _randomized(build_ghost_module(copied, layout)))
    return deploy(module, images), images


def _device_and_dtype(conv: nn.Conv2d) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that a layer is timed in."""
    device, dtype = conv.weight.device, conv.weight.dtype
    return device, torch.float32 if device.type == "cpu" else dtype


def _randomized(ghost: GhostModule) -> GhostModule:
    for parameter in ghost.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    return ghost


def _random_images(conv: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    images = torch.randn(shape[0], conv.in_channels, *shape[2:], generator=torch.Generator().manual_seed(0))
    return images.to(*_device_and_dtype(conv))


def _key(form: ConvVariant, shape: tuple[int, ...], timer: LatencyTimer) -> str:
    conv, layout = form
    device, dtype = _device_and_dtype(conv)
    layer = (
        type(conv).__name__, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.padding_mode, conv.dilation, conv.groups, shape[0], *shape[2:],
    )  # fmt: skip
    on_cpu = (torch.get_num_threads(), timer.version, processor())
    machine = on_cpu if device.type == "cpu" else (timer.version, dtype, gpu(device))
    facts = ", ".join([*map(repr, layer), layout_text(layout), *map(repr, machine)])
    return hashlib.sha256(f"({facts})".encode()).hexdigest()[:24]


def layout_text(layout: GhostLayout | None) -> str:
    """The text of a layout in the keys of the cache; cached latencies are lost if it changes."""
    if layout is None:
        return "None"
    return f"Layout({', '.join(f'{name}={value}' for name, value in layout.to_dict().items())})"


def gpu(device: torch.device) -> str:
    """The name of the GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def processor() -> str:
    """The name of the processor, or "" where the system does not provide it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read_cache() -> dict[str, float]:
    try:
        content = read_json(cache_file())
    except GhostifyError:
        return {}  # measured again
    is_valid = isinstance(content, dict) and all(isinstance(ms, int | float) and ms > 0 for ms in content.values())
    return {key: float(latency_ms) for key, latency_ms in content.items()} if is_valid else {}


def _write_cache(latencies_ms: dict[str, float]) -> None:
    file = cache_file()
    try:
        write_text_atomic(file, json.dumps(latencies_ms))
    except (OSError, GhostifyError):
        return  # measured again next time
