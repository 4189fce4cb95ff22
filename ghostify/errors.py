"""The errors of the package."""


class GhostifyError(Exception):
    """An error that the user can fix; its one line names the node or file, the problem and the remedy."""


class InfeasibleBudgetError(GhostifyError):
    """No plan meets the budget."""
