"""The one error of the package."""


class GhostifyError(Exception):
    """What the user can mend: which node or file, what is wrong, what to do - in one line."""
