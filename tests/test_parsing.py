from dataclasses import fields

import pytest

from ghostify import GhostifyError, Policy, Recipe, Rule
from ghostify.cli.parsing import (
    RULE_OPTIONS,
    parse_arguments,
    parse_budget,
    parse_cheap,
    parse_policy,
    parse_recipe,
    parse_size,
)

DEFAULTS = {"ratio": 2.0, "dw_size": 3, "cheap": "depthwise", "activated": False, "prune": False}


def policy(file=None, target=None, ignore=None, given=(), **options):
    return parse_policy(file, *{**DEFAULTS, **options}.values(), target, ignore, given)


def test_options_form_one_rule():
    assert policy() == Policy((Rule(ratio=2.0),))
    options = {"ratio": 4.0, "dw_size": 5, "cheap": "8", "activated": True, "prune": True}
    expected = Rule(("a.*", "b"), ("c",), 4.0, 5, 8, activated=True, prune=True)
    assert policy(target=["a.*", "b"], ignore=["c"], **options) == Policy((expected,), keep_first=False)


def test_a_file_of_rules_replaces_the_options(tmp_path, capsys):
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nratio = 3\nprune = true\n")
    assert policy(file) == Policy((Rule(ratio=3, prune=True),))
    assert capsys.readouterr().err == ""
    with pytest.raises(GhostifyError, match=r"--target, --ratio: set in the rules of --policy. Pass either"):
        policy(file, given=["--target", "--ratio"])


def test_a_former_key_in_a_file_prints_a_line(tmp_path, capsys):
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nnarrow = true\n")
    assert policy(file) == Policy((Rule(prune=True),))
    assert capsys.readouterr().err == f"ghostify: {file}: rule 1: narrow is deprecated. Use prune.\n"


def test_budgets_are_numbers_by_name():
    assert parse_budget(["macs=0.5", "latency=12"]) == {"macs": 0.5, "latency": 12}
    assert parse_budget(None) is None
    assert parse_budget([]) is None
    assert parse_budget(["max_drop=0"]) == {"max_drop": 0}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("0.5", r"^--budget '0\.5': is not of the form key=value\. Write it as in macs=0\.5"),
        ("flops=0.5", r"^--budget 'flops': is unknown\. Use macs, params, latency or max_drop"),
        *((f"macs={value}", "^--budget macs .*: is not a positive number") for value in
          ("half", "0", "-1", "NaN", "Infinity", "1e999", "true", "null", "[0.5]", '{"a": 1}', "")),
        ("macs=" + "[" * 100_000, "^--budget macs: is nested too deeply"),
    ],
)  # fmt: skip
def test_budgets_that_are_no_limits_are_refused(pair, message):
    with pytest.raises(GhostifyError, match=message):
        parse_budget([pair])


@pytest.mark.parametrize(
    "text", ["3,4", "3,4,5,6", "3,0,4", "3,-4,5", "3x4x5", "", "3,²,4", "3,٣,4", "3,4,+5", "3,4.0,5", "3,4,000"]
)
def test_sizes_are_three_positive_numbers(text):
    assert parse_size("3, 24,32") == (3, 24, 32)
    assert parse_size(None) is None
    with pytest.raises(GhostifyError, match=r"is not three positive sizes\. Use C,H,W"):
        parse_size(text)


def test_settings_complete_the_recipe():
    assert parse_recipe(2.0, 16, 0.1, 7, ["features=0.5", "ema=0.9"]) == Recipe(
        epochs=2.0, batch=16, learning_rate=0.1, seed=7, features=0.5, ema=0.9
    )
    assert parse_recipe(1.0, 8, 0.1, 0, None) == Recipe(batch=8, learning_rate=0.1)
    with pytest.raises(GhostifyError, match=r"--set depth: unknown training setting\. Use batch, clip,"):
        parse_recipe(1.0, 8, 0.1, 0, ["depth=3"])
    with pytest.raises(GhostifyError, match=r"^--set epochs 'many': is not a positive number"):
        parse_recipe(1.0, 8, 0.1, 0, ["warmup=1", "epochs=many"])
    assert parse_recipe(1.0, 8, 0.1, 0, ["frozen_norms=false", "ema=null"]) == Recipe(batch=8, learning_rate=0.1)
    assert parse_recipe(1.0, 8, 0.1, 0, ["distill=0", "labels=1"]).distill == 0
    with pytest.raises(GhostifyError, match="--set frozen_norms 'False': is not a boolean"):
        parse_recipe(1.0, 8, 0.1, 0, ["frozen_norms=False"])


@pytest.mark.parametrize("text", ["3,70000,4", "3,99999999999,99999999999", "3,60000,60000", "3,4," + "9" * 5000])
def test_sizes_are_bounded(text):
    with pytest.raises(GhostifyError, match=r"^--input-size '[\d,]{,60}'?: is more than 65536 in one direction or "):
        parse_size(text)


def test_arguments_are_json_where_possible():
    assert parse_arguments(["a=1", "b=true", "c=x y", "d=[1]"]) == {"a": 1, "b": True, "c": "x y", "d": [1]}
    assert parse_arguments(["a=NaN", "b=" + "9" * 5000]) == {"a": "NaN", "b": "9" * 5000}
    assert parse_arguments(None) == {}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["a"], r"^--arg 'a': is not of the form key=value. Write it as in width=32\."),
        (["=3"], "'=3': is not of the form"),
        (["a b=3"], "'a b=3': is not of the form"),
        (["a=1", "a=2"], "^--arg a: is given twice"),
        (["a=" + "[" * 100_000], "^--arg a: is nested too deeply"),
    ],
)
def test_other_arguments_are_refused(pairs, message):
    with pytest.raises(GhostifyError, match=message):
        parse_arguments(pairs)


@pytest.mark.parametrize("text", ["²", "0", "-1", "1.5", "9" * 5000, "DEPTHWISE", "", "٣"])
def test_the_cheap_operation_is_a_name_or_a_width(text):
    assert [parse_cheap(t) for t in ("8", "auto", "pointwise")] == [8, "auto", "pointwise"]
    with pytest.raises(GhostifyError, match=r"^--cheap .*: is unknown"):
        parse_cheap(text)


def test_every_field_of_a_rule_is_an_option_that_a_policy_replaces():
    options = {field.name for field in fields(Rule)} - {"targets"} | {"target", "former_prune"}
    assert set(RULE_OPTIONS) == options
