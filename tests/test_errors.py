import pickle

from ghostify.errors import GhostifyError, InfeasibleBudgetError


def test_a_message_is_one_line_without_control_characters():
    assert str(GhostifyError("a\n  b\r\nc: \x1b[31m\x00é is wrong\u2028.")) == r"a b c: \x1b[31m\x00é is wrong\u2028."


def test_a_long_message_loses_its_middle():
    text = str(InfeasibleBudgetError("start" + 10_000 * "x" + "end"))
    assert len(text) < 2010
    assert text.startswith("startx")
    assert text.endswith("xend")


def test_errors_are_pickled():
    assert str(pickle.loads(pickle.dumps(GhostifyError("a: is wrong. Correct it.")))) == "a: is wrong. Correct it."
