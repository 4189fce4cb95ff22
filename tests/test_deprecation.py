"""Former names of public things still work, and warn at the user's line."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ghostify
from ghostify import GhostifyError, Policy, Rule, fit, plan, trace
from ghostify.deprecation import rename_keys, renamed_keywords
from tests import nets


@given(st.dictionaries(st.sampled_from("abcd"), st.integers()))
def test_keys_are_renamed_and_values_kept(table):
    if "a" in table and "b" in table:
        with pytest.raises(GhostifyError, match=r"here: a is the former name of b\. Pass b only\."):
            rename_keys(table, {"a": "b"}, "here")
    elif "a" in table:
        with pytest.warns(DeprecationWarning, match=r"here: a is deprecated\. Use b\."):
            renamed = rename_keys(table, {"a": "b"}, "here")
        assert renamed == {("b" if key == "a" else key): value for key, value in table.items()}
    else:
        assert rename_keys(table, {"a": "b"}, "here") == table


def test_a_decorated_function_keeps_its_signature_and_warns_at_the_call():
    def double(number):
        return 2 * number

    decorated = renamed_keywords(value="number")(double)
    assert decorated(3) == decorated(number=3) == 6
    assert inspect.signature(decorated) == inspect.signature(double)
    with pytest.warns(DeprecationWarning, match="double") as warned:
        assert decorated(value=3) == 6
    assert warned[0].filename == __file__
    with pytest.raises(TypeError):
        decorated(amount=3)


@pytest.mark.parametrize(("old", "new"), [("lessons", "load_training_data"), ("plan_within", "plan_for_budget")])
def test_functions_have_their_former_names(old, new):
    with pytest.warns(DeprecationWarning, match=rf"ghostify\.{old} is deprecated\. Use {new}\.") as warned:
        assert getattr(ghostify, old) is getattr(ghostify, new)
    assert warned[0].filename == __file__
    assert old not in ghostify.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ghostify.nothing  # noqa: B018


def test_rules_take_narrow_for_prune():
    with pytest.warns(DeprecationWarning, match=r"Rule\(\): narrow is deprecated\. Use prune\."):
        rule = Rule(narrow=True)
    assert rule == Rule(prune=True)
    with pytest.warns(DeprecationWarning, match=r"Rule\.narrow is deprecated"):
        assert rule.narrow is True
    with pytest.raises(GhostifyError, match="former name of prune"):
        Rule(narrow=True, prune=True)


def test_policy_files_take_narrow_for_prune(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\n[[rule]]\nnarrow = true\n")
    with pytest.warns(DeprecationWarning, match=r"policy\.toml: rule 2: narrow is deprecated\. Use prune\."):
        policy = Policy.from_toml(file)
    assert policy.rules == (Rule(), Rule(prune=True))


def test_ghostify_and_fit_take_progress_for_on_progress():
    model, x, calls = nets.settle(nets.Straight()), nets.images(8), []

    def on_progress(*call):
        calls.append(call)

    with pytest.warns(DeprecationWarning, match=r"ghostify\(\): progress is deprecated\. Use on_progress\."):
        ghostify.ghostify(model, calibration=x, progress=on_progress)
    by_ghostify, program = calls.copy(), trace(model)
    calls.clear()
    with pytest.warns(DeprecationWarning, match=r"fit\(\): progress is deprecated\. Use on_progress\."):
        fit(program, plan(program, Policy()), x, progress=on_progress)
    assert calls == by_ghostify != []


def test_ghostify_takes_narrow_for_prune():
    with (
        pytest.warns(DeprecationWarning, match=r"ghostify\(\): narrow is deprecated\. Use prune\."),
        pytest.raises(GhostifyError, match="budget"),
    ):
        ghostify.ghostify(nets.settle(nets.Straight()), narrow=True)


def test_reports_have_their_former_fields():
    converted_report = ghostify.report(ghostify.ghostify(nets.settle(nets.Straight())))
    with pytest.warns(DeprecationWarning, match=r"Report\.lines is deprecated\. Use layers\.") as warned:
        layers = converted_report.lines
    assert layers is converted_report.layers
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"LayerReport\.reason is deprecated\. Use skip_reason\."):
        assert layers[0].reason == converted_report.layers[0].skip_reason
    with pytest.warns(DeprecationWarning, match=r"LayerReport\.makes is deprecated\. Use kept_out_count\."):
        assert layers[0].makes is None
