"""What users read of a model beside its forward: kept with its graph where plain data can say it, named where not."""

from __future__ import annotations

import copy

from torch import fx, nn

from ghostify.graph.methods import set_attributes
from ghostify.graph.serialization import is_serializable

STANDARD = frozenset(dir(nn.Module)) | {"forward", "meta"}


def copy_attributes(made: fx.GraphModule, model: nn.Module) -> None:
    """Give a traced module the attributes of the model that are plain data, such as `num_classes`."""
    wanted = {k: v for k, v in vars(model).items() if not k.startswith("_") and k not in vars(made)}
    kept = {k: v for k, v in wanted.items() if k != "training" and not callable(v) and is_serializable(v)}
    set_attributes(made, copy.deepcopy(kept))


def missing_attributes(made: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Public methods and attributes of the model that the result does not have."""
    names = {n for n in (*dir(type(model)), *vars(model)) if not n.startswith("_")} - STANDARD
    return tuple(sorted(n for n in names if not hasattr(made, n)))
