from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from ghostify import GhostifyError, Policy, Rule
from ghostify.modules.layout import Depthwise, Grouped, Pointwise
from ghostify.planning.policy import RULE_CHECKS


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("layer1.conv", True),
        ("layer1.*", True),
        ("layer2.*", False),
        (r"re:layer\d", True),
        ("Conv2d", True),
        ("Linear", False),
        (lambda _, module: module.kernel_size == (3, 3), True),
    ],
)
def test_patterns(pattern, matches):
    rule = Rule(targets=pattern)
    assert rule.matches("layer1.conv", nn.Conv2d(1, 1, 3), "Conv2d") is matches


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"ratio": 0.5}, "ratio 0.5: is not a number of at least 1"),
        ({"ratio": "2"}, "ratio '2': is not a number"),
        ({"dw_size": 4}, "dw_size 4: is not an odd number"),
        ({"cheap": "magic"}, "cheap 'magic': is unknown"),
        ({"cheap": 0}, "cheap 0: is unknown"),
        ({"targets": 3}, "targets 3: is not a pattern"),
        ({"targets": "re:("}, "is not a regular expression"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(wish, message):
    with pytest.raises(GhostifyError, match=message):
        Rule(**wish)


def test_policy_from_toml(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text(
        'keep_first = false\n[[rule]]\ntargets = "layer4.*"\nratio = 4\ncheap = "pointwise"\n'
        "[[rule]]\nratio = 1.5\ndw_size = 5\n"
    )
    policy = Policy.from_toml(file)
    assert not policy.keep_first
    assert policy.rules == (Rule("layer4.*", ratio=4, cheap="pointwise"), Rule(ratio=1.5, dw_size=5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 100_000, r"policy\.toml: is not a readable policy \(.*\)\. Correct the TOML file"),
        ("a = 1" + "0" * 10_000, r"policy\.toml: is not a readable policy \(.*\)\. Correct the TOML file"),
        ("[[rule", r"policy\.toml: is not a readable policy \(.*\)\. Correct the TOML file"),
        ("", r"has no \[\[rule\]\] table"),
        ("[[rule]]\nration = 2", "rule 1: unknown key 'ration'. Use activated, cheap, dw_size"),
        ("colour = 1\n[[rule]]\nratio = 2", "unknown key 'colour'"),
        ("[[rule]]\nratio = 2\n[[rule]]\nratio = 0", "rule 2: ratio 0: is not"),
        ("keep_first = 3\n[[rule]]\nratio = 2", "keep_first is not a boolean"),
    ],
)
def test_toml_errors_name_file_and_key(tmp_path, text, message):
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(GhostifyError, match=message):
        Policy.from_toml(file)


def test_missing_policy_file(tmp_path):
    with pytest.raises(GhostifyError, match=r"none\.toml: cannot be read"):
        Policy.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("cheap", "forms"),
    [
        ("depthwise", {Depthwise}),
        (1, {Depthwise}),
        ("pointwise", {Pointwise}),
        (4, {Grouped}),
        ("auto", {Depthwise, Pointwise}),
    ],
)
def test_cheap_names_forms_of_ghosts(cheap, forms):
    assert set(Rule(cheap=cheap).forms) == forms


@pytest.mark.parametrize(
    "wish",
    [
        {"targets": nn.Conv2d(3, 8, 3)},
        {"ignore": [nn.Conv2d(3, 8, 3)]},
        {"targets": nn.Conv2d},
        {"targets": lambda: True},
        {"targets": ["a", 3]},
        {"targets": None},
        {"targets": "re:" + "(" * 5000},
        {"ratio": 10**400},
        {"ratio": True},
        {"cheap": True},
        {"cheap": ["auto"]},
        {"dw_size": 3.0},
        {"activated": 1},
        {"prune": "no"},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_a_rule_of_other_values_is_refused_in_one_line(wish):
    with pytest.raises(GhostifyError) as caught:
        Rule(**wish)
    assert str(caught.value).startswith(next(iter(wish)))
    assert str(caught.value).isprintable()


def test_numbers_of_numpy_are_those_of_python():
    rule = Rule(ratio=np.float32(1.5), dw_size=np.int64(5), cheap=np.int32(2), prune=np.bool_(True))
    assert rule == Rule(ratio=1.5, dw_size=5, cheap=2, prune=True)
    assert [type(v) for v in (rule.ratio, rule.dw_size, rule.cheap, rule.prune)] == [float, int, int, bool]


@pytest.mark.parametrize("rules", [(3,), "ab", None, {"rule": []}, [Rule(), "a"], Rule])
def test_a_policy_of_other_than_rules_is_refused(rules):
    with pytest.raises(GhostifyError, match=r"policy: its rules are .* Pass a tuple of Rule"):
        Policy(rules)


def test_a_single_rule_is_a_policy_of_one():
    assert Policy(Rule(ratio=3)) == Policy((Rule(ratio=3),)) == Policy([Rule(ratio=3)])


@pytest.mark.parametrize("keep_first", [None, 1, "yes"])
def test_keep_first_is_a_boolean(keep_first):
    with pytest.raises(GhostifyError, match=r"keep_first .*: is not a boolean"):
        Policy(keep_first=keep_first)


@pytest.mark.parametrize("pattern", [lambda *_: 1 / 0, lambda *_: torch.zeros(2)])
def test_a_pattern_that_fails_is_named_with_its_convolution(pattern):
    with pytest.raises(GhostifyError, match=r"pattern for conv: the function failed \(\w+Error: ") as caught:
        Rule(targets=pattern).matches("conv", nn.Conv2d(1, 1, 3), "Conv2d")
    assert caught.value.__cause__ is not None


def test_the_default_ratio_is_no_ratio_of_the_rule():
    assert (Rule().ratio, Rule().ratio_or_default, Rule(ratio=3).ratio_or_default) == (None, 2, 3)


def test_every_field_of_a_rule_is_checked():
    assert set(RULE_CHECKS) == {field.name for field in fields(Rule)}
