"""Save and load without pickle: a folder of `model.safetensors` and `ghostify.json`."""

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
from ghostify.graph.serialization import deserialize_module, serialize_module
from ghostify.io.atomic import staged_folder
from ghostify.summary import Report, attach_report, conversion_info

FORMAT_VERSION = 1
TENSORS, DESCRIPTION = "model.safetensors", "ghostify.json"


def save(module: nn.Module, path: str | Path, *, source: dict[str, Any] | None = None) -> Path:
    """Write a converted model as a folder, all or nothing; `source` may tell where the original came from.

    Raises `GhostifyError` for what plain data cannot say, and for an existing folder that is not ghostify's.
    """
    folder = Path(path)
    _check_output_folder(folder)
    info = conversion_info(module)
    data, tensors = serialize_module(module)
    with staged_folder(folder) as fresh:
        save_file({k: _on_its_own(v) for k, v in tensors.items()}, fresh / TENSORS)
        content = {
            "format": FORMAT_VERSION,
            "source": source or info.source,
            "model": data,
            "report": info.report.to_dict(),
            "versions": versions(),
            "tensors": _digest_of(fresh / TENSORS),
        }
        content["digest"] = _digest(_canonical(content))
        (fresh / DESCRIPTION).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return folder


def load(path: str | Path, *, allow: Iterable[str] = (), device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder that `save` wrote; bit-equal, without pickle.

    Classes are imported from torch, torchvision and timm, and from the packages named in `allow`. Raises
    `GhostifyError` that names the file for what is missing, damaged, of another version, or not ghostify's.
    """
    folder = Path(path)
    content = read_description(folder)
    file = folder / TENSORS
    try:
        digest = _digest_of(file)
    except OSError as error:
        raise GhostifyError(f"{file}: cannot be read: {error.strerror}") from error
    if digest != content["tensors"]:
        raise GhostifyError(f"{file}: is damaged or belongs to another {DESCRIPTION}: save the model again")
    try:
        tensors = load_file(file, device=str(device))
    except (safetensors.SafetensorError, OSError) as error:
        raise GhostifyError(f"{file}: is no safetensors file: {error}") from error
    try:
        module = deserialize_module(content["model"], tensors, allow)
        return attach_report(module, Report.from_dict(content["report"]), content["source"])
    except GhostifyError as error:
        raise GhostifyError(f"{folder / DESCRIPTION}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GhostifyError(f"{folder / DESCRIPTION}: is incomplete: {type(error).__name__}: {error}") from error


def read_description(folder: Path) -> dict[str, Any]:
    """The checked content of a folder's `ghostify.json`."""
    file = folder / DESCRIPTION
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise GhostifyError(f"{file}: cannot be read, so {folder} is no ghostify folder: {error.strerror}") from error
    except ValueError as error:
        raise GhostifyError(f"{file}: is truncated or no JSON: {error}") from error
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise GhostifyError(f"{file}: was not written by ghostify")
    if content["format"] != FORMAT_VERSION:
        raise GhostifyError(
            f"{file}: has format {content['format']!r}, this version reads {FORMAT_VERSION}: convert it again"
        )
    digest = content.pop("digest", None)
    if digest != _digest(_canonical(content)):
        raise GhostifyError(f"{file}: was changed after it was saved: save the model again")
    return content


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill `model` in place from a plain checkpoint: safetensors, or a `.pt`/`.pth` read with `weights_only=True`.

    The usual wrappers (`state_dict`, `model`, `model_ema`, `module.`) are unwrapped. Raises `GhostifyError` that names
    the file and the first keys that do not fit.
    """
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), device="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise GhostifyError(f"{path}: there is no such checkpoint") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GhostifyError(
            f"{path}: is no checkpoint that can be read without running code from it: {reason}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise GhostifyError(f"{path}: holds no state_dict of tensors")
    own = model.state_dict()
    shape = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing, more = [k for k in own if k not in state], [k for k in state if k not in own]
    for what, keys in (("lacks", missing), ("has beside the model's", more), ("has in another shape", shape)):
        if keys:
            listed = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise GhostifyError(f"{path}: does not fit {type(model).__name__}: it {what} {listed}")
    model.load_state_dict(state)
    return model


def versions() -> dict[str, str]:
    """Versions of what a saved model depends on."""
    from ghostify import __version__  # late: the package imports this module before it knows its version

    return {
        "ghostify": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def _check_output_folder(folder: Path) -> None:
    if folder.is_file():
        raise GhostifyError(f"{folder}: is a file: name a folder to save into")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise GhostifyError(f"{folder}: holds other files and no {DESCRIPTION}: name a new folder")


def _on_its_own(tensor: Tensor) -> Tensor:
    """The tensor in row-major order on the CPU, the only one in its storage."""
    found = tensor.detach().cpu().contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def _digest_of(file: Path) -> str:
    """Of a file that need not fit into memory."""
    made = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            made.update(block)
    return made.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
