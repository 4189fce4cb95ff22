"""MkDocs hooks: the page of the command shows what --help says."""

from typer.main import get_command
from typer.testing import CliRunner

from ghostify.cli.commands import app

MARK = "<!-- help -->"


def on_page_markdown(markdown, **_):
    if MARK not in markdown:
        return markdown
    verbs = list(get_command(app).commands)
    return markdown.replace(MARK, "\n".join(map(section, verbs)))


def section(verb):
    done = CliRunner().invoke(app, [verb, "--help"], terminal_width=80, prog_name="ghostify")
    text = "\n".join(line.rstrip() for line in done.output.strip().splitlines())
    return f"## ghostify {verb}\n\n```text\n{text}\n```\n"
