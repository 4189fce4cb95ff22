"""Saving and loading without pickle: a folder with `model.safetensors` and `ghostify.json`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import load_state_dict
from torch import Tensor, nn

from ghostify.arguments import a_device, a_flag, a_mapping, a_model, a_module, a_path, optional, public, some_names
from ghostify.errors import GhostifyError
from ghostify.files import open_regular, parse_json, read_json
from ghostify.graph.allowed_ops import allow_entries
from ghostify.graph.description import parse_description
from ghostify.graph.deserialization import deserialize_module, names_to_allow
from ghostify.graph.savable import savable
from ghostify.graph.serialization import serialize_module
from ghostify.graph.tensor_facts import dtype_name
from ghostify.io import format1
from ghostify.io.atomic import check_output_folder, staged_folder
from ghostify.io.journal import current_file
from ghostify.io.manifest import DESCRIPTION, TENSORS, content_digest, file_digest, own_files
from ghostify.io.tensor_file import read_tensors
from ghostify.io.tensor_writer import write_tensors
from ghostify.numerics import first_not_finite
from ghostify.summary import Report, attach_report, conversion_info
from ghostify.text import first_line
from ghostify.user_warnings import warn_user

FORMAT_VERSION = 2
MIN_FLOAT_BYTES = 2  # types of 8 bits need scales that a checkpoint of weights does not have
REMEDY = "Convert and save the model again."


@public(module=a_model, path=a_path, source=optional(a_mapping("Pass a dict that JSON can hold.")), overwrite=a_flag)
def save(module: nn.Module, path: str | Path, *, source: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write a converted model as a folder, atomically; `source` may describe the original model.

    A weight that a part computes, such as by spectral norm, is saved as the parameter that it is in evaluation mode.
    Returns the folder. Raises `GhostifyError` for a model that cannot be expressed as JSON and tensors, for weights
    that are not finite, and for an existing folder that holds files which ghostify did not write; with `overwrite`
    those stay, and only ghostify's own are replaced. Exports in the folder stay as well, with a warning where the
    weights are others.
    """
    check_output_folder(path, overwrite=overwrite)
    info = conversion_info(module)
    module = savable(module)
    data, tensors = serialize_module(module)
    damaged = first_not_finite(tensors, {name for name, _ in module.named_parameters(remove_duplicate=False)})
    if damaged is not None:
        raise GhostifyError(f"{damaged}: holds NaN or infinity. Save a model whose weights are finite.")
    content: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "source": source or info.source,
        "model": data,
        "report": info.report.to_dict(),
        "versions": versions(),
    }
    for key in ("source", "report"):
        _check_json(key, content[key])
    _warn_of_custom_names(Path(path), names_to_allow(data, tensors))
    previous = own_files(Path(path))
    with staged_folder(path, overwrite=overwrite) as staging:
        write_tensors(staging / TENSORS, tensors)
        content["tensors"] = file_digest(staging / TENSORS)
        content["digest"] = content_digest(content)
        (staging / DESCRIPTION).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    if previous.get(TENSORS, content["tensors"]) != content["tensors"]:
        _warn_of_former_files(Path(path), sorted(previous.keys() - {TENSORS, DESCRIPTION}))
    return Path(path)


def _warn_of_former_files(folder: Path, names: list[str]) -> None:
    if names:
        listed = ", ".join(names)
        warn_user(f"{folder}: {listed} stay, from the model that was here before. Export again.")


def _check_json(key: str, value: Any) -> None:
    """Raise `GhostifyError` for what JSON cannot hold, or what `load` would not read."""
    try:
        parse_json(json.dumps(value, allow_nan=False, sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise GhostifyError(f"{key}: cannot be saved as JSON ({error}). Use numbers, text, lists and dicts.") from error


@public(path=a_path, allow=some_names, device=a_device)
def load(path: str | Path, *, allow: Iterable[str] = (), device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder written by `save`, of format 1 or 2; bit-equal, without pickle.

    A folder can name only functions and classes of torch, torchvision, timm and ghostify that are in a fixed list, and
    those in `allow`: "package.module:Name", or "package.module" for all that this module defines. Raises
    `GhostifyError` naming the file that is missing, damaged, of an unknown format, or not written by ghostify.
    """
    folder = Path(path)
    content = _read_description(folder)
    with _named(folder / DESCRIPTION):
        if content["format"] == 1:
            content = format1.upgrade(content)
        needed, digest = parse_description(content["model"]).tensors(), content["tensors"]
        if not isinstance(digest, str):
            raise GhostifyError(f"tensors {digest!r}: is not the digest of a file")
    file = current_file(folder, TENSORS)
    tensors = read_tensors(file, digest=digest, needed=needed, description=DESCRIPTION, remedy=REMEDY)
    with _named(folder / DESCRIPTION):
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        module = deserialize_module(content["model"], on_device, allow)
        return attach_report(module, Report.from_dict(content["report"]), content["source"])


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the file in errors that its content causes."""
    try:
        yield
    except GhostifyError as error:
        problem = str(error)
        remedy = "" if problem.endswith(".") else f". {REMEDY}"
        raise GhostifyError(f"{file}: {problem}{remedy}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise GhostifyError(f"{file}: is incomplete ({type(error).__name__}: {error}). {REMEDY}") from error


def _warn_of_custom_names(folder: Path, names: list[str]) -> None:
    if names:
        python, command = allow_entries(names)
        warn_user(
            f"{folder}: names classes or functions that a folder may not run by itself. "
            f"Load it with load(..., {python}), or {command}."
        )


def _read_description(folder: Path) -> dict[str, Any]:
    """The content of a folder's `ghostify.json` in the format that it has, less its digest, which is checked."""
    file = current_file(folder, DESCRIPTION)
    content = read_json(file, folder=folder, remedy="Name a folder that ghostify saved.")
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise GhostifyError(f"{file}: was not written by ghostify. Name a saved model.")
    if type(content["format"]) is not int or content["format"] not in (1, FORMAT_VERSION):
        raise GhostifyError(
            f"{file}: has format {content['format']!r}, this version reads formats 1 and {FORMAT_VERSION}. "
            f"Convert the model again, or update ghostify."
        )
    digest = content.pop("digest", None)
    if digest != content_digest(content):
        raise GhostifyError(f"{file}: was changed after it was saved. {REMEDY}")
    return content


@public(model=a_module, path=a_path)
def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a plain checkpoint into `model` in place: safetensors, or `.pt`/`.pth` read with `weights_only=True`.

    The usual wrappers (`state_dict`, `model`, `model_ema`, `module.`) are unwrapped. Weights of another floating-point
    type are converted to the model's, with a warning. Raises `GhostifyError` naming the file and the tensors that do
    not fit, that are not floating-point numbers where the model has these, or not finite; the model is unchanged then.
    """
    state = _read_state(Path(path))
    _check_names_and_shapes(model, state, path)
    _check_values(model, state, path)
    model.load_state_dict(state)
    return model


def _read_state(path: Path) -> dict[str, Tensor]:
    with open_regular(path, remedy="Name a checkpoint file."):
        pass
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # PyTorch and safetensors do not say what they raise for damaged files
        raise GhostifyError(
            f"{path}: is not a checkpoint that can be read without running code from it ({first_line(error)}). "
            f"Save its state_dict alone."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GhostifyError(f"{path}: does not hold a state_dict of tensors. Save the model's state_dict.")
    return state


def _check_names_and_shapes(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [name for name in expected if name in state and expected[name].shape != state[name].shape]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise GhostifyError(
                f"{path}: does not fit {type(model).__name__}, {problem}: {listed}. Build the model that was saved."
            )


def _check_values(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raise `GhostifyError` for values that the model cannot have; warn of floating-point types that are converted."""
    parameters = dict(model.named_parameters())
    converted = set[str]()
    for name, expected in model.state_dict().items():
        value = state[name]
        if expected.is_floating_point():
            if not value.is_floating_point() or value.is_quantized or value.dtype.itemsize < MIN_FLOAT_BYTES:
                raise GhostifyError(
                    f"{path}: {name} is of type {dtype_name(value.dtype)}, the model's weights are of "
                    f"{dtype_name(expected.dtype)}. Save the weights as floating-point numbers."
                )
            if not (value.isfinite() if name in parameters else ~value.isnan()).all():
                raise GhostifyError(f"{path}: {name} holds values that are not finite. Use another checkpoint.")
            if value.dtype != expected.dtype:
                converted.add(f"{dtype_name(value.dtype)} to {dtype_name(expected.dtype)}")
        elif not expected.is_complex() and not _is_integral(value):
            raise GhostifyError(f"{path}: {name} does not hold whole numbers. Use another checkpoint.")
    if converted:
        warn_user(f"{path}: its weights are converted from {', '.join(sorted(converted))}.")


def _is_integral(value: Tensor) -> bool:
    if value.is_floating_point():
        return bool((value.isfinite() & (value == value.round())).all())
    return not (value.is_complex() or value.is_quantized)


def versions() -> dict[str, str]:
    """Versions of the packages that a saved model depends on."""
    from ghostify import __version__  # late: this module is imported before the version is defined

    return {
        "ghostify": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
