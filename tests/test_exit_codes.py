import os
import sys
import warnings

import pytest
import typer

from ghostify import GhostifyError
from ghostify.cli import exit_codes
from ghostify.cli.exit_codes import run
from ghostify.user_warnings import warn_user


def ending(capsys, raised=None, returned=None):
    """Exit code, and what is printed on standard error, of a command that raises or returns this."""

    def app(standalone_mode):
        assert not standalone_mode
        if raised is not None:
            raise raised
        return returned

    code = run(app)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (GhostifyError("a[/b]: is\nwrong. Change it."), "ghostify: a[/b]: is wrong. Change it.\n"),
        (FileNotFoundError(2, "No such file", "[x]"), "ghostify: [x]: No such file. Check the path, its rights"),
        (OSError(28, "No space left on device"), "ghostify: No space left on device. Check"),
        (MemoryError("12 TB"), "ghostify: not enough memory (12 TB). Use"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "ghostify: not enough memory (Default"),
        (typer.BadParameter("is bad."), "ghostify: Invalid value: is bad. See ghostify --help.\n"),
        (
            typer.BadParameter("Input should be a valid integer, unable to parse string as an integer."),
            "ghostify: Invalid value: it should be a valid integer. See ghostify --help.\n",
        ),
        (KeyboardInterrupt(), "ghostify: interrupted.\n"),
        (typer.Abort(), "ghostify: interrupted.\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mistakes_and_interruptions_are_one_line(capsys, error, line):
    code, err = ending(capsys, raised=error)
    assert code == (130 if "interrupted" in line else 2)
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [AssertionError("ours"), RuntimeError("ours"), TypeError("ours"), KeyError("ours")])
def test_mistakes_of_this_package_are_raised(capsys, error):
    with pytest.raises(type(error), match="ours"):
        ending(capsys, raised=error)


def test_results_are_exit_codes(capsys):
    assert ending(capsys) == (0, "")
    assert ending(capsys, returned=3) == (3, "")
    assert ending(capsys, returned=130) == (130, "ghostify: interrupted.\n")


def test_a_closed_pipe_ends_silently(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which is replaced
    assert ending(capsys, raised=BrokenPipeError()) == (exit_codes.CLOSED_PIPE, "")
    sys.stdout.close()


def test_warnings_of_this_package_are_lines_and_others_are_silent(capsys):
    def app(**_):
        warnings.warn("of another package", stacklevel=1)
        warn_user("of [the] fit")

    assert run(app) == 0
    assert capsys.readouterr().err == "ghostify: of [the] fit\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_device_is_named(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda **_: print("x" * 100)) == 2
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert "ghostify: No space left on device." in capsys.readouterr().err
