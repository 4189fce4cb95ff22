"""ghostify: a compiler pass that rewrites a trained CNN's convolutions into ghost modules."""

from importlib.metadata import PackageNotFoundError, version

from ghostify.budgeting.budget import plan_within
from ghostify.budgeting.frontier import frontier
from ghostify.convert import ghostify
from ghostify.data.lessons import lessons
from ghostify.data.sources import preprocessing, read_data
from ghostify.deploying.deploy import deploy
from ghostify.deploying.export import export
from ghostify.errors import GhostifyError
from ghostify.fitting.fit import fit
from ghostify.ghost import GhostModule
from ghostify.planning.plan import plan
from ghostify.planning.policy import Policy, Rule
from ghostify.report import report
from ghostify.reporting.present import write_report
from ghostify.rewrite import rewrite
from ghostify.storing.checkpoint import load, load_weights, save
from ghostify.tracing.trace import trace
from ghostify.training.finetune import Recipe, finetune

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
    "lessons",
    "load",
    "load_weights",
    "plan",
    "plan_within",
    "preprocessing",
    "read_data",
    "report",
    "rewrite",
    "save",
    "trace",
    "write_report",
]
