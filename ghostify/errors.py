"""The package's error, and its one kind that a search goes on from."""


class GhostifyError(Exception):
    """What the user can mend: which node or file, what is wrong, what to do - in one line."""


class InfeasibleBudgetError(GhostifyError):
    """No plan keeps within a budget."""
