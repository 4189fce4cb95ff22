import copy
import json
import pickle

import pytest
import torch
from rich.console import Console

from ghostify import GhostifyError, Rule, ghostify, plan, report, trace
from ghostify.planning.policy import Policy
from ghostify.summary import ConversionInfo, Report, attach_report, build_report, conversion_info, table
from tests import nets


def converted():
    return ghostify(nets.settle(nets.Residual()), example_inputs=nets.images(1), calibration=nets.images())


def test_a_report_survives_json():
    made = report(converted())
    assert Report.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_lines_add_up_to_the_totals():
    made = report(converted())
    saved = sum(line.macs_before - line.macs_after for line in made.layers)
    assert made.macs_before - made.macs_after == saved
    module = converted()
    changed = sum(line.params_after for line in made.layers)
    weights = sum(p.numel() for n, p in module.named_parameters() if "bn" not in n and "stem.1" not in n)
    assert changed == weights


def test_the_table_names_every_layer_and_reason_at_80_columns():
    policy = Policy((Rule(ignore="conv1"),))
    made = build_report(plan(trace(nets.settle(nets.Residual()), torch.zeros(1, 3, 12, 12)), policy))
    console = Console(width=80, record=True, force_terminal=False)
    console.print(table(made, "a title"))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for line in made.layers:
        assert line.name in text
    flat = " ".join(text.replace("│", " ").split())
    assert "first" in flat
    assert "ignored" in flat


def test_copies_and_pickles_take_the_report_and_the_source_along():
    made = converted()
    attach_report(made, report(made), {"name": "timm:x"})
    info = ConversionInfo(report(made), {"name": "timm:x"})
    assert conversion_info(copy.deepcopy(made)) == info
    assert pickle.loads(pickle.dumps(conversion_info(made))) == info
    with pytest.raises(GhostifyError, match="Conv2d carries no report"):
        report(torch.nn.Conv2d(1, 1, 1))
