"""Saving and loading without pickle: a folder with `model.safetensors` and `ghostify.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.graph.serialization import deserialize_module, serialize_module
from ghostify.io import format1
from ghostify.io.atomic import check_output_folder, staged_folder
from ghostify.io.journal import current_file
from ghostify.io.manifest import DESCRIPTION, TENSORS, content_digest, file_digest
from ghostify.io.tensor_file import write_tensors
from ghostify.numerics import first_not_finite
from ghostify.summary import Report, attach_report, conversion_info

FORMAT_VERSION = 2


def save(module: nn.Module, path: str | Path, *, source: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write a converted model as a folder, atomically; `source` may describe the original model.

    Returns the folder. Raises `GhostifyError` for a model that cannot be expressed as JSON and tensors, for weights
    that are not finite, and for an existing folder that holds files which ghostify did not write; with `overwrite`
    those stay, and only ghostify's own are replaced.
    """
    check_output_folder(path, overwrite=overwrite)
    info = conversion_info(module)
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
    with staged_folder(path, overwrite=overwrite) as staging:
        write_tensors(staging / TENSORS, tensors)
        content["tensors"] = file_digest(staging / TENSORS)
        content["digest"] = content_digest(content)
        (staging / DESCRIPTION).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return Path(path)


def _check_json(key: str, value: Any) -> None:
    """Raise `GhostifyError` for what JSON cannot hold."""
    try:
        json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise GhostifyError(f"{key}: cannot be saved as JSON ({error}). Use numbers, text, lists and dicts.") from error


def load(path: str | Path, *, allow: Iterable[str] = (), device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder written by `save`, of format 1 or 2; bit-equal, without pickle.

    Classes are imported from torch, torchvision and timm, and from the packages named in `allow`. Raises
    `GhostifyError` naming the file that is missing, damaged, of an unknown format, or not written by ghostify.
    """
    folder = Path(path)
    content = _read_description(folder)
    tensors = _read_tensors(current_file(folder, TENSORS), content.get("tensors"), device)
    try:
        if content["format"] == 1:
            content = format1.upgrade(content)
        module = deserialize_module(content["model"], tensors, allow)
        return attach_report(module, Report.from_dict(content["report"]), content["source"])
    except GhostifyError as error:
        problem = str(error)
        remedy = "" if problem.endswith(".") else ". Convert and save the model again."
        raise GhostifyError(f"{folder / DESCRIPTION}: {problem}{remedy}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise GhostifyError(
            f"{folder / DESCRIPTION}: is incomplete ({type(error).__name__}: {error}). Save the model again."
        ) from error


def _read_description(folder: Path) -> dict[str, Any]:
    """The content of a folder's `ghostify.json` in the format that it has, less its digest, which is checked."""
    file = current_file(folder, DESCRIPTION)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise GhostifyError(
            f"{file}: cannot be read, so {folder} is not a ghostify folder ({error.strerror}). Name a saved model."
        ) from error
    except ValueError as error:
        raise GhostifyError(f"{file}: is truncated or not JSON ({error}). Save the model again.") from error
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise GhostifyError(f"{file}: was not written by ghostify. Name a saved model.")
    if content["format"] not in (1, FORMAT_VERSION):
        raise GhostifyError(
            f"{file}: has format {content['format']!r}, this version reads formats 1 and {FORMAT_VERSION}. "
            f"Convert the model again, or update ghostify."
        )
    digest = content.pop("digest", None)
    if digest != content_digest(content):
        raise GhostifyError(f"{file}: was changed after it was saved. Save the model again.")
    return content


def _read_tensors(file: Path, digest: str | None, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file with this digest, by path."""
    try:
        is_unchanged = file_digest(file) == digest
    except OSError as error:
        raise GhostifyError(f"{file}: cannot be read ({error.strerror}). Save the model again.") from error
    if not is_unchanged:
        raise GhostifyError(f"{file}: is damaged or belongs to another {DESCRIPTION}. Save the model again.")
    try:
        return load_file(file, device=str(device))
    except (safetensors.SafetensorError, OSError) as error:
        raise GhostifyError(f"{file}: is not a safetensors file ({error}). Save the model again.") from error


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a plain checkpoint into `model` in place: safetensors, or `.pt`/`.pth` read with `weights_only=True`.

    The usual wrappers (`state_dict`, `model`, `model_ema`, `module.`) are unwrapped. Raises `GhostifyError` naming the
    file and the first keys that do not fit.
    """
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), device="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise GhostifyError(f"{path}: does not exist. Name a checkpoint file.") from error
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GhostifyError(
            f"{path}: is not a checkpoint that can be read without running code from it ({first_line}). "
            f"Save its state_dict alone."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GhostifyError(f"{path}: does not hold a state_dict of tensors. Save the model's state_dict.")
    _check_keys_and_shapes(model, state, path)
    model.load_state_dict(state)
    return model


def _check_keys_and_shapes(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
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


def versions() -> dict[str, str]:
    """Versions of the packages that a saved model depends on."""
    from ghostify import __version__  # late: this module is imported before the version is defined

    return {
        "ghostify": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
