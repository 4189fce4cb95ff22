"""The original that a saved folder names: built only where its name and arguments neither run code nor fetch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostify.data.sources import ModelSource
from ghostify.errors import GhostifyError

MAX_SIZE, MAX_NUMBER, MAX_LENGTH = 2**14, 2**20, 64
BUILDERS = ("timm", "torchvision")
BUILDER_NAME = re.compile(r"[\w.]+")
TEXT = re.compile(r"[\w-]{0,40}")
SAFE_ARGUMENTS = frozenset({
    "act_layer", "attn_drop_rate", "aux_logits", "block_size", "channels", "class_token", "depth", "depths", "dims",
    "dropout", "drop_block_rate", "drop_path_rate", "drop_rate", "embed_dim", "global_pool", "growth_rate", "head_type",
    "image_size", "img_size", "in_chans", "in_channels", "init_weights", "kernel_size", "layers", "max_size",
    "min_size", "mlp_ratio", "norm_layer", "num_classes", "num_heads", "output_stride", "patch_size",
    "pos_drop_rate", "stochastic_depth_prob", "transform_input", "width_mult", "window_size",
})  # fmt: skip
"""Arguments of timm's and torchvision's builders that neither read files nor fetch."""

FETCHING = re.compile(r"pretrain|weight(?!ed)|checkpoint|cache|cfg|config|url|path$|^path|file|hub|tag", re.IGNORECASE)
"""Arguments that may read files or fetch; `init_weights`, a flag, is known."""


@dataclass(frozen=True)
class SavedSource:
    """The builder of the original that a saved folder names, and the size of its inputs (C, H, W)."""

    model: ModelSource
    input_size: tuple[int, int, int]


def parse_saved_source(source: object, folder: Path, allow: Iterable[str] = ()) -> SavedSource:
    """The source of a saved folder.

    A builder of timm or torchvision takes plain values of `SAFE_ARGUMENTS`; any other builder, and any other argument,
    takes an entry of `allow`: the builder's name, or its module. Raises `GhostifyError` naming the folder.
    """
    size = parse_input_size(source, folder)
    if not isinstance(source, dict) or size is None or not isinstance(source.get("arguments"), dict):
        raise _not_a_source(folder)
    name, arguments = source.get("name"), source["arguments"]
    if not isinstance(name, str) or not all(_is_plain(value) for value in arguments.values()):
        raise _not_a_source(folder)
    kind, _, builder = name.partition(":")
    if kind in BUILDERS:
        if not BUILDER_NAME.fullmatch(builder):
            raise GhostifyError(
                f"{folder}: names {name[:80]!r}, which is not a model of {kind}. Convert the model again."
            )
        _check_arguments(name, arguments, folder, set(allow))
    elif not {name, kind} & set(allow):
        raise GhostifyError(
            f"{folder}: names its original as {name[:80]!r}, which would run code of {kind[:80]!r}. "
            f"If you trust who saved it, use --allow {name[:80]}."
        )
    return SavedSource(ModelSource(name, arguments), size)


def parse_input_size(source: object, folder: Path) -> tuple[int, int, int] | None:
    """The size of the inputs (C, H, W) in the source of a saved folder; None where it has no source or no size."""
    if source is None or (isinstance(source, dict) and "input_size" not in source):
        return None
    size = source["input_size"] if isinstance(source, dict) else None
    if (
        not isinstance(size, list | tuple)
        or len(size) != 3
        or not all(type(n) is int and 0 < n <= MAX_SIZE for n in size)
    ):
        raise _not_a_source(folder)
    channels, height, width = size
    return channels, height, width


def _check_arguments(name: str, arguments: dict[str, Any], folder: Path, allow: set[str]) -> None:
    for key in arguments:
        if key in SAFE_ARGUMENTS:
            continue
        if FETCHING.search(key):
            raise GhostifyError(
                f"{folder}: names its original with the argument {key[:80]!r}, which may read or fetch files. "
                f"Pass the weights as --original."
            )
        if name not in allow:
            raise GhostifyError(
                f"{folder}: names its original with the argument {key[:80]!r}, which is not known. "
                f"If you trust who saved it, use --allow {name}."
            )


def _is_plain(value: object) -> bool:
    """Whether a value is a number, a flag, None, a short word or a short list of numbers."""
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LENGTH and all(isinstance(v, int | float) and _is_plain(v) for v in value)
    if isinstance(value, str):
        return TEXT.fullmatch(value) is not None
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= MAX_NUMBER)


def _not_a_source(folder: Path) -> GhostifyError:
    return GhostifyError(
        f"{folder}: its source is not the name, arguments and input size of a model. "
        f"Convert it with `ghostify convert`."
    )
