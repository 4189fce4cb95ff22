"""Translation of a format-1 `ghostify.json` to format 2: new import paths, new report keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ghostify.deprecation import LAYER_FIELDS, RECONSTRUCTION_FIELDS, REPORT_FIELDS, with_new_keys

IMPORT_PATHS = {
    "ghostify.ghost:GhostModule": "ghostify.modules.ghost:GhostModule",
    "ghostify.ghost:CheapOperation": "ghostify.modules.ghost:CheapOperation",
    "ghostify.ghost:join": "ghostify.modules.ghost:concat_channels",
    "ghostify.tracing.tracer:Mode": "ghostify.graph.symbolic_tracer:TrainingFlag",
    "ghostify.tracing.tracer:fixed": "ghostify.graph.symbolic_tracer:check_default_argument",
    "ghostify.tracing.tracer:unused": "ghostify.graph.symbolic_tracer:check_no_extra_arguments",
    "ghostify.tracing.tracer:same_mode": "ghostify.graph.symbolic_tracer:check_training_mode",
}


def upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a format-1 `ghostify.json`, its digest already checked, in format 2; `content` is not changed.

    Raises `KeyError`, `TypeError` or `AttributeError` for content that is incomplete.
    """
    return {
        **content,
        "format": 2,
        "model": _with_new_import_paths(content["model"]),
        "report": _upgrade_report(content["report"]),
    }


def _upgrade_report(report: Mapping[str, Any]) -> dict[str, Any]:
    upgraded = with_new_keys(report, REPORT_FIELDS)
    upgraded["layers"] = [with_new_keys(layer, LAYER_FIELDS) for layer in upgraded["layers"]]
    if upgraded.get("reconstruction") is not None:
        reconstruction = with_new_keys(upgraded["reconstruction"], RECONSTRUCTION_FIELDS)
        blocks = [with_new_keys(block, RECONSTRUCTION_FIELDS) for block in reconstruction["blocks"]]
        upgraded["reconstruction"] = {**reconstruction, "blocks": blocks}
    return upgraded


def _with_new_import_paths(value: Any) -> Any:
    """The same lists and dicts, with every string that is an old import path replaced."""
    if isinstance(value, dict):
        return {key: _with_new_import_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_new_import_paths(inner) for inner in value]
    return IMPORT_PATHS.get(value, value) if isinstance(value, str) else value
