import pytest

from ghostify import GhostifyError, Policy, Recipe, Rule
from ghostify.cli.options import parse_budget, parse_policy, parse_recipe, parse_size

DEFAULTS = {"ratio": 2.0, "dw_size": 3, "cheap": "depthwise", "activated": False, "prune": False}


def policy(file=None, target=None, ignore=None, **options):
    return parse_policy(file, *{**DEFAULTS, **options}.values(), target, ignore)


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
    with pytest.raises(GhostifyError, match="are set in the rules of --policy"):
        policy(file, target=["a"])


def test_a_former_key_in_a_file_prints_a_line(tmp_path, capsys):
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nnarrow = true\n")
    assert policy(file) == Policy((Rule(prune=True),))
    assert capsys.readouterr().err == f"ghostify: {file}: rule 1: narrow is deprecated. Use prune.\n"


def test_budgets_are_numbers_by_name():
    assert parse_budget(["macs=0.5", "latency=12"]) == {"macs": 0.5, "latency": 12}
    assert parse_budget(None) is None
    assert parse_budget([]) is None
    with pytest.raises(
        GhostifyError, match=r"--budget '0\.5': is not of the form key=value\. Write it as in macs=0\.5"
    ):
        parse_budget(["0.5"])


@pytest.mark.parametrize("text", ["3,4", "3,4,5,6", "3,0,4", "3,-4,5", "3x4x5", ""])
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
    with pytest.raises(GhostifyError, match="--set warmup=1 epochs=many: has a value of the wrong type"):
        parse_recipe(1.0, 8, 0.1, 0, ["warmup=1", "epochs=many"])
