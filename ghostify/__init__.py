"""ghostify makes trained CNNs cheaper: it rewrites their convolutions into ghost modules with `torch.fx`.

    from ghostify import ghostify, save

    converted = ghostify(model, ratio=2, example_inputs=x, calibration=images)
    save(converted, "out/")

`model` is any trained `torch.nn.Module` with `Conv2d` layers, `x` one input of it, and `images` a few hundred
unlabelled inputs in batches. `load("out/")` restores the converted model, without the code of the original if its whole
forward traces.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ghostify.api import ghostify
from ghostify.data.sources import preprocessing, read_data
from ghostify.data.training_data import load_training_data
from ghostify.deployment.exporter import export
from ghostify.deployment.inference_form import deploy
from ghostify.deprecation import warn_renamed
from ghostify.errors import GhostifyError
from ghostify.fitting.driver import fit
from ghostify.graph.tracing import trace
from ghostify.healing.settings import Healing
from ghostify.io.checkpoint import load, load_weights, save
from ghostify.modules.ghost import GhostModule
from ghostify.planning.planner import plan
from ghostify.planning.policy import Policy, Rule
from ghostify.reporting.builder import write_report
from ghostify.rewriting.apply import rewrite
from ghostify.search.budget import plan_for_budget
from ghostify.search.pareto import frontier
from ghostify.summary import report
from ghostify.training.recipe import Recipe
from ghostify.training.trainer import finetune
from ghostify.user_warnings import GhostifyWarning

try:
    __version__ = version("ghostify")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "GhostModule",
    "GhostifyError",
    "GhostifyWarning",
    "Healing",
    "Policy",
    "Recipe",
    "Rule",
    "deploy",
    "export",
    "finetune",
    "fit",
    "frontier",
    "ghostify",
    "load",
    "load_training_data",
    "load_weights",
    "plan",
    "plan_for_budget",
    "preprocessing",
    "read_data",
    "report",
    "rewrite",
    "save",
    "trace",
    "write_report",
]

RENAMED_FUNCTIONS = {"lessons": "load_training_data", "plan_within": "plan_for_budget"}


def __getattr__(name: str) -> Any:
    """Public functions by their former names, with a `DeprecationWarning`."""
    if name not in RENAMED_FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"{__name__}.{name}", RENAMED_FUNCTIONS[name])
    return globals()[RENAMED_FUNCTIONS[name]]
