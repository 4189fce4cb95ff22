from dataclasses import replace

import torch
from rich.console import Console

from ghostify import Policy, Rule, ghostify, plan, report, trace
from ghostify.reporting.table import report_table
from ghostify.summary import build_report
from tests import nets

COLUMNS = 80


def shown(summary, title=""):
    console = Console(width=COLUMNS, record=True, force_terminal=False)
    console.print(report_table(summary, title))
    return console.export_text()


def test_the_table_names_every_layer_and_reason_at_80_columns():
    policy = Policy((Rule(ignore="conv1"),))
    summary = build_report(plan(trace(nets.settle(nets.Residual()), torch.zeros(1, 3, 12, 12)), policy))
    text = shown(summary, "a title")
    assert all(len(line) <= COLUMNS for line in text.splitlines())
    assert all(layer.name in text for layer in summary.layers)
    flat = " ".join(text.split())
    assert "first" in flat
    assert "ignored" in flat
    assert "a title" in flat


def test_errors_are_shown_once_there_is_a_fit():
    model, x = nets.settle(nets.Straight()), nets.images(16)
    fitted = report(ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8)))
    text = shown(fitted)
    assert "error" in text
    assert f"{fitted.layers[1].holdout_error:.3f}" in text
    assert "error" not in shown(build_report(plan(trace(model))))


def test_notes_stand_below_the_table():
    summary = report(ghostify(nets.settle(nets.Straight()), 2))
    text = shown(replace(summary, notes=("no channel group can be pruned",)))
    assert text.index("no channel group can be pruned") > text.index(summary.layers[-1].name)


def test_names_with_brackets_are_text():
    summary = report(ghostify(nets.settle(nets.Straight()), 2))
    layers = (replace(summary.layers[0], name="[/x] :cat: \x1b[31m"), *summary.layers[1:])
    text = shown(replace(summary, layers=layers, notes=("a [bold]note[/b]",)), "the [/title]")
    assert "[/x] :cat:" in text
    assert "\x1b" not in text
    assert "a [bold]note[/b]" in text
    assert "the [/title]" in text
