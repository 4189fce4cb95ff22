import pytest

from ghostify.cli.console import print_line, progress_bar, show_facts


@pytest.mark.parametrize("text", ["a[/b]", "[bold]x[/bold]", ":cat:", "https://example.org [1]"])
def test_lines_and_facts_are_printed_as_they_are(capsys, text):
    print_line(text)
    show_facts({"key": text}, {}, as_json=False)
    line, fact = capsys.readouterr().out.splitlines()
    assert line == text
    assert fact.split(maxsplit=1) == ["key", text]


def test_control_characters_are_printed_as_escapes(capsys):
    print_line("a\x1b[31mb")
    assert capsys.readouterr().out == "a\\x1b[31mb\n"


def test_there_is_no_progress_bar_without_a_terminal(capsys):
    with progress_bar("fitting", is_quiet=False) as on_progress:
        assert on_progress is None
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_shows_names_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("fitting", is_quiet=False) as on_progress:
        on_progress(1, 2, "[/x]\nand more")
    assert "[/x] and more" in capsys.readouterr().err
