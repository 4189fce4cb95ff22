"""ghostify: a compiler pass that rewrites a trained CNN's convolutions into ghost modules."""

from ghostify.checkpoint import load, load_weights, save
from ghostify.convert import ghostify
from ghostify.deploy import deploy
from ghostify.errors import GhostifyError
from ghostify.export import export
from ghostify.finetune import Recipe, finetune
from ghostify.fit import fit
from ghostify.frontier import frontier
from ghostify.ghost import GhostModule
from ghostify.lessons import lessons
from ghostify.plan import plan
from ghostify.policy import Policy, Rule
from ghostify.present import write_report
from ghostify.report import report
from ghostify.rewrite import rewrite
from ghostify.sources import preprocessing, read_data
from ghostify.trace import trace

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
    "preprocessing",
    "read_data",
    "report",
    "rewrite",
    "save",
    "trace",
    "write_report",
]
