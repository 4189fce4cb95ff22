"""ghostify: a compiler pass that rewrites a trained CNN's convolutions into ghost modules."""

from importlib.metadata import PackageNotFoundError, version

from ghostify.api import ghostify
from ghostify.data.sources import preprocessing, read_data
from ghostify.data.training_data import load_training_data
from ghostify.deployment.exporter import export
from ghostify.deployment.inference_form import deploy
from ghostify.errors import GhostifyError
from ghostify.fitting.driver import fit
from ghostify.graph.tracing import trace
from ghostify.io.checkpoint import load, load_weights, save
from ghostify.modules.ghost import GhostModule
from ghostify.planning.planner import plan
from ghostify.planning.policy import Policy, Rule
from ghostify.reporting.builder import write_report
from ghostify.rewriting.apply import rewrite
from ghostify.search.budget import plan_for_budget
from ghostify.search.pareto import frontier
from ghostify.summary import report
from ghostify.training.trainer import Recipe, finetune

try:
    __version__ = version("ghostify")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "GhostModule",
    "GhostifyError",
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
