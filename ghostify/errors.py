"""The errors of the package."""

import re

MESSAGE_LIMIT = 2000


class GhostifyError(Exception):
    """An error that the user can fix; its one line names the node or file, the problem and the remedy.

    Control characters in the message, which may hold names from a file, are written as escapes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_one_line(message))


class InfeasibleBudgetError(GhostifyError):
    """No plan meets the budget."""


def _one_line(text: str) -> str:
    line = re.sub(r"\s*[\r\n]\s*", " ", text)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= MESSAGE_LIMIT else f"{line[: MESSAGE_LIMIT // 2]} ... {line[-MESSAGE_LIMIT // 2 :]}"
