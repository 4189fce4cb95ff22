"""Saving and loading without pickle: a folder with `model.safetensors` and `ghostify.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.models import load_state_dict
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.graph.savable import savable
from ghostify.graph.serialization import deserialize_module, serialize_module
from ghostify.io import format1
from ghostify.io.atomic import staged_folder
from ghostify.summary import Report, attach_report, conversion_info

FORMAT_VERSION = 2
TENSORS, DESCRIPTION = "model.safetensors", "ghostify.json"


def save(module: nn.Module, path: str | Path, *, source: dict[str, Any] | None = None) -> Path:
    """Write a converted model as a folder, atomically; `source` may describe the original model.

    A weight that a part computes, such as by spectral norm, is saved as the parameter that it is in evaluation mode.
    Returns the folder. Raises `GhostifyError` for a model that cannot be expressed as JSON and tensors, and for an
    existing folder that does not hold a saved model.
    """
    folder = Path(path)
    _check_output_folder(folder)
    info = conversion_info(module)
    data, tensors = serialize_module(savable(module))
    with staged_folder(folder) as staging:
        save_file({name: _with_own_storage(tensor) for name, tensor in tensors.items()}, staging / TENSORS)
        content = {
            "format": FORMAT_VERSION,
            "source": source or info.source,
            "model": data,
            "report": info.report.to_dict(),
            "versions": versions(),
            "tensors": _file_digest(staging / TENSORS),
        }
        content["digest"] = _content_digest(content)
        (staging / DESCRIPTION).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return folder


def load(path: str | Path, *, allow: Iterable[str] = (), device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder written by `save`, of format 1 or 2; bit-equal, without pickle.

    Classes are imported from torch, torchvision and timm, and from the packages named in `allow`. Raises
    `GhostifyError` naming the file that is missing, damaged, of an unknown format, or not written by ghostify.
    """
    folder = Path(path)
    content = _read_description(folder)
    tensors = _read_tensors(folder / TENSORS, content.get("tensors"), device)
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
    file = folder / DESCRIPTION
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
    if digest != _content_digest(content):
        raise GhostifyError(f"{file}: was changed after it was saved. Save the model again.")
    return content


def _read_tensors(file: Path, digest: str | None, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file with this digest, by path."""
    try:
        is_unchanged = _file_digest(file) == digest
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


def _check_output_folder(folder: Path) -> None:
    if folder.is_file():
        raise GhostifyError(f"{folder}: is a file. Name a folder to save into.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise GhostifyError(f"{folder}: holds other files and no {DESCRIPTION}. Name a new folder.")


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in row-major order, the only one in its storage."""
    on_cpu = tensor.detach().cpu().contiguous()
    return on_cpu if on_cpu.untyped_storage().nbytes() == on_cpu.nbytes else on_cpu.clone()


def _file_digest(file: Path) -> str:
    """SHA-256 of a file that may be larger than the memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _content_digest(content: dict[str, Any]) -> str:
    """SHA-256 of the content as compact JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
