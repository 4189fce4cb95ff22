"""MkDocs hooks: the page of the command line shows the output of --help."""

from typer.main import get_command
from typer.testing import CliRunner

from ghostify.cli.commands import app

MARK = "<!-- help -->"


def on_page_markdown(markdown, **_):
    if MARK not in markdown:
        return markdown
    names = list(get_command(app).commands)
    return markdown.replace(MARK, "\n".join(map(section, names)))


def section(name):
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=80, prog_name="ghostify")
    text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
    return f"## ghostify {name}\n\n```text\n{text}\n```\n"
